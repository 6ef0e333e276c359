"""Eight-bit weights offloaded, copied, cast, written and read."""

from __future__ import annotations

import copy
import io

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading

from flexclear.compile import (
    load_quantized,
    quantize,
    save_quantized,
    sqnr,
)
from flexclear.compile.quantize import is_quantized

from helpers.eight_bit import CPU, FLOOR, RECIPES, eight_bit, local, pipeline, run

pytestmark = pytest.mark.filterwarnings(
    "ignore:TorchaoLoraLinear was instantiated", "ignore:Already found a `peft_conf"
)


def whole(model):
    accelerate.cpu_offload_with_hook(model, execution_device=CPU)


def sequential(model):
    accelerate.cpu_offload(model, execution_device=CPU)


def group(**options):
    return lambda model: apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **options)


OFFLOADS = {
    "whole model": whole,
    "sequential": sequential,
    "groups of blocks": group(offload_type="block_level", num_blocks_per_group=1),
    "groups of leaves": group(offload_type="leaf_level"),
}


@pytest.mark.parametrize("kind", OFFLOADS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_offloaded_eight_bit_model_gives_what_it_gives_at_home(base, recipe, kind):
    model = eight_bit(local(base, down_factor=2), recipe)
    expected = run(model)
    OFFLOADS[kind](model)
    assert torch.equal(run(model), expected)
    assert torch.equal(run(model), expected)
    assert is_quantized(model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_offloading_to_disk_raises(base, recipe, tmp_path):
    to_disk = group(offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path / "groups"))
    with pytest.raises(ValueError, match="Disk offloading is not supported for TorchAO"):
        to_disk(eight_bit(local(base), recipe))
    with pytest.raises(NotImplementedError, match="unimplemented operator"):
        accelerate.disk_offload(eight_bit(local(base), recipe), str(tmp_path / "leaves"), execution_device=CPU)


@pytest.mark.parametrize(
    ("offload", "message"),
    [
        (sequential, r"is on the meta device: .*enable_sequential_cpu_offload.*Quantize first, then offload"),
        (OFFLOADS["groups of blocks"], r"is offloaded in groups .*Quantize first, then offload"),
        (OFFLOADS["groups of leaves"], r"is offloaded in groups .*Quantize first, then offload"),
    ],
    ids=["sequential", "groups of blocks", "groups of leaves"],
)
def test_quantizing_what_is_offloaded_is_refused_and_changes_nothing(base, offload, message, tmp_path):
    model = local(base)
    expected = run(model)
    file = save_quantized(eight_bit(local(base), "int8"), tmp_path / "model.safetensors")
    offload(model)
    with pytest.raises(ValueError, match=message):
        quantize(model, "weight_only")
    with pytest.raises(ValueError, match="Load first, then offload"):
        load_quantized(model, file)
    assert not is_quantized(model)
    assert torch.equal(run(model), expected)


def test_a_model_offloaded_as_a_whole_may_still_be_quantized(base):
    model = local(base)
    whole(model)
    assert torch.equal(run(eight_bit(model, "weight_only")), run(eight_bit(local(base), "weight_only")))


@pytest.mark.parametrize("recipe", RECIPES)
def test_copies_pickles_and_moves_are_bit_equal(base, recipe):
    model = eight_bit(local(base), recipe)
    expected = run(model)
    assert torch.equal(run(copy.deepcopy(model)), expected)
    # torch.save, because torch (2.13) cannot read FP8 tensors that pickle alone has written.
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert torch.equal(run(torch.load(stream, weights_only=False)), expected)
    assert torch.equal(run(copy.deepcopy(model).to("cpu")), expected)
    assert torch.equal(run(pipeline(copy.deepcopy(model)).to("cpu")), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_type_after_quantizing_never_changes_eight_bit_weights(base, dtype):
    cast = {recipe: eight_bit(local(base), recipe).to(dtype) for recipe in RECIPES}
    assert all(is_quantized(model) for model in cast.values())
    with pytest.raises(RuntimeError, match="same dtype"):
        run(cast["weight_only"], dtype)
    output = run(cast["int8"], dtype)
    assert output.dtype is dtype
    assert sqnr(run(local(base)), output) >= FLOOR["int8"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_transformed_model_with_pooled_keys_comes_back_from_its_file(base, recipe, tmp_path):
    model = local(base, down_factor=2)
    for name, parameter in model.named_parameters():
        if name.endswith("spatial_weight"):
            parameter.data.normal_(0.25, 0.1)
    file = save_quantized(eight_bit(model, recipe), tmp_path / "model.safetensors")
    fresh = local(base, down_factor=2)
    unlike = run(eight_bit(copy.deepcopy(fresh), recipe))
    assert torch.equal(run(load_quantized(fresh, file)), run(model))
    assert not torch.equal(unlike, run(model)), "the pooling weights make no difference"
    for other in (local(base), local(base, down_factor=4), copy.deepcopy(base)):
        with pytest.raises(ValueError, match=r"Pooling weights differ: call flexclear.transform with .* down_factor"):
            load_quantized(other, file)
        assert not is_quantized(other)


def test_a_file_takes_the_place_of_other_eight_bit_weights(base, tmp_path):
    int8 = eight_bit(local(base), "int8")
    file = save_quantized(int8, tmp_path / "model.safetensors")
    assert torch.equal(run(load_quantized(eight_bit(local(base), "weight_only"), file)), run(int8))


def test_files_are_written_and_read_without_a_lora(base, files, tmp_path):
    pipe = pipeline(eight_bit(local(base), "int8"))
    expected = run(pipe)
    file = save_quantized(pipe.transformer, tmp_path / "model.safetensors")
    pipe.load_lora_weights(files["first"])
    adapted = run(pipe)
    with pytest.raises(
        ValueError, match=r"attn.to_q of this FluxTransformer2DModel has a LoRA loaded.*Save without it"
    ):
        save_quantized(pipe.transformer, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has a LoRA loaded.*Load without it"):
        load_quantized(pipe.transformer, file)
    assert torch.equal(run(pipe), adapted)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    other = pipeline(load_quantized(local(base), file))
    assert torch.equal(run(other), expected)
    other.load_lora_weights(files["first"])
    assert torch.equal(run(other), adapted)


def test_weights_that_are_away_are_not_saved(base, tmp_path):
    model = eight_bit(local(base), "weight_only")
    sequential(model)
    with pytest.raises(ValueError, match=r"is on the meta device.*Save first, then offload"):
        save_quantized(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_diffusers_itself_saves_eight_bit_weights_as_a_pickle_only(base, recipe, tmp_path):
    model = eight_bit(copy.deepcopy(base), recipe)
    with pytest.raises(RuntimeError, match="invalid python storage"):
        model.save_pretrained(tmp_path / "safe")
    model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    loaded = type(model).from_pretrained(tmp_path / "pickle", torch_dtype=torch.bfloat16, use_safetensors=False)
    assert torch.equal(run(loaded), run(model))
