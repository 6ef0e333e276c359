"""LongCat-Image, Ovis-Image, Bria, FIBO, FLUX.3 and Krea 2: their real pipelines end to end, and what these hand over."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch

from helpers import models_packed as models
from helpers import pipelines_packed as pipelines
from helpers.pipeline_calls import assert_alike, calls_of, lora_weights

GRID = (9, 13)
"""Tokens of every image that is drawn here, height and width."""


@dataclass(frozen=True)
class Case:
    """One pipeline.

    Attributes:
        make: makes it.
        px: pixels per token and side.
        call: what it hands to its transformer first, for two images on ``GRID``.
        options: arguments that are only its own.
        calls: how often it calls the transformer in a step.
        lora: whether the pipeline itself loads LoRA weights; all transformers do.
    """

    make: Callable[[], Any]
    px: int
    call: Callable[[], dict[str, Any]]
    options: Callable[[], dict[str, Any]] = field(default=dict)
    calls: int = 2
    lora: bool = True


def keep(*kept: int) -> torch.Tensor:
    """FIBO's mask of padded text, as long as the longest."""
    return torch.arange(max(kept))[None] < torch.tensor(kept)[:, None]


REFERENCES = ((6, 8), (10, 4))
"""Tokens of the images that editing pipelines are given."""


def references(px: int) -> list:
    """Images of those sizes."""
    return [pipelines.image(height * px, width * px, number) for number, (height, width) in enumerate(REFERENCES)]


CASES = {
    "longcat": Case(pipelines.longcat, 4, lambda: longcat_call(), lora=False),
    "ovis": Case(pipelines.ovis, 4, lambda: models.ovis_call(*GRID, 16, 2), lora=False),
    "bria": Case(pipelines.bria, 4, lambda: models.bria_call(*GRID, 16, 4), calls=1, lora=False),
    "fibo": Case(pipelines.fibo, 16, lambda: models.fibo_call(*GRID, 13, 4, keep=keep(1, 1, 7, 13)), calls=1),
    "fibo edit": Case(
        functools.partial(pipelines.fibo, "BriaFiboEditPipeline"),
        16,
        lambda: models.fibo_call(*GRID, 17, 4, references=REFERENCES, keep=keep(1, 1, 17, 17)),
        lambda: {"image": references(16)},
        calls=1,
    ),
    "flux3": Case(pipelines.flux3, 4, lambda: models.flux3_call(*GRID, 80, 2)),
    "flux3 with references": Case(
        pipelines.flux3,
        4,
        lambda: models.flux3_call(*GRID, 80, 2, references=REFERENCES),
        lambda: {"image": references(4)},
    ),
    "flux3 distilled": Case(
        functools.partial(pipelines.flux3, "Flux3DistilledAutoBlocks"),
        4,
        lambda: models.flux3_call(*GRID, 80, 2, flow_map=True),
        calls=1,
    ),
    "krea2": Case(pipelines.krea2, 4, lambda: models.krea2_call(*GRID, 24, 2, keep=models.krea2_keep((12, 18), 24))),
}


def longcat_call() -> dict[str, Any]:
    """The image's ids begin at the longest prompt, which is 12 in the small pipeline and 512 in the call."""
    call = models.longcat_call(*GRID, 12, 2)
    call["img_ids"][:, 1:] += 12 - 512
    return call


def draw(case: Case, pipe: Any, **options: Any) -> torch.Tensor:
    height, width = (side * case.px for side in GRID)
    return pipelines.draw(pipe, height, width, **{**case.options(), **options})


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_the_pipeline_draws_a_rectangle_for_each_of_two_prompts_with_the_call_that_tests_make(case):
    pipe = case.make()
    with calls_of(pipe.transformer) as calls:
        images = draw(case, pipe)
    assert images.shape == (2, 3, GRID[0] * case.px, GRID[1] * case.px)
    assert images.isfinite().all()
    assert (images[0] - images[1]).abs().max() > 1e-3
    assert len(calls) == 2 * case.calls
    assert_alike(case.call(), calls[0])


@pytest.mark.parametrize("name", ["fibo edit", "flux3 with references"])
def test_references_make_a_difference(name):
    case = CASES[name]
    pipe = case.make()
    images = draw(case, pipe)
    assert (images - draw(case, pipe, image=None)).abs().max() > 1e-2
    assert (images - draw(case, pipe, image=case.options()["image"][::-1])).abs().max() > 1e-3


def test_longcat_edits_an_image_of_its_own_size_at_the_size_that_it_brings_it_to():
    pipe = pipelines.longcat("LongCatImageEditPipeline")
    module = inspect.getmodule(type(pipe))
    plain = module.calculate_dimensions
    with (
        mock.patch.object(module, "calculate_dimensions", lambda area, ratio: plain(area / 512, ratio)),
        calls_of(pipe.transformer) as calls,
    ):
        images, others = (pipelines.draw(pipe, 0, 0, image=pipelines.image(60, 80, number)) for number in (0, 1))
    assert images.shape == (2, 3, 48, 64)
    assert (images - others).abs().max() > 1e-3
    text_len = 1 + 1 + 1 + 12  # the image in the prompt between its two marks, and the longest prompt
    assert_alike(models.longcat_call(12, 16, text_len, 2, references=((12, 16),)), calls[0])


def test_a_lora_is_loaded_and_leaves_again(case):
    pipe = case.make()
    transformer = pipe.transformer
    plain = draw(case, pipe)
    weights = lora_weights(transformer)
    assert len(weights) >= 8
    if case.lora:
        pipe.load_lora_weights(weights)
    else:
        assert not hasattr(pipe, "load_lora_weights")
        transformer.load_lora_adapter(weights, prefix="transformer")
    assert (draw(case, pipe) - plain).abs().max() > 1e-3
    pipe.unload_lora_weights() if case.lora else transformer.unload_lora()
    assert torch.equal(draw(case, pipe), plain)
