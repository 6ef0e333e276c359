"""Every alternative equals a float64 reference written from its formula, gradients too."""

from __future__ import annotations

import copy

import pytest
import torch

import flexclear
from flexclear.alternatives import (
    AgentAttention,
    LinearAttention,
    NeighborhoodAttention,
    PixArtAttention,
    SigmoidAttention,
    StridedAttention,
    SwinAttention,
)

from helpers.alternative_references import Agent, Linear, PixArt, Sigmoid, Windowed, double, reference_model
from helpers.models import flux_call, raster_ids, tiny_flux

LAYERS = 4
TEXT = 7
FORMULAS = [
    SigmoidAttention(),
    LinearAttention(),
    PixArtAttention(4),
    PixArtAttention(3),
    AgentAttention(3),
    AgentAttention(),
]
MASKS = [StridedAttention(3), SwinAttention(4), NeighborhoodAttention(3)]
SHAPES = [(8, 12, 1), (9, 13, 2), (6, 5, 2)]


def name_of(mechanism):
    return mechanism.name


def weights_of(model):
    return [p for name, p in model.named_parameters() if name.endswith("compression_weight")]


def train(model):
    """Compression weights that are nothing special."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights_of(model):
            weight.add_(torch.randn(weight.shape, generator=generator) / weight.shape[-1])
    return model


def processors_of(mechanism, model, grid):
    """A float64 reference of each layer."""
    if isinstance(mechanism, SigmoidAttention):
        return [Sigmoid(grid, TEXT) for _ in range(LAYERS)]
    if isinstance(mechanism, LinearAttention):
        return [Linear(grid, TEXT) for _ in range(LAYERS)]
    if isinstance(mechanism, AgentAttention):
        return [Agent(grid, TEXT, mechanism.side) for _ in range(LAYERS)]
    if isinstance(mechanism, PixArtAttention):
        return [PixArt(grid, TEXT, weight) for weight in weights_of(model)]
    return [Windowed(rule(mechanism, grid, layer), grid, TEXT) for layer in range(LAYERS)]


def rule(mechanism, grid, layer):
    """Whether an image query at (y, x) sees the image key at (v, u)."""
    height, width = grid
    if isinstance(mechanism, StridedAttention):
        return lambda y, x, v, u: (y - v) % mechanism.stride == 0 and (x - u) % mechanism.stride == 0
    if isinstance(mechanism, SwinAttention):
        size, shift = mechanism.size, (layer % 2) * (mechanism.size // 2)
        cell = lambda place: (place - shift) // size  # noqa: E731
        return lambda y, x, v, u: (cell(y), cell(x)) == (cell(v), cell(u))
    k = mechanism.kernel
    first = lambda place, side: min(max(place - k // 2, 0), side - k)  # noqa: E731
    return lambda y, x, v, u: 0 <= v - first(y, height) < k and 0 <= u - first(x, width) < k


def reference_of(mechanism, model, grid):
    processors = processors_of(mechanism, model, grid)
    return reference_model(flexclear.restore(copy.deepcopy(model)), processors)


def run(model, call):
    with torch.no_grad():
        return model(**call).sample


@pytest.fixture
def model():
    return tiny_flux()


@pytest.mark.parametrize("order", ["tiled", "raster"])
@pytest.mark.parametrize("mechanism", [*FORMULAS, *MASKS], ids=name_of)
def test_an_alternative_equals_its_float64_reference_and_differs_from_dense_attention(model, mechanism, order):
    dense = copy.deepcopy(model)
    train(flexclear.transform(model, attention=mechanism, order=order, backend="sdpa"))
    for height, width, batch in SHAPES:
        call = flux_call(height, width, TEXT, batch)
        expected = run(reference_of(mechanism, model, (height, width)), double(call))
        assert (run(model, call) - expected).abs().max() <= 1e-4
        assert (run(dense, call) - expected).abs().max() > 1e-3, "the mechanism makes no difference here"


@pytest.mark.parametrize("mechanism", [*FORMULAS, SwinAttention(4)], ids=name_of)
def test_gradients_are_those_of_autograd_through_the_reference(model, mechanism):
    grid = (9, 6)
    call = flux_call(*grid, TEXT, batch=2)
    train(flexclear.transform(model, attention=mechanism))
    reference = reference_of(mechanism, model, grid)
    model(**call).sample.square().sum().backward()
    reference(**double(call)).sample.square().sum().backward()
    theirs = {name.replace("filters", "compression_weight"): p.grad for name, p in reference.named_parameters()}
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert set(ours) == set(theirs)
    largest = max(grad.abs().max() for grad in theirs.values())
    for name, grad in ours.items():
        assert (grad - theirs[name]).abs().max() <= 1e-5 * largest, name
    if isinstance(mechanism, PixArtAttention):
        assert all(weight.grad.abs().max() > 1e-3 for weight in weights_of(model))


@pytest.mark.parametrize("mechanism", [*FORMULAS[:3], *FORMULAS[4:]], ids=name_of)
def test_several_grids_and_bfloat16_go_through_one_transformed_model(model, mechanism):
    flexclear.transform(model, attention=mechanism)
    calls = [flux_call(8, 6, TEXT), flux_call(5, 9, TEXT)]
    exact = [run(model, call) for call in calls]
    assert torch.equal(run(model, calls[0]), exact[0])
    model.to(torch.bfloat16)
    for call, expected in zip(calls, exact, strict=True):
        half = run(model, {name: value.to(torch.bfloat16) for name, value in call.items()})
        assert half.dtype == torch.bfloat16
        assert (half.float() - expected).norm() / expected.norm() <= 5e-2


def test_sigmoid_attention_in_parts_is_the_same(monkeypatch):
    from flexclear.alternatives import sigmoid

    query, key, value = torch.randn(3, 2, 2, 50, 8, dtype=torch.float64)
    whole = sigmoid.sigmoid_attention(query, key, value)
    monkeypatch.setattr(sigmoid, "MAX_SCORES", 2 * 2 * 50 * 7)
    assert torch.allclose(sigmoid.sigmoid_attention(query, key, value), whole, atol=1e-12)


def test_the_feature_map_is_elu_plus_one_and_stays_positive_far_below_zero():
    from flexclear.alternatives.linear import feature_map

    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    assert torch.allclose(feature_map(x), torch.nn.functional.elu(x) + 1, atol=1e-15)
    assert feature_map(torch.tensor(-40.0)) > 0
    at_zero = torch.zeros(1, requires_grad=True)
    feature_map(at_zero).sum().backward()
    assert at_zero.grad == 1


def test_linear_attention_over_four_times_the_tokens_keeps_a_state_of_the_same_size():
    """A sequence whose pairs alone would be 68 GB runs, because no pair is formed."""
    from flexclear.alternatives.linear import linear_attention

    tokens = torch.randn(3, 1, 1, 1 << 17, 4)
    out = linear_attention(*tokens)
    assert out.shape == (1, 1, 1 << 17, 4)
    assert out.isfinite().all()


def test_equal_weights_compress_to_the_mean_also_of_cells_that_are_cut_off():
    from flexclear.alternatives.pixart import compress
    from flexclear.masks import Layout
    from flexclear.runtime.pooling import make_pooling

    layout = Layout(5, 7, 0, order="raster")
    image = torch.randn(2, 3, 35, 4)
    pooled = compress(image, torch.full((12, 1, 4, 4), 1 / 16), make_pooling(layout, 4, torch.device("cpu")))
    picture = image.unflatten(2, (5, 7))
    cells = [picture[:, :, y : y + 4, x : x + 4].mean((2, 3)) for y in (0, 4) for x in (0, 4)]
    assert torch.allclose(pooled, torch.stack(cells, dim=2), atol=1e-6)


def test_where_the_factor_divides_the_sides_compression_is_torch_s_strided_depthwise_convolution():
    from flexclear.alternatives.pixart import compress
    from flexclear.masks import Layout
    from flexclear.runtime.pooling import make_pooling

    layout, weight = Layout(8, 12, 0, order="raster"), torch.randn(6, 1, 4, 4)
    image = torch.randn(2, 3, 96, 2)
    ours = compress(image, weight, make_pooling(layout, 4, torch.device("cpu")))
    channels_first = image.transpose(2, 3).flatten(1, 2).unflatten(2, (8, 12))
    expected = torch.nn.functional.conv2d(channels_first, weight, stride=4, groups=6)
    assert torch.allclose(ours, expected.flatten(2).unflatten(1, (3, 2)).transpose(2, 3), atol=1e-5)


@pytest.mark.parametrize("mechanism", [PixArtAttention(), AgentAttention()], ids=name_of)
def test_reference_pictures_are_refused_where_the_formula_needs_one_grid(model, mechanism):
    call = flux_call(6, 6, 5)
    call["hidden_states"] = torch.cat([call["hidden_states"]] * 2, dim=1)
    second = raster_ids(6, 6)
    second[:, 0] = 1
    call["img_ids"] = torch.cat([call["img_ids"], second])
    flexclear.transform(model, attention=mechanism)
    with pytest.raises(ValueError, match="is defined for one grid, and this layout has 2"):
        run(model, call)
    flexclear.transform(model, attention="sigmoid")
    assert run(model, call).isfinite().all()
