"""Files that appear whole or not at all, and the folder for files kept per user."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

_NO_HARD_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What ``os.link`` reports on file systems without hard links, such as FAT and some network mounts."""

_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "iostream error")
"""Fragments of the messages of ``torch.save`` when it cannot write; they do not say why."""


USER_FOLDER = "FLEXCLEAR_CACHE"
"""Environment variable that names ``user_folder``."""


def user_folder() -> Path:
    """Folder for measurements of this machine: ``$FLEXCLEAR_CACHE``, or ``flexclear`` in the user's cache folder. For a user
    without a home, that lies in the folder of temporary files."""
    named = os.environ.get(USER_FOLDER)
    if named:
        return Path(named).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(shared) if shared else Path.home() / ".cache") / "flexclear"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"flexclear-{os.getuid()}"


def check_user_folder() -> None:
    """Make ``user_folder``, and raise if nothing can be written to it.

    Raises:
        OSError: nothing can.
    """
    folder = user_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"results cannot be kept ({error.strerror}); set ${USER_FOLDER} to another folder",
            str(folder),
        ) from error


@contextlib.contextmanager
def whole_file(path: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """Yields a path to write to; the file there at the end becomes ``path``, with permissions by the user's umask.

    Other processes see the old file or the new one, never an empty or partial one. Missing parent folders are made. After an
    exception nothing is left behind, and an existing ``path`` is unchanged.

    Args:
        path: the file.
        overwrite: whether a file that exists is replaced.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false; of several writers one succeeds.
        OSError: writing failed, for example because the disk is full; it names ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with write_errors(path, beside):
            # Created empty first, for its mode: files that safetensors creates have mode 0600.
            with beside.open("xb") as stream:
                mode = os.fstat(stream.fileno()).st_mode & 0o777
            yield beside
            beside.chmod(mode)
            with beside.open("r+b") as stream:
                os.fsync(stream.fileno())  # A full disk is reported here at the latest.
            if overwrite:
                os.replace(beside, path)
            else:
                _publish_new(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """Yields a folder to write files into, which becomes ``path`` at the end. After an exception nothing is left of it.

    Args:
        path: the folder.
        overwrite: whether an existing folder is replaced, with everything in it. It is missing for a moment, and restored if
            the new one cannot take its place.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false; of several writers one succeeds.
        OSError: writing failed, for example because the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}") for _ in range(2))
    try:
        with write_errors(path):
            beside.mkdir()
            yield beside
            for file in beside.iterdir():
                with file.open("r+b") as stream:
                    os.fsync(stream.fileno())
            if overwrite and path.exists():
                path.rename(old)
            try:
                beside.rename(path)  # onto a folder that has something in it: an error, whoever made it
            except OSError as error:
                if old.exists():
                    old.rename(path)
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise FileExistsError(errno.EEXIST, "the folder exists already", str(path)) from None
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def write_errors(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Turn failures to write in a ``with`` block into an ``OSError`` that names ``path``.

    Python's own errors for a full disk name no file, errors for a temporary file (``beside``) name that one, and safetensors
    and ``torch.save`` raise their own exceptions.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(errno.EIO if number is None else int(number[1]), str(error), str(path)) from error
    except RuntimeError as error:
        if not any(mark in str(error) for mark in _TORCH_SAVE):
            raise
        first = next(line for line in str(error).splitlines() if line.strip())
        raise OSError(errno.EIO, f"torch.save fails, as on a full disk: {first}", str(path)) from error
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(beside)) and error.filename2 is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _publish_new(beside: Path, path: Path) -> None:
    """Give a finished file its name unless a file of that name exists already."""
    try:
        os.link(beside, path)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "the file exists already", str(path)) from None
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        with _reserved(path):
            if path.exists():
                raise FileExistsError(errno.EEXIST, "the file exists already", str(path)) from None
            os.replace(beside, path)


@contextlib.contextmanager
def _reserved(path: Path) -> Iterator[None]:
    """The exclusive right to create ``path``; raises FileExistsError if another process has it."""
    claim = path.with_name(f".{path.name}.claim")
    with claim.open("xb"):
        pass
    try:
        yield
    finally:
        claim.unlink()
