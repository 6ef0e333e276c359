"""Weights loaded into models that are quantized already: what comes out is what quantizing afterwards gives."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import flexclear
from flexclear.compile import RECIPES, quantize, sqnr
from flexclear.families import family_of
from flexclear.weights.keys import PROJECTIONS

from helpers.models import flux_call, tiny_flux
from helpers.weight_files import with_lora

CONFIG = {"attention_head_dim": 64, "num_attention_heads": 2, "axes_dims_rope": (16, 24, 24)}
"""Width 128: what torchao, GGUF's blocks of 32 and bitsandbytes' of 64 take."""


def flux(seed=0):
    return tiny_flux(seed, **CONFIG).to(torch.bfloat16)


@pytest.fixture
def path(tmp_path):
    """A file of other projections than ``flux()`` has."""
    return flexclear.save_weights(flexclear.transform(flux(1), r=3), tmp_path / "local.safetensors")


def run(model):
    with torch.no_grad():
        call = {
            name: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in flux_call(6, 8, 5).items()
        }
        return model(**call).sample.float()


def projections(model):
    """The linear layers that a file changes, by name."""
    found = {}
    for layer in family_of(model).layers(model):
        for part in PROJECTIONS:
            if part != "to_out.0" or hasattr(layer.module, "to_out"):
                module = layer.module.get_submodule(part)
                found[f"{layer.name}.{part}"] = getattr(module, "base_layer", module)
    return found


def parts(weight):
    """The tensors that a weight is made of."""
    data = weight.data
    names = [*getattr(data, "tensor_data_names", []), *getattr(data, "optional_tensor_data_names", [])]
    return [getattr(data, name) for name in names if getattr(data, name, None) is not None] or [data]


def same(one, other):
    """Whether two models have the same weights, down to the bytes of the quantized ones."""
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert type(parameter.data) is type(theirs[name].data), name
        for ours, their in zip(parts(parameter), parts(theirs[name]), strict=True):
            assert torch.equal(ours.view(torch.uint8), their.view(torch.uint8)), name


def quantized(model, recipe):
    """As ``quantize`` does, on CPUs without the instructions that int8 products need, too: nothing is multiplied here."""
    from torchao.quantization import quantize_

    if recipe == "weight_only":
        quantize(model, recipe, min_features=16)
    else:
        chosen = projections(model).values()
        quantize_(model, RECIPES[recipe].config(), filter_fn=lambda module, name: any(module is one for one in chosen))
    return model


@pytest.mark.parametrize("recipe", ["weight_only", "int8"])
def test_torchao_s_weights_are_as_if_quantized_afterwards(recipe, path):
    after = flux()
    flexclear.load_weights(after, path)
    quantized(after, recipe)
    before = quantized(flux(), recipe)
    untouched = {name: p for name, p in before.named_parameters() if not any(n in name for n in projections(before))}
    loaded = flexclear.load_weights(before, path)
    assert loaded.radius == 3
    same(before, after)
    assert all(dict(before.named_parameters())[name] is parameter for name, parameter in untouched.items())
    if recipe == "weight_only":
        assert torch.equal(run(before), run(after))
        exact = flux()
        flexclear.load_weights(exact, path)
        # E4M3 has three bits behind the point: errors to 1/16 of a weight, uniform in it, 20 log10(16 sqrt(3)) = 28.9 dB each.
        assert sqnr(run(exact), run(before)) > 20


def test_a_configuration_that_diffusers_quantized_by_is_repeated(path, tmp_path):
    from diffusers import FluxTransformer2DModel, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    flux().save_pretrained(tmp_path / "model")
    model = FluxTransformer2DModel.from_pretrained(
        tmp_path / "model", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.bfloat16
    )
    flexclear.load_weights(model, path)
    after = flux()
    flexclear.load_weights(after, path)
    chosen = projections(after)
    quantize_(
        after, Int8WeightOnlyConfig(), filter_fn=lambda module, name: any(module is one for one in chosen.values())
    )
    for name, linear in projections(model).items():
        for ours, theirs in zip(parts(linear.weight), parts(chosen[name].weight), strict=True):
            assert torch.equal(ours, theirs), name


def test_lora_and_a_window_of_the_file_s_stay(path):
    model = quantized(flux(), "weight_only")
    flexclear.transform(model, r=3, backend="sdpa")
    with_lora(model)
    adapters = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    assert adapters
    flexclear.load_weights(model, path)
    after = flux()
    flexclear.load_weights(after, path)
    chosen = projections(quantized(after, "weight_only"))
    for name, linear in projections(model).items():
        assert all(map(torch.equal, parts(linear.weight), parts(chosen[name].weight))), name
    assert all(torch.equal(dict(model.named_parameters())[name], kept) for name, kept in adapters.items())


def gguf_model(tmp_path, kind):
    """``flux()`` with the projections' weights in a type of GGUF's, read by diffusers from a file."""
    import gguf
    import numpy
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    model = flux()
    model.save_pretrained(tmp_path / "model")
    low = {f"{name}.weight" for name in projections(model)}
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "flux")
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if name not in low:
            writer.add_tensor(name, values)
        elif kind == gguf.GGMLQuantizationType.Q4_K:  # which only other programs write: of zeros
            block, size = gguf.GGML_QUANT_SIZES[kind]
            shape = (values.shape[0], -(-values.shape[1] // block) * size)
            writer.add_tensor(name, numpy.zeros(shape, numpy.uint8), raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return FluxTransformer2DModel.from_single_file(
        str(tmp_path / "model.gguf"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        config=str(tmp_path / "model"),
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_gguf_s_weights_are_as_if_converted_afterwards(kind, path, tmp_path):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[kind]
    model = gguf_model(tmp_path, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flexclear.load_weights(model, path)
    source = flux()
    flexclear.load_weights(source, path)
    exact = projections(source)
    for name, linear in projections(model).items():
        expected = gguf.quants.quantize(exact[name].weight.detach().float().numpy(), kind)
        assert linear.weight.quant_type == kind
        assert (linear.weight.data.as_tensor().numpy() == expected).all(), name
        assert torch.equal(linear.bias, exact[name].bias)
    # Signal to noise of the model's output, over that of weights of so many bits; a lost factor or row would end at 0 dB.
    assert (
        sqnr(run(source), run(flexclear.transform(model, r=3, backend="sdpa")))
        > {"Q8_0": 30, "Q4_0": 8, "Q5_1": 14}[kind.name]
    )


def test_types_that_cannot_be_written_become_finer_and_it_is_said(path, tmp_path):
    gguf = pytest.importorskip("gguf")
    from flexclear.weights.requantizing import Gguf

    wide = torch.nn.Linear(256, 32)
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q4_K
    block, size = gguf.GGML_QUANT_SIZES[kind]
    linear = GGUFLinear(256, 32, bias=True, compute_dtype=torch.float32)
    linear.weight = GGUFParameter(torch.zeros(32, 256 // block * size, dtype=torch.uint8), quant_type=kind)
    place = Gguf("x.to_q.weight", linear)
    assert place.shape == (32, 256)
    from flexclear.weights.requantizing import say_what_grew

    with pytest.warns(UserWarning, match=r"1 attention projections are in GGUF's Q4_K, .* stored in Q8_0 now"):
        say_what_grew([place], 1)
    kept = place.keep()
    place.write(wide.weight.detach())
    assert linear.weight.quant_type == gguf.GGMLQuantizationType.Q8_0
    x = torch.randn(4, 256)
    expected = torch.nn.functional.linear(x, wide.weight, linear.bias)
    assert sqnr(expected, linear(x)) > 35
    place.put_back(kept)
    assert linear.weight is kept


SMALL = ["x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"]
"""Layers whose inputs are fewer than bitsandbytes' kernel for CPUs takes."""

BITS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "fp4, nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


@pytest.fixture
def on_cpu(monkeypatch):
    """diffusers' loader asks for a GPU, although bitsandbytes needs none."""
    pytest.importorskip("bitsandbytes")
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(kind, "validate_environment", lambda self, *args, **options: None)


def bits_model(folder, bits):
    from diffusers import BitsAndBytesConfig, FluxTransformer2DModel

    skipped = {"llm_int8_skip_modules": SMALL}  # of every kind, whatever its name says
    return FluxTransformer2DModel.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(**BITS[bits], **skipped),
        device_map={"": "cpu"},
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.usefixtures("on_cpu")
def test_bitsandbytes_weights_are_as_if_loaded_before(bits, path, tmp_path):
    flux().save_pretrained(tmp_path / "model")
    model = bits_model(tmp_path / "model", bits)
    run(model)  # which makes what is derived from the old weights
    flexclear.load_weights(model, path)
    source = flux()
    flexclear.load_weights(source, path)
    flexclear.restore(source).save_pretrained(tmp_path / "loaded")
    after = bits_model(tmp_path / "loaded", bits)
    theirs = projections(after)
    for name, linear in projections(model).items():
        assert type(linear) is type(theirs[name])
        if bits != "int8":
            assert torch.equal(linear.weight.quant_state.absmax, theirs[name].weight.quant_state.absmax), name
    assert torch.equal(run(model), run(flexclear.transform(after, r=3)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.usefixtures("on_cpu")
def test_an_error_puts_bitsandbytes_weights_back(bits, path, tmp_path, monkeypatch):
    flux().save_pretrained(tmp_path / "model")
    model = flexclear.transform(bits_model(tmp_path / "model", bits), r=3)
    before = run(model)
    fail_at_the_last_tensor(monkeypatch)
    with pytest.raises(RuntimeError, match="planted"):
        flexclear.load_weights(model, path)
    assert torch.equal(run(model), before)


def test_bitsandbytes_weights_that_are_kept_in_float16_stay_so():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from flexclear.weights.requantizing import Plain, place_of

    linear = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=True).half()
    weight, value = linear.weight, torch.randn(32, 64)
    place = place_of(linear, "weight", "x.to_q.weight")
    assert type(place) is Plain
    assert place.shape == (32, 64)
    kept = place.keep()
    place.write(value)
    assert linear.weight is weight
    assert torch.equal(weight.data, value.half())
    place.put_back(kept)
    assert torch.equal(weight.data, kept)


def test_an_error_puts_torchao_s_weights_back(path, monkeypatch):
    model = flexclear.transform(quantized(flux(), "weight_only"), r=3)
    kept = copy.deepcopy(model)
    weights = {name: id(parameter) for name, parameter in model.named_parameters()}
    fail_at_the_last_tensor(monkeypatch)
    with pytest.raises(RuntimeError, match="planted"):
        flexclear.load_weights(model, path)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == weights
    same(model, kept)


def fail_at_the_last_tensor(monkeypatch):
    """The last tensor of a file cannot be read."""
    from flexclear.weights import load

    real = load.safe_open

    class Failing:
        def __init__(self, *args, **options):
            self.file = real(*args, **options)

        def __enter__(self):
            self.tensors = self.file.__enter__()
            self.left = len(self.tensors.keys())
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_tensor(self, name):
            self.left -= 1
            if not self.left:
                raise RuntimeError("planted")
            return self.tensors.get_tensor(name)

    monkeypatch.setattr(load, "safe_open", Failing)
    from flexclear.weights import files

    assert files.safe_open is real, "headers are read as before"


def test_another_configuration_of_torchao_s_is_refused_and_nothing_changes(path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = flux()
    chosen = projections(model)
    quantize_(
        model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: any(module is one for one in chosen.values())
    )
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"by a configuration that the model does not name .* then quantize"):
        flexclear.load_weights(model, path)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert not flexclear.is_transformed(model)
