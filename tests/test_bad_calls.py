"""One table of bad calls: what is said, and that nothing is changed."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import flexclear
from flexclear.runtime.grid import read_grids

from helpers.models import flux_call, tiny_flux


def unsupported():
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_layers=1, attention_head_dim=8, num_attention_heads=2, cross_attention_dim=16, caption_channels=8,
        sample_size=8,
    )  # fmt: skip


def without_blocks():
    return tiny_flux(num_layers=0, num_single_layers=0)


def with_foreign_block():
    model = tiny_flux()
    model.transformer_blocks[1] = torch.nn.Linear(2, 2)
    return model


class PluginProcessor:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None):
        return hidden_states


def with_plugin_processor():
    model = tiny_flux()
    model.transformer_blocks[1].attn.set_processor(PluginProcessor())
    return model


TRANSFORM = {
    "radius zero": (tiny_flux, {"r": 0}, ValueError, "window radius r must be an int >= 1 in tokens, got 0"),
    "radius negative": (tiny_flux, {"r": -3}, ValueError, "got -3"),
    "radius float": (tiny_flux, {"r": 16.0}, TypeError, r"window radius r must be .*got 16.0 \(float\)"),
    "radius bool": (tiny_flux, {"r": True}, TypeError, r"got True \(bool\)"),
    "radius text": (tiny_flux, {"r": "16"}, TypeError, r"got '16' \(str\)"),
    "backend unknown": (tiny_flux, {"backend": "flash"}, ValueError, r"backend must be one of .*'sdpa'.*got 'flash'"),
    "order unknown": (tiny_flux, {"order": "morton"}, ValueError, "order must be one of .* got 'morton'"),
    "block size": (tiny_flux, {"block_size": 100}, ValueError, "block_size must be a multiple of 16 .* got 100"),
    "exact ids": (tiny_flux, {"exact_position_ids": 1}, TypeError, "exact_position_ids must be True or False, got 1"),
    "unsupported model": (
        unsupported,
        {},
        TypeError,
        "PixArtTransformer2DModel is not a model.*Supported: FluxTransformer2DModel",
    ),
    "not a model": (lambda: "flux", {}, TypeError, "got str.*Supported models: FluxTransformer2DModel"),
    "no blocks": (without_blocks, {}, ValueError, "has no blocks"),
    "foreign block": (
        with_foreign_block,
        {},
        ValueError,
        r"transformer_blocks\[1\] .* has no attention module named attn",
    ),
    "plugin": (with_plugin_processor, {}, TypeError, r"transformer_blocks\[1\].attn has a PluginProcessor"),
    "compiled": (
        lambda: torch.compile(tiny_flux()),
        {},
        TypeError,
        "already wrapped by torch.compile.*Transform first",
    ),
}


@pytest.mark.parametrize(("make", "kwargs", "error", "message"), TRANSFORM.values(), ids=TRANSFORM)
def test_a_bad_transform_is_named_and_changes_nothing(make, kwargs, error, message):
    model = make()
    before = dict(getattr(model, "attn_processors", {}))
    with pytest.raises(error, match=message):
        flexclear.transform(model, **kwargs)
    if isinstance(model, torch.nn.Module):
        assert not model._forward_pre_hooks
        assert all(model.attn_processors[name] is processor for name, processor in before.items())


@pytest.mark.parametrize("piped", [False, True], ids=["model", "pipeline"])
def test_the_model_inside_a_compiled_wrapper_is_named(piped, tmp_path):
    wrapped = torch.compile(flexclear.transform(tiny_flux(), r=2, backend="sdpa"))
    given = SimpleNamespace(transformer=wrapped) if piped else wrapped
    place = r"pipe\.transformer\._orig_mod" if piped else r"model\._orig_mod"
    for call in (
        lambda: flexclear.save_weights(given, tmp_path / "w.safetensors"),
        lambda: flexclear.explain(given, height=64, width=64),
        lambda: flexclear.optimize(given),
        lambda: flexclear.transform(given, r=3),
    ):
        with pytest.raises(TypeError, match=f"transformed FluxTransformer2DModel given is wrapped.*{place}"):
            call()
    flexclear.save_weights(wrapped._orig_mod, tmp_path / "w.safetensors")


def test_a_bad_second_transform_keeps_the_first():
    model = flexclear.transform(tiny_flux(), r=2, backend="sdpa")
    call = flux_call(8, 8, 4)
    with torch.no_grad():
        expected = model(**call).sample
        with pytest.raises(ValueError, match="got 0"):
            flexclear.transform(model, r=0)
        assert torch.equal(model(**call).sample, expected)


def ids_with(change):
    ids = flux_call(6, 8, 4)["img_ids"].clone()
    return change(ids)


def shuffled(ids):
    return ids[torch.randperm(len(ids))]


def second_picture(ids):
    ids[:, 0] = 1
    return ids


def shifted(ids):
    ids[:, 1] += 3
    return ids


def unknown_row(ids):
    ids[5, 1] = torch.nan
    return ids


def half_index(ids):
    ids[:, 0] = 0.5
    return ids


CALL = {
    "attention mask": (
        {"joint_attention_kwargs": {"attention_mask": torch.ones(52, 52, dtype=torch.bool)}},
        r"attention_mask in joint_attention_kwargs must be a bool tensor of shape \(\d, 1, 1, \d+\).* of shape \(52, 52\)",
    ),
    "missing row": ({"img_ids": ids_with(lambda ids: ids[:-3])}, r"image ids of shape \(45, 3\).* not full grids"),
    "shuffled ids": ({"img_ids": ids_with(shuffled)}, "not full grids of height x width"),
    "other index": (
        {"img_ids": ids_with(second_picture)},
        "begin with an image of index 1; the image itself has index 0",
    ),
    "shifted ids": (
        {"img_ids": ids_with(shifted)},
        "not full grids .* start at row 3 and column 0, and the first row has 8 of 48 tokens",
    ),
    "row not a number": (
        {"img_ids": ids_with(unknown_row)},
        r"image ids of shape \(48, 3\), torch.float32 hold nan at \[5, 1\]; positions must be finite",
    ),
    "index between pictures": (
        {"img_ids": ids_with(half_index)},
        "begin with an image of index 0.5; the image itself has index 0",
    ),
    "two columns": (
        {"img_ids": ids_with(lambda ids: ids[:, :2])},
        r"shape \[tokens, 3\].*got image ids of shape \(48, 2\)",
    ),
    "axes (y, x, index)": (
        {"img_ids": ids_with(lambda ids: ids[:, [1, 2, 0]])},
        r"are 6 images of 8 x 1 tokens.*rows of one image of 6 x 8 .* columns must be \(index, y, x\)",
    ),
    "axes (y, index, x)": (
        {"img_ids": ids_with(lambda ids: ids[:, [1, 0, 2]])},
        r"are 6 images of 1 x 8 tokens.*rows of one image of 6 x 8 .* columns must be \(index, y, x\)",
    ),
    "axes (index, x, y)": ({"img_ids": ids_with(lambda ids: ids[:, [0, 2, 1]])}, "not full grids of height x width"),
    "axes (x, y, index)": ({"img_ids": ids_with(lambda ids: ids[:, [2, 1, 0]])}, "not full grids of height x width"),
    "axes (x, index, y)": ({"img_ids": ids_with(lambda ids: ids[:, [2, 0, 1]])}, "not full grids of height x width"),
    "axes (layer, index, y, x)": (
        {"img_ids": ids_with(lambda ids: torch.cat([torch.zeros(48, 1), ids], dim=1))},
        "not full grids of height x width",
    ),
    "a fourth axis in use": (
        {"img_ids": ids_with(lambda ids: torch.cat([ids, torch.arange(48.0)[:, None]], dim=1))},
        "not full grids of height x width",
    ),
    "no ids": ({"img_ids": None}, "needs img_ids as a tensor, got None"),
    "no text": ({"encoder_hidden_states": None}, "needs encoder_hidden_states as a tensor, got None"),
    "longer residuals": (
        {"controlnet_block_samples": [torch.randn(1, 48, 32), torch.randn(1, 60, 32)]},
        r"controlnet_block_samples\[1\] of shape \(1, 60, 32\) does not hold one residual for each of the 48 tokens",
    ),
    "shorter residuals": (
        {"controlnet_single_block_samples": (torch.randn(1, 40, 32),)},
        r"controlnet_single_block_samples\[0\] of shape \(1, 40, 32\)",
    ),
    "other grid": (
        {"hidden_states": torch.randn(1, 40, 8)},
        r"hidden_states of shape \(1, 40, 8\) do not hold the 6 x 8",
    ),
}


def test_one_row_of_ids_with_swapped_axes_is_refused_and_reference_pictures_of_one_row_are_not():
    row = flux_call(1, 8, 4)["img_ids"]
    for axes in ([2, 1, 0], [2, 0, 1]):
        with pytest.raises(ValueError, match=r"rows of one image of 8 x 1 .* columns must be \(index, y, x\)"):
            read_grids(row[:, axes])
    reference = row.clone()
    reference[:, 0] = 10  # as FLUX.2 numbers them
    assert read_grids(torch.cat([row, reference])) == ((1, 8), (1, 8))
    reference[:, 0] = 1  # as Kontext does
    assert read_grids(torch.cat([flux_call(6, 8, 4)["img_ids"], reference])) == ((6, 8), (1, 8))


@pytest.mark.parametrize(("change", "message"), CALL.values(), ids=CALL)
def test_a_bad_call_is_named_before_any_work(change, message):
    model = flexclear.transform(tiny_flux(), r=2, backend="sdpa")
    worked = []
    model.x_embedder.register_forward_hook(lambda *_: worked.append(True))
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(**{**flux_call(6, 8, 4), **change})
    assert not worked


def test_a_block_called_without_its_window_does_not_run_dense():
    model = flexclear.transform(tiny_flux(), r=2)
    with pytest.raises(ValueError, match="called without its window"):
        model.single_transformer_blocks[0].attn(torch.randn(1, 8, 32))


def test_other_attention_backends_are_refused_not_ignored():
    model = flexclear.transform(tiny_flux(), r=2)
    with pytest.raises(ValueError, match="cannot be set on a transformed model"):
        model.set_attention_backend("native")
    copy.deepcopy(model)


def test_a_dense_mask_that_would_not_fit_is_refused_with_its_size():
    model = flexclear.transform(tiny_flux(), r=2, backend="sdpa")
    with torch.no_grad(), pytest.raises(ValueError, match=r"over 65544 tokens \(256 x 256 .* 4.0 GiB"):
        model(**flux_call(256, 256, 8))


def test_flex_with_gradients_on_cpu_is_refused():
    model = flexclear.transform(tiny_flux(), r=2, backend="flex")
    with pytest.raises(ValueError, match="on CPU it has no backward pass"):
        model(**flux_call(6, 8, 4))
