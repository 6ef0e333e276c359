"""LoRA through peft on a transformed FLUX: what the adapters do to the stock model they do to ours."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save_file

import flexclear

from helpers.models import flux_call

ORDERS_OF_EVENTS = ["transform first", "adapter first"]
LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v")


def lora_file(folder, model, seed, rank=4, layers=LAYERS):
    """A LoRA in diffusers' naming over attention, feed-forward and single-block layers of ``model``."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(name.endswith(layer) for layer in layers):
            weights[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator)
            weights[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator)
    path = folder / f"lora_{seed}.safetensors"
    save_file({name: weight * 0.3 for name, weight in weights.items()}, path)
    return path


@pytest.fixture
def first(tmp_path, twins):
    return lora_file(tmp_path, twins.theirs.transformer, 1)


@pytest.fixture
def second(tmp_path, twins):
    return lora_file(tmp_path, twins.theirs.transformer, 2, rank=2, layers=(*LAYERS, "proj_mlp", "attn.add_q_proj"))


def loaded(twins, events, *files):
    """Both twins with the files loaded as adapters "0", "1", ..., ours transformed before or after."""
    if events == "transform first":
        twins.transform()
    for number, file in enumerate(files):
        twins.both(lambda pipe, n=number, f=file: pipe.load_lora_weights(f, adapter_name=str(n)))
    if events == "adapter first":
        twins.transform()
    return twins


@pytest.mark.parametrize("events", ORDERS_OF_EVENTS)
def test_a_loaded_adapter_acts_as_on_the_original_and_leaves_with_it(twins, first, events):
    plain = twins.transform().agree()
    flexclear.restore(twins.ours)
    adapted = loaded(twins, events, first).agree()
    assert (adapted - plain).abs().max() > 1e-2, "the adapter makes no difference"
    twins.both(lambda pipe: pipe.unload_lora_weights())
    assert torch.equal(twins.agree(), plain)


@pytest.mark.parametrize("events", ORDERS_OF_EVENTS)
def test_the_scale_of_a_call_reaches_the_adapter(twins, first, events):
    plain = twins.transform().agree()
    whole = loaded(twins, events, first).agree()
    half = twins.agree(extra={"scale": 0.5})
    assert (half - whole).abs().max() > 1e-2
    assert (half - plain).abs().max() > 1e-2
    assert (twins.agree(extra={"scale": 0.0}) - plain).abs().max() <= 1e-5
    assert torch.equal(twins.agree(), whole), "a call's scale stayed behind"


@pytest.mark.parametrize("events", ORDERS_OF_EVENTS)
def test_two_adapters_mix_by_weight_and_switch_off(twins, first, second, events):
    loaded(twins, events, first, second)
    outputs = []
    for weights in ([1.0, 0.0], [0.3, 0.9]):
        twins.both(lambda pipe, w=weights: pipe.set_adapters(["0", "1"], w))
        outputs.append(twins.agree())
    twins.both(lambda pipe: pipe.disable_lora())
    outputs.append(twins.agree())
    twins.both(lambda pipe: pipe.enable_lora())
    twins.both(lambda pipe: pipe.delete_adapters("0"))
    outputs.append(twins.agree())
    for before, after in itertools.pairwise(outputs):
        assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("events", ORDERS_OF_EVENTS)
def test_an_adapter_is_fused_into_the_weights_and_taken_out_again(twins, first, events):
    plain = twins.transform().agree()
    adapted = loaded(twins, events, first).agree()
    twins.both(lambda pipe: pipe.fuse_lora())
    fused = twins.agree()
    assert (fused - adapted).abs().max() <= 1e-4
    assert not torch.equal(fused, adapted), "nothing was fused"
    twins.both(lambda pipe: pipe.unfuse_lora())
    assert (twins.agree() - adapted).abs().max() <= 1e-4
    twins.both(lambda pipe: pipe.fuse_lora(lora_scale=0.5))
    assert (twins.agree() - adapted).abs().max() > 1e-2
    twins.both(lambda pipe: pipe.unfuse_lora())
    twins.both(lambda pipe: pipe.unload_lora_weights())
    assert (twins.agree() - plain).abs().max() <= 1e-4


@pytest.mark.parametrize("events", ORDERS_OF_EVENTS)
def test_a_hot_swapped_adapter_takes_the_place_of_the_first(twins, tmp_path, first, events):
    other = lora_file(tmp_path, twins.theirs.transformer, 5, rank=2)
    if events == "transform first":
        twins.transform()
    twins.both(lambda pipe: pipe.enable_lora_hotswap(target_rank=8))
    twins.both(lambda pipe: pipe.load_lora_weights(first, adapter_name="only"))
    if events == "adapter first":
        twins.transform()
    before = twins.agree()
    twins.both(lambda pipe: pipe.load_lora_weights(other, adapter_name="only", hotswap=True))
    swapped = twins.agree()
    assert (swapped - before).abs().max() > 1e-2
    assert twins.ours.get_list_adapters() == {"transformer": ["only"]}


def test_restoring_keeps_the_adapter_and_gives_back_the_original_s_output(twins, first):
    loaded(twins, "transform first", first).agree()
    flexclear.restore(twins.ours)
    call = flux_call(9, 13, 20)
    with torch.no_grad():
        assert torch.equal(twins.ours.transformer(**call).sample, twins.theirs.transformer(**call).sample)


def test_pooling_weights_stay_as_they_are_under_an_adapter(twins, first):
    twins.transform(down_factor=2)
    model = twins.ours.transformer
    for name, parameter in model.named_parameters():
        if "spatial_weight" in name:
            parameter.data.normal_(0.25, 0.1)
    trained = {name: p.clone() for name, p in model.named_parameters() if "spatial_weight" in name}
    twins.ours.load_lora_weights(first, adapter_name="0")
    twins.ours.fuse_lora()
    twins.ours.unfuse_lora()
    twins.ours.unload_lora_weights()
    after = {name: p for name, p in model.named_parameters() if "spatial_weight" in name}
    assert len(trained) == 4
    assert trained.keys() == after.keys()
    assert all(torch.equal(trained[name], after[name]) for name in trained)


def test_an_adapter_trains_on_a_transformed_model_and_its_weights_save_under_diffusers_names(twins, tmp_path):
    from diffusers import FluxPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    twins.transform()
    model = twins.ours.transformer.requires_grad_(False)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=layers))
    with torch.no_grad():
        untrained = model(**flux_call(9, 13, 20, 2)).sample
    trainable = [p for p in model.parameters() if p.requires_grad]
    step = torch.optim.SGD(trainable, lr=5.0)
    for _ in range(3):
        model(**flux_call(9, 13, 20)).sample.square().mean().backward()
        step.step()
        step.zero_grad()
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=weights)
    with torch.no_grad():
        trained = model(**flux_call(9, 13, 20, 2)).sample
    twins.theirs.load_lora_weights(tmp_path)
    assert (trained - untrained).abs().max() > 1e-3
    assert (twins.agree() - trained).abs().max() <= 1e-6
