"""load_weights and save_weights: files in the layout of the released ones, against independent readings of them."""

from __future__ import annotations

import copy
import json
import os
import stat
import struct
import tempfile
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import flexclear
from flexclear.hooks import entry_hook_of
from flexclear.masks import Disc, Downsampled, Full, Square, Swin, Window

from models import flux_call, tiny_flux

CPU = torch.device("cpu")
WIDTH = 16
DOUBLE = [f"transformer_blocks.{index}" for index in range(19)]
SINGLE = [f"single_transformer_blocks.{index}" for index in range(38)]


def full_flux(seed=0, **config):
    """FLUX.1-dev's 19 + 38 blocks, one head wide."""
    return tiny_flux(seed, num_layers=19, num_single_layers=38, num_attention_heads=1, guidance_embeds=True, **config)


def released(down_factor=None, seed=1, width=WIDTH, dtype=torch.float32, double=DOUBLE, single=SINGLE):
    """Tensors under the names of the released files, written out by hand."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return (torch.randn(shape, generator=generator) / 4).to(dtype)

    tensors = {}
    for block in double + single:
        for part in ["to_q", "to_k", "to_v"] + (["to_out.0"] if block in double else []):
            tensors[f"{block}.attn.{part}.weight"] = noise(width, width)
            tensors[f"{block}.attn.{part}.bias"] = noise(width)
        if down_factor is not None:
            tensors[f"{block}.attn.processor.spatial_weight"] = noise(1, 1, 1, down_factor, 1, down_factor, 1).abs()
    return tensors


def raw_header(path):
    """Metadata, and shape and type of every tensor, read off the file's bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return header.pop("__metadata__", {}), {key: (tuple(t["shape"]), t["dtype"]) for key, t in header.items()}


def windows_of(model):
    return dict(entry_hook_of(model).settings.windows)


def snapshot(model):
    """Everything that a failed call must leave alone."""
    return (
        {key: tensor.clone() for key, tensor in model.state_dict().items()},
        {name: id(processor) for name, processor in model.attn_processors.items()},
        [id(hook) for hook in model._forward_pre_hooks.values()],
        [type(hook) for hook in model._forward_hooks.values()],
    )


def assert_unchanged(model, before):
    state, *rest = snapshot(model)
    assert list(state) == list(before[0])
    assert all(torch.equal(state[key], before[0][key]) for key in state)
    assert tuple(rest) == before[1:]


def run(model, call):
    """The model's output; through masked SDPA, so that nothing is compiled."""
    if entry_hook_of(model) is not None and entry_hook_of(model).settings.backend == "auto":
        flexclear.transform(model, r=windows_of(model), backend="sdpa")
    with torch.no_grad():
        return model(**call).sample


CALL = {**flux_call(8, 6, 5), "guidance": torch.tensor([3.5])}


@pytest.fixture
def model():
    return tiny_flux(num_attention_heads=1)


def tiny_file(path, down_factor=None, metadata=None, change=None, **options):
    """A file for the ``model`` fixture; ``change`` edits its tensors first."""
    tensors = released(down_factor, double=DOUBLE[:2], single=SINGLE[:2], **options)
    if change is not None:
        change(tensors)
    save_file(tensors, path, metadata)
    return path


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


class Foreign(Disc):
    """A window of somebody's own."""


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


def drop(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


def put(name, tensor):
    return lambda tensors: tensors.__setitem__(name, tensor)


def spoil(name):
    return lambda tensors: tensors[name].view(-1)[:1].fill_(float("nan"))


LAST = "single_transformer_blocks.1.attn.to_v.bias"
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
    "radius": ({"metadata": {"r": "8.5"}}, r"metadata r='8\.5'; a whole number of tokens from 1 on is expected"),
    "radius zero": ({"metadata": {"r": "0"}}, "metadata r='0'"),
    "windows": ({"metadata": {"windows": "{"}}, "metadata 'windows' that cannot be read"),
    "window unknown": (
        {"metadata": {"windows": '{"default": {"kind": "Hexagon", "radius": 2}}'}},
        "cannot be read: 'Hexagon' is no window that this flexclear knows",
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
        refused("cut.safetensors", whole[:cut], rf"\({cut} bytes\) is no whole safetensors file, perhaps truncated")
    refused("long.safetensors", whole + b"\0", "no whole safetensors file")
    refused("noise.safetensors", b"\x10" * 500, "no whole safetensors file")
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


def with_lora(model):
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False), "style")
    return model


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


def quantised(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name.endswith("to_q"))


def grouped(model, **options):
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model, onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1, **options
    )


def on_disk(model):
    with tempfile.TemporaryDirectory() as folder:
        grouped(model, offload_to_disk_path=folder)


OBSTACLES = {
    "on disk": (on_disk, r"is offloaded to disk in groups .* before enable_group_offload"),
    "fused": (lambda model: model.fuse_qkv_projections(), r"fused projections .*unfuse_qkv_projections\(\) first"),
    "lora": (lambda model: with_lora(model).fuse_lora(), r"a LoRA is fused into .*unfuse_lora\(\) first"),
    "quantised": (quantised, "to_q.weight is quantised .* then quantise"),
    "float8": (
        lambda model: model.transformer_blocks[0].attn.to_k.to(torch.float8_e4m3fn),
        "transformer_blocks.0.attn.to_k.weight is quantised .*float8",
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
    from flexclear.weights.metadata import decode, encode

    windows = [
        masks.Disc(3), masks.Square(2), masks.Neighborhood(5), masks.Swin(8, 3), masks.Strided(4), masks.Full(),
        masks.Disc(3) & (masks.Square(2) | masks.Strided(2)), masks.Downsampled(masks.Disc(8), 4), None,
    ]  # fmt: skip
    exported = {type(w) for w in windows} | {masks.Both, masks.Either, type(None)}
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
