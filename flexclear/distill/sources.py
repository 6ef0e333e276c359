"""Images with captions: a folder, or WebDataset tar files. Damaged ones are named, never skipped silently."""

from __future__ import annotations

import hashlib
import tarfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from flexclear.common.reading import check_unicode, lines_of, parse_json, read_text
from flexclear.images.fitting import on_white
from flexclear.images.reading import read_image

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption", "prompt")
BLOCK = 512


@dataclass(frozen=True)
class Skipped:
    """What could not be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Item:
    """One image that has not been read yet.

    Attributes:
        name: unique in its source; for messages.
        caption: what it shows.
        read: returns the file's bytes.
    """

    name: str
    caption: str
    read: Callable[[], bytes]

    def digest(self) -> str:
        """Digest of the file's bytes; ``"unreadable"`` if it cannot be read."""
        try:
            return hashlib.sha256(self.read()).hexdigest()
        except OSError:
            return "unreadable"

    def picture(self, digest: str | None = None) -> Image.Image:
        """The image in RGB; what is transparent lies on white.

        Args:
            digest: the file's earlier digest; None if not known.

        Raises:
            MemoryError: it does not fit into memory.
            OSError: the file has another digest now.
            ValueError: it is damaged, cannot be read, or has more pixels than Pillow accepts.
        """
        try:
            content = self.read()
        except OSError as error:
            raise ValueError(f"it cannot be read: {error}") from error
        if digest is not None and hashlib.sha256(content).hexdigest() != digest:
            raise OSError(f"{self.name} was replaced while it was being encoded; run the same command again")
        try:
            return on_white(read_image(content, self.name))
        except (OSError, ValueError) as error:
            raise ValueError(f"damaged image: {error}") from error


def find_items(source: str | Path) -> tuple[list[Item], list[Skipped]]:
    """Find the images of a folder, of the tar files in it, or of one tar file.

    Captions in a folder: ``NAME.txt`` beside an image, a line of ``metadata.jsonl``, or ``NAME.json`` with ``"prompt"``,
    ``"caption"`` or ``"text"``, as in the published set.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it holds neither images nor tar files, or ``metadata.jsonl`` cannot be read.
    """
    source = Path(source).expanduser()
    if source.is_file() and source.suffix == ".tar":
        return _in_shards([source])
    if not source.is_dir():
        raise FileNotFoundError(f"no folder of images and no .tar file at {source}")
    shards = sorted(source.glob("*.tar"))
    if shards:
        return _in_shards(shards)
    files = sorted(file for file in source.rglob("*") if file.suffix.lower() in PICTURES and not _hidden(file, source))
    if not files:
        raise ValueError(f"{source} holds neither images ({', '.join(PICTURES)}) nor .tar files")
    listed = _listed(source / METADATA)
    items, skipped = [], []
    for file in files:
        name = file.relative_to(source).as_posix()
        try:
            caption = _caption_of(file, listed.get(name))
        except (OSError, ValueError) as error:
            skipped.append(Skipped(name, f"caption cannot be read: {error}"))
            continue
        if caption is None:
            beside = f"neither {file.stem}.txt nor {file.stem}.json beside it"
            skipped.append(Skipped(name, f"no caption: {beside}, nor a line of {METADATA}"))
        else:
            items.append(Item(name, caption, file.read_bytes))
    skipped += _without_pictures(source, files)
    lost = sorted(set(listed) - {file.relative_to(source).as_posix() for file in files})
    skipped += [Skipped(name, f"{METADATA} names it, but there is no such image") for name in lost]
    return items, skipped


def _caption_of(picture: Path, listed: str | None) -> str | None:
    """The caption in ``NAME.txt`` beside an image, else ``listed``, else the caption in ``NAME.json``, else None.

    Raises:
        OSError, ValueError: a file cannot be read, is not JSON, or holds no caption; the message names it.
    """
    text, record = picture.with_suffix(".txt"), picture.with_suffix(".json")
    if text.is_file():
        return read_text(text).strip()
    if listed is not None or not record.is_file():
        return listed
    try:
        return _caption_in(parse_json(read_text(record)))
    except ValueError as error:
        raise ValueError(f"{record.name}: {error}") from error


def _without_pictures(folder: Path, pictures: list[Path]) -> list[Skipped]:
    """JSON files without an image beside them that have a caption or are damaged. JSON files with other content do not count."""
    captioned = {picture.with_suffix(".json") for picture in pictures}
    lost = []
    for file in sorted(file for file in folder.rglob("*.json") if file not in captioned and not _hidden(file, folder)):
        reason = f"no image beside it: {file.stem} with {', '.join(PICTURES)}"
        try:
            found = parse_json(read_text(file))
        except (OSError, ValueError) as error:
            reason += f"; and it cannot be read: {error}"
        else:
            if not isinstance(found, dict) or not any(isinstance(found.get(key), str) for key in CAPTION_KEYS):
                continue
        lost.append(Skipped(file.relative_to(folder).as_posix(), reason))
    return lost


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _listed(path: Path) -> dict[str, str]:
    """Captions by file name."""
    found: dict[str, str] = {}
    if not path.is_file():
        return found
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            if record["file_name"] in found:
                raise ValueError(f"{record['file_name']!r} is named twice")
            found[record["file_name"]] = _caption_in(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {number} must hold file_name and one of {list(CAPTION_KEYS)} in JSON: {error}"
            ) from error
    return found


def _caption_in(record: Any) -> str:
    for key in CAPTION_KEYS:
        if isinstance(record, dict) and isinstance(record.get(key), str):
            return check_unicode(record[key].strip(), "the caption")
    raise ValueError(f"no {' or '.join(CAPTION_KEYS)}")


def _in_shards(shards: list[Path]) -> tuple[list[Item], list[Skipped]]:
    items: list[Item] = []
    skipped: list[Skipped] = []
    for shard in shards:
        try:
            members = _members(shard)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            skipped.append(Skipped(shard.name, f"damaged shard: {error}"))
            continue
        groups: dict[str, dict[str, tarfile.TarInfo]] = defaultdict(dict)
        for member in members:
            folder, _, file = member.name.rpartition("/")
            stem, _, suffix = file.partition(".")
            groups[f"{folder}/{stem}" if folder else stem][f".{suffix.lower()}"] = member
        for key, parts in groups.items():
            name = f"{shard.name}/{key}"
            picture = next((parts[suffix] for suffix in PICTURES if suffix in parts), None)
            if picture is None:
                skipped.append(Skipped(name, f"no image among {sorted(parts)}"))
                continue
            try:
                if ".txt" in parts:
                    caption = _reader(shard, parts[".txt"])().decode("utf-8-sig").strip()
                elif ".json" in parts:
                    caption = _caption_in(parse_json(_reader(shard, parts[".json"])()))
                else:
                    raise ValueError("neither .txt nor .json beside the image")
            except (OSError, ValueError) as error:
                skipped.append(Skipped(name, f"no caption: {error}"))
                continue
            items.append(Item(name, caption, _reader(shard, picture)))
    return items, skipped


def _members(shard: Path) -> list[tarfile.TarInfo]:
    """All files in a tar, which must be complete: ``tarfile`` itself silently accepts a truncated file."""
    with tarfile.open(shard, "r:") as archive:
        members = archive.getmembers()
    if members:
        last = members[-1]
        end = last.offset_data + -(-last.size // BLOCK) * BLOCK
        with shard.open("rb") as stream:
            stream.seek(end)
            if stream.read(BLOCK) != bytes(BLOCK):
                raise ValueError(f"it does not end after its {len(members)} readable members, or ends early")
    return [member for member in members if member.isfile()]


def _reader(shard: Path, member: tarfile.TarInfo) -> Callable[[], bytes]:
    offset, size = member.offset_data, member.size

    def read() -> bytes:
        with shard.open("rb") as stream:
            stream.seek(offset)
            return stream.read(size)

    return read
