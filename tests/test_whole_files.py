"""Files that appear whole or not at all: what another process sees meanwhile, a full disk, file systems without links."""

from __future__ import annotations

import ast
import errno
import os
import threading
from pathlib import Path

import pytest
import torch

import flexclear
from flexclear.compile import files
from flexclear.compile.files import whole_file, write_errors

OLD, NEW = b"old" * 1000, b"new" * 2000


def no_links(*arguments):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.fixture(params=["hard links", "no hard links"])
def looks(request, monkeypatch, tmp_path):
    """What is in the file before and after each call that could change it, on either kind of file system."""
    path, seen = tmp_path / "image.png", []

    def look():
        seen.append(path.read_bytes() if path.exists() else None)

    def watched(call):
        def watch(*arguments):
            look()
            try:
                return call(*arguments)
            finally:
                look()

        return watch

    monkeypatch.setattr(files.os, "link", watched(os.link if request.param == "hard links" else no_links))
    monkeypatch.setattr(files.os, "replace", watched(os.replace))
    return path, seen, look


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("before", [None, OLD])
def test_a_reader_sees_the_old_file_or_the_new_one(looks, overwrite, before):
    path, seen, look = looks
    if before is not None:
        path.write_bytes(before)

    def write():
        with whole_file(path, overwrite) as beside:
            look()
            with beside.open("wb") as stream:
                stream.write(NEW[:3000])
                stream.flush()
                look()  # a reader in the middle of the write
                stream.write(NEW[3000:])
            look()

    if before is not None and not overwrite:
        with pytest.raises(FileExistsError, match=r"image\.png"):
            write()
        assert set(seen) == {OLD}
        assert path.read_bytes() == OLD
    else:
        write()
        assert set(seen) <= {before, NEW}
        assert seen[0] == seen[1] == seen[2] == before
        assert path.read_bytes() == NEW
    assert [entry.name for entry in path.parent.iterdir()] == ["image.png"]


@pytest.mark.parametrize("links", [True, False])
def test_of_several_writers_one_succeeds(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(files.os, "link", no_links)
    path, barrier, outcomes = tmp_path / "image.png", threading.Barrier(4), []

    def write(content):
        try:
            with whole_file(path, overwrite=False) as beside:
                beside.write_bytes(content)
                barrier.wait()
            outcomes.append(content)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=write, args=(bytes([number]) * 9,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes()] == outcomes
    assert [entry.name for entry in tmp_path.iterdir()] == ["image.png"]


def test_a_failed_write_leaves_the_old_file_alone_and_names_it(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(OLD)

    def write():
        with whole_file(path) as beside:
            beside.write_bytes(NEW[:100])
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(NEW)

    with pytest.raises(OSError, match=r"No space left on device.*image\.png'$") as error:
        write()
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


def test_failures_of_torch_and_safetensors_are_errors_of_the_file(tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(1000)}
    for write in (lambda: torch.save(tensors, "/dev/full"), lambda: save_file(tensors, tmp_path / "gone" / "a")):
        with pytest.raises(OSError, match=r"weights'$"), write_errors(tmp_path / "weights"):
            write()
    with pytest.raises(RuntimeError, match="another"), write_errors(tmp_path / "weights"):
        raise RuntimeError("another")


WRITERS = {"save", "savefig", "save_file", "save_pretrained", "save_lora_adapter", "write_text", "write_bytes"}
INDIRECT = {"self.checkpoints.save", "kept.save", "told.save", "save"}
"""Calls of our own functions, whose writers are looked at."""
NOT_PUBLISHED = {
    "distill/checkpoints.py": "writes a folder under another name, then renames it",
    "embedded/train/checkpoint.py": "writes under another name, then os.replace",
    "embedded/train/controlnet.py": "writes a folder under another name, then renames it",
    "embedded/train/export.py": "writes a folder under another name, then renames it",
    "embedded/train/tokenizers.py": "its rules are in a temporary folder",
    "distill/model_state.py": "the adapter goes into a folder of another name first",
    "common/resident.py": "resets a counter of the kernel's",
    "saved/hub.py": "writes to a temporary folder, which is uploaded",
    "soak.py": "hands over between two processes in a temporary folder",
}


def test_every_writer_of_the_package_writes_beside_and_publishes():
    """A writer that bypasses ``whole_file`` shows half a file to a reader."""
    package, found = Path(flexclear.__file__).parent, set()
    for source in [*package.rglob("*.py"), *Path(files.__file__).parent.rglob("*.py")]:
        for call in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", None))
            if name == "open":
                modes = [part.value for part in ast.walk(call) if isinstance(part, ast.Constant)]
                writes = any(mode in ("w", "wb", "x", "xb") for mode in modes)
            else:
                writes = name in WRITERS
            names = {part.id for part in ast.walk(call) if isinstance(part, ast.Name)}
            if writes and not names & {"beside", "stream", "claim"} and ast.unparse(call.func) not in INDIRECT:
                found.add(source.as_posix())
    assert not {path for path in found if not path.endswith(tuple(NOT_PUBLISHED))}
    assert all(any(path.endswith(known) for path in found) for known in NOT_PUBLISHED)
