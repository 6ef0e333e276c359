"""What is known before any work: about a model's layers, how it was transformed, and one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flexclear.compile.kernels import Kernel, Options
from flexclear.compile.tuned import choose_tuned
from flexclear.masks import Window
from flexclear.masks.blocks import default_block_size
from flexclear.runtime.mechanism import Formula
from flexclear.runtime.steps import StepCounter
from flexclear.runtime.switches import Switches

JOINT = "joint"
"""Scope of attention over text and image together; every family has it."""

REFERENCES = "references"
"""Scope of attention over reference images alone; in a call without any, no such layer runs."""

Slot: TypeAlias = tuple[str, Window | None]
"""Key of one of a plan's masks: the scope of attention, and the window over it."""


@dataclass(frozen=True)
class Layer:
    """One attention layer whose processor is replaced.

    Attributes:
        name: path of the module in the model.
        module: the attention module; has ``processor`` and ``set_processor``.
        scope: which tokens it attends over: ``JOINT``, or a name defined by the family.
        shared: whether the layer also belongs to another model, which calls it without a plan.
    """

    name: str
    module: Any
    scope: str = JOINT
    shared: bool = False

    @property
    def heads(self) -> int:
        """Number of query heads.

        Raises:
            TypeError: the attention module has no attribute for it.
        """
        found = self._number("heads", "num_heads", "num_attention_heads")
        if found is None:
            raise TypeError(
                f"{self.name}, a {type(self.module).__name__}, needs an attribute heads, the number of its heads"
            )
        return found

    @property
    def head_dim(self) -> int:
        """Channels of each head.

        Raises:
            TypeError: the attention module has no attribute for it.
        """
        own, inner = self._number("head_dim"), self._number("inner_dim")
        if own is None and inner is None:
            raise TypeError(
                f"{self.name}, a {type(self.module).__name__}, needs an attribute head_dim, the channels of each head, or "
                "inner_dim, those of all heads"
            )
        return own if own is not None else inner // self.heads  # type: ignore[operator]

    def _number(self, *names: str) -> int | None:
        """The first of these attributes of the module that is an int."""
        return next((own for own in (getattr(self.module, name, None) for name in names) if isinstance(own, int)), None)


@dataclass(frozen=True)
class Call:
    """One call of a model as the entry hook sees it, read before any work.

    Attributes:
        tokens: a floating-point input, which gives device and dtype.
        grids: (height, width) in tokens of the image, then of each reference image.
        text_lens: number of text tokens by scope.
        keep: by scope, bool ``[B, text_len]`` with False for text that is padding; absent for scopes without padding.
        text_adjoins: whether, in attention's sequence, each sample's image directly follows its own text, with the text's
            padding behind the image.
        order: token order of a call that cannot use the one passed to ``transform``, else None.
        own_grids: grids of scopes for which they differ from ``grids``.
        frames: number of frames, each with the image's grid, after the VAE and after patching; 1: an image.
        start: for packed sequences, which have other tokens before and after the image: where the image begins in attention's
            sequence; None: all text is on one side, see ``Family.text_first``.
    """

    tokens: Tensor
    grids: tuple[tuple[int, int], ...]
    text_lens: dict[str, int]
    keep: dict[str, Tensor] = field(default_factory=dict)
    text_adjoins: bool = False
    order: str | None = None
    own_grids: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    frames: int = 1
    start: int | None = None

    def grids_of(self, scope: str) -> tuple[tuple[int, int], ...]:
        """Grids whose tokens a scope's layers attend over, in order."""
        return self.own_grids.get(scope, self.grids)


DERIVED = {"derived": True}
"""Marks a setting that follows from other settings and the model, or that belongs to one process."""


@dataclass(frozen=True)
class Settings:
    """How a model was transformed; see ``flexclear.transform`` for the meaning of each field.

    ``windows`` maps layer names to windows; a plan holds one mask for each of ``slots``. With a ``formula`` there are no
    windows. ``head_dim`` is the model's.
    """

    windows: Mapping[str, Window | None]
    slots: tuple[Slot, ...] = field(metadata=DERIVED)
    backend: str
    order: str
    block_size: tuple[int, int] | None
    kernel_options: Options
    head_dim: int = field(metadata=DERIVED)
    exact_position_ids: bool
    switches: Switches
    steps: StepCounter = field(metadata=DERIVED)
    formula: Formula | None = None

    def options(self) -> dict[str, Any]:
        """The arguments of ``transform`` by name: every field that is not DERIVED, and each of ``switches``."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.metadata != DERIVED}
        switches = own.pop("switches")
        return {**own, **{one.name: getattr(switches, one.name) for one in fields(switches)}}

    @property
    def reach(self) -> int | None:
        """``Window.reach`` of all windows, a disc's radius; None if there is none, or if they differ."""
        found = {window.reach for _, window in self.slots if window is not None}
        return found.pop() if len(found) == 1 else None

    def kernel(
        self,
        backend: str,
        device: torch.device,
        dtype: torch.dtype,
        seq_len: int,
        backward: bool,
        text_padded: bool = False,
    ) -> Kernel:
        """Blocks and kernel options of a call: those requested, those that ``flexclear bench --tune`` found fastest here, or the
        table's.

        Raises:
            ValueError: the kernels on ``device`` do not support those that were requested.
        """
        if backend != "flex":
            return Kernel(self.block_size or default_block_size(seq_len, device=device))
        return choose_tuned(
            device,
            dtype,
            self.head_dim,
            backward=backward,
            seq_len=seq_len,
            text_padded=text_padded,
            reach=self.reach,
            pools=any(window is not None and window.pools for _, window in self.slots),
            block_size=self.block_size,
            options=self.kernel_options,
        )
