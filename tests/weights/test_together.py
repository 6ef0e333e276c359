"""Weights beside LoRA, offloading, compilation and other families, and how they are saved."""

from __future__ import annotations

import copy
import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file

import flexclear
from flexclear.masks import Window

from helpers.models import flux_call, tiny_flux
from helpers.weight_files import LAST, Foreign, grouped, raw_header, run, tiny_file, with_lora


def test_weights_go_below_a_lora_and_are_saved_without_it(model, tmp_path):
    path, call = tiny_file(tmp_path / "clear_local_8.safetensors"), flux_call(8, 6, 5)
    plain = copy.deepcopy(model)
    flexclear.load_weights(plain, path)
    expected = run(with_lora(plain), call)
    flexclear.load_weights(with_lora(model), path)
    linear = model.transformer_blocks[0].attn.to_q
    assert torch.equal(linear.base_layer.weight, load_file(path)["transformer_blocks.0.attn.to_q.weight"])
    for name, parameter in plain.named_parameters():
        if "lora" in name:
            model.get_parameter(name).data.copy_(parameter)
    assert torch.equal(run(model, call), expected)
    saved = load_file(flexclear.save_weights(model, tmp_path / "saved.safetensors"))
    assert saved.keys() == load_file(path).keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in load_file(path).items())


def test_weights_reach_a_model_that_is_offloaded_in_groups(model, tmp_path):
    path, call = tiny_file(tmp_path / "clear_local_8.safetensors"), flux_call(8, 6, 5)
    plain = copy.deepcopy(model)
    flexclear.load_weights(plain, path)
    expected = run(plain, call)
    flexclear.transform(model, r=8, backend="sdpa")
    grouped(model)
    run(model, call)
    flexclear.load_weights(model, path)
    assert torch.equal(run(model, call), expected)


def test_a_compiled_model_takes_weights_for_its_own_window_only(model, tmp_path):
    path = tiny_file(tmp_path / "clear_local_8.safetensors")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"Load weights first, then torch\.compile"):
        flexclear.load_weights(compiled, path)
    flexclear.transform(model, r=8)
    assert flexclear.load_weights(compiled, path).radius == 8
    assert torch.equal(model.state_dict()[LAST], load_file(path)[LAST])


def test_compiled_blocks_stay_valid_when_weights_are_loaded(model, tmp_path):
    from torch._dynamo.utils import counters

    path, call = tiny_file(tmp_path / "clear_local_3.safetensors"), flux_call(8, 6, 5)
    flexclear.transform(model, r=3, backend="sdpa")
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.compile(backend="eager", fullgraph=True)
    before = run(model, call)
    graphs = counters["stats"]["unique_graphs"]
    flexclear.load_weights(model, path)
    after = run(model, call)
    assert counters["stats"]["unique_graphs"] == graphs
    plain = tiny_flux(num_attention_heads=1)
    flexclear.load_weights(plain, path)
    assert torch.allclose(after, run(plain, call), atol=1e-5)
    assert (after - before).abs().max() > 1e-2


def test_saving_refuses_what_it_could_not_load(model, tmp_path):
    target = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match=r"is not transformed.*flexclear\.transform\(model, r=\.\.\.\) first"):
        flexclear.save_weights(model, target)
    flexclear.transform(model, r={"default": 3, 1: Foreign(3)})
    with pytest.raises(
        ValueError, match=r"transformer_blocks\.1\.attn has the window .*Foreign.*which metadata cannot"
    ):
        flexclear.save_weights(model, target)
    flexclear.transform(model, r=3)
    for name in ("w.pt", "w"):
        with pytest.raises(ValueError, match=r"must be a file whose name ends in \.safetensors"):
            flexclear.save_weights(model, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_saved_file_appears_whole_with_the_mode_that_the_umask_says(model, tmp_path, monkeypatch):
    import safetensors.torch

    flexclear.transform(model, r=3)
    target = tmp_path / "w.safetensors"
    before = os.umask(0o027)
    try:
        flexclear.save_weights(model, target)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    content = target.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        flexclear.save_weights(model, target)
    assert target.read_bytes() == content
    assert list(tmp_path.iterdir()) == [target]


def test_every_window_of_the_package_survives_json():
    from flexclear import masks
    from flexclear.masks.encoding import decode, encode

    windows = [
        masks.Disc(3), masks.Square(2), masks.Neighborhood(5), masks.Swin(8, 3), masks.Strided(4), masks.Full(),
        masks.Disc(3) & (masks.Square(2) | masks.Strided(2)), masks.Downsampled(masks.Disc(8), 4), None,
        masks.cylinder(4, 2) | masks.Anchors((0, 3)), masks.radial(8), masks.TileWindow((2, 4, 4), 3),
        masks.Neighborhood((3, 5, 7), dilation=(1, 2, 1)),
    ]  # fmt: skip
    exported = {type(w) for w in windows} | {masks.Both, masks.Either, masks.Tube, masks.Anchors, type(None)}
    public = [getattr(masks, name) for name in masks.__all__]
    assert {kind for kind in public if isinstance(kind, type) and issubclass(kind, Window)} - {Window} <= exported
    assert [decode(json.loads(json.dumps(encode(window, "here")))) for window in windows] == windows


def test_other_families_keep_their_projections_under_the_same_names(tmp_path):
    from diffusers import SD3Transformer2DModel

    def tiny_sd3(seed):
        torch.manual_seed(seed)
        return SD3Transformer2DModel(
            sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
            caption_projection_dim=16, pooled_projection_dim=10, in_channels=4, out_channels=4, pos_embed_max_size=8,
            dual_attention_layers=(0,),
        ).eval()  # fmt: skip

    trained, other = tiny_sd3(0), tiny_sd3(1)
    path = flexclear.save_weights(flexclear.transform(trained, r=2), tmp_path / "sd3.safetensors")
    loaded = flexclear.load_weights(other, path)
    assert (loaded.radius, loaded.tensors) == (2, 3 * 8)
    state, theirs = other.state_dict(), trained.state_dict()
    assert {key.split(".attn")[0] for key in load_file(path)} == {"transformer_blocks.0", "transformer_blocks.1"}
    for key in state:
        assert torch.equal(state[key], theirs[key]) or key not in load_file(path), key
    with pytest.raises(ValueError, match=r"2 transformer_blocks of width 16, and this FluxTransformer2DModel has"):
        flexclear.load_weights(tiny_flux(), path)


def test_the_base_model_is_what_the_model_was_loaded_from_unless_named(model, tmp_path):
    target = tmp_path / "w.safetensors"
    flexclear.transform(model, r=3)
    assert "base" not in raw_header(flexclear.save_weights(model, target))[0]
    model.save_pretrained(tmp_path / "somewhere")
    loaded = flexclear.transform(type(model).from_pretrained(tmp_path / "somewhere"), r=3)
    assert raw_header(flexclear.save_weights(loaded, target))[0]["base"] == str(tmp_path / "somewhere")
    assert raw_header(flexclear.save_weights(loaded, target, base="owner/name"))[0]["base"] == "owner/name"
    # Weights of dev run on schnell: the same blocks under another name are no obstacle.
    assert flexclear.load_weights(model, target).base == "owner/name"
