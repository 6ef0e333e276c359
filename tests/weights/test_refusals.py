"""What does not fit a model, or a model that cannot take weights: named, and nothing is changed."""

from __future__ import annotations

import tempfile

import pytest
import torch
from safetensors.torch import save_file

import flexclear
from flexclear.runtime.hooks import entry_hook_of

from helpers.weight_files import (
    DOUBLE,
    LAST,
    SINGLE,
    assert_unchanged,
    grouped,
    released,
    snapshot,
    tiny_file,
    with_lora,
)


def drop(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


def put(name, tensor):
    return lambda tensors: tensors.__setitem__(name, tensor)


def spoil(name):
    return lambda tensors: tensors[name].view(-1)[:1].fill_(float("nan"))


BAD = {
    "missing": ({"change": drop(LAST)}, rf"does not fit the model: 1 missing: {LAST}\. Nothing"),
    "many missing": (
        {"change": drop(*[f"{block}.attn.to_k.bias" for block in DOUBLE[:2] + SINGLE[:2]], LAST)},
        r"5 missing: transformer_blocks\.0\.attn\.to_k\.bias, .*, \.\.\.",
    ),
    "unexpected": ({"change": put("proj_out.weight", torch.ones(2))}, "1 unexpected: proj_out.weight"),
    "missing and unexpected": (
        {"change": lambda t: t.__setitem__("x." + LAST, t.pop(LAST))},
        f"1 missing: {LAST}; 1 unexpected: x.{LAST}",
    ),
    "shape": (
        {"change": put(LAST, torch.ones(17))},
        rf"1 of another shape: {LAST} is \(17,\) in the file, \(16,\) in the model",
    ),
    "integers": ({"change": put(LAST, torch.ones(16, dtype=torch.int8))}, f"1 of another type than .*{LAST} is I8"),
    "not finite": ({"change": spoil(LAST)}, f"{LAST} in the file holds numbers that are not finite"),
    "wider": (
        {"width": 32},
        r"2 transformer_blocks \+ 2 single_transformer_blocks of width 32, and .* width 16: another",
    ),
    "named base": (
        {"width": 32, "metadata": {"r": "8", "base": "somebody/wide"}},
        r"\(base model somebody/wide\), and this FluxTransformer2DModel has .* another base model",
    ),
    "pooling of another factor": (
        {"down_factor": 2, "metadata": {"r": "8", "down_factor": "4"}},
        r"4 of another shape: .*spatial_weight is \(1, 1, 1, 2, 1, 2, 1\) in the file, \(1, 1, 1, 4, 1, 4, 1\) in",
    ),
    "pooling missing": ({"metadata": {"r": "8", "down_factor": "4"}}, "4 missing: .*spatial_weight"),
    "pooling unexpected": ({"down_factor": 4, "metadata": {"r": "8"}}, "4 unexpected: .*spatial_weight"),
    "radius": ({"metadata": {"r": "8.5"}}, r"metadata r='8\.5'; a whole number of tokens >= 1 is expected"),
    "radius zero": ({"metadata": {"r": "0"}}, "metadata r='0'"),
    "windows": ({"metadata": {"windows": "{"}}, "metadata 'windows' that cannot be read"),
    "window unknown": (
        {"metadata": {"windows": '{"default": {"kind": "Hexagon", "radius": 2}}'}},
        "cannot be read: 'Hexagon' is not a window that this flexclear knows",
    ),
    "window without radius": ({"metadata": {"windows": '{"default": {"kind": "Disc"}}'}}, "cannot be read: .*radius"),
    "windows no mapping": ({"metadata": {"windows": "[1]"}}, "cannot be read"),
    "newer": ({"metadata": {"flexclear_format": "2", "r": "8"}}, "format '2'; this flexclear reads '1'. Update it"),
}


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_said_and_nothing_is_changed(model, tmp_path, case, transformed):
    options, message = BAD[case]
    path = tiny_file(tmp_path / "clear_local_8.safetensors", **options)
    if transformed:
        flexclear.transform(model, r=8)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        flexclear.load_weights(model, path)
    assert str(path) in str(caught.value) or "not finite" in message
    assert_unchanged(model, before)


def test_weights_of_the_full_model_on_a_smaller_one_are_another_base_model(model, tmp_path):
    path = tmp_path / "clear_local_8.safetensors"
    save_file(released(), path)
    with pytest.raises(
        ValueError,
        match=r"19 transformer_blocks \+ 38 single_transformer_blocks of width 16, and this FluxTransformer2DModel has 2 "
        r"transformer_blocks \+ 2 single_transformer_blocks of width 16: another base model\. 352 unexpected",
    ):
        flexclear.load_weights(model, path)


def test_an_interruption_in_the_middle_leaves_the_model_as_it_was(model, tmp_path, monkeypatch):
    path = tiny_file(tmp_path / "clear_local_8_down_2.safetensors", 2)
    for transform in (None, {"r": 8, "down_factor": 2}, {"r": 3, "order": "raster"}):
        if transform is not None:
            flexclear.transform(model, **transform)
        before = snapshot(model)
        calls = []
        isfinite = torch.isfinite

        def fail(value, calls=calls, isfinite=isfinite):
            calls.append(value)
            if len(calls) > 27:
                raise KeyboardInterrupt
            return isfinite(value)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "isfinite", fail)
            with pytest.raises(KeyboardInterrupt):
                flexclear.load_weights(model, path)
        assert len(calls) == 28
        assert_unchanged(model, before)


def test_files_that_are_no_safetensors_are_refused_with_the_reason(model, tmp_path):
    whole = tiny_file(tmp_path / "clear_local_8.safetensors").read_bytes()
    before = snapshot(model)

    def refused(name, content, message):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            flexclear.load_weights(model, path)
        assert_unchanged(model, before)

    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        refused(
            "cut.safetensors", whole[:cut], rf"\({cut} bytes\) is not a complete safetensors file, perhaps truncated"
        )
    refused("long.safetensors", whole + b"\0", "not a complete safetensors file")
    refused("noise.safetensors", b"\x10" * 500, "not a complete safetensors file")
    refused("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "Git LFS pointer")
    for zipped in (True, False):
        torch.save({"a": torch.ones(2)}, tmp_path / "pickle", _use_new_zipfile_serialization=zipped)
        for name in ("weights.pt", "clear_local_8.bin", "clear_local_8_.safetensors"):
            refused(name, (tmp_path / "pickle").read_bytes(), "is a pickle .*safetensors only")


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    from flexclear.weights.files import is_pickle, read_header

    for pad in range(1024):
        path = tmp_path / "a.safetensors"
        save_file({"a": torch.ones(1)}, path, {"pad": "x" * pad})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert not is_pickle(path.read_bytes()[:64])
    assert read_header(path, path.name).shapes == {"a": (1,)}


def test_missing_files_and_folders_are_named_with_what_is_nearby(model, tmp_path):
    tiny_file(tmp_path / "clear_local_8.safetensors")
    tiny_file(tmp_path / "clear_local_16.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no file .*clear_local_08.*one of \['clear_local_8\.safetensors'"):
        flexclear.load_weights(model, tmp_path / "clear_local_08.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no file .*; in .*absent: no \.safetensors file"):
        flexclear.load_weights(model, tmp_path / "absent" / "x.safetensors")
    with pytest.raises(IsADirectoryError, match=r"is a folder; name the file in it with filename=\.\.\., one of"):
        flexclear.load_weights(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="If 'owner/name' is a hub id, name the file in it with filename="):
        flexclear.load_weights(model, "owner/name")
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a hub id"):
        flexclear.load_weights(model, "no/such/folder", filename="x.safetensors")
    with pytest.raises(ValueError, match="is a file already"):
        flexclear.load_weights(model, tmp_path / "clear_local_8.safetensors", filename="clear_local_8.safetensors")
    with pytest.raises(TypeError, match="path must be a str or Path"):
        flexclear.load_weights(model, 3)
    assert entry_hook_of(model) is None
    assert flexclear.load_weights(model, tmp_path, filename="clear_local_16.safetensors").radius == 16


def test_a_hub_id_and_a_file_name_go_through_huggingface_hub(model, tmp_path, monkeypatch):
    import huggingface_hub

    tiny_file(tmp_path / "0123abcd", 2)  # the hub's cache may call a file by its hash
    asked = {}

    def download(repo_id, filename, **options):
        asked.update(options, repo_id=repo_id, filename=filename)
        return str(tmp_path / "0123abcd")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = flexclear.load_weights(
        model, "owner/clear", filename="clear_local_8_down_2.safetensors", revision="main", token="t"
    )
    assert (asked["repo_id"], asked["filename"]) == ("owner/clear", "clear_local_8_down_2.safetensors")
    assert (asked["revision"], asked["token"], asked["local_files_only"]) == ("main", "t", False)
    assert (loaded.radius, loaded.down_factor) == (8, 2)


def quantized(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name.endswith("to_q"))


def on_disk(model):
    with tempfile.TemporaryDirectory() as folder:
        grouped(model, offload_to_disk_path=folder)


OBSTACLES = {
    "on disk": (on_disk, r"is offloaded to disk in groups .* before enable_group_offload"),
    "fused": (lambda model: model.fuse_qkv_projections(), r"fused projections .*unfuse_qkv_projections\(\) first"),
    "lora": (lambda model: with_lora(model).fuse_lora(), r"a LoRA is fused into .*unfuse_lora\(\) first"),
    "quantized": (quantized, "to_q.weight is quantized "),
    "float8": (
        lambda model: model.transformer_blocks[0].attn.to_k.to(torch.float8_e4m3fn),
        "transformer_blocks.0.attn.to_k.weight is quantized .*float8",
    ),
    "meta": (
        lambda model: model.transformer_blocks[0].attn.to_k.to("meta"),
        "on the meta device.*sequential_cpu_offload",
    ),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_models_whose_projections_cannot_be_written_are_refused(model, tmp_path, case):
    path = tiny_file(tmp_path / "clear_local_8.safetensors")
    flexclear.transform(model, r=8)
    change, message = OBSTACLES[case]
    change(model)
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        flexclear.load_weights(model, path)
    with pytest.raises(ValueError, match=message):
        flexclear.save_weights(model, tmp_path / "saved.safetensors")
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert not (tmp_path / "saved.safetensors").exists()
