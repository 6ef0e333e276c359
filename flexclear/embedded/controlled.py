"""Draw with the embedded model's ControlNet: held-out scenes, their conditions, and the images drawn from them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from flexclear.embedded.captions import caption
from flexclear.embedded.control import MODES
from flexclear.embedded.evaluation import Request
from flexclear.embedded.loading import SAMPLE_SIZE
from flexclear.embedded.scenes import SCENE_PIXELS, draw, random_scene
from flexclear.embedded.vocabulary import Vocabulary

if TYPE_CHECKING:
    from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxPipeline


def controlled_pipeline(pipe: FluxPipeline, model: FluxControlNetModel) -> FluxControlNetPipeline:
    """Return diffusers' ControlNet pipeline made of the embedded pipeline's components and this ControlNet."""
    from diffusers import FluxControlNetPipeline

    made = FluxControlNetPipeline(**pipe.components, controlnet=model)
    made.default_sample_size = SAMPLE_SIZE
    made.set_progress_bar_config(disable=True)
    return made


def originals(
    requests: Sequence[Request], bitmaps: Sequence[Image.Image], vocabulary: Vocabulary, pixels: int = SCENE_PIXELS
) -> list[Image.Image]:
    """Return a clean drawing for each request. The request's seed determines place, size and direction.

    Args:
        requests: what to draw.
        bitmaps: one RGBA image per emoji index.
        vocabulary: contains the backgrounds' colors.
        pixels: side, a multiple of 128.
    """
    colours = list(vocabulary.backgrounds.values())
    scenes = [random_scene(item.emoji, item.background, random.Random(item.seed)) for item in requests]
    return [Image.fromarray(draw(scene, bitmaps, colours, pixels)) for scene in scenes]


def generate_controlled(
    pipe: FluxControlNetPipeline,
    vocabulary: Vocabulary,
    requests: Sequence[Request],
    conditions: Sequence[Image.Image],
    kind: str,
    steps: int,
    scale: float = 1.0,
    batch: int = 16,
    max_sequence_length: int = 32,
    on_done: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """Return the images that the pipeline draws for the requests from their conditions, at the conditions' size.

    Args:
        pipe: see :func:`controlled_pipeline`.
        vocabulary: the names that the requests' indices stand for.
        requests: what to draw; each has its own noise, whatever the batch.
        conditions: one RGB image per request, all of one size.
        kind: kind of these conditions, a key of ``MODES``.
        steps: denoising steps.
        scale: factor on the ControlNet's residuals; 0 draws without it.
        batch: images drawn at once.
        max_sequence_length: T5 tokens, padding included.
        on_done: called with the number of images after each batch.

    Raises:
        ValueError: the kind is unknown, or there is not one condition per request.
    """
    if kind not in MODES:
        raise ValueError(f"kind must be one of {list(MODES)}, got {kind!r}")
    if len(conditions) != len(requests):
        raise ValueError(f"need one condition per request, got {len(conditions)} and {len(requests)}")
    backgrounds = list(vocabulary.backgrounds)
    drawn: list[Image.Image] = []
    for start in range(0, len(requests), batch):
        part = requests[start : start + batch]
        drawn += pipe(
            [caption(vocabulary.emoji[item.emoji].name, backgrounds[item.background]) for item in part],
            height=conditions[start].height,
            width=conditions[start].width,
            control_image=list(conditions[start : start + batch]),
            control_mode=MODES[kind],
            controlnet_conditioning_scale=scale,
            num_inference_steps=steps,
            max_sequence_length=max_sequence_length,
            generator=[torch.Generator().manual_seed(item.seed) for item in part],
        ).images
        if on_done is not None:
            on_done(len(part))
    return drawn
