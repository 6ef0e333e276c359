"""``restore`` always succeeds, and ``transform`` and ``restore`` happen wholly or not at all."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0

import flexclear
from flexclear.analysis.attending import attending
from flexclear.compile.undoing import numbers_as_before
from flexclear.highres.state import windowed
from flexclear.masks import Disc
from flexclear.runtime.exchange import Snapshot
from flexclear.runtime.hooks import entry_hook_of
from flexclear.runtime.processors import WindowProcessor

from helpers.interruptions import OTHERS, Lines, hooks_of, outline_of, same, state_of
from helpers.models import flux_call, sd3_call, tiny_flux, tiny_sd3, tiny_zimage, zimage_call
from helpers.parallel_families import sample

SIZES = {"num_layers": 1, "num_single_layers": 1}


SIZES = {"num_layers": 1, "num_single_layers": 1}


def small(kind):
    """A model of a few blocks, with every kind of hook and of processor that its family has; and a call."""
    if kind == "flux":
        return tiny_flux(**SIZES), flux_call(6, 8, 4)
    if kind == "zimage":
        return tiny_zimage(n_layers=1), zimage_call(6, 8, (7,))
    return tiny_sd3(num_layers=2, dual_attention_layers=(0,)), sd3_call(6, 8, 4)


STATES = {
    "plain": lambda model: flexclear.restore(model),
    "two": lambda model: flexclear.transform(model, r=2, backend="sdpa", order="raster"),
    "three": lambda model: flexclear.transform(model, r=3, backend="sdpa"),
    "pooled": lambda model: flexclear.transform(model, r=2, down_factor=2, backend="sdpa"),
    "again": lambda model: flexclear.transform(model, r=3, down_factor=2, backend="sdpa"),
    "alone": lambda model: alone(model),
    "joined": lambda model: share(alone(model)),
    "shared": lambda model: share(flexclear.transform(model, r=2, backend="sdpa", order="raster")),
}
CASES = [
    ("flux", "plain", "three"),
    ("flux", "two", "three"),
    ("flux", "two", "plain"),
    ("flux", "pooled", "again"),
    ("flux", "pooled", "plain"),
    ("flux", "two", "pooled"),
    ("sd3", "plain", "three"),
    ("sd3", "shared", "three"),
    ("sd3", "shared", "plain"),
    ("sd3", "alone", "joined"),
    ("sd3", "joined", "alone"),
    ("zimage", "two", "three"),
    ("zimage", "two", "plain"),
]


def share(model):
    """Let it take part in a run over several ranks that never begins."""
    flexclear.parallel.attach(
        model, SimpleNamespace(current=None, check=lambda *given: None, close=lambda: None, links=None)
    )
    return model


def alone(model):
    """Let it be transformed, and take part in no run."""
    if entry_hook_of(model) is None:
        STATES["two"](model)
    return flexclear.parallel.disable(model)


@pytest.mark.parametrize(("kind", "before", "after"), CASES)
def test_an_interrupted_change_leaves_the_old_state_or_the_new(kind, before, after):
    model, _ = small(kind)
    plain = state_of(model)
    STATES[before](model)
    trained = train(model)
    outline = outline_of(model)
    STATES[after](model)
    new_outline = outline_of(model)
    assert new_outline != outline
    STATES[before](model)
    lines = Lines()
    assert lines.run(lambda: STATES[after](model))
    STATES[before](model)
    ends = {True: 0, False: 0}
    for number in lines.points():
        old = state_of(model)
        assert not Lines(number).run(lambda: STATES[after](model))
        done = not same(state_of(model), old)
        ends[done] += 1
        if done:
            assert outline_of(model) == new_outline, number
            STATES[before](model)
            assert outline_of(model) == outline
        if after != "plain":
            assert pooling_of(model) == trained
    assert ends[False] > ends[True]
    flexclear.restore(model)
    assert same(state_of(model), plain)


def train(model):
    """Change pooling weights; see ``pooling_of``."""
    for name, parameter in model.named_parameters():
        if "spatial_weight" in name:
            parameter.data += torch.rand_like(parameter)
    return pooling_of(model)


def pooling_of(model):
    """The pooling weights' own numbers, by name."""
    return {
        name: parameter.flatten().tolist() for name, parameter in model.named_parameters() if "spatial_weight" in name
    }


def test_interrupted_once_more_on_the_way_back_it_can_still_be_restored(monkeypatch):
    model, call = small("flux")
    dense, plain = sample(model, call), state_of(model)
    STATES["two"](model)
    lines = Lines()
    lines.run(lambda: STATES["three"](model))
    STATES["two"](model)
    last = max(number for number, (file, _) in enumerate(lines.seen) if file in OTHERS)
    put_back = Snapshot.put_back

    def way_back(*stops):
        # Python stops tracing where the tracer raises.
        back = Lines(*stops)
        monkeypatch.setattr(Snapshot, "put_back", lambda snapshot: back.run(lambda: put_back(snapshot)))
        assert not Lines(last).run(lambda: STATES["three"](model))
        return back

    halves = 0
    points = way_back().points()
    assert len(points) > 40
    for point in points:
        old = state_of(model)
        way_back(point)
        halves += not same(state_of(model), old)
        flexclear.restore(model)
        assert same(state_of(model), plain)
        STATES["two"](model)
    assert halves <= 2, "more than the lines before anything is put back"
    assert torch.equal(sample(flexclear.restore(model), call), dense)


@pytest.mark.parametrize("before", ["plain", "pooled"])
def test_interrupted_loading_leaves_windows_and_numbers(before, tmp_path):
    path = tmp_path / "weights.safetensors"
    flexclear.save_weights(flexclear.transform(tiny_flux(1, **SIZES), r=3, down_factor=2), path)
    model = tiny_flux(**SIZES)

    def numbers():
        return [parameter.sum().item() for parameter in model.parameters()]

    def load():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flexclear.load_weights(model, path)

    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def begin():
        STATES[before](model)
        model.load_state_dict(given, strict=False)

    load()  # imports happen once
    begin()
    lines = Lines()
    assert lines.run(load)
    loaded, done = numbers(), 0
    begin()
    for number in lines.points("load.py", "convert.py", "exchange.py"):
        old, were = state_of(model), numbers()
        assert not Lines(number).run(load)
        if same(state_of(model), old) and numbers() == were:
            continue
        assert numbers() == loaded, lines.seen[number]
        done += 1
        begin()
    assert done <= 10, "more than the lines after everything is loaded"


class Pipe:
    def __init__(self, transformer):
        self.transformer = transformer


def test_interrupted_other_windows_for_a_while_leave_the_own_ones():
    pipe = Pipe(small("flux")[0])
    STATES["two"](pipe.transformer)
    windows = dict.fromkeys(("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"), Disc(1))

    def draw():
        with windowed(pipe, windows, hooks=True):
            pass

    lines = Lines()
    assert lines.run(draw)
    old = state_of(pipe.transformer)
    for number in lines.points("state.py", "convert.py", "exchange.py"):
        assert not Lines(number).run(draw)
        assert same(state_of(pipe.transformer), old), lines.seen[number]


def test_interrupted_for_a_while_numbers_and_attention_are_put_back():
    model, _ = small("flux")
    flexclear.transform(model, r=2)
    processors = model.attn_processors
    parameters = list(model.parameters())
    before = [parameter.clone() for parameter in parameters]

    def work():
        with (
            numbers_as_before(parameters),
            attending(processors, lambda *given: None),
            torch.no_grad(),
        ):
            for parameter in parameters:
                parameter.add_(1)

    lines = Lines()
    assert lines.run(work)
    for number in lines.points("undoing.py", "attending.py"):
        assert not Lines(number).run(work)
        assert all(torch.equal(*pair) for pair in zip(parameters, before, strict=True)), lines.seen[number]
        assert not any("attend" in vars(processor) for processor in processors.values()), lines.seen[number]


class Custom:
    """Somebody's processor."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


def restored(model, match=None):
    """Restore it; one warning that says ``match``, or none."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert flexclear.restore(model) is model
    if match is None:
        assert not said
    else:
        (warning,) = said
        assert match in str(warning.message)
        assert warning.filename == __file__
    assert not any(hooks_of(module) for module in model.modules())
    assert not any(isinstance(getattr(module, "processor", None), WindowProcessor) for module in model.modules())
    return model


@pytest.mark.parametrize("down_factor", [None, 2])
def test_a_custom_processor_in_every_layer_stays_and_is_named_once(down_factor):
    model, call = small("flux")
    dense, plain = sample(model, call), model.attn_processors
    flexclear.transform(model, r=2, backend="sdpa", down_factor=down_factor)
    theirs = Custom()
    model.set_attn_processor(theirs)
    with pytest.raises(
        RuntimeError, match=r"was given a Custom after .*or flexclear.restore\(model\), which keeps what is"
    ):
        sample(model, call)
    with pytest.raises(TypeError, match=r"transformer_blocks\[0\].attn has a Custom; flexclear replaces"):
        flexclear.transform(model, r=2)
    names = "transformer_blocks.0.attn, Custom on single_transformer_blocks.0.attn"
    restored(model, f"Custom on {names}")
    assert all(processor is theirs for processor in model.attn_processors.values())
    restored(model)
    model.set_attn_processor(dict(plain))
    assert torch.equal(sample(model, call), dense)


def test_of_several_layers_ours_give_way_and_theirs_stays():
    model, _ = small("flux")
    own = model.attn_processors
    flexclear.transform(model, r=2, backend="sdpa")
    theirs = Custom()
    model.transformer_blocks[0].attn.set_processor(theirs)
    restored(model, "Custom on transformer_blocks.0.attn. ")
    assert model.transformer_blocks[0].attn.processor is theirs
    name = "single_transformer_blocks.0.attn.processor"
    assert model.attn_processors[name] is own[name]


def test_after_a_pipeline_with_perturbed_attention_guidance():
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3PAGPipeline

    model, call = small("sd3")
    own, dense = model.attn_processors, sample(model, call)
    flexclear.transform(model, r=2, backend="sdpa")
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "vae")
    pipe = StableDiffusion3PAGPipeline(
        **dict.fromkeys(parts),
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        pag_applied_layers="transformer_blocks.1",
    )
    pipe.vae_scale_factor, pipe.default_sample_size = 8, 16
    text, pooled = torch.randn(1, 4, 12), torch.randn(1, 10)
    given = {
        "prompt_embeds": text, "negative_prompt_embeds": text,
        "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled,
        "height": 128, "width": 128, "num_inference_steps": 1, "output_type": "latent", "guidance_scale": 1.0,
    }  # fmt: skip
    advice = r"was given a PAGJointAttnProcessor2_0 after .*flexclear.restore\(model\)"
    with pytest.raises(RuntimeError, match=advice):
        pipe(**given)
    restored(pipe.transformer, "PAGJointAttnProcessor2_0 on transformer_blocks.1.attn. ")
    assert pipe(**given).images.shape == (1, 4, 16, 16)
    model.set_attn_processor(dict(own))
    assert torch.equal(sample(flexclear.restore(flexclear.transform(model, r=2)), call), dense)


def lose_hooks(model):
    """What code that clears all hooks does."""
    model._forward_pre_hooks.clear()
    model._forward_hooks.clear()


def lose_a_processor(model):
    """What an interrupted ``set_processor`` leaves."""
    del model.transformer_blocks[0].attn.processor


def lose_a_block(model):
    model.transformer_blocks[0] = torch.nn.Identity()


@pytest.mark.parametrize("loss", [lose_hooks, lose_a_processor, lose_a_block])
@pytest.mark.parametrize("down_factor", [None, 2])
def test_after_a_loss_the_rest_is_restored(loss, down_factor):
    model, _ = small("flux")
    own = model.attn_processors
    flexclear.transform(model, r=2, backend="sdpa", down_factor=down_factor)
    loss(model)
    restored(model)
    assert model.single_transformer_blocks[0].attn.processor is own["single_transformer_blocks.0.attn.processor"]
    if loss is lose_hooks:
        assert model.attn_processors == own


def test_windows_that_diffusers_puts_back_after_restore_are_taken_off_again():
    model, call = small("sd3")
    dense = sample(model, call)
    flexclear.transform(model, r=2, backend="sdpa")
    model.fuse_qkv_projections()
    flexclear.transform(model, r=2, backend="sdpa")
    restored(model)
    model.unfuse_qkv_projections()
    with pytest.raises(ValueError, match="called without its window"):
        sample(model, call)
    assert torch.equal(sample(restored(model), call), dense)


def test_a_compiled_model_is_restored_below_its_wrapper():
    model, call = small("flux")
    dense = sample(model, call)
    flexclear.transform(model, r=2, backend="sdpa")
    pipe = Pipe(torch.compile(model, backend="eager"))
    restored(pipe.transformer)
    assert torch.equal(sample(model, call), dense)
    assert (sample(pipe.transformer, call) - dense).abs().max() <= 1e-6


def test_restoring_ends_a_run_over_several_ranks_and_so_does_disabling_with_a_foreign_processor():
    model, _ = small("sd3")
    closed = []
    session = SimpleNamespace(current=None, check=lambda *given: None, close=lambda: closed.append(True), links=None)
    for leave in (flexclear.restore, flexclear.parallel.disable):
        flexclear.parallel.attach(flexclear.transform(model, r=2, backend="sdpa"), session)
        assert hooks_of(model.proj_out)
        flexclear.transform(model, r=3, backend="sdpa")
        assert hooks_of(model.proj_out), "another transform ends the run"
        model.transformer_blocks[0].attn.set_processor(Custom())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            leave(model)
        assert not hooks_of(model.proj_out)
        assert closed.pop()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flexclear.restore(model)
        model.transformer_blocks[0].attn.set_processor(JointAttnProcessor2_0())
