"""Eight-bit linears: which, how exactly, what is said where it cannot be, and the round trip through a file."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import flexclear
from flexclear.compile import (
    RECIPES,
    load_quantized,
    quantize,
    recipes,
    runnable_recipes,
    save_quantized,
    sqnr,
    why_not_recipe,
)
from flexclear.compile.quantize import choose_linears, is_quantized, linears, weight_bytes, why_kept

from helpers.models import flux_call, tiny_flux

CPU = torch.device("cpu")
ON_CPU = ["weight_only", "int8"]
LAYER_FLOOR = {"weight_only": 28.0, "int8": 34.0}
MODEL_FLOOR = {"weight_only": 25.0, "int8": 28.0}
CAPABILITIES = {
    (7, 5): ["weight_only", "int8"],
    (8, 6): ["weight_only", "int8"],
    (8, 9): list(RECIPES),
    (9, 0): list(RECIPES),
}


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


@pytest.fixture(scope="module")
def call():
    return flux_call(16, 16, 32, dtype=torch.bfloat16)


def run(model, call):
    with torch.no_grad():
        return model(**call).sample


@pytest.mark.parametrize("recipe", ON_CPU)
def test_every_layer_and_the_whole_model_stay_above_their_floors(base, model, call, recipe):
    report = quantize(model, recipe)
    assert is_quantized(model)
    generator = torch.Generator().manual_seed(1)
    for name in report.quantized:
        linear = base.get_submodule(name)
        tokens = torch.randn(1, 64, linear.in_features, generator=generator).to(torch.bfloat16)
        with torch.no_grad():
            assert sqnr(linear(tokens), model.get_submodule(name)(tokens)) >= LAYER_FLOOR[recipe], name
    assert sqnr(run(base, call), run(model, call)) >= MODEL_FLOOR[recipe]
    assert not torch.equal(run(base, call), run(model, call))


@pytest.mark.parametrize("recipe", ON_CPU)
def test_the_weights_shrink_by_what_the_report_says(base, model, recipe):
    report = quantize(model, recipe)
    elements = sum(base.get_submodule(name).weight.numel() for name in report.quantized)
    assert report.bytes_before == weight_bytes(base) == sum(2 * p.numel() for p in base.parameters())
    assert report.bytes_after == weight_bytes(model)
    saved = report.bytes_before - report.bytes_after
    assert 0.95 * elements <= saved <= elements
    assert f"{len(report.quantized)} linears in {recipe}" in str(report)


def test_a_weight_that_torchao_would_take_for_one_block_of_scales_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    gpu = torch.device("cuda", 0)
    model = tiny_flux(num_attention_heads=2, attention_head_dim=64, axes_dims_rope=(16, 24, 24)).to(torch.bfloat16)
    name = "transformer_blocks.0.attn.to_q"
    assert model.get_submodule(name).weight.shape == (128, 128)
    _, kept = choose_linears(model, "tensorwise", 128, device=gpu)
    assert kept[name].startswith("128 x 128")
    chosen, _ = choose_linears(model, "rowwise", 128, device=gpu)
    assert name in chosen


def test_every_linear_is_quantized_or_kept_with_a_reason(model):
    names = {name for name, _, _ in linears(model)}
    report = quantize(model, "weight_only", keep=lambda name, linear: name.endswith("to_k"))
    assert set(report.quantized) | set(report.kept) == names
    assert not set(report.quantized) & set(report.kept)
    inside = {name for name, _, in_block in linears(model) if in_block}
    assert set(report.quantized) <= inside
    for name in (
        "x_embedder",
        "context_embedder",
        "proj_out",
        "norm_out.linear",
        "time_text_embed.timestep_embedder.linear_1",
    ):
        assert report.kept[name].startswith("outside the transformer blocks")
    assert report.kept["transformer_blocks.0.norm1.linear"].startswith("modulation")
    assert report.kept["transformer_blocks.0.attn.to_k"] == "kept on request"
    assert {"transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"} <= set(report.quantized)


@pytest.mark.parametrize(
    ("name", "shape", "in_block", "reason"),
    [
        ("transformer_blocks.3.attn.to_q", (3072, 3072), True, None),
        ("single_transformer_blocks.3.proj_out", (15360, 3072), True, None),
        ("transformer_blocks.3.img_mod.1", (3072, 18432), True, "modulation"),
        ("layers.3.adaLN_modulation.0", (256, 15360), True, "modulation"),
        ("transformer_blocks.3.attn.to_q", (3072, 3000), True, "odd shape"),
        ("transformer_blocks.3.attn.to_q", (64, 3072), True, "tiny"),
        ("transformer_blocks.3.attn.processor.to_k_ip.0", (4096, 3072), True, "an adapter's layer"),
        ("transformer_blocks.3.attn.to_q.lora_A.style", (3072, 16), True, "an adapter's layer"),
        ("x_embedder", (64, 3072), False, "outside the transformer blocks"),
    ],
)
def test_the_filter_names_its_reason(name, shape, in_block, reason):
    told = why_kept(name, nn.Linear(*shape, device="meta"), in_block)
    assert told is None if reason is None else told.startswith(reason)


@pytest.mark.parametrize("recipe", ON_CPU)
def test_a_quantized_model_comes_back_from_its_file_bit_for_bit(base, model, call, recipe, tmp_path):
    quantize(model, recipe)
    path = save_quantized(model, tmp_path / "model.safetensors")
    loaded = load_quantized(copy.deepcopy(base), path)
    assert torch.equal(run(loaded, call), run(model, call))
    assert weight_bytes(loaded) == weight_bytes(model)
    assert path.stat().st_mode & 0o077 == (0o666 & ~_umask()) & 0o077
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def _umask():
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_transformed_model_is_quantized_and_a_quantized_one_transformed_alike(base, call):
    first = quantize_of(flexclear.transform(copy.deepcopy(base), r=3, backend="sdpa"))
    second = copy.deepcopy(base)
    quantize(second, "weight_only")
    flexclear.transform(second, r=3, backend="sdpa")
    assert torch.equal(run(first, call), run(second, call))
    assert sqnr(run(flexclear.transform(copy.deepcopy(base), r=3, backend="sdpa"), call), run(first, call)) >= 25
    flexclear.restore(second)
    plain = copy.deepcopy(base)
    quantize(plain, "weight_only")
    assert torch.equal(run(second, call), run(plain, call))


def quantize_of(model):
    quantize(model, "weight_only")
    return model


def test_fp8_products_on_a_cpu_are_refused_with_what_can_run(model, call):
    before = run(model, call)
    with pytest.raises(ValueError, match=r"FP8 products need a CUDA device; this is 'cpu'.*can run \['weight_only'"):
        quantize(model, "rowwise")
    assert torch.equal(run(model, call), before)


def test_int8_products_that_overflow_on_this_cpu_are_refused(model, call, monkeypatch):
    """As oneDNN's do without VNNI instructions: 127 x 127, 64 times, came out as 8,160 in place of 1,032,256."""
    before = run(model, call)
    monkeypatch.setattr(recipes, "_int8_products_are_exact", lambda: False)
    with pytest.raises(ValueError, match=r"without VNNI instructions.*can run \['weight_only'\]"):
        quantize(model, "int8")
    assert torch.equal(run(model, call), before)


@pytest.mark.parametrize(("capability", "able"), CAPABILITIES.items(), ids=str)
def test_a_gpu_runs_the_recipes_of_its_capability(monkeypatch, capability, able):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    device = torch.device("cuda")
    assert runnable_recipes(device) == able
    if "rowwise" not in able:
        assert why_not_recipe("rowwise", device) == (
            f"FP8 products need compute capability 8.9; Some GPU has {capability[0]}.{capability[1]}"
        )


@pytest.mark.parametrize(
    ("make", "recipe", "error", "message"),
    [
        (lambda base: base, "fp4", ValueError, r"recipe must be one of \['rowwise'.*got 'fp4'"),
        (lambda base: "pipe", "int8", TypeError, "expected a model, got str; for a pipeline, pass pipe.transformer"),
        (lambda base: tiny_flux(), "int8", ValueError, "no linear to quantize: .*tiny: fewer than 256 features"),
        (lambda base: quantize_of(copy.deepcopy(base)), "int8", ValueError, "already quantized"),
        (
            lambda base: copy.deepcopy(base).double(),
            "int8",
            ValueError,
            r"takes weights of torch.bfloat16.*got torch.float64",
        ),
    ],
)
def test_what_cannot_be_quantized_is_named(base, make, recipe, error, message):
    with pytest.raises(error, match=message):
        quantize(make(base), recipe)


def by_quanto(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, include=["*to_q"])
    quanto.freeze(model)


def by_bitsandbytes(model):
    kind = pytest.importorskip("bitsandbytes").nn.Linear4bit
    replace_queries(model, lambda linear: kind(linear.in_features, linear.out_features, quant_type="nf4"))


def by_gguf(model):
    pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear

    replace_queries(model, lambda linear: GGUFLinear(linear.in_features, linear.out_features))


def by_diffusers_itself(model):
    kind = pytest.importorskip("diffusers.quantizers.bfl.utils").BFLFP8RLinear
    replace_queries(model, lambda linear: kind(linear.in_features, linear.out_features))


def by_hand(model):
    def stored(linear):
        linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
        return linear

    replace_queries(model, stored)


def replace_queries(model, make):
    for attn in [module for name, module in model.named_modules() if name.endswith("attn")]:
        attn.to_q = make(attn.to_q)


@pytest.mark.parametrize("by", [by_quanto, by_bitsandbytes, by_gguf, by_diffusers_itself, by_hand])
def test_weights_that_another_library_has_quantized_are_refused_by_name(model, by):
    by(model)
    layer = r"\(transformer_blocks.0.attn.to_q is a \w*Linear\w* of [\w.]+\)"
    for options, message in (
        ({"fp8": "int8"}, rf"FluxTransformer2DModel is already quantized {layer}: leave this pass out \(fp8=False\)"),
        ({"fuse_qkv": True}, rf"fuse_qkv concatenates weights, .* quantized ones {layer}"),
    ):
        with pytest.raises(ValueError, match=message):
            flexclear.optimize(model, compile=False, **options)
    assert not is_quantized(model)
    assert not any(name.endswith("to_qkv") for name, _ in model.named_modules())


def test_a_file_that_does_not_fit_changes_nothing(base, model, call, tmp_path):
    quantize(model, "int8")
    path = save_quantized(model, tmp_path / "model.safetensors")
    whole = path.read_bytes()
    target = copy.deepcopy(base)
    before = run(target, call)

    def refused(message, content=None, error=ValueError, other=target):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(error, match=message):
            load_quantized(other, path)

    refused("is damaged or not a safetensors file", whole[: len(whole) // 2])
    refused("is damaged or not a safetensors file", b"not a file of weights")
    path.write_bytes(whole)
    refused(
        r"does not fit this FluxTransformer2DModel \(it was saved from a FluxTransformer2DModel\)",
        other=tiny_flux(),
    )
    path.unlink()
    refused("no file", error=FileNotFoundError)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path, {"other": json.dumps({})})
    refused("does not hold quantized weights of flexclear")
    assert torch.equal(run(target, call), before)
    with pytest.raises(ValueError, match="is not quantized"):
        save_quantized(base, path)
