"""What is generated, compiled or interpreted: a mask over a layout, types and sizes of query, key and value, options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexclear import masks
from flexclear.compile.kernels import Kernel, check_kernel_options, choose, with_kernel
from flexclear.masks import Downsampled, Layout, Window, block_mask, dense_mask, suited, with_text_mask
from flexclear.masks.apart import text_apart
from flexclear.masks.blocks import default_block_size
from flexclear.masks.carried import KERNEL_OPTIONS
from flexclear.masks.coordinates import Source

MASKS: dict[str, dict[str, Any]] = {
    "disc": {},
    "pooled": {"pooled": 4},
    "padded": {"padding": (512, 77)},
    "references": {"references": ((64, 64),)},
    "apart": {"apart": True},
    "computed": {"coordinates": "computed"},
}
"""What a mask may have beside the circular window, in the arguments of ``Case``: pooled keys, padded text (a batch), and
the images of an editing model; image queries alone, and coordinates by arithmetic."""


EVEN = {"frames": 16, "height": 16, "width": 16}
"""As many tokens as the image of a case: kernels of clips differ from the image's by their masks alone."""

UNEVEN = {"frames": 21, "height": 24, "width": 40, "text_len": 0}
"""A clip of Wan's, whose length no block divides."""

CLIPS: dict[str, dict[str, Any]] = {
    "clip, cylinder": {**EVEN, "made_by": ("cylinder", 6, 2)},
    "clip, radial": {**EVEN, "made_by": ("radial", 8)},
    "clip, cylinder, lengths that do not divide": {**UNEVEN, "made_by": ("cylinder", 8, 4)},
    "clip, radial, lengths that do not divide": {**UNEVEN, "made_by": ("radial", 8)},
    "clip, cylinder, apart": {**EVEN, "made_by": ("cylinder", 6, 2), "apart": True},
    "clip, neighborhood": {**EVEN, "made_by": ("Neighborhood", (5, 7, 7))},
}
"""Masks of several frames. ``cylinder``, ``all_frames`` and ``ball`` are one kernel, whose numbers are tensors; ``radial``
compares with the distances at which its radius falls."""


@dataclass(frozen=True)
class Case:
    """Attention of one kind, as JSON can hold it.

    Attributes:
        head_dim, dtype, heads: of query, key and value.
        key_heads: of key and value, where these have fewer.
        backward: compile for training: the forward pass keeps the log-sum-exp, and the backward pass follows.
        height, width, text_len, text_first, references, frames, r: layout and window, several frames in the order that suits
            the window.
        made_by: what makes another window, a name of ``flexclear.masks`` and its arguments, such as ``("cylinder", 16, 4)``.
        pooled: side in tokens of a cell of pooled keys, 0 for none.
        padding: text tokens that each sample of a batch keeps; none: one sample, all kept.
        apart: the image's part where text is attended apart, its lists as narrow as on a GPU.
        coordinates: where the ``mask_mod`` has them from; None: as flexclear chooses.
        block_size: tokens per (query, key-value) block; None: what flexclear chooses.
        options: FlexAttention's kernel options, of which flexclear chooses those that are not given.
        exact: hand the kernels ``options`` alone, past flexclear's choice and checks: to try what the table may hold.
    """

    head_dim: int = 128
    dtype: str = "bfloat16"
    backward: bool = False
    heads: int = 4
    key_heads: int | None = None
    height: int = 64
    width: int = 64
    text_len: int = 512
    text_first: bool = True
    references: tuple[tuple[int, int], ...] = ()
    frames: int = 1
    r: int = 16
    made_by: tuple[Any, ...] = ()
    pooled: int = 0
    padding: tuple[int, ...] = ()
    apart: bool = False
    coordinates: Source | None = None
    block_size: tuple[int, int] | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    exact: bool = False

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Case:
        """The case that ``to_json`` was made from: JSON has lists where this has tuples."""
        facts = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
        for name in ("references", "made_by"):
            facts[name] = tuple(tuple(part) if isinstance(part, list) else part for part in facts.get(name, ()))
        return cls(**facts)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def batch(self) -> int:
        return len(self.padding) or 1

    @property
    def layout(self) -> Layout:
        grids = {"references": self.references, "frames": self.frames}
        return suited(Layout(self.height, self.width, self.text_len, self.text_first, **grids), self.window)

    @property
    def window(self) -> Window:
        name, *arguments = self.made_by or ("Disc", self.r)
        window: Window = getattr(masks, name)(*arguments)
        return Downsampled(window, self.pooled) if self.pooled else window

    @property
    def keep(self) -> Tensor | None:
        """Bool ``[batch, text_len]``, or None where no text is padded."""
        if not self.padding:
            return None
        return torch.arange(self.text_len) < torch.tensor(self.padding)[:, None]

    def kernel(self) -> Kernel:
        """Blocks and options of the kernels on the GPU that ``device.install`` has described.

        Raises:
            ValueError: flexclear refuses them.
        """
        cuda, options = torch.device("cuda", 0), tuple(sorted(self.options.items()))
        if self.exact:
            blocks = self.block_size or default_block_size(self.layout.seq_len, self.backward)
            return Kernel(blocks, options)
        return choose(
            cuda,
            self.torch_dtype,
            self.head_dim,
            backward=self.backward,
            seq_len=self.layout.seq_len,
            text_padded=self.keep is not None,
            block_size=self.block_size,
            options=check_kernel_options(self.options),
        )

    def block_mask(self, moved: Callable[[Tensor], Tensor]) -> BlockMask:
        """The mask for these kernels, its tensors as ``moved`` gives them.

        Raises:
            ValueError: flexclear refuses its blocks or options.
        """
        kernel, keep = self.kernel(), self.keep
        source = self.coordinates or kernel.coordinates
        if self.apart:
            mask = text_apart(
                self.layout, self.window, block_size=kernel.block_size, coordinates=source, narrow=True
            ).image
        else:
            mask = block_mask(
                self.layout,
                self.window,
                block_size=kernel.block_size,
                backward=self.backward,
                text_padded=keep is not None,
                coordinates=source,
            )
        mask = _on_device(mask if keep is None else with_text_mask(mask, self.layout, keep), moved)
        if self.exact:
            setattr(mask, KERNEL_OPTIONS, kernel.options)
            return mask
        return with_kernel(mask, kernel)

    def dense_mask(self) -> Tensor:
        """Bool, broadcasts to ``[batch, heads, queries, keys]``.

        Raises:
            ValueError: text is apart and shares a block with the image, where what its rows see means nothing.
        """
        mask = dense_mask(self.layout, self.window)
        if self.apart:
            if self.layout.image_start % self.kernel().block_size[0]:
                raise ValueError(f"{self.text_len} text tokens share a block with the image")
            return mask[self.layout.image_start :][: self.layout.image_len]
        return mask if self.keep is None else with_text_mask(mask, self.layout, self.keep)


def _on_device(mask: BlockMask, moved: Callable[[Tensor], Tensor]) -> BlockMask:
    """``mask`` with its lists, and the tensors that its ``mask_mod`` captures, as ``moved`` gives them."""
    lists = {
        name: None if getattr(mask, name) is None else moved(getattr(mask, name))
        for kind in ("kv", "full_kv", "q", "full_q")
        for name in (f"{kind}_num_blocks", f"{kind}_indices")
    }
    mask_mod = _rebound(mask.mask_mod, moved)
    return BlockMask(seq_lengths=mask.seq_lengths, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask_mod, **lists)


def _rebound(function: Any, moved: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a function that captures other tensors, in functions, tuples and lists that it captures too."""

    def other(content: Any) -> Any:
        if isinstance(content, Tensor):
            return moved(content)
        if isinstance(content, list | tuple):
            return type(content)(map(other, content))
        return _rebound(content, moved) if isinstance(content, FunctionType) else content

    cells = tuple(CellType(other(cell.cell_contents)) for cell in function.__closure__ or ())
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    copy.__dict__.update(function.__dict__)
    return copy
