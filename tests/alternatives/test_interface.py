"""``transform(attention=...)``: the same in-place, reversible interface for every mechanism."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import flexclear
from flexclear.alternatives import (
    NAMES,
    AgentAttention,
    NeighborhoodAttention,
    PixArtAttention,
    StridedAttention,
    SwinAttention,
    named,
)
from flexclear.compile import why_not_compiled
from flexclear.masks import Disc, Neighborhood, Strided, Swin

from helpers.models import flux_call, tiny_flux

CPU = torch.device("cpu")
FORMULAS = ("linear", "sigmoid", "pixart", "agent")
OTHERS = [name for name in NAMES if name != "clear"]
GRID = (16, 18)
WEIGHTS = [f"{stack}.{index}.attn.processor.compression_weight"
           for stack in ("transformer_blocks", "single_transformer_blocks") for index in range(2)]  # fmt: skip


@pytest.fixture
def model():
    return tiny_flux()


def run(model, call):
    with torch.no_grad():
        return model(**call).sample


def windows_of(model):
    return [layer.window for layer in flexclear.explain(model).layers]


def test_the_names_are_those_of_the_paper_s_comparison():
    assert set(NAMES) == {"clear", "linear", "sigmoid", "pixart", "agent", "strided", "swin", "neighborhood"}
    for name in OTHERS:
        assert named(name).kind == name
        assert "arXiv" in named(name).source
        assert name in flexclear.transform.__doc__


def test_masks_become_one_window_per_layer_with_the_published_sizes(model):
    assert windows_of(flexclear.transform(model, attention="strided")) == [Strided(4)] * 4
    assert windows_of(flexclear.transform(model, attention="swin")) == [Swin(16), Swin(16, 8)] * 2
    assert windows_of(flexclear.transform(model, attention="neighborhood")) == [Neighborhood(16)] * 4
    assert windows_of(flexclear.transform(model, attention=SwinAttention(5))) == [Swin(5), Swin(5, 2)] * 2


def test_clear_is_the_default_and_its_radius_16(model):
    assert windows_of(flexclear.transform(model)) == [Disc(16)] * 4
    assert windows_of(flexclear.transform(model, attention="clear")) == [Disc(16)] * 4
    assert windows_of(flexclear.transform(model, 3, attention="clear")) == [Disc(3)] * 4


@pytest.mark.parametrize("name", OTHERS)
def test_restore_is_bit_identical_and_leaves_nothing_behind(model, name):
    call = flux_call(*GRID, 5)
    before, processors, keys = run(model, call), model.attn_processors, list(model.state_dict())
    assert flexclear.transform(model, attention=name, backend="sdpa") is model
    assert not torch.equal(run(model, call), before)
    flexclear.restore(model)
    assert torch.equal(run(model, call), before)
    assert all(model.attn_processors[key] is processor for key, processor in processors.items())
    assert list(model.state_dict()) == keys
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize("name", OTHERS)
def test_a_copy_and_a_pickle_attend_alike_and_are_restored_on_their_own(model, name):
    call = flux_call(*GRID, 5)
    dense = run(model, call)
    flexclear.transform(model, attention=name, backend="sdpa")
    expected = run(model, call)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied, call), expected)
        assert torch.equal(run(flexclear.restore(copied), call), dense)
    assert torch.equal(run(model, call), expected)


def test_the_last_transform_holds_whatever_was_before(model):
    call, fresh = flux_call(*GRID, 5), copy.deepcopy(model)
    for name in ("pixart", "swin", "sigmoid", "clear", "agent", "linear", "strided", "clear"):
        flexclear.transform(model, attention=name, backend="sdpa")
        alone = flexclear.transform(copy.deepcopy(fresh), attention=name, backend="sdpa")
        assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
        assert torch.equal(run(model, call), run(alone, call))
        assert list(model.state_dict()) == list(alone.state_dict())


def test_compression_weights_are_parameters_that_start_as_the_mean_and_follow_the_model(model):
    keys = set(model.state_dict())
    flexclear.transform(model, attention="pixart")
    assert set(model.state_dict()) - keys == set(WEIGHTS)
    named_parameters = dict(model.named_parameters())
    for name in WEIGHTS:
        assert torch.equal(named_parameters[name], torch.full((32, 1, 4, 4), 1 / 16))
        assert named_parameters[name].requires_grad
    model.to(torch.bfloat16)
    assert {named_parameters[name].dtype for name in WEIGHTS} == {torch.bfloat16}
    fresh = flexclear.transform(tiny_flux().to(torch.bfloat16), attention="pixart")
    assert {parameter.dtype for name, parameter in fresh.named_parameters() if name in WEIGHTS} == {torch.bfloat16}


def test_trained_compression_weights_load_by_state_dict_and_survive_another_transform_of_the_same_factor(model):
    call = flux_call(*GRID, 5)
    flexclear.transform(model, attention="pixart")
    with torch.no_grad():
        for name in WEIGHTS:
            model.get_parameter(name).add_(0.1 * torch.randn(32, 1, 4, 4))
    expected = run(model, call)
    other = flexclear.transform(tiny_flux(seed=1), attention="pixart")
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other, call), expected)
    trained = model.get_parameter(WEIGHTS[0]).detach().clone()
    flexclear.transform(model, attention="pixart", order="raster")
    assert torch.equal(model.get_parameter(WEIGHTS[0]), trained)
    flexclear.transform(model, attention=PixArtAttention(2))
    assert torch.equal(model.get_parameter(WEIGHTS[0]), torch.full((32, 1, 2, 2), 1 / 4))


def test_dense_steps_are_dense_whatever_the_mechanism():
    pipe = flexclear.embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "latent"}

    def draw():
        return pipe("an apple", generator=torch.Generator().manual_seed(0), **settings).images

    dense = draw()
    for mechanism in ("linear", PixArtAttention(2)):
        flexclear.transform(pipe, attention=mechanism, dense_steps=(1, 1))
        assert (draw() - dense).abs().max() <= 1e-4
        with flexclear.override(dense_steps=(0, 0)):
            assert (draw() - dense).abs().max() > 1e-2


def test_a_fresh_processor_of_a_plugin_is_taken_over_and_the_mechanism_stays(model):
    """What ``flexclear.optimize`` does after it has fused projections."""
    from flexclear.convert import transform_again

    call = flux_call(*GRID, 5)
    for name in ("agent", "pixart", "swin"):
        flexclear.transform(model, attention=name, backend="sdpa")
        expected = run(model, call)
        transform_again(model)
        assert torch.equal(run(model, call), expected)


def test_ntk_factor_reaches_formulas(model):
    call = flux_call(*GRID, 5)
    plain = run(flexclear.transform(model, attention="agent"), call)
    with flexclear.override(ntk_factor=10.0):
        assert (run(model, call) - plain).abs().max() > 1e-3


@pytest.mark.kept
@pytest.mark.skipif(why_not_compiled(CPU) is not None, reason=str(why_not_compiled(CPU)))
def test_a_swin_window_runs_by_compiled_flex_attention_too(model):
    call = flux_call(*GRID, 5)
    expected = run(flexclear.transform(model, attention="swin", backend="sdpa"), call)
    assert (run(flexclear.transform(model, attention="swin", backend="flex"), call) - expected).abs().max() <= 1e-4


@pytest.mark.kept("pixart")
@pytest.mark.parametrize("name", FORMULAS)
def test_blocks_under_a_formula_are_one_graph_each(name):
    model = tiny_flux(num_layers=1, num_single_layers=1)
    calls = [flux_call(8, 6, 5), flux_call(5, 9, 5)]
    flexclear.transform(model, attention=name)
    expected = [run(model, call) for call in calls]
    torch._dynamo.reset()  # other tests' graphs of the same blocks count towards its limit
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for call, plain in zip(calls, expected, strict=True):
        assert (run(model, call) - plain).abs().max() <= 1e-6


def test_explain_names_the_mechanism_and_counts_its_work(model):
    flexclear.transform(model, attention="agent")
    told = flexclear.explain(model, height=1024, width=1024, text_len=512)
    assert [layer.formula for layer in told.layers] == [AgentAttention()] * 4
    expected = flexclear.alternatives.flops("agent", flexclear.masks.Layout(64, 64), channels=32, heads=2)
    assert [layer.flops for layer in told.layers] == [expected] * 4
    assert told.flops == 4 * expected
    assert "2 x agent_16x16 attention" in str(told)
    assert "30.9% of dense" in str(told)
    assert "dense attention everywhere" in str(flexclear.explain(flexclear.restore(model)))


def test_weights_under_a_formula_are_not_saved_as_if_they_were_a_window_s(model, tmp_path):
    flexclear.transform(model, attention="sigmoid")
    with pytest.raises(ValueError, match=r"has attention='sigmoid', but a weights file states windows"):
        flexclear.save_weights(model, tmp_path / "weights.safetensors")
    assert not list(tmp_path.iterdir())


def test_weights_under_a_mask_are_saved_with_its_windows_and_load_as_such(model, tmp_path):
    call = flux_call(*GRID, 5)
    flexclear.transform(model, attention="swin", backend="sdpa")
    flexclear.save_weights(model, tmp_path / "swin.safetensors")
    loaded = tiny_flux()
    flexclear.load_weights(loaded, tmp_path / "swin.safetensors")
    assert windows_of(loaded) == [Swin(16), Swin(16, 8)] * 2
    assert (run(loaded, call) - run(model, call)).abs().max() <= 1e-5


def test_clear_s_weights_make_a_model_under_a_formula_clear_again(model, tmp_path):
    flexclear.save_weights(flexclear.transform(tiny_flux(), r=3), tmp_path / "clear.safetensors")
    flexclear.transform(model, attention="linear")
    with pytest.warns(UserWarning, match="was trained for another window"):
        flexclear.load_weights(model, tmp_path / "clear.safetensors")
    assert windows_of(model) == [Disc(3)] * 4
    assert {layer.formula for layer in flexclear.explain(model).layers} == {None}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention": "performer"}, ValueError, r"attention must be one of \['clear', 'linear', .*got 'performer'"),
        ({"attention": None}, TypeError, r"attention must be one of .*, or a mechanism .* got None"),
        ({"attention": {"transformer_blocks": "swin"}}, TypeError, r"attention must be one of .*got \{'transformer_blocks'"),
        ({"attention": ["swin"] * 4}, TypeError, r"attention must be one of .*got \['swin', 'swin'"),
        ({"attention": SwinAttention}, TypeError, r"got <class .*SwinAttention"),
        ({"attention": "swin", "r": 8}, ValueError, r"r=8 with attention='swin'.*fields of .*SwinAttention"),
        ({"attention": "linear", "r": 16}, ValueError, r"r=16 with attention='linear': only CLEAR has a radius"),
        ({"attention": "pixart", "r": None}, ValueError, r"r=None with attention='pixart'"),
        ({"attention": "agent", "down_factor": 4}, ValueError, r"down_factor=4 with attention='agent'"),
        ({"attention": "strided", "down_factor": 4}, ValueError, r"down_factor=4 with attention='strided'"),
        ({"attention": "linear", "proportional_attention": True}, ValueError, r"proportional_attention scales .*'linear'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_named_and_changes_nothing(model, options, error, message):
    processors = model.attn_processors
    with pytest.raises(error, match=message):
        flexclear.transform(model, **options)
    assert not model._forward_pre_hooks
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SwinAttention(0), ValueError, "swin window must be an int from 1 to 16384 in tokens, got 0"),
        (lambda: StridedAttention(2.0), TypeError, r"stride must be .*got 2.0 \(float\)"),
        (lambda: NeighborhoodAttention(-1), ValueError, "neighborhood kernel must be .*got -1"),
        (lambda: PixArtAttention(True), TypeError, r"compression factor must be .*got True \(bool\)"),
        (lambda: AgentAttention(0), ValueError, "agents along each axis must be .*got 0"),
        (lambda: named("swin", kernel=3), TypeError, r"attention='swin' has the sizes \['size'\], got kernel"),
        (lambda: named("linear", size=3), TypeError, r"attention='linear' has the sizes \[\], got size"),
        (lambda: named("clear", size=3), TypeError, "attention='clear' takes its size as r, got size"),
    ],
)
def test_sizes_that_make_no_sense_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_sizes_may_be_given_by_name():
    assert named("swin", size=4) == SwinAttention(4)
    assert named("clear") is None
    assert named(PixArtAttention(2)) == PixArtAttention(2)


def test_a_neighborhood_larger_than_the_picture_is_named(model):
    flexclear.transform(model, attention="neighborhood", backend="sdpa")
    with pytest.raises(ValueError, match="a neighborhood of 16 x 16 tokens does not fit into a grid of 8 x 18"):
        run(model, flux_call(8, 18, 5))


def test_proportional_attention_for_some_calls_is_refused_under_a_formula(model):
    flexclear.transform(model, attention="sigmoid")
    with (
        flexclear.override(proportional_attention=True),
        pytest.raises(ValueError, match="proportional_attention scales the scores"),
    ):
        run(model, flux_call(8, 8, 5))


def test_models_without_formulas_are_refused_before_any_change_but_take_masks():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, pooled_projection_dim=10, in_channels=4, out_channels=4,
    )  # fmt: skip
    for name in FORMULAS:
        with pytest.raises(ValueError, match=f"attention='{name}' is defined for FluxTransformer2DModel, got SD3"):
            flexclear.transform(model, attention=name)
    assert not model._forward_pre_hooks
    assert windows_of(flexclear.transform(model, attention="swin")) == [Swin(16), Swin(16, 8)]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_mask_over_text_is_refused_by_formulas_unless_it_hides_nothing(model, name):
    call, keep = flux_call(8, 8, 5), torch.ones(1, 1, 1, 69, dtype=torch.bool)
    masked = {**call, "joint_attention_kwargs": {"attention_mask": keep}}
    flexclear.transform(model, attention=name, backend="sdpa")
    assert torch.equal(run(model, masked), run(model, call))
    keep[..., 3:5] = False
    with pytest.raises(ValueError, match=f"attention='{name}' is over all tokens, and the attention_mask"):
        run(model, masked)
    assert torch.equal(run(model, call), run(model, {**call, "joint_attention_kwargs": {}}))
