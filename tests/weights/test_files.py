"""load_weights and save_weights: files in the layout of the released ones, against independent readings of them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import flexclear
from flexclear.masks import Disc, Downsampled, Full, Square, Swin
from flexclear.runtime.hooks import entry_hook_of

from helpers.models import flux_call, tiny_flux
from helpers.weight_files import (
    CALL,
    assert_unchanged,
    full_flux,
    raw_header,
    released,
    run,
    snapshot,
    tiny_file,
    windows_of,
)


@pytest.mark.parametrize(
    ("name", "radius", "down_factor"),
    [
        ("clear_local_8.safetensors", 8, None),
        ("clear_local_16.safetensors", 16, None),
        ("clear_local_32.safetensors", 32, None),
        ("clear_local_8_down_4.safetensors", 8, 4),
        ("clear_local_16_down_4.safetensors", 16, 4),
    ],
)
def test_a_file_of_the_released_layout_and_name_is_loaded_whole(tmp_path, name, radius, down_factor):
    path = tmp_path / name
    save_file(released(down_factor), path)
    model = full_flux()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    loaded = flexclear.load_weights(model, path)
    expected = 57 * 6 + 19 * 2 + (57 if down_factor else 0)
    assert (loaded.radius, loaded.down_factor, loaded.tensors, loaded.path) == (radius, down_factor, expected, path)
    window = Disc(radius) if down_factor is None else Downsampled(Disc(radius), down_factor)
    assert set(windows_of(model).values()) == {window}
    assert len(windows_of(model)) == 57
    state, file = model.state_dict(), load_file(path)
    assert len(file) == expected
    assert all(torch.equal(state[key], tensor) for key, tensor in file.items())
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items() if key not in file)
    assert not any(torch.equal(before[key], tensor) for key, tensor in file.items() if key in before)
    assert torch.isfinite(run(model, CALL)).all()


@pytest.mark.parametrize("down_factor", [None, 4])
def test_a_saved_file_has_the_released_names_and_shapes_and_says_what_it_is_for(tmp_path, down_factor):
    model = flexclear.transform(full_flux(), r=8, down_factor=down_factor, backend="sdpa")
    path = flexclear.save_weights(model, tmp_path / "new" / "mine.safetensors", base="black-forest-labs/FLUX.1-dev")
    metadata, tensors = raw_header(path)
    assert tensors == {key: (tuple(t.shape), "F32") for key, t in released(down_factor).items()}
    assert metadata["base"] == "black-forest-labs/FLUX.1-dev"
    assert (metadata["r"], metadata.get("down_factor")) == ("8", down_factor and str(down_factor))
    assert metadata["window"] == (
        "Disc(radius=8)" if down_factor is None else "Downsampled(window=Disc(radius=8), factor=4)"
    )
    assert metadata["flexclear"] == flexclear.__version__
    assert metadata["torch"] == torch.__version__
    assert {"diffusers", "flexclear_format"} <= set(metadata)


@pytest.mark.parametrize("down_factor", [None, 2])
def test_save_restore_load_gives_bit_equal_outputs(model, tmp_path, down_factor):
    call = flux_call(8, 6, 5)
    flexclear.transform(model, r=3, down_factor=down_factor)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "spatial_weight" in name or "to_q" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = run(model, call)
    path = flexclear.save_weights(model, tmp_path / "mine.safetensors")
    other = tiny_flux(num_attention_heads=1)
    assert not torch.equal(run(flexclear.transform(copy.deepcopy(other), r=3, down_factor=down_factor), call), expected)
    loaded = flexclear.load_weights(other, path)
    assert (loaded.radius, loaded.down_factor) == (3, down_factor)
    assert torch.equal(run(other, call), expected)
    flexclear.restore(model)
    flexclear.load_weights(model, path)
    assert torch.equal(run(model, call), expected)


@pytest.mark.parametrize(
    "r",
    [
        [2, 3, None, 4],
        {"default": Square(2), "single_transformer_blocks.1": Downsampled(Disc(2), 2)},
        Square(3),
        {"transformer_blocks": Swin(4, 2) & Full(), "default": Disc(2) | Square(2)},
        None,
    ],
)
def test_windows_that_differ_by_layer_come_back(model, tmp_path, r):
    call = flux_call(8, 6, 5)
    flexclear.transform(model, r=r)
    expected, windows = run(model, call), windows_of(model)
    path = flexclear.save_weights(model, tmp_path / "mine.safetensors")
    assert "r" not in raw_header(path)[0]
    loaded = flexclear.load_weights(flexclear.restore(model), path)
    assert (loaded.radius, loaded.down_factor) == (None, None)
    assert windows_of(model) == windows
    assert torch.equal(run(model, call), expected)


def test_metadata_of_one_radius_is_used_whatever_the_file_is_called(model, tmp_path):
    path = tiny_file(
        tmp_path / "clear_local_32.safetensors", 2, {"r": "5", "down_factor": "2", "base": "somebody/flux"}
    )
    loaded = flexclear.load_weights(model, path)
    assert (loaded.radius, loaded.down_factor, loaded.base) == (5, 2, "somebody/flux")


def test_without_a_word_in_the_file_the_model_s_radius_and_the_weights_shape_hold(model, tmp_path):
    path = tiny_file(tmp_path / "weights.safetensors", 2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"neither the metadata nor the name of .*transform\(model, r=\.\.\.\) first"):
        flexclear.load_weights(model, path)
    assert_unchanged(model, before)
    flexclear.transform(model, r=3, order="raster", backend="sdpa")
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="another window"):
            flexclear.load_weights(model, path)
    assert_unchanged(model, before)
    with pytest.warns(UserWarning, match="another window"):
        loaded = flexclear.load_weights(model, path)
    assert (loaded.radius, loaded.down_factor) == (3, 2)
    assert set(windows_of(model).values()) == {Downsampled(Disc(3), 2)}


def test_a_model_with_the_file_s_window_keeps_hooks_and_processors(model, tmp_path, recwarn):
    path = tiny_file(tmp_path / "clear_local_8_down_2.safetensors", 2)
    flexclear.transform(model, r=8, down_factor=2, order="raster")
    before = snapshot(model)[1:]
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    flexclear.load_weights(model, path)
    assert snapshot(model)[1:] == before
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert not recwarn.list


def test_a_model_with_another_window_gets_the_file_s_and_keeps_the_other_settings(tmp_path):
    pipe = flexclear.embedded.pipeline()
    flexclear.transform(
        pipe, r=3, order="raster", backend="sdpa", block_size=64, dense_steps=(1, 0), ntk_factor=2.0,
        exact_position_ids=False,
    )  # fmt: skip
    path = flexclear.save_weights(flexclear.transform(flexclear.embedded.pipeline(), r=5), tmp_path / "w.safetensors")
    before = entry_hook_of(pipe.transformer).settings
    with pytest.warns(UserWarning, match="another window"):
        flexclear.load_weights(pipe.transformer, path)
    after = entry_hook_of(pipe.transformer).settings
    assert set(after.windows.values()) == {Disc(5)}
    for name in ("backend", "order", "block_size", "exact_position_ids", "switches", "steps"):
        assert getattr(after, name) == getattr(before, name), name
    pipe.set_progress_bar_config(disable=True)
    pipe("an apple", height=64, width=64, num_inference_steps=2, max_sequence_length=16, output_type="latent")


def test_numbers_are_cast_to_the_model_s_type_in_place(model, tmp_path):
    path = tiny_file(tmp_path / "clear_local_8_down_2.safetensors", 2, dtype=torch.float16)
    model.to(torch.bfloat16)
    identities = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    flexclear.load_weights(model, path)
    state, file = model.state_dict(), load_file(path)
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    assert all(torch.equal(state[key], tensor.to(torch.bfloat16)) for key, tensor in file.items())
    now = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    assert {name: now[name] for name in identities} == identities


def test_weights_for_dense_layers_take_a_formula_s_place(tmp_path):
    file = flexclear.save_weights(flexclear.transform(tiny_flux(), None), tmp_path / "dense.safetensors")
    model = flexclear.transform(tiny_flux(), attention="linear", backend="sdpa")
    with pytest.warns(UserWarning, match="trained for another window"):
        flexclear.load_weights(model, file)
    assert flexclear.summary(model).models[0].window.startswith("dense in all")
