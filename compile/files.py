"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a place to write to; what is there at the end becomes ``path``, readable as the user's umask says.

    Folders on the way are made. After an exception nothing is left and an older ``path`` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        # Made empty first, for its mode: what safetensors writes itself has 0600.
        with beside.open("xb") as stream:
            mode = os.fstat(stream.fileno()).st_mode & 0o777
        yield beside
        beside.chmod(mode)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
