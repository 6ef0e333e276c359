"""What diffusers' pipelines of the models that take latents give under the window, with and without a LoRA."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from unittest import mock

import torch

import flexclear

from .oracle import RADIUS, TOLERANCE, differ, far, under
from .row import Row
from .shapes import Shape
from helpers.pipeline_parts import draw

STEPS = 64
"""An image comes of two steps, each of a model whose outputs may err by ``TOLERANCE``; guidance multiplies what differs by its
scale, 5 at most and twice where it is added, and the decoder's layers pass on what they get."""


def shape_of(row: Row, model, call) -> Shape:
    """The sizes of a pipeline's call."""
    if "img_shapes" in call:
        *conditions, (_, height, width) = call["img_shapes"][0]
        places = 3 * sum(math.prod(grid) for grid in conditions) // 4
        return Shape(height, width, call["encoder_hidden_states"].shape[1] + places, len(call["hidden_states"]))
    latents, patch = call["hidden_states"], model.config.patch_size
    side = patch if isinstance(patch, int) else patch[-1]
    if row.video and "num_frames" in call:
        sizes = (call["height"], call["width"], call["encoder_hidden_states"].shape[1], len(latents))
        return Shape(*sizes, frames=call["num_frames"])
    text = next(
        call[name] for name in ("encoder_hidden_states", "text_bth", "encoder_hidden_states_t5") if name in call
    )
    text_len = int(call["encoder_attention_mask"].sum(1).max()) if row.adjoins else text.shape[1]
    frames = latents.shape[2] // patch[0] if row.video else None
    return Shape(latents.shape[-2] // side, latents.shape[-1] // side, text_len, len(latents), frames=frames)


@contextlib.contextmanager
def windowed(row: Row, model) -> Iterator[None]:
    """Each call of a stock model under the window of its own sizes."""
    plain = model.forward

    def forward(*args, **call):
        latents = call["hidden_states"] if not args else args[0]
        with under(row, shape_of(row, model, {**call, "hidden_states": latents})):
            return plain(*args, **call)

    with mock.patch.object(model, "forward", forward):
        yield


def check_windowed(
    pipe, row: Row, load: Callable[[], None] | None = None, unload: Callable[[], None] | None = None, **options
) -> None:
    """A pipeline draws what the plain one draws under the dense mask, and restored what it drew before, bit by bit; a LoRA
    counts alike if it is loaded before or after.

    Args:
        pipe: not transformed.
        row: of its model.
        load, unload: bring a LoRA and take it away.
        options: of the pipeline's call.
    """

    def same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        assert differ(found, expected) <= STEPS * TOLERANCE, (what, differ(found, expected))

    def expected() -> torch.Tensor:
        with contextlib.ExitStack() as windows:
            for name in ("transformer", "transformer_2"):
                if getattr(pipe, name, None) is not None:
                    windows.enter_context(windowed(row, getattr(pipe, name)))
            return draw(pipe, **options)

    def transformed() -> torch.Tensor:
        flexclear.transform(pipe, r=RADIUS, **row.frames, backend="sdpa")
        return draw(pipe, **options)

    dense, plain = draw(pipe, **options), expected()
    far(dense, plain, "the window")
    same(transformed(), plain, "the window")
    if load is not None and unload is not None:
        load()
        late = draw(pipe, **options)
        flexclear.restore(pipe)
        adapted = expected()
        far(plain, adapted, "the LoRA")
        same(late, adapted, "a LoRA that is loaded later")
        same(transformed(), adapted, "a LoRA that is loaded before")
        unload()
        same(draw(pipe, **options), plain, "a LoRA that is unloaded")
    flexclear.restore(pipe)
    assert torch.equal(draw(pipe, **options), dense)
