"""diffusers' own switches on a transformed FLUX: fused projections, checkpointing, training, casting, backends."""

from __future__ import annotations

import copy

import pytest
import torch

import flexclear

from helpers.models import flux_call, tiny_flux


@pytest.mark.parametrize("events", ["transform first", "fuse first"])
def test_fused_projections_act_as_on_the_original_and_come_apart_again(twins, events):
    plain = twins.transform().agree()
    flexclear.restore(twins.ours)
    if events == "transform first":
        twins.transform()
    twins.both(lambda pipe: pipe.transformer.fuse_qkv_projections())
    if events == "fuse first":
        twins.transform()
    assert any(name.endswith("to_qkv") for name, _ in twins.ours.transformer.named_modules())
    assert (twins.agree() - plain).abs().max() <= 1e-5
    twins.both(lambda pipe: pipe.transformer.unfuse_qkv_projections())
    assert torch.equal(twins.agree(), plain)
    flexclear.restore(twins.ours)
    with torch.no_grad():
        ours, theirs = (pipe.transformer(**flux_call(9, 13, 20)).sample for pipe in (twins.ours, twins.theirs))
    assert torch.equal(ours, theirs)


def pooled(seed=0):
    """A model with down-sampled keys whose pooling weights are not all alike."""
    model = flexclear.transform(tiny_flux(), r=3, down_factor=2, backend="sdpa")
    generator = torch.Generator().manual_seed(seed)
    for processor in model.attn_processors.values():
        processor.spatial_weight.data += 0.1 * torch.randn(processor.spatial_weight.shape, generator=generator)
    return model


def gradients(model, call):
    model.zero_grad()
    model(**call).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_reaches_the_pooling_weights(use_reentrant):
    model, call = pooled().train(), flux_call(8, 12, 16, 2)
    plain = gradients(model, call)
    trained = [name for name in plain if "spatial_weight" in name]
    assert len(trained) == 4
    assert all(plain[name].abs().max() > 0 for name in trained)

    def checkpoint(function, *args):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=use_reentrant)

    model.enable_gradient_checkpointing(checkpoint)
    again = gradients(model, call)
    assert all(torch.allclose(plain[name], again[name], atol=1e-7) for name in plain)
    model.disable_gradient_checkpointing()
    assert all(torch.equal(plain[name], grad) for name, grad in gradients(model, call).items())


def test_training_mode_and_eval_mode_give_the_same_output():
    model, call = pooled(), flux_call(8, 12, 16)
    with torch.no_grad():
        assert torch.equal(model.train()(**call).sample, model.eval()(**call).sample)


def test_an_optimiser_step_moves_pooling_weights_and_projections():
    model, call = pooled().train(), flux_call(8, 12, 16)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**call).sample.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert "transformer_blocks.0.attn.processor.spatial_weight" in moved
    assert "single_transformer_blocks.1.attn.to_q.weight" in moved


@pytest.mark.parametrize("events", ["transform first", "casting first"])
def test_weights_kept_in_eight_bits_give_what_they_give_the_original(twins, events):
    if events == "transform first":
        twins.transform()
    twins.both(
        lambda pipe: pipe.transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        )
    )
    if events == "casting first":
        twins.transform()
    assert twins.ours.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    twins.agree()


def test_pooling_weights_compute_in_full_precision_beside_weights_kept_in_eight_bits():
    model = tiny_flux()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    flexclear.transform(model, r=3, down_factor=2, backend="sdpa")
    assert {p.spatial_weight.dtype for p in model.attn_processors.values()} == {torch.float32}
    with torch.no_grad():
        assert model(**flux_call(8, 12, 16)).sample.isfinite().all()


def test_an_attention_backend_of_diffusers_is_refused_with_the_reason():
    model = flexclear.transform(tiny_flux(), r=3, backend="sdpa")
    with pytest.raises(ValueError, match=r"attention backend .*native.* cannot be set on a transformed model"):
        model.set_attention_backend("native")
    model.reset_attention_backend()
    with torch.no_grad():
        model(**flux_call(8, 8, 4))
    flexclear.restore(model).set_attention_backend("native")
    model.reset_attention_backend()


def test_context_parallelism_is_refused_on_a_transformed_model(monkeypatch):
    from diffusers import ContextParallelConfig, ParallelConfig

    model = flexclear.transform(tiny_flux(), r=3)
    # It makes the mesh of devices, of which there are none here; what follows is diffusers' own.
    monkeypatch.setattr(type(model), "_resolve_parallel_config", lambda self, config: ParallelConfig(config))
    with pytest.raises(ValueError, match="context parallelism cannot be enabled on a transformed model"):
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))


def test_a_model_under_context_parallelism_is_not_transformed():
    from diffusers import ContextParallelConfig, ParallelConfig

    model = tiny_flux()
    model._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(ValueError, match=r"context parallelism \(ring_degree=1, ulysses_degree=2\)"):
        flexclear.transform(model)
    assert not model._forward_pre_hooks


def test_a_processor_of_somebody_else_is_refused_by_name_and_noticed_afterwards():
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    class Theirs:
        def __call__(self, attn, hidden_states, **kwargs):
            raise AssertionError

    model = tiny_flux()
    model.set_attn_processor(Theirs())
    with pytest.raises(TypeError, match=r"transformer_blocks\[0\].attn has a Theirs"):
        flexclear.transform(model)
    model.set_attn_processor(FluxAttnProcessor())
    flexclear.transform(model, r=3, backend="sdpa")
    model.single_transformer_blocks[1].attn.set_processor(FluxAttnProcessor())
    with pytest.raises(RuntimeError, match=r"single_transformer_blocks.1.attn .* was given a FluxAttnProcessor"):
        model(**flux_call(8, 8, 4))
