"""MiniMax-H3: text, keyframes or references, sound and the video in one packed sequence, with a position and a time per token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.families.latents import LatentsFamily
from flexclear.masks.defaults import independent
from flexclear.runtime.checks import required_tensor
from flexclear.runtime.facts import JOINT, Call
from flexclear.runtime.grid import GridReader

ROWS, POSITIONS = "video_indices", "position_ids"

CLIP = (17, 5)
"""Number of frames that the VAE encodes at a time, and of frames after the last whole clip."""


@dataclass(frozen=True)
class MiniMaxH3Family(LatentsFamily):
    """``MiniMaxH3Transformer3DModel``.

    The window is over the generated video: the last of the video's rows that are consecutive and have the positions of one grid
    at increasing times. All other rows see all rows and are seen by all: text, sound, keyframes and references. The latter two
    are separate clips, at times that the video has too. The text refiner is unchanged.
    """

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        required_tensor(kwargs, self.text, model)
        tokens, rows, positions = (required_tensor(kwargs, name, model) for name in (self.tokens, ROWS, POSITIONS))
        first, last = grids.once(rows, _last_run)
        if positions.ndim != 2 or positions.shape[1] != 3 or last > len(positions):
            raise ValueError(
                f"{POSITIONS} must be of shape [tokens, 3], the time, row and column of every token of the sequence, of which "
                f"{ROWS} names number {last - 1}; got {tuple(positions.shape)}"
            )
        start, frames, height, width = grids.once(positions, _clip_reader(first, last))
        text_len = len(positions) - frames * height * width
        return Call(tokens, ((height, width),), {JOINT: text_len}, frames=frames, start=start)

    def latent_frames(self, num_frames: int, frames_per_latent: int) -> int:
        # Each clip of 17 frames makes five latent frames. The pipeline extends to the next 17 n + 5, whose last five make two.
        return 5 * -(-(num_frames - CLIP[1]) // CLIP[0]) + 2 if num_frames > CLIP[1] else 2

    def stretched(self, model: nn.Module, factor: float) -> Any:
        embedder: Any = self.embedder_of(model)
        config: Any = model.config
        kind: Any = type(embedder)
        return _embedder(kind, config.rope_freq_dim, config.rope_theta * factor, embedder.inv_freq.device)


@functools.lru_cache(maxsize=8)
@independent
def _embedder(kind: Any, frequencies: int, theta: float, device: torch.device) -> Any:
    return kind(frequencies, theta).to(device)


def _last_run(rows: Tensor) -> tuple[int, int]:
    """Begin and end of the last run of consecutive places.

    Raises:
        ValueError: there are none, or one is named twice.
    """
    if rows.ndim != 1 or not len(rows):
        raise ValueError(f"{ROWS} must be of shape [tokens] and not empty, got {tuple(rows.shape)}")
    if len(torch.unique(rows)) != len(rows):
        raise ValueError(f"{ROWS} name a row of the sequence more than once; each is one token")
    jumps = torch.nonzero(rows[1:] - rows[:-1] != 1)[:, 0]
    first = int(jumps[-1]) + 1 if len(jumps) else 0
    return int(rows[first]), int(rows[-1]) + 1


@functools.lru_cache(maxsize=64)
def _clip_reader(first: int, last: int) -> Callable[[Tensor], tuple[int, int, int, int]]:
    """``read_clip`` with these rows. Equal arguments give the same function, by which ``GridReader`` remembers results."""
    return functools.partial(read_clip, first=first, last=last)


def read_clip(positions: Tensor, first: int, last: int) -> tuple[int, int, int, int]:
    """Where the last clip among rows ``first`` to ``last`` begins, and its frames, height and width in tokens.

    A clip is a number of frames at increasing times, whose rows and columns form the same grid in raster order. The distances
    between positions do not matter.

    Args:
        positions: time, row and column of every token, ``[N, 3]``.
        first, last: the rows to look at, the last one excluded.

    Raises:
        ValueError: the last frame is not a full grid in raster order, for example because two tokens share a position.
    """
    own = positions[first:last].cpu()
    times, places = own[:, 0], own[:, 1:]
    behind = torch.nonzero(times != times[-1])[:, 0]
    size = len(own) - (int(behind[-1]) + 1 if len(behind) else 0)
    frame = places[-size:]
    new_row = torch.nonzero(frame[:, 0] != frame[0, 0])[:, 0]
    width = int(new_row[0]) if len(new_row) else size
    height = size // width
    rows, columns = frame[::width, 0], frame[:width, 1]
    grid = torch.stack([rows.repeat_interleave(width), columns.repeat(len(rows))], dim=1)
    if height * width != size or not torch.equal(grid, frame) or not _rises(rows) or not _rises(columns):
        raise ValueError(
            f"{POSITIONS} {first} to {last - 1} are not a video: the {size} tokens of its last frame, at time "
            f"{float(times[-1]):g}, are not a full grid in raster order with each token at its own position. "
            "Windows need whole frames"
        )
    frames = 1
    while (frames + 1) * size <= len(own):
        part = slice(len(own) - (frames + 1) * size, len(own) - frames * size)
        time = times[part]
        if bool((time != time[0]).any()) or not time[0] < times[part.stop] or not torch.equal(places[part], frame):
            break
        frames += 1
    return last - frames * size, frames, height, width


def _rises(values: Tensor) -> bool:
    return bool((values[1:] > values[:-1]).all())


MINIMAX_H3 = MiniMaxH3Family(
    model_class="MiniMaxH3Transformer3DModel",
    processors=("MiniMaxH3AttnProcessor",),
    stacks={"transformer_blocks": "attn"},
    carriers=("rope",),
    video=True,
    px_per_token=32,
    pipelines=("MiniMaxH3ModularPipeline",),
    notes=(
        "text and keyframes to video with sound: the window is over the generated video, and text, sound, keyframes and "
        "references see all and are seen by all"
    ),
)
