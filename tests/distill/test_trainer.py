"""Runs of a few steps: what they train, LoRA, what is written, what is refused."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import flexclear
from flexclear.distill import MemorySamples, OptimizerConfig, distill
from flexclear.distill.batches import BatchMaker
from flexclear.distill.config import HeldOutConfig, LoraConfig, SheetConfig, TimestepConfig
from flexclear.distill.losses import Objective
from flexclear.distill.students import make_teacher, trained_parameters
from flexclear.runtime.hooks import entry_hook_of

from helpers.distill_samples import random_samples
from helpers.models import flux_call, tiny_flux


def output(model):
    with torch.no_grad():
        return model(**flux_call(8, 6, 5)).sample


def test_the_weights_file_gives_a_fresh_model_what_was_trained(fresh, samples, settings):
    student, dense = fresh(), fresh()
    done = distill(student, settings(optimizer=OptimizerConfig("adamw", learning_rate=1e-2)), samples)
    loaded = flexclear.transform(fresh(), r=2, backend="sdpa")
    assert flexclear.load_weights(loaded, done.weights).radius == 2
    assert torch.equal(output(loaded), output(student))
    flexclear.transform(dense, r=2, backend="sdpa")
    assert (output(dense) - output(student)).abs().max() > 1e-3
    frozen = {n: p for n, p in dense.named_parameters() if n not in trained_parameters(dense)}
    now = dict(student.named_parameters())
    assert all(torch.equal(p, now[name]) for name, p in frozen.items())
    assert done.held_out[-1]["loss"] < done.held_out[0]["loss"]


def test_pooling_weights_train_and_are_written(fresh, samples, settings):
    student = fresh()
    done = distill(student, settings(down_factor=2, optimizer=OptimizerConfig("adamw", learning_rate=1e-2)), samples)
    loaded = flexclear.transform(fresh(), r=2, down_factor=2, backend="sdpa")
    assert flexclear.load_weights(loaded, done.weights).down_factor == 2
    weight = loaded.single_transformer_blocks[1].attn.processor.spatial_weight
    assert (weight - 0.25).abs().max() > 1e-3
    assert torch.equal(output(loaded), output(student))


def test_a_lora_is_written_for_itself_and_merged(fresh, samples, settings):
    student = fresh()
    config = settings(train="lora", lora=LoraConfig(4, 8), optimizer=OptimizerConfig("adamw", learning_rate=1e-2))
    done = distill(student, config, samples)
    merged, adapted, plain = fresh(), fresh(), fresh()
    for model in (merged, adapted, plain):
        flexclear.transform(model, r=2, backend="sdpa")
    flexclear.load_weights(merged, done.weights)
    adapted.load_lora_adapter(str(config.output / "lora"), prefix=None, use_safetensors=True)
    assert (output(merged) - output(adapted)).abs().max() < 1e-5
    assert (output(merged) - output(student)).abs().max() < 1e-5
    assert (output(merged) - output(plain)).abs().max() > 1e-3
    assert not any("lora" in name for name, _ in student.named_parameters())


def test_mixed_precision_trains_weights_in_float32_and_hands_the_model_back_in_its_own_type(samples, settings):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model = tiny_flux(num_single_layers=5).to(torch.bfloat16)
    original = copy.deepcopy(model)
    with pytest.raises(ValueError, match="mixed_precision: bf16"):
        distill(model, settings(), samples, accelerator=Accelerator(cpu=True, mixed_precision="no"))
    AcceleratorState._reset_state(True)
    try:
        done = distill(model, settings(steps=2, mixed_precision="bf16", gradient_checkpointing=True), samples)
    finally:
        AcceleratorState._reset_state(True)
    assert model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.is_gradient_checkpointing
    assert "forward" not in model.__dict__
    assert not model.training
    assert all(0 < record["loss"] < 10 for record in done.losses)
    changed = dict(original.named_parameters())
    assert any(not torch.equal(p, changed[name]) for name, p in trained_parameters(model).items())


def test_accumulated_batches_are_one_large_one(fresh, samples, settings):
    samples = MemorySamples(samples.samples[:4], 1.2, 0.1)
    config = settings(held_out=HeldOutConfig(), gradient_accumulation=2, steps=2)
    one = distill(fresh(), config, samples)
    maker = BatchMaker(samples, range(4), 2, 0, TimestepConfig())
    assert not torch.equal(maker.make(0).noise, maker.make(1).noise)
    model = fresh()
    flexclear.transform(model, r=2, backend="sdpa")
    objective = Objective(model, make_teacher(model), config.losses)
    expected = sum(objective(maker.make(number)).total.item() for number in range(2)) / 2
    assert one.losses[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_what_does_not_fit_is_refused_before_the_model_changes(fresh, samples, settings):
    model = fresh()
    other = MemorySamples([dataclasses.replace(s, pooled=torch.zeros(11)) for s in samples.samples])
    for config, data, message in (
        (settings(), other, "sample 0 has 11 pooled features, the model takes 10"),
        (settings(), None, "data is missing"),
        (settings(held_out=HeldOutConfig(count=6)), samples, "none are left to train on"),
        (settings(steps=0), samples, "steps must be"),
        (settings(r=0), samples, "radius"),
        (settings(attention="swin"), samples, "r and down_factor are for"),
        (settings(attention="swine", r=None), samples, "attention must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(model, config, data)
    assert entry_hook_of(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_missing_package_is_named(fresh, samples, settings, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ImportError, match="prodigyopt"):
        distill(fresh(), settings(optimizer=OptimizerConfig(name="prodigy")), samples)


def test_a_batch_larger_than_the_data_is_refused(fresh, samples, settings):
    model = fresh()
    distill(model, settings("four", steps=1, batch_size=4), samples)
    with pytest.raises(ValueError, match="batch_size is 5, but there are only 4 samples to train on"):
        distill(fresh(), settings("five", steps=1, batch_size=5), samples)


@pytest.mark.parametrize(
    ("attention", "sizes"), [("linear", {}), ("sigmoid", {}), ("swin", {"size": 4}), ("pixart", {"factor": 2})]
)
def test_every_alternative_trains_and_its_file_gives_the_student_back(fresh, samples, settings, attention, sizes):
    student, loaded = fresh(), fresh()
    config = settings(
        r=None, attention=attention, sizes=sizes, steps=3, optimizer=OptimizerConfig("adamw", learning_rate=1e-3)
    )
    done = distill(student, config, samples)
    assert done.held_out[-1]["loss"] < done.held_out[0]["loss"]
    flexclear.transform(loaded, attention=config.mechanism, backend="sdpa")
    before = output(loaded)
    if attention == "swin":
        flexclear.load_weights(loaded, done.weights)
    else:
        assert not loaded.load_state_dict(load_file(done.weights), strict=False).unexpected_keys
    assert torch.equal(output(loaded), output(student))
    assert (before - output(student)).abs().max() > 1e-5


def test_a_student_may_start_from_weights_of_another_window(fresh, samples, settings):
    first = distill(fresh(), settings("first", r=3, steps=2), samples)
    student = fresh()
    second = distill(student, settings("second", r=2, steps=1, initial_weights=first.weights), samples)
    plain = distill(fresh(), settings("plain", r=2, steps=1), samples)
    assert second.losses[0]["loss"] != plain.losses[0]["loss"]
    assert {window.radius for window in entry_hook_of(student).settings.windows.values()} == {2}


def test_a_formula_does_not_start_from_weights_of_a_window(fresh, samples, settings, tmp_path):
    file = flexclear.save_weights(flexclear.transform(fresh(), r=2), tmp_path / "first.safetensors")
    model = flexclear.transform(fresh(), attention="linear", backend="sdpa")
    with pytest.raises(ValueError, match="initial_weights are for windows; this model's attention='linear'"):
        distill(model, settings(initial_weights=file), samples)
    assert flexclear.summary(model).models[0].window == "linear"


def test_prodigy_trains_where_its_package_is_installed(fresh, samples, settings):
    pytest.importorskip("prodigyopt")
    student = fresh()
    done = distill(student, settings(optimizer=OptimizerConfig(name="prodigy")), samples)
    assert done.losses[0]["learning_rate"] == 1
    assert all(0 < record["loss"] < 10 for record in done.losses)


def test_a_lora_that_was_trained_leaves_the_layers_under_their_own_names(fresh, samples, settings, tmp_path):
    student = fresh()
    before, names = dict(student.named_modules()), list(student.state_dict())
    distill(student, settings(steps=1, train="lora", lora=LoraConfig(4, 8)), samples)
    assert dict(student.named_modules()) == before
    assert list(student.state_dict()) == names
    student.save_pretrained(tmp_path / "saved")
    loaded = flexclear.from_pretrained(type(student), tmp_path / "saved").state_dict()
    assert all(torch.equal(loaded[name], own) for name, own in student.state_dict().items())


@pytest.mark.parametrize("kind", ["active", "two active", "disabled"])
def test_other_loras_are_with_the_student_as_they_are_with_the_teacher(fresh, samples, settings, kind):
    from peft import LoraConfig as Adapter

    def adapted():
        model = fresh()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name in ("style", "other"):
                model.add_adapter(Adapter(r=2, target_modules=["to_q"], init_lora_weights=False), name)
        model.set_adapter(["style", "other"] if kind == "two active" else ["style"])
        if kind == "disabled":
            model.disable_adapters()
        return model

    student, other = adapted(), adapted()
    expected = distill(other, settings("other", steps=1), samples)
    layer = student.transformer_blocks[0].attn.to_q
    state = list(layer.active_adapters), layer.disable_adapters
    flags = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    styles = {name: p.detach().clone() for name, p in student.named_parameters() if "lora_" in name}
    schedule = OptimizerConfig("adamw", learning_rate=1e-2)
    done = distill(student, settings(steps=4, train="lora", lora=LoraConfig(4, 8), optimizer=schedule), samples)
    assert done.held_out[0] == expected.held_out[0]  # the LoRA begins with nothing
    assert done.held_out[-1]["loss"] < done.held_out[0]["loss"]
    assert (list(layer.active_adapters), layer.disable_adapters) == state
    assert {name: parameter.requires_grad for name, parameter in student.named_parameters()} == flags
    now = dict(student.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in styles.items())
    assert student.transformer_blocks[0].attn.to_q is layer


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gradient_accumulation": 4}, "has gradient_accumulation 1, the settings have gradient_accumulation: 4"),
        ({"mixed_precision": "bf16"}, "has mixed_precision 'no', the settings have mixed_precision: bf16"),
        ({"tracker": "tensorboard"}, "has tracker None, the settings have tracker: tensorboard"),
    ],
    ids=str,
)
def test_an_accelerator_that_contradicts_the_settings_is_refused(
    fresh, samples, settings, monkeypatch, changed, message
):
    from accelerate import Accelerator

    there = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: object()))
    monkeypatch.setattr("flexclear.distill.preparing.importlib", there)
    with pytest.raises(ValueError, match=message):
        distill(fresh(), settings(**changed), samples, accelerator=Accelerator(cpu=True))


def test_a_student_trains_under_its_window_whatever_steps_draw_densely(settings):
    samples, losses = random_samples(4, 16, 16, channels=8, text_width=96, pooled_width=96), []
    for number, dense_steps in enumerate([(0, 0), (1, 0), (0, 1)]):
        pipe = flexclear.embedded.pipeline()
        flexclear.transform(pipe, r=2, backend="sdpa", dense_steps=dense_steps)
        if dense_steps == (0, 1):  # the scheduler is left behind its last step
            pipe(
                "a red apple", height=64, width=64, num_inference_steps=2, max_sequence_length=16, output_type="latent"
            )
        losses.append(distill(pipe, settings(str(number), steps=1), samples).held_out[0])
        assert entry_hook_of(pipe.transformer).settings.switches.dense_steps == dense_steps
    assert losses[0]["prediction"] > 1e-3
    assert losses[1] == losses[2] == losses[0]


def test_sheets_leave_the_pipeline_its_progress_bars(settings):
    pipe, samples = flexclear.embedded.pipeline(), random_samples(4, 16, 16, channels=8, text_width=96, pooled_width=96)
    pipe.set_progress_bar_config(desc="mine")
    sheets = SheetConfig(every=1, steps=1, prompts=("a red apple",), height=64, width=64)
    done = distill(pipe, settings(steps=1, sheets=sheets, held_out=HeldOutConfig(count=0)), samples)
    assert len(list((done.weights.parent / "sheets").iterdir())) == 1
    assert pipe._progress_bar_config == {"desc": "mine"}
