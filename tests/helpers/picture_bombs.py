"""Small files that hold huge images."""

from __future__ import annotations

import struct
import zlib


def bomb(side: int = 20_000) -> bytes:
    """A PNG of ``side`` x ``side`` black pixels, according to its header."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
