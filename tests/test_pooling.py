"""Down-sampled keys: equal to a plain float64 reference, trainable, and parameters like any other."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

import flexclear
from flexclear.compile import why_not_compiled
from flexclear.masks import Disc, Downsampled
from flexclear.runtime.pooling import make_pooling

from helpers.flux_reference import ReferenceProcessor, double, reference_model
from helpers.models import flux_call, raster_ids, tiny_flux

CPU = torch.device("cpu")
NAMES = [f"{stack}.{index}.attn.processor.spatial_weight"
         for stack in ("transformer_blocks", "single_transformer_blocks") for index in range(2)]  # fmt: skip


def pooled_weights(model):
    return [parameter for name, parameter in model.named_parameters() if name.endswith("spatial_weight")]


def train(model, seed=0):
    """Pooling weights that are nothing special: no sum of one, no symmetry, some negative."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in pooled_weights(model):
            weight.add_(torch.randn(weight.shape, generator=generator) / weight.shape[3])
    return model


def reference_of(model, r, d, grid, text_len, **options):
    """The float64 reference of a transformed model."""
    weights = [weight.view(d, d) for weight in pooled_weights(model)]
    plain = flexclear.restore(copy.deepcopy(model))
    return reference_model(plain, [ReferenceProcessor(r, grid, text_len, weight, **options) for weight in weights])


def run(model, call):
    with torch.no_grad():
        return model(**call).sample


@pytest.fixture
def model():
    return tiny_flux()


@pytest.mark.parametrize("order", ["tiled", "raster"])
@pytest.mark.parametrize(
    ("grid", "d", "batch"),
    [((8, 12), 4, 1), ((16, 8), 2, 2), ((9, 13), 4, 2), ((7, 6), 3, 1), ((3, 5), 4, 1), ((6, 6), 1, 1)],
)
def test_pooled_keys_equal_the_float64_reference_on_sides_that_the_factor_divides_and_others(
    model, order, grid, d, batch
):
    call = flux_call(*grid, 7, batch)
    train(flexclear.transform(model, r=2, down_factor=d, order=order, backend="sdpa"))
    expected = run(reference_of(model, 2, d, grid, 7), double(call))
    assert (run(model, call) - expected).abs().max() <= 1e-4
    without = copy.deepcopy(model)
    flexclear.transform(without, r=2, backend="sdpa")
    assert (run(without, call) - expected).abs().max() > 1e-3, "pooled keys make no difference here"
    assert (run(flexclear.restore(without), call) - expected).abs().max() > 1e-3, "the window makes no difference here"


@pytest.mark.skipif(why_not_compiled(CPU) is not None, reason=str(why_not_compiled(CPU)))
def test_compiled_pooled_keys_under_all_switches_equal_the_float64_reference(model):
    options = {"ntk_factor": 10.0, "proportional_attention": True}
    train(flexclear.transform(model, r=3, down_factor=4, backend="flex", **options))
    for grid in ((9, 13), (16, 12)):
        call = flux_call(*grid, 7)
        expected = run(reference_of(model, 3, 4, grid, 7, theta=1e5, proportional=True), double(call))
        assert (run(model, call) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("order", ["tiled", "raster"])
def test_gradients_of_pooling_weights_are_those_of_the_reference(model, order):
    grid = (9, 6)
    call = flux_call(*grid, 5, batch=2)
    train(flexclear.transform(model, r=2, down_factor=4, order=order))
    reference = reference_of(model, 2, 4, grid, 5)
    model(**call).sample.square().sum().backward()
    reference(**double(call)).sample.square().sum().backward()
    ours = [weight.grad.view(4, 4) for weight in pooled_weights(model)]
    theirs = [
        block.attn.processor.weight.grad
        for block in [*reference.transformer_blocks, *reference.single_transformer_blocks]
    ]
    assert len(ours) == len(theirs) == 4
    for mine, expected in zip(ours, theirs, strict=True):
        assert expected.abs().max() > 1e-2
        assert (mine - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_equal_weights_pool_to_the_mean_of_each_cell_also_of_cut_off_ones():
    from flexclear.masks import Layout

    layout = Layout(5, 7, 3)
    tokens = torch.randn(2, 3, layout.seq_len, 4)
    pooled = make_pooling(layout, 4, CPU).append(tokens, torch.full((1, 1, 1, 4, 1, 4, 1), 1 / 16))
    raster = tokens[:, :, 3:][:, :, layout.inverse_permutation()].unflatten(2, (5, 7))
    cells = [raster[:, :, y : y + 4, x : x + 4].mean((2, 3)) for y in (0, 4) for x in (0, 4)]
    assert torch.equal(pooled[:, :, : layout.seq_len], tokens)
    assert torch.allclose(pooled[:, :, layout.seq_len :], torch.stack(cells, dim=2), atol=1e-6)


def test_pooling_weights_are_parameters_under_the_released_names_and_start_as_the_mean(model):
    keys = set(model.state_dict())
    flexclear.transform(model, r=8, down_factor=4)
    assert set(model.state_dict()) - keys == set(NAMES)
    named = dict(model.named_parameters())
    for name in NAMES:
        assert named[name].shape == (1, 1, 1, 4, 1, 4, 1)
        assert named[name].requires_grad
        assert torch.equal(named[name], torch.full((1, 1, 1, 4, 1, 4, 1), 1 / 16))
    assert len({id(parameter) for parameter in pooled_weights(model)}) == 4


def test_pooling_weights_follow_to_and_deepcopy(model):
    call = flux_call(8, 6, 5)
    train(flexclear.transform(model, r=2, down_factor=2, backend="sdpa"))
    expected = run(model, call)
    copied = copy.deepcopy(model)
    assert torch.equal(run(copied, call), expected)
    with torch.no_grad():
        for weight in pooled_weights(copied):
            weight.zero_()
    assert not torch.equal(run(copied, call), expected)
    assert torch.equal(run(model, call), expected)
    model.to(torch.bfloat16)
    assert {weight.dtype for weight in pooled_weights(model)} == {torch.bfloat16}
    half = run(model, {name: value.to(torch.bfloat16) for name, value in call.items()})
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() / expected.norm() <= 3e-2
    fresh = tiny_flux().to(torch.bfloat16)
    assert {w.dtype for w in pooled_weights(flexclear.transform(fresh, r=2, down_factor=2))} == {torch.bfloat16}


def test_another_transform_keeps_trained_weights_of_the_same_factor_and_restore_drops_them(model):
    plain, call = copy.deepcopy(model), flux_call(8, 6, 5)
    train(flexclear.transform(model, r=2, down_factor=2, backend="sdpa"))
    trained = [weight.detach().clone() for weight in pooled_weights(model)]
    flexclear.transform(model, r=3, down_factor=2, order="raster", backend="sdpa")
    assert all(torch.equal(a, b) for a, b in zip(pooled_weights(model), trained, strict=True))
    flexclear.transform(model, r=3, down_factor=4)
    assert all(torch.equal(w, torch.full_like(w, 1 / 16)) for w in pooled_weights(model))
    flexclear.restore(model)
    assert pooled_weights(model) == []
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(run(model, call), run(plain, call))
    flexclear.transform(model, r=2, down_factor=2)
    assert all(torch.equal(w, torch.full_like(w, 1 / 4)) for w in pooled_weights(model))


def test_only_layers_with_a_window_get_pooling_weights_and_a_window_may_bring_its_own_factor(model):
    grid, call = (8, 6), flux_call(8, 6, 5)
    r = {0: 2, 1: None, 2: Downsampled(Disc(3), 4), "default": Downsampled(Disc(2), 2)}
    plain = copy.deepcopy(model)
    flexclear.transform(model, r={0: 2, "default": None}, down_factor=2, backend="sdpa")
    assert [name for name, _ in model.named_parameters() if "spatial" in name] == NAMES[:1]
    train(flexclear.transform(model, r=r, backend="sdpa"))
    assert [name for name, _ in model.named_parameters() if "spatial" in name] == NAMES[2:]
    four, two = pooled_weights(model)
    processors = [
        ReferenceProcessor(2, grid, 5),
        ReferenceProcessor(None, grid, 5),
        ReferenceProcessor(3, grid, 5, four.view(4, 4)),
        ReferenceProcessor(2, grid, 5, two.view(2, 2)),
    ]
    expected = run(reference_model(plain, processors), double(call))
    assert (run(model, call) - expected).abs().max() <= 1e-4
    with pytest.raises(TypeError, match="Downsampled takes a window without pooled keys"):
        flexclear.transform(model, r=Downsampled(Disc(3), 4), down_factor=2)


def test_dense_steps_leave_pooled_keys_out():
    pipe = flexclear.embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "latent"}

    def draw():
        return pipe("an apple", generator=torch.Generator().manual_seed(0), **settings).images

    dense = draw()
    flexclear.transform(pipe, r=2, down_factor=4, dense_steps=(1, 1), backend="sdpa")
    assert (draw() - dense).abs().max() <= 1e-4
    with flexclear.override(dense_steps=(0, 0)):
        assert (draw() - dense).abs().max() > 1e-2


def test_a_saved_model_loads_as_the_original_and_says_which_weights_were_left_out(model, tmp_path, caplog):
    from diffusers.utils import logging as diffusers_logging

    call = flux_call(8, 6, 5)
    dense = run(model, call)
    train(flexclear.transform(model, r=2, down_factor=2)).save_pretrained(tmp_path / "model")
    flexclear.save_weights(model, tmp_path / "local.safetensors")
    expected = run(flexclear.transform(model, r=2, down_factor=2, backend="sdpa"), call)
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            loaded = type(model).from_pretrained(tmp_path / "model")
    finally:
        diffusers_logging.disable_propagation()
    assert "spatial_weight" in caplog.text
    weights, kept = loaded.state_dict(), model.state_dict()
    assert set(kept) - set(weights) == set(NAMES)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights.items())
    assert (run(loaded, call) - dense).abs().max() <= 1e-6
    flexclear.load_weights(loaded, tmp_path / "local.safetensors")
    flexclear.transform(loaded, r=2, down_factor=2, backend="sdpa")
    assert (run(loaded, call) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (0, ValueError, "down_factor must be an int from 1 to 16384 in tokens, got 0"),
        (2.0, TypeError, r"down_factor must be .* got 2.0 \(float\)"),
        (True, TypeError, r"got True \(bool\)"),
    ],
)
def test_a_down_factor_that_is_none_is_named(model, given, error, message):
    with pytest.raises(error, match=message):
        flexclear.transform(model, r=2, down_factor=given)
    assert not model._forward_pre_hooks


def test_models_without_known_pooling_are_refused_before_any_change():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, pooled_projection_dim=10, in_channels=4, out_channels=4,
    )  # fmt: skip
    for options in ({"down_factor": 2}, {"r": Downsampled(Disc(2), 2)}):
        with pytest.raises(ValueError, match=r"down-sampled keys are defined for FluxTransformer2DModel.*got SD3"):
            flexclear.transform(model, **options)
    assert not model._forward_pre_hooks


def test_reference_pictures_beside_pooled_keys_are_refused(model):
    call = flux_call(6, 6, 5)
    call["hidden_states"] = torch.cat([call["hidden_states"]] * 2, dim=1)
    second = raster_ids(6, 6)
    second[:, 0] = 1
    call["img_ids"] = torch.cat([call["img_ids"], second])
    flexclear.transform(model, r=2, down_factor=2, backend="sdpa")
    with pytest.raises(ValueError, match="pooled keys are defined for one grid, and this layout has 2"):
        run(model, call)
