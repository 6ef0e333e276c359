"""NTK factor and proportional attention against a float64 reference; overrides, models and threads keep apart."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import flexclear
from flexclear.runtime.hooks import entry_hook_of
from flexclear.runtime.switches import Switches, in_force

from helpers.flux_reference import ReferenceProcessor, double, reference_model
from helpers.models import flux_call, tiny_flux

GRIDS = [((9, 13), 7), ((16, 8), 20)]


@pytest.fixture
def model():
    return tiny_flux()


def run(model, call):
    with torch.no_grad():
        return model(**call).sample


def reference(model, call, r, grid, text_len, **options):
    """The float64 reference's output; see ``ReferenceProcessor`` for the options."""
    processors = [ReferenceProcessor(r, grid, text_len, **options) for _ in range(4)]
    return run(reference_model(model, processors), double(call))


SWITCHES = {
    "none": ({}, {}),
    "ntk": ({"ntk_factor": 10.0}, {"theta": 1e5}),
    "ntk below one": ({"ntk_factor": 0.5}, {"theta": 5e3}),
    "proportional": ({"proportional_attention": True}, {"proportional": True}),
    "both": ({"ntk_factor": 10, "proportional_attention": True}, {"theta": 1e5, "proportional": True}),
}


@pytest.mark.parametrize("order", ["tiled", "raster"])
@pytest.mark.parametrize("case", SWITCHES)
def test_switches_of_transform_and_of_override_equal_the_float64_reference(model, case, order):
    switches, options = SWITCHES[case]
    original = copy.deepcopy(model)
    for batch, (grid, text_len) in enumerate(GRIDS, 1):
        call = flux_call(*grid, text_len, batch)
        expected = reference(original, call, 3, grid, text_len, **options)
        flexclear.transform(model, r=3, order=order, backend="sdpa", **switches)
        assert (run(model, call) - expected).abs().max() <= 1e-4
        flexclear.transform(model, r=3, order=order, backend="sdpa")
        plain = run(model, call)
        with flexclear.override(**switches):
            assert (run(model, call) - expected).abs().max() <= 1e-4
        assert torch.equal(run(model, call), plain)
        if switches:
            assert (plain - expected).abs().max() > 1e-3, "the switch makes no difference here"


def test_the_ntk_factor_leaves_the_model_s_own_embedding_alone(model):
    theta, call = model.pos_embed.theta, flux_call(8, 6, 5)
    flexclear.transform(model, r=3, ntk_factor=10, backend="sdpa")
    changed = run(model, call)
    assert model.pos_embed.theta == theta
    with flexclear.override(ntk_factor=1.0):
        plain = run(model, call)
    assert torch.equal(plain, run(flexclear.transform(model, r=3, backend="sdpa"), call))
    assert (changed - plain).abs().max() > 1e-3


def test_proportional_attention_counts_each_layer_s_own_keys_ten_times_where_they_are_pooled(model):
    grid, call = (8, 6), flux_call(8, 6, 5)
    original = copy.deepcopy(model)
    flexclear.transform(
        model, r={"transformer_blocks": 2, "default": None}, down_factor=2, backend="sdpa", proportional_attention=True
    )
    weights = [block.attn.processor.spatial_weight.view(2, 2) for block in model.transformer_blocks]
    processors = [ReferenceProcessor(2, grid, 5, weight, proportional=True) for weight in weights]
    processors += [ReferenceProcessor(None, grid, 5, proportional=True) for _ in range(2)]
    expected = run(reference_model(original, processors), double(call))
    assert (run(model, call) - expected).abs().max() <= 1e-4
    one_for_all = [ReferenceProcessor(2, grid, 5, weight) for weight in weights]
    one_for_all += [ReferenceProcessor(None, grid, 5) for _ in range(2)]
    assert (run(reference_model(original, one_for_all), double(call)) - expected).abs().max() > 1e-3


def test_switches_work_in_bfloat16_and_under_gradients(model):
    call = flux_call(8, 6, 5)
    flexclear.transform(model, r=3, ntk_factor=10, proportional_attention=True, backend="sdpa")
    expected = run(model, call)
    model(**call).sample.square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    half = run(model.to(torch.bfloat16), {name: value.to(torch.bfloat16) for name, value in call.items()})
    assert (half.float() - expected).norm() / expected.norm() <= 3e-2


def test_overrides_nest_and_what_an_inner_one_leaves_out_stays(model):
    call, original = flux_call(9, 13, 7), copy.deepcopy(model)
    flexclear.transform(model, r=3, backend="sdpa", ntk_factor=4.0)

    def expected(theta, proportional):
        return reference(original, call, 3, (9, 13), 7, theta=theta, proportional=proportional)

    def off(theta, proportional):
        return (run(model, call) - expected(theta, proportional)).abs().max()

    assert off(4e4, False) <= 1e-4
    with flexclear.override(ntk_factor=10.0):
        assert off(1e5, False) <= 1e-4
        with flexclear.override(proportional_attention=True):
            assert off(1e5, True) <= 1e-4
            with flexclear.override(ntk_factor=1, proportional_attention=False):
                assert off(1e4, False) <= 1e-4
            assert off(1e5, True) <= 1e-4
        assert off(1e5, False) <= 1e-4
    assert off(4e4, False) <= 1e-4


def test_an_exception_ends_an_override_and_so_does_one_inside_the_model(model):
    call = flux_call(8, 6, 5)
    flexclear.transform(model, r=3, backend="sdpa")
    plain = run(model, call)
    with pytest.raises(KeyError), flexclear.override(ntk_factor=10.0):
        raise KeyError
    assert torch.equal(run(model, call), plain)
    with pytest.raises(RuntimeError), flexclear.override(ntk_factor=10.0):
        run(model, {**call, "pooled_projections": torch.randn(1, 3)})
    assert torch.equal(run(model, call), plain)


def test_an_override_is_also_a_decorator(model):
    call = flux_call(8, 6, 5)
    flexclear.transform(model, r=3, backend="sdpa")
    decorated = flexclear.override(ntk_factor=10.0)(run)
    plain = run(model, call)
    with flexclear.override(ntk_factor=10.0):
        expected = run(model, call)
    assert torch.equal(decorated(model, call), expected)
    assert torch.equal(decorated(model, call), expected)
    assert torch.equal(run(model, call), plain)


def test_a_pipeline_run_under_an_override_is_switched_in_every_step():
    pipe = flexclear.embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "latent"}

    def draw():
        return pipe("an apple", generator=torch.Generator().manual_seed(0), **options).images

    flexclear.transform(pipe, r=3, backend="sdpa", ntk_factor=10.0, proportional_attention=True)
    expected = draw()
    flexclear.transform(pipe, r=3, backend="sdpa")
    plain = draw()
    with flexclear.override(ntk_factor=10.0, proportional_attention=True):
        assert torch.equal(draw(), expected)
    assert (expected - plain).abs().max() > 1e-2

    def switch_off(pipe, step, timestep, tensors):
        entry = entry_hook_of(pipe.transformer).settings.switches
        assert (entry.ntk_factor, entry.proportional_attention) == (1.0, False)
        return tensors

    with flexclear.override(dense_steps=(1, 1)):
        dense = pipe("an apple", generator=torch.Generator().manual_seed(0), callback_on_step_end=switch_off, **options)
    assert (dense.images - plain).abs().max() > 1e-2
    flexclear.restore(pipe)
    assert (dense.images - draw()).abs().max() <= 1e-4


def test_differently_transformed_models_in_one_process_do_not_mix():
    call, models = flux_call(9, 13, 7), []
    for options in (
        {"r": 3},
        {"r": 3, "ntk_factor": 10.0},
        {"r": 3, "proportional_attention": True},
        {"r": [2, None, 3, 2], "order": "raster"},
        {"r": 2, "down_factor": 4},
        None,
    ):
        model = tiny_flux()
        models.append(model if options is None else flexclear.transform(model, backend="sdpa", **options))
    alone = [run(model, call) for model in models]
    for first in range(len(models)):
        for second in range(first):
            assert (alone[first] - alone[second]).abs().max() > 1e-4
    for index in (3, 0, 5, 1, 4, 2, 0, 3, 4, 5, 1):
        assert torch.equal(run(models[index], call), alone[index])
    flexclear.restore(models[1])
    assert torch.equal(run(models[1], call), alone[5])
    assert torch.equal(run(models[0], call), alone[0])


def test_threads_have_overrides_of_their_own():
    call, model = flux_call(9, 13, 7), flexclear.transform(tiny_flux(), r=3, backend="sdpa")
    settings = [{}, {"ntk_factor": 10.0}, {"proportional_attention": True}, {"ntk_factor": 2.0}]
    alone = []
    for given in settings:
        with flexclear.override(**given):
            alone.append(run(model, call))
    wrong, done = [], []
    together = threading.Barrier(len(settings))

    def work(number):
        with flexclear.override(**settings[number]):
            together.wait(timeout=60)
            for _ in range(8):
                if not torch.equal(run(model, call), alone[number]):
                    wrong.append(number)
        done.append(number)

    # What is in force where a thread is started does not reach into it.
    with flexclear.override(ntk_factor=7.0, proportional_attention=True):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(settings))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(done) == [0, 1, 2, 3]
    assert not wrong


def drawing(factor):
    """A generator that draws under an override of its own, as a server that streams previews does."""
    with flexclear.override(ntk_factor=factor):
        while True:
            yield in_force(Switches()).ntk_factor


def test_overrides_of_generators_that_take_turns_end_with_their_own_generator():
    first, second = drawing(2.0), drawing(3.0)
    assert (next(first), next(second)) == (2.0, 3.0)
    first.close()
    assert next(second) == 3.0
    second.close()
    assert in_force(Switches()) == Switches()
    with flexclear.override(ntk_factor=5.0):
        first, second = drawing(2.0), drawing(3.0)
        next(first), next(second)
        first.close()
        second.close()
        assert in_force(Switches()).ntk_factor == 5.0
    assert in_force(Switches()) == Switches()


def test_an_override_that_ends_in_another_thread_ends_in_its_own():
    begun = drawing(2.0)
    next(begun)
    errors = []

    def close():
        try:
            begun.close()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert not errors
    assert in_force(Switches()) == Switches()


BAD = {
    "ntk text": ({"ntk_factor": "10"}, TypeError, "ntk_factor must be a number, got '10'"),
    "ntk bool": ({"ntk_factor": True}, TypeError, "ntk_factor must be a number, got True"),
    "ntk zero": ({"ntk_factor": 0}, ValueError, "ntk_factor must be positive and finite, got 0"),
    "ntk negative": ({"ntk_factor": -1.5}, ValueError, r"got -1\.5"),
    "ntk infinite": ({"ntk_factor": float("inf")}, ValueError, "positive and finite, got inf"),
    "ntk nan": ({"ntk_factor": float("nan")}, ValueError, "positive and finite, got nan"),
    "proportional": ({"proportional_attention": 1}, TypeError, "proportional_attention must be True or False, got 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_switches_that_make_no_sense_are_named_by_transform_and_override(model, case):
    given, error, message = BAD[case]
    with pytest.raises(error, match=message):
        flexclear.transform(model, **given)
    assert entry_hook_of(model) is None
    with pytest.raises(error, match=message), flexclear.override(**given):
        pass
    flexclear.transform(model, r=3, backend="sdpa")
    assert torch.isfinite(run(model, flux_call(6, 4, 3))).all()


def test_an_ntk_factor_on_a_model_without_rotary_positions_is_refused():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, pooled_projection_dim=10, in_channels=4, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    with pytest.raises(ValueError, match=r"ntk_factor=10: SD3Transformer2DModel has no rotary positions"):
        flexclear.transform(model, ntk_factor=10)
    flexclear.transform(model, r=2, backend="sdpa")
    call = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "pooled_projections": torch.randn(1, 10),
        "timestep": torch.tensor([500.0]),
    }
    with flexclear.override(ntk_factor=10.0), pytest.raises(ValueError, match="rotary"):
        run(model, call)
    assert torch.isfinite(run(model, call)).all()
