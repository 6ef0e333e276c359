"""LongCat-Image, Ovis-Image, Bria, FIBO, FLUX.3 and Krea 2: their real pipelines end to end, dense and windowed, and what
these hand over; how position ids are read."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch

import flexclear

from contract import rows_packed
from contract.oracle import RADIUS, TOLERANCE, differ, expected, far, run, same, windowed
from contract.pipelines import STEPS
from contract.row import Row
from contract.shapes import Shape
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
        row: of its model.
        options: arguments that are only its own.
        calls: how often it calls the transformer in a step.
        lora: whether the pipeline itself loads LoRA weights; all transformers do.
        references: tokens of the images that it is given.
    """

    make: Callable[[], Any]
    px: int
    call: Callable[[], dict[str, Any]]
    row: Row
    options: Callable[[], dict[str, Any]] = field(default=dict)
    calls: int = 2
    lora: bool = True
    references: tuple[tuple[int, int], ...] = ()


def keep(*kept: int) -> torch.Tensor:
    """FIBO's mask of padded text, as long as the longest."""
    return torch.arange(max(kept))[None] < torch.tensor(kept)[:, None]


REFERENCES = ((6, 8), (10, 4))
"""Tokens of the images that editing pipelines are given."""


def references(px: int) -> list:
    """Images of those sizes."""
    return [pipelines.image(height * px, width * px, number) for number, (height, width) in enumerate(REFERENCES)]


CASES = {
    "longcat": Case(pipelines.longcat, 4, lambda: longcat_call(), lora=False, row=rows_packed.LONGCAT),
    "ovis": Case(pipelines.ovis, 4, lambda: models.ovis_call(*GRID, 16, 2), lora=False, row=rows_packed.OVIS),
    "bria": Case(pipelines.bria, 4, lambda: models.bria_call(*GRID, 16, 4), calls=1, lora=False, row=rows_packed.BRIA),
    "fibo": Case(
        pipelines.fibo,
        16,
        lambda: models.fibo_call(*GRID, 13, 4, keep=keep(1, 1, 7, 13)),
        calls=1,
        row=rows_packed.FIBO,
    ),
    "fibo edit": Case(
        functools.partial(pipelines.fibo, "BriaFiboEditPipeline"),
        16,
        lambda: models.fibo_call(*GRID, 17, 4, references=REFERENCES, keep=keep(1, 1, 17, 17)),
        options=lambda: {"image": references(16)},
        calls=1,
        row=rows_packed.FIBO,
        references=REFERENCES,
    ),
    "flux3": Case(pipelines.flux3, 4, lambda: models.flux3_call(*GRID, 80, 2), row=rows_packed.FLUX3),
    "flux3 with references": Case(
        pipelines.flux3,
        4,
        lambda: models.flux3_call(*GRID, 80, 2, references=REFERENCES),
        options=lambda: {"image": references(4)},
        row=rows_packed.FLUX3,
        references=REFERENCES,
    ),
    "flux3 distilled": Case(
        functools.partial(pipelines.flux3, "Flux3DistilledAutoBlocks"),
        4,
        lambda: models.flux3_call(*GRID, 80, 2, flow_map=True),
        calls=1,
        row=rows_packed.FLUX3,
    ),
    "krea2": Case(
        pipelines.krea2,
        4,
        lambda: models.krea2_call(*GRID, 24, 2, keep=models.krea2_keep((12, 18), 24)),
        row=rows_packed.KREA2,
    ),
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


@contextlib.contextmanager
def small_edits(pipe: Any):
    """LongCat edits at a 512th of 1024 x 1024 px."""
    module = inspect.getmodule(type(pipe))
    plain = module.calculate_dimensions
    with mock.patch.object(module, "calculate_dimensions", lambda area, ratio: plain(area / 512, ratio)):
        yield


EDITED = Shape(12, 16, 1 + 1 + 1 + 12, 2, references=((12, 16),))
"""The image in the prompt between its two marks, and the longest prompt."""


def test_longcat_edits_an_image_of_its_own_size_at_the_size_that_it_brings_it_to():
    pipe = pipelines.longcat("LongCatImageEditPipeline")
    with small_edits(pipe), calls_of(pipe.transformer) as calls:
        images, others = (pipelines.draw(pipe, 0, 0, image=pipelines.image(60, 80, number)) for number in (0, 1))
    assert images.shape == (2, 3, 48, 64)
    assert (images - others).abs().max() > 1e-3
    assert_alike(rows_packed.longcat_call(EDITED), calls[0])


def test_longcat_edits_the_same_under_the_window_as_under_the_dense_mask():
    pipe = pipelines.longcat("LongCatImageEditPipeline")

    def edited() -> torch.Tensor:
        with small_edits(pipe):
            return pipelines.draw(pipe, 0, 0, image=pipelines.image(60, 80))

    dense = edited()
    with windowed(rows_packed.LONGCAT, pipe.transformer, EDITED):
        expected = edited()
    far(dense, expected, "the window")
    flexclear.transform(pipe, r=RADIUS, backend="sdpa")
    alike(edited(), expected, "the edited image")
    flexclear.restore(pipe)
    assert torch.equal(edited(), dense)


def load_lora(case: Case, pipe: Any) -> None:
    weights = lora_weights(pipe.transformer)
    assert len(weights) >= 8
    if case.lora:
        pipe.load_lora_weights(weights)
    else:
        assert not hasattr(pipe, "load_lora_weights")
        pipe.transformer.load_lora_adapter(weights, prefix="transformer")


def drawn_under_the_mask(case: Case, pipe: Any, **options: Any) -> torch.Tensor:
    """What the stock pipeline draws under the dense mask."""
    text_len = case.call()["encoder_hidden_states"].shape[1]
    with windowed(case.row, pipe.transformer, Shape(*GRID, text_len, 2, case.references)):
        return draw(case, pipe, **options)


def alike(images: torch.Tensor, others: torch.Tensor, what: str) -> None:
    assert differ(images, others) <= STEPS * TOLERANCE, (what, differ(images, others))


def test_a_transformed_pipeline_draws_what_the_plain_one_draws_under_the_dense_mask(case):
    pipe = case.make()
    dense, expected = draw(case, pipe), drawn_under_the_mask(case, pipe)
    far(dense, expected, "the window")
    for order in ("tiled", "raster"):
        flexclear.transform(pipe, r=RADIUS, backend="sdpa", order=order)
        alike(draw(case, pipe), expected, order)
    load_lora(case, pipe)
    late = draw(case, pipe)
    flexclear.restore(pipe)
    adapted = drawn_under_the_mask(case, pipe)
    far(expected, adapted, "the LoRA")
    alike(late, adapted, "a LoRA that is loaded after the transform")
    flexclear.transform(pipe, r=RADIUS, backend="sdpa")
    alike(draw(case, pipe), adapted, "a LoRA that is loaded before it")
    pipe.unload_lora_weights() if case.lora else pipe.transformer.unload_lora()
    alike(draw(case, pipe), expected, "a LoRA that is unloaded")
    flexclear.restore(pipe)
    assert torch.equal(draw(case, pipe), dense)


def test_pixels_of_a_token_are_read_off_pipeline_and_model(case):
    from flexclear.families.target import px_per_token

    pipe = case.make()
    assert px_per_token(pipe) == case.px
    assert px_per_token(pipe.transformer) == 16


def change(ids: torch.Tensor, **columns: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Ids with other columns."""
    changed = ids.clone()
    for number, name in enumerate("iyx"):
        if name in columns:
            changed[:, number] = columns[name](ids[:, number])
    return changed


def test_longcat_s_ids_may_begin_anywhere_and_keep_where():
    """Windows go by places in the image; the model's positions by the ids, as exactly as they were given."""
    plain, call, shape = models.tiny_longcat(), models.longcat_call(9, 13, 5), Shape(9, 13, 5)
    model = flexclear.transform(models.tiny_longcat(), r=RADIUS, backend="sdpa")
    for moved in (
        change(call["img_ids"], y=lambda y: y + 33, x=lambda x: x - 200),
        change(call["img_ids"], y=lambda y: y - 512, x=lambda x: x - 512),
        call["img_ids"].long(),
        call["img_ids"].double(),
    ):
        given = {**call, "img_ids": moved}
        same(run(model, given), expected(rows_packed.LONGCAT, plain, shape, given))


BAD_IDS = {
    "the text's index": ({"i": lambda i: i - 1}, "begin with an image of index 0; the image itself has index 1"),
    "a gap": (
        {"y": lambda y: y + (y > 515)},
        "start at row 512 and column 512, where the image does: they start at row 512",
    ),
    "steps of two": ({"x": lambda x: 2 * x - 512}, "not full grids of height x width"),
    "swapped": ({"y": lambda y: y - 512, "x": lambda x: x.flip(0)}, "not full grids of height x width"),
}


@pytest.mark.parametrize(("columns", "says"), BAD_IDS.values(), ids=BAD_IDS)
def test_ids_that_are_no_grid_of_longcat_s_are_refused(columns, says):
    model, call = flexclear.transform(models.tiny_longcat(), r=RADIUS), models.longcat_call(9, 13, 5)
    with pytest.raises(ValueError, match=says):
        run(model, {**call, "img_ids": change(call["img_ids"], **columns)})


def test_a_reference_that_begins_elsewhere_than_the_image_is_refused():
    model = flexclear.transform(models.tiny_longcat(), r=RADIUS)
    call = models.longcat_call(6, 8, 5, references=((4, 5),))
    call["img_ids"][48:, 1] += 1
    with pytest.raises(
        ValueError, match=r"grid 1 of 2 .* at row 5 and column 5, where the image does: .* at row 6 and"
    ):
        run(model, call)


def test_bria_s_residuals_of_single_blocks_are_refused():
    model, call = flexclear.transform(models.tiny_bria(), r=RADIUS), models.bria_call(6, 8, 5)
    with pytest.raises(ValueError, match="got controlnet_single_block_samples: diffusers adds them to other tokens"):
        run(model, {**call, "controlnet_single_block_samples": [torch.zeros(1, 48, 32)]})


BAD_MASKS = {
    "hides an image token": (
        lambda: (torch.arange(53) != 30).view(1, 1, 1, 53),
        r"attention_mask in joint_attention_kwargs hides image tokens \(the last one .* is number 25 of 48\)",
    ),
    "text and image in two dimensions": (
        lambda: torch.ones(1, 53).bool(),
        r"\(1, 1, 1, 53\) .* got torch.bool of shape",
    ),
    "a row for each query": (lambda: torch.ones(1, 1, 53, 53).bool(), r"got torch.bool of shape \(1, 1, 53, 53\)"),
    "text alone": (lambda: torch.ones(1, 1, 1, 5).bool(), r"got torch.bool of shape \(1, 1, 1, 5\)"),
    "added to scores": (lambda: torch.zeros(1, 1, 1, 53), r"must be a bool tensor .* got torch.float32"),
    "no tensor": (lambda: [True], r"got \[True\]"),
}


@pytest.mark.parametrize(("mask", "says"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_a_mask_that_is_none_of_fibo_s_padding_is_refused(mask, says):
    model, call = flexclear.transform(models.tiny_fibo(), r=RADIUS), models.fibo_call(6, 8, 5)
    with pytest.raises(ValueError, match=says):
        run(model, {**call, "joint_attention_kwargs": {"attention_mask": mask()}})


def test_fibo_s_mask_may_serve_the_whole_batch_or_hide_nothing_and_the_caller_s_arguments_stay():
    plain, call, shape = models.tiny_fibo(), models.fibo_call(6, 8, 5, 2), Shape(6, 8, 5, 2)
    model = flexclear.transform(models.tiny_fibo(), r=RADIUS, backend="sdpa")
    same(run(model, {**call, "joint_attention_kwargs": None}), expected(rows_packed.FIBO, plain, shape, call))
    for hidden in (torch.tensor([3, 4]), torch.tensor([], dtype=torch.int64)):
        mask = torch.ones(1, 1, 1, 53, dtype=torch.bool)
        mask[..., hidden] = False
        masked = {**call, "joint_attention_kwargs": {"attention_mask": mask, "scale": 1.0}}
        same(run(model, masked), expected(rows_packed.FIBO, plain, shape, masked))
        assert masked["joint_attention_kwargs"]["attention_mask"] is mask


KREA2_MASKS = {
    "text and image": (lambda: torch.ones(1, 53).bool(), r"shape \(1, 5\) \(batch, text tokens\).* of shape \(1, 53\)"),
    "another batch": (lambda: torch.ones(2, 5).bool(), r"got torch.bool of shape \(2, 5\)"),
    "whole numbers": (lambda: torch.ones(1, 5, dtype=torch.int64), r"bool tensor .* got torch.int64"),
    "added to scores": (lambda: torch.zeros(1, 5), r"bool tensor .* got torch.float32"),
}


@pytest.mark.parametrize(("mask", "says"), KREA2_MASKS.values(), ids=KREA2_MASKS)
def test_a_mask_that_is_none_of_krea_2_s_text_is_refused(mask, says):
    model, call = flexclear.transform(models.tiny_krea2(), r=RADIUS), models.krea2_call(6, 8, 5)
    with pytest.raises(ValueError, match=f"encoder_attention_mask must be a.*{says}"):
        run(model, {**call, "encoder_attention_mask": mask()})


def test_krea_2_takes_no_mask_and_one_that_keeps_all_alike():
    model, call = flexclear.transform(models.tiny_krea2(), r=RADIUS, backend="sdpa"), models.krea2_call(6, 8, 5, 2)
    same(run(model, {**call, "encoder_attention_mask": None}), run(model, call))


def test_position_ids_of_another_text_are_refused():
    model, call = flexclear.transform(models.tiny_krea2(), r=RADIUS), models.krea2_call(6, 8, 5)
    for others in (models.krea2_call(6, 8, 4), models.krea2_call(6, 8, 7), models.krea2_call(1, 8, 4)):
        with pytest.raises(ValueError, match=r"not full grids of height x width|do not hold the"):
            run(model, {**call, "position_ids": others["position_ids"]})
    with pytest.raises(ValueError, match=r"torch.float32 behind 5 of text"):
        run(model, {**call, "position_ids": call["position_ids"][:5]})


def test_krea_2_attends_with_as_many_heads_of_keys_as_it_has():
    """diffusers repeats them; attention gets each once."""
    from flexclear.runtime import call_plan

    model, heads = flexclear.transform(models.tiny_krea2(), r=RADIUS, backend="sdpa"), []

    def attend(query, key, value, *others):
        heads.append((query.shape[1], key.shape[1], value.shape[1]))
        return plain(query, key, value, *others)

    plain = call_plan.windowed_attention
    with mock.patch.object(call_plan, "windowed_attention", attend):
        run(model, models.krea2_call(6, 8, 5))
    assert heads == [(4, 2, 2)] * 2


@pytest.mark.parametrize("step", [1.0, 0.25])
def test_ids_in_other_steps_than_halves_are_refused(step):
    model, call = flexclear.transform(models.tiny_flux3(), r=RADIUS), models.flux3_call(6, 8, 5)
    call["img_ids"][:, 1:3] *= 2 * step
    with pytest.raises(ValueError, match=r"start at row 0 and column 0 in steps of 0.5: they start at row 0"):
        run(model, call)


def test_references_go_in_arguments_of_their_own_and_fit_their_ids():
    model, call = flexclear.transform(models.tiny_flux3(), r=RADIUS), models.flux3_call(6, 8, 5, references=((4, 5),))
    tokens, ids = "image_cond_hidden_states", "image_cond_ids"
    for changes, says in (
        ({tokens: None}, "needs image_cond_hidden_states as a tensor, got None"),
        ({ids: None}, "needs image_cond_ids as a tensor, got None"),
        (
            {tokens: call[tokens][:, 1:]},
            r"image_cond_hidden_states .* do not hold the 4 x 5 = 20 .* image_cond_ids describe",
        ),
        ({ids: call[ids][5:]}, r"shape \(15, 4\).* at row 0 and column 0 in steps of 0.5: they start at row 0.5"),
    ):
        with pytest.raises(ValueError, match=says):
            run(model, {**call, **changes})
    joined = {
        name: torch.cat([call[name], call[other]], -2) for name, other in (("hidden_states", tokens), ("img_ids", ids))
    }
    with pytest.raises(
        ValueError, match=r"img_ids describe 2 images.* takes reference images in image_cond_hidden_states"
    ):
        run(model, {**call, **joined, tokens: None, ids: None})


def test_blocks_over_references_alone_have_a_window_of_their_own():
    """Tokens of one reference see others of it and of the next, where these are near."""
    shape = Shape(6, 8, 5, references=((12, 9), (7, 10)))
    plain = models.tiny_flux3(num_single_layers=1)
    call = models.flux3_call(6, 8, 5, references=shape.references)
    reference = expected(rows_packed.FLUX3, plain, shape, call)
    model = flexclear.transform(models.tiny_flux3(num_single_layers=1), r=RADIUS, backend="sdpa")
    same(run(model, call), reference)
    dense = flexclear.transform(model, r={"mode_blocks.image_cond": None, "default": RADIUS}, backend="sdpa")
    far(run(dense, call), reference, "their window")


def test_krea_2_and_flux_3_are_explained_stack_by_stack():
    explained = str(flexclear.explain(flexclear.transform(models.tiny_krea2(), r=RADIUS), height=256, width=256))
    assert "transformer_blocks.0-1.attn    2 x disc_r3 " in explained
    explained = flexclear.explain(flexclear.transform(models.tiny_flux3(), r=RADIUS), height=256, width=256)
    for line in (
        "mode_blocks.image.0-1.attn            2 x disc_r3 (image only)  ",
        "mode_blocks.image_cond.0-1.attn       2 x disc_r3 (references only)\n",  # of which a call without any does nothing
        "single_transformer_blocks.0-1.attn    2 x disc_r3  ",
    ):
        assert line in str(explained)
    assert [layer.flops > 0 for layer in explained.layers] == [True, True, False, False, True, True]
