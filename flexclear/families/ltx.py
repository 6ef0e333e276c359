"""LTX-Video and LTX-2: packed tokens of a video, whose sizes are given in the call or follow from coordinates.

The window is over the video's tokens. Attention to text is unchanged; so are sound, and attention from and to it, in LTX-2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.families.latents import LatentsFamily
from flexclear.runtime.checks import refuse_mask, required_tensor
from flexclear.runtime.facts import JOINT, Call
from flexclear.runtime.grid import GridReader

SIZES = ("num_frames", "height", "width")
"""Arguments with a video's sizes in latents."""

FRACTIONS = (
    "has frequencies for positions as shares of a largest size, which a larger base makes finer; an NTK factor is not defined "
    "for them"
)


@dataclass(frozen=True)
class LtxFamily(LatentsFamily):
    """``LTXVideoTransformer3DModel`` and ``LTX2VideoTransformer3DModel``.

    Tokens outside the video's grid, such as those of an image that a later frame is conditioned on, see all tokens and are seen
    by all, like text in other models.

    Attributes:
        sized: whether the sizes are always given; otherwise they follow from coordinates, if there are any.
    """

    sized: bool = False

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        tokens = required_tensor(kwargs, "hidden_states", model)
        required_tensor(kwargs, self.text, model)
        refuse_mask(kwargs.get("attention_kwargs") or {}, "attention_kwargs")
        for name, why in self.refuses.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"a transformed {type(model).__name__} takes no {name}: {why}")
        if tokens.ndim != 3:
            raise ValueError(
                f"a transformed {type(model).__name__} takes tokens of a video, [batch, tokens, channels], got "
                f"{list(tokens.shape)}"
            )
        coordinates = kwargs.get("video_coords")
        if coordinates is None or self.sized:
            frames, height, width = self._given(model, kwargs, tokens)
            if coordinates is not None:
                grids.once(coordinates, checking(frames, height, width))
        else:
            frames, height, width = grids.once(coordinates, trailing_grid)
        beside = tokens.shape[1] - frames * height * width
        counted = tokens.shape[1] if coordinates is None else coordinates.shape[2]
        if counted != tokens.shape[1] or beside < 0 or (beside and coordinates is None):
            raise ValueError(
                f"hidden_states of shape {tuple(tokens.shape)} do not hold the {frames} x {height} x {width} = "
                f"{frames * height * width} tokens of the video that "
                f"{' and '.join(SIZES) if coordinates is None else 'video_coords'} describe, one for each position"
            )
        return Call(tokens, ((height, width),), {JOINT: beside}, frames=frames)

    def _given(self, model: nn.Module, kwargs: dict[str, Any], tokens: Tensor) -> tuple[int, int, int]:
        """The sizes that the call gives, in tokens.

        Raises:
            ValueError: one is missing or invalid.
        """
        sizes: list[Any] = [kwargs.get(name) for name in SIZES]
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(
                f"a transformed {type(model).__name__} needs {', '.join(SIZES)} of the latents to know where {tokens.shape[1]} "
                f"tokens sit, got {', '.join(map(repr, sizes))}"
            )
        config: Any = model.config
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        frames, height, width = (-(-size // part) for size, part in zip(sizes, patch, strict=True))
        return frames, height, width


def starts_of(coordinates: Tensor) -> Tensor:
    """Frame, row and column of each token, float ``[3, tokens]``, from coordinates ``[B, 3, tokens]``, or from starts and ends
    ``[B, 3, tokens, 2]``.

    Raises:
        ValueError: they have another shape, are not finite, or differ in the batch.
    """
    given = f"video_coords of shape {tuple(coordinates.shape)}"
    if coordinates.ndim not in (3, 4) or coordinates.shape[1] != 3 or not coordinates.shape[2]:
        raise ValueError(f"{given} must be [batch, 3, tokens], frame, row and column of each")
    if not bool(torch.isfinite(coordinates).all()):
        raise ValueError(f"{given} hold numbers that are not finite")
    if bool((coordinates != coordinates[:1]).any()):
        raise ValueError(f"{given} differ from sample to sample; a batch shares its positions")
    own = coordinates[0]
    return (own[..., 0] if own.ndim == 3 else own).float().cpu()


def trailing_grid(coordinates: Tensor) -> tuple[int, int, int]:
    """Frames, rows and columns of the video that forms the last of these tokens, frame by frame and row by row from the first
    time on. Tokens of conditions, at later times, may precede it.

    Raises:
        ValueError: there is no such video.
    """
    times, rows, columns = starts_of(coordinates)
    length = len(times)

    def same(axis: Tensor) -> int:
        """How many tokens at the end share the last token's place."""
        other = torch.nonzero(axis != axis[-1])
        return length - 1 - int(other[-1]) if len(other) else length

    area = same(times)
    width = min(same(rows), area)
    firsts = torch.nonzero((times == times.min()) & (rows == rows.min()) & (columns == columns.min()))[:, 0]
    start = int(firsts[0])
    frames, rest = divmod(length - start, area)
    if (
        area % width
        or rest
        or len(firsts) != 1
        or not _is_grid(times[start:], rows[start:], columns[start:], area, width)
    ):
        raise ValueError(
            f"video_coords of {length} tokens are not a video in raster order that begins at the first time, preceded by "
            "conditions at later times: flexclear has no windows for such a call"
        )
    return frames, area // width, width


@functools.lru_cache(maxsize=64)
def checking(frames: int, height: int, width: int) -> Callable[[Tensor], None]:
    """A function that raises unless coordinates begin with those of a video of this size in raster order. The same size gives
    the same function, by which ``GridReader`` remembers results."""

    def check(coordinates: Tensor) -> None:
        count = frames * height * width
        times, rows, columns = (axis[:count] for axis in starts_of(coordinates))
        if len(times) != count or not _is_grid(times, rows, columns, height * width, width):
            raise ValueError(
                f"video_coords of {coordinates.shape[2]} tokens do not begin with the video of {frames} x {height} x {width} "
                "tokens in raster order that num_frames, height and width describe"
            )

    return check


def _is_grid(times: Tensor, rows: Tensor, columns: Tensor, area: int, width: int) -> bool:
    """Whether the coordinates of whole frames of ``area`` tokens form a grid that grows along each axis."""
    shaped = [axis.view(-1, area // width, width) for axis in (times, rows, columns)]
    lines = [shaped[0][:, :1, :1], shaped[1][:1, :, :1], shaped[2][:1, :1, :]]
    grows = (bool((line.flatten().diff() > 0).all()) for line in lines)
    return all(grows) and all(bool((axis == line).all()) for axis, line in zip(shaped, lines, strict=True))


LTX = LtxFamily(
    model_class="LTXVideoTransformer3DModel",
    processors=("LTXVideoAttnProcessor",),
    stacks={"transformer_blocks": "attn1"},
    carriers=("rope",),
    joins=False,
    video=True,
    rope=False,
    no_ntk=FRACTIONS,
    px_per_token=32,
    latents_per_token=1,
    frames_per_latent=8,
    pipelines=("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"),
    notes="tokens of images and videos that later frames are conditioned on see all and are seen by all",
)

LTX2 = LtxFamily(
    model_class="LTX2VideoTransformer3DModel",
    processors=("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
    stacks={"transformer_blocks": "attn1"},
    carriers=("rope",),
    text_first=False,
    joins=False,
    video=True,
    sized=True,
    rope=False,
    no_ntk=FRACTIONS,
    refuses={
        "video_self_attention_mask": "the window decides which tokens of the video are seen (IC-LoRA weights them by this mask). "
        "Leave it out, or flexclear.restore(model) first"
    },
    px_per_token=32,
    latents_per_token=1,
    frames_per_latent=8,
    pipelines=("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline"),
    notes="sound, and attention between it and the video, is unchanged; keyframes after the video see all and are seen by all",
)
