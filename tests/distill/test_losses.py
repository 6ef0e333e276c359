"""What the losses are: against hand-computed values, against a dense reference, and a teacher that is the stock model."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import flexclear
from flexclear.distill.batches import Batch, BatchMaker
from flexclear.distill.calls import flux_call, pack
from flexclear.distill.capture import Captured, capture, compared_layers
from flexclear.distill.config import LossConfig, TimestepConfig
from flexclear.distill.losses import Objective, attention_loss
from flexclear.distill.students import add_lora, make_teacher, trained_parameters
from flexclear.masks import Disc, Layout, dense_mask

from helpers.models import tiny_flux

HEIGHT, WIDTH, TEXT = 8, 6, 5


def batch_of(samples, count=2, dtype=torch.float64):
    batch = BatchMaker(samples, range(len(samples)), count, 0, TimestepConfig()).make(0)
    return Batch(*(getattr(batch, name).to(dtype) for name in Batch.__dataclass_fields__))


def wide(**config):
    return tiny_flux(num_single_layers=5, **config).double()


def dense_reference(model, batch, r, weights, guidance=3.5, teacher=None):
    """The losses by the stock model with a dense boolean mask in raster order, outputs taken by its own hooks; the teacher
    is the same model unless another is given."""
    mask = dense_mask(Layout(HEIGHT, WIDTH, TEXT, order="raster"), Disc(r))
    call = flux_call(model, batch, guidance)
    names = [
        name.removesuffix(".processor")
        for number, name in enumerate(model.attn_processors)  # as the released script counts
        if "single" in name and number % weights.attention_every == 0
    ]

    def outputs(network, **extra):
        found = {}
        handles = [
            network.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: found.update({name: out}))
            for name in names
        ]
        prediction = network(**call, **extra)[0]
        for handle in handles:
            handle.remove()
        return prediction, found

    student, own = outputs(model, joint_attention_kwargs={"attention_mask": mask})
    with torch.no_grad():
        taught, theirs = outputs(copy.deepcopy(model) if teacher is None else teacher)
    flow = (student - pack(batch.noise - batch.latents)).square().mean()
    prediction = (student - taught).square().mean()
    attention = sum((own[name] - theirs[name]).square().mean() for name in names) / len(names)
    return weights.flow * flow + weights.prediction * prediction + weights.attention * attention


@pytest.mark.parametrize("order", ["tiled", "raster"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradients_of_every_trained_parameter_are_those_of_a_dense_reference(samples, order, checkpointing):
    reference, student = wide(), wide()
    batch, weights = batch_of(samples), LossConfig(attention_every=3)
    flexclear.transform(student, r=2, backend="sdpa", order=order)
    trained = trained_parameters(student)
    teacher = make_teacher(student, trained.values())
    if checkpointing:
        student.enable_gradient_checkpointing()
    expected = dense_reference(reference, batch, 2, weights)
    expected.backward()
    found = Objective(student, teacher, weights)(batch).total
    found.backward()
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    parameters = dict(reference.named_parameters())
    assert len(trained) == 2 * (3 * 7 + 2)
    for name, parameter in trained.items():
        assert (parameter.grad - parameters[name].grad).abs().max() < 1e-10, name
        assert parameter.grad.abs().max() > 1e-8, name


def test_the_gradient_of_the_pooling_weights_is_that_of_finite_differences(samples):
    student = wide()
    flexclear.transform(student, r=2, down_factor=2, backend="sdpa")
    teacher = make_teacher(student, trained_parameters(student).values())
    objective, batch = Objective(student, teacher, LossConfig()), batch_of(samples)
    objective(batch).total.backward()
    names = [name for name in trained_parameters(student) if name.endswith("spatial_weight")]
    assert len(names) == 7
    for name in names[::3]:
        weight = trained_parameters(student)[name]
        ends = {}
        with torch.no_grad():
            for steps in (1, -1, 2, -2):  # of 2**-5: exact in float32, which these weights are
                weight[0, 0, 0, 1, 0, 0, 0] += steps / 32
                ends[steps] = objective(batch).total.item()
                weight[0, 0, 0, 1, 0, 0, 0] -= steps / 32
        # Five points, whose error is of fourth order: a shorter step would magnify what diffusers rotates in float32.
        slope = (8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) * 32 / 12
        assert weight.grad[0, 0, 0, 1, 0, 0, 0].item() == pytest.approx(slope, rel=1e-5)


def test_the_gradient_of_a_lora_is_that_of_the_dense_reference_by_the_chain_rule(samples):
    stock, student = wide(), wide()
    flexclear.transform(student, r=2, backend="sdpa")
    teacher = make_teacher(student)
    adapters = add_lora(student, 2, 4)
    student.double()
    batch, weights = batch_of(samples), LossConfig(attention_every=3)
    merged = copy.deepcopy(stock)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))  # B is zero at first, and hides A
        pairs = {
            name.split(".lora_A")[0]: (a, adapters[name.replace("lora_A", "lora_B")])
            for name, a in adapters.items()
            if ".lora_A." in name
        }
        for name, (a, b) in pairs.items():
            merged.get_submodule(name).weight.add_(2 * b @ a)  # alpha over rank
    expected = dense_reference(merged, batch, 2, weights, teacher=stock)
    expected.backward()
    found = Objective(student, teacher, weights)(batch).total
    found.backward()
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    assert len(pairs) == 3 * 7 + 2
    for name, (a, b) in pairs.items():
        full = merged.get_submodule(name).weight.grad
        assert (a.grad - 2 * b.T @ full).abs().max() < 1e-10, name
        assert (b.grad - 2 * full @ a.T).abs().max() < 1e-10, name
        assert min(a.grad.abs().max(), b.grad.abs().max()) > 1e-8, name


def test_the_attention_loss_of_small_numbers_is_what_a_hand_computes():
    def captured(*outputs):
        return Captured(tuple(torch.tensor(output).view(1, -1, 1) for output in outputs), None)

    student = {"single": captured([1.0, 2.0, 4.0]), "double": captured([0.0, 2.0], [3.0])}
    teacher = {"single": captured([1.0, 0.0, 3.0]), "double": captured([1.0, 2.0], [5.0])}
    # single: (0 + 4 + 1) / 3; double: the mean of image (1 + 0) / 2 and text 4
    assert attention_loss(student, teacher).item() == pytest.approx((5 / 3 + (0.5 + 4) / 2) / 2)


def test_each_loss_is_what_it_says_and_is_switched_off_by_its_weight(samples):
    student = wide()
    flexclear.transform(student, r=2, backend="sdpa")
    teacher = make_teacher(student)
    batch = batch_of(samples)
    found = Objective(student, teacher, LossConfig(1.0, 0.5, 0.5))(batch)
    with torch.no_grad():
        own, theirs = student(**flux_call(student, batch, 3.5))[0], teacher(**flux_call(student, batch, 3.5))[0]
    flow = (own - pack(batch.noise - batch.latents)).square().mean()
    assert found.flow.item() == pytest.approx(flow.item(), rel=1e-12)
    assert found.prediction.item() == pytest.approx((own - theirs).square().mean().item(), rel=1e-9)
    total = found.flow + 0.5 * found.prediction + 0.5 * found.attention
    assert found.total.item() == pytest.approx(total.item(), rel=1e-12)
    only = Objective(student, None, LossConfig(2.0, 0, 0))(batch)  # no teacher is needed
    assert only.total.item() == pytest.approx(2 * flow.item(), rel=1e-12)
    assert only.prediction is None
    assert only.attention is None
    assert set(only.values()) == {"loss", "flow"}


def test_a_student_with_a_window_that_covers_everything_has_nothing_to_learn_from_its_teacher(samples):
    student = wide()
    flexclear.transform(student, r=64, backend="sdpa")
    losses = Objective(student, make_teacher(student), LossConfig())(batch_of(samples))
    assert losses.prediction < 1e-20
    assert losses.attention < 1e-20
    assert losses.flow > 1e-3


def test_tokens_are_packed_and_numbered_as_the_flux_pipeline_does_it(samples):
    from diffusers import FluxPipeline

    batch = batch_of(samples, dtype=torch.float32)
    expected = FluxPipeline._pack_latents(batch.noise, 2, 2, 2 * HEIGHT, 2 * WIDTH)
    assert torch.equal(pack(batch.noise), expected)
    ids = FluxPipeline._prepare_latent_image_ids(1, HEIGHT, WIDTH, "cpu", torch.float32)
    model = tiny_flux(guidance_embeds=True)
    call = flux_call(model, batch, 3.5)
    assert torch.equal(call["img_ids"], ids)
    assert call["guidance"].tolist() == [3.5, 3.5]
    sigma = batch.sigmas.view(-1, 1, 1)
    noisy = (1 - sigma) * pack(batch.latents) + sigma * pack(batch.noise)
    assert (call["hidden_states"] - noisy).abs().max() < 1e-6
    assert flux_call(tiny_flux(), batch, 3.5)["guidance"] is None


def test_guidance_reaches_a_model_that_embeds_it(samples):
    student = wide(guidance_embeds=True)
    batch = batch_of(samples)
    flexclear.transform(student, r=2, backend="sdpa")
    teacher = make_teacher(student)
    at = [Objective(student, teacher, LossConfig(), guidance)(batch).total.item() for guidance in (1.0, 3.5)]
    assert abs(at[0] - at[1]) > 1e-6


@pytest.mark.parametrize("shared", [True, False])
def test_the_teacher_is_the_stock_model_whatever_the_student_becomes(samples, shared):
    stock = wide()
    student = copy.deepcopy(stock)
    flexclear.transform(student, r=2, down_factor=2, backend="sdpa")
    trained = trained_parameters(student)
    teacher = make_teacher(student, trained.values() if shared else None)
    call = flux_call(student, batch_of(samples), 3.5)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.3)
        before = student(**call)[0]
        assert torch.equal(teacher(**call)[0], stock(**call)[0])
        assert torch.equal(student(**call)[0], before)
    assert (before - stock(**call)[0]).abs().max() > 1e-2
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    own = {id(parameter) for parameter in student.parameters()}
    held_in_common = [name for name, parameter in teacher.named_parameters() if id(parameter) in own]
    projections = sum(not name.endswith("spatial_weight") for name in trained)
    assert len(held_in_common) == (len(list(stock.parameters())) - projections if shared else 0)


def test_a_teacher_that_raises_leaves_the_student_as_it_is(samples):
    student = wide()
    flexclear.transform(student, r=2, backend="sdpa")
    teacher = make_teacher(student, trained_parameters(student).values())
    batch = batch_of(samples)
    call = flux_call(student, batch, 3.5)
    with torch.no_grad():
        before = student(**call)[0]
    teacher.norm_out = nn.Identity()
    with pytest.raises(TypeError):
        Objective(student, teacher, LossConfig())(batch)
    with torch.no_grad():
        assert torch.equal(student(**call)[0], before)
    assert not any(layer._forward_hooks for name, layer in student.named_modules() if name.endswith(".attn"))


def test_of_flux_1_single_stream_blocks_1_to_37_are_compared_every_fourth_of_all_57_layers():
    from diffusers import FluxTransformer2DModel

    sizes = {"attention_head_dim": 16, "num_attention_heads": 1, "axes_dims_rope": (4, 6, 6)}
    with torch.device("meta"):
        flux_1 = FluxTransformer2DModel(num_layers=19, num_single_layers=38, **sizes)
        no_single = FluxTransformer2DModel(num_layers=6, num_single_layers=0, **sizes)
    every_fourth = [f"single_transformer_blocks.{block}.attn" for block in range(1, 38, 4)]
    assert compared_layers(flux_1, LossConfig().attention_every) == every_fourth
    assert compared_layers(no_single, 4) == ["transformer_blocks.0.attn", "transformer_blocks.4.attn"]
    with pytest.raises(ValueError, match=r"attention_every: no multiple of 4 is among .* layers, 2 to 3 of 4"):
        compared_layers(tiny_flux(), 4)
    assert LossConfig(attention_every=4) == LossConfig()


def test_outputs_are_captured_of_this_threads_calls_only(samples):
    model = wide()
    call = flux_call(model, batch_of(samples), 3.5)
    names = compared_layers(model, 3)
    assert names == ["single_transformer_blocks.1.attn", "single_transformer_blocks.4.attn"], "layers 3 and 6 of 2 + 5"
    with torch.no_grad(), capture(model, names) as found:
        other = threading.Thread(target=lambda: model(**call))
        other.start()
        other.join()
        assert not found
        model(**call)
        assert list(found) == names
    assert not model.get_submodule(names[0])._forward_hooks
