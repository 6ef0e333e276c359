"""Files that appear whole or not at all: what another process sees meanwhile, a full disk, file systems without links."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch

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
        with pytest.raises(OSError, match=r"weights cannot be written|weights'$"), write_errors(tmp_path / "weights"):
            write()
    with pytest.raises(RuntimeError, match="another"), write_errors(tmp_path / "weights"):
        raise RuntimeError("another")
