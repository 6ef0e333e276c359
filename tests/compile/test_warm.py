"""Compile artefacts go through a file into another process; what does not fit is noticed, said, and not used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from diffusers import FluxTransformer2DModel

import flexclear
from flexclear.compile import load_artifacts, save_artifacts, why_not_compiled
from flexclear.compile.warm import artifact_key

WHY_NOT = why_not_compiled(torch.device("cpu"))
needs_inductor = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

FUNCTION = """
import sys, torch
from flexclear.compile import load_artifacts, save_artifacts
from torch._inductor.cpp_builder import CppBuilder
from torch._dynamo.utils import counters

built = []
build = CppBuilder.build
CppBuilder.build = lambda self: (built.append(self.get_target_file_path()), build(self))[1]

@torch.compile
def function(x):
    return torch.softmax(x.sin() * 2, -1).sum(0)

"""

SAVE = (
    FUNCTION
    + """
x = torch.arange(600.0).view(20, 30)
result = function(x)
save_artifacts(sys.argv[1], {"mode": "default"})
torch.save(result, sys.argv[2])
"""
)

LOAD = (
    FUNCTION
    + """
start = load_artifacts(sys.argv[1], {"mode": "default"})
assert start.loaded, start.reason
assert start.binaries >= 1
x = torch.arange(600.0).view(20, 30)
assert torch.equal(function(x), torch.load(sys.argv[2]))
assert counters["inductor"]["fxgraph_cache_hit"] == 1, counters["inductor"]
assert not [path for path in built if ".main." in path], built
"""
)


def in_process(code, *arguments, **environment):
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.kept
@needs_inductor
def test_another_process_compiles_no_kernel_that_the_file_holds(tmp_path):
    artefacts, result, empty = (tmp_path / name for name in ("artefacts.zip", "result.pt", "empty"))
    # It may find its kernel in the cache of these tests, as a process may that saves for the second time.
    in_process(SAVE, artefacts, result)
    in_process(LOAD, artefacts, result, TORCHINDUCTOR_CACHE_DIR=str(empty))
    assert empty.is_dir(), "else the second process has looked elsewhere"


def tiny():
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    widths = {"in_channels": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6)}
    return FluxTransformer2DModel(**sizes, **widths)


def test_optimize_takes_what_save_artifacts_wrote_for_an_equal_model(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="flexclear")
    # What torch would give: a cache that other tests may have cleared.
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"cached", None))
    taken = []
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: taken.append(data) or True)
    model = tiny()
    with pytest.raises(
        ValueError, match=r"FluxTransformer2DModel was not compiled by flexclear\.optimize in this process"
    ):
        flexclear.save_artifacts(model, tmp_path / "none.bin")
    flexclear.optimize(model, backend="eager")
    file = flexclear.save_artifacts(model, tmp_path / "flux.bin")
    flexclear.optimize(tiny(), backend="eager", warm_start=file)
    assert taken == [b"cached"]
    assert f"warm start from {file}" in caplog.text
    flexclear.optimize(tiny(), backend="eager", warm_start=file, dynamic=True)
    assert taken == [b"cached"]
    assert f"no warm start, everything is compiled from scratch: {file} is stale: configuration" in caplog.text
    assert not (tmp_path / "none.bin").exists()


def test_a_pipeline_whose_vae_alone_is_compiled_has_artifacts_too(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"cached", None))
    pipe = flexclear.embedded.pipeline()
    flexclear.optimize(pipe, compile=False, vae=True, backend="eager")
    assert flexclear.save_artifacts(pipe, tmp_path / "vae.bin").is_file()


def archive(path, compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name.replace("__", "/").replace("_json", ".json").replace("_bin", ".bin"), content)
    return path


def test_a_missing_file_is_said(tmp_path):
    start = load_artifacts(tmp_path / "none.zip")
    assert not start.loaded
    assert start.reason == f"no file {tmp_path / 'none.zip'}"


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x03\x04 half"])
def test_a_damaged_file_is_noticed_and_not_used(tmp_path, content):
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    start = load_artifacts(path)
    assert not start.loaded
    assert f"{path} is damaged" in start.reason


def test_a_truncated_or_changed_file_is_noticed(tmp_path):
    path = archive(tmp_path / "a.zip", key_json=json.dumps(artifact_key()), portable_bin=bytes(range(256)) * 40)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "is damaged" in load_artifacts(path).reason
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 255
    path.write_bytes(bytes(changed))
    assert "is damaged" in load_artifacts(path).reason


def test_compressed_data_that_cannot_be_read_is_noticed(tmp_path):
    content = {"key_json": json.dumps(artifact_key()), "portable_bin": bytes(range(256)) * 40}
    path = archive(tmp_path / "a.zip", zipfile.ZIP_DEFLATED, **content)
    changed = bytearray(path.read_bytes())
    changed[changed.index(b"portable.bin") + len(b"portable.bin")] |= 7
    path.write_bytes(bytes(changed))
    start = load_artifacts(path)
    assert not start.loaded
    assert "is damaged: error: " in start.reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"torch": "1.0"}, "torch '1.0' is now"),
        ({"device": "another"}, "device 'another' is now"),
        ({"configuration": {"mode": "max-autotune"}}, "configuration {'mode': 'max-autotune'} is now {}"),
    ],
)
def test_a_stale_file_is_noticed_with_what_has_changed(tmp_path, change, said):
    path = archive(tmp_path / "a.zip", key_json=json.dumps({**artifact_key(), **change}))
    start = load_artifacts(path)
    assert not start.loaded
    assert "is stale" in start.reason
    assert said in start.reason


def test_a_file_cannot_write_outside_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("key.json", json.dumps(artifact_key()))
        file.writestr("inductor/../../evil.so", b"x")
    start = load_artifacts(path)
    assert not start.loaded
    assert "outside the cache" in start.reason
    assert not list(tmp_path.rglob("evil.so"))


def test_nothing_compiled_is_nothing_to_save(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    monkeypatch.setattr("flexclear.compile.warm._loaded_libraries", list)
    with pytest.raises(ValueError, match="nothing has been compiled in this process yet"):
        save_artifacts(tmp_path / "a.zip")
    assert not list(tmp_path.iterdir())
