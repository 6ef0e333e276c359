"""``flexclear report``: results of ``eval``, ``eval run`` and ``analyze`` in a folder, as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from PIL import Image

from flexclear.common.reading import parse_json, read_text
from flexclear.common.versions import versions
from flexclear.compile.files import whole_file
from flexclear.images.reading import read_image

NAME = "report.html"
LARGEST = 1024
"""Longer side in pixels of an image on the page."""

SECTIONS = (
    ("results.md", "Variants", ("sheet.png",)),
    ("scores.md", "Scores", ()),
    ("mass.md", "Attention", ("picture.png", "mass.png", "maps_*.png")),
    ("perturb.md", "Clipped relative distances", ("perturb.png",)),
    ("cost.md", "Cost", ("cost.png",)),
)
"""A section for each of these files: its title, and the images beside it."""

TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(folder: str | Path, most_pairs: int = 12) -> Path:
    """Write ``report.html`` into ``folder``: tables, curves, images side by side under a slider. Return its path.

    Args:
        folder: results, also those in subfolders.
        most_pairs: maximum number of image pairs per section.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no results.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    sections = []
    for name, title, pictures in SECTIONS:
        for file in sorted(folder.rglob(name)):
            where = file.parent.relative_to(folder).as_posix()
            sections.append(
                {
                    "title": title if where == "." else f"{title}: {where}",
                    "text": from_markdown(read_text(file)),
                    "pairs": [_pair(*pair) for pair in itertools.islice(_pairs(file), most_pairs)],
                    "images": [
                        _image(picture, picture.stem, LARGEST * 2)
                        for pattern in pictures
                        for picture in sorted(file.parent.glob(pattern))
                    ],
                    "settings": _settings(file),
                }
            )
    if not sections:
        raise ValueError(
            f"{folder} holds no results of flexclear eval or flexclear analyze ({', '.join(name for name, *_ in SECTIONS)})"
        )
    page = _template().render(
        name=folder.resolve().name,
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
        sections=sections,
    )
    path = folder / NAME
    with whole_file(path) as beside:
        beside.write_text(page, encoding="utf-8")
    return path


def _pairs(file: Path) -> Iterator[tuple[Path, Path, str, str, str]]:
    """(left, right, left's name, right's name, caption) of the images behind a table."""
    if file.name == "perturb.md":
        rows = _json(file.with_name("perturb.json"))
        (first, base), *others = rows.items() if rows else [("", {})]
        for title, row in others:
            yield file.with_name(base["file"]), file.with_name(row["file"]), first, title, ""
    elif file.name == "results.md":
        config = _json(file.with_name("results.json")).get("config", {})
        places = {
            variant["name"]: Path(variant["pictures"] or file.parent / "pictures" / variant["name"])
            for variant in config.get("variants", ())
        }
        names = list(places)
        if not names:
            return
        reference = config.get("reference") or names[0]
        for picture in sorted(places[reference].rglob("*.png")):
            inside = picture.relative_to(places[reference])
            for name in names:
                if name != reference and (places[name] / inside).is_file():
                    yield picture, places[name] / inside, reference, name, inside.stem
    elif file.name == "scores.md":
        told = _json(file.with_name("scores.json"))
        if "a" not in told or "b" not in told:
            return  # Path("") would be the working folder.
        a, b = Path(told["a"]), Path(told["b"])
        if a.is_dir() and b.is_dir():
            for picture in sorted(a.rglob("*.png")):
                if (b / picture.relative_to(a)).is_file():
                    yield b / picture.relative_to(a), picture, "B", "A", picture.stem


def _settings(file: Path) -> str:
    """The requested settings; empty if they are not known."""
    config = _json(file.with_name("results.json")).get("config") if file.name == "results.md" else None
    return "" if config is None else json.dumps(config, indent=1)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = parse_json(read_text(file))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def _pair(left: Path, right: Path, left_name: str, right_name: str, caption: str) -> dict[str, Any]:
    """Two images under a slider."""
    return {
        "left": _image(left, left_name),
        "right": _image(right, right_name),
        "label": f"{caption}: {left_name} and {right_name}" if caption else f"{left_name} and {right_name}",
        "caption": caption,
    }


def _image(path: Path, name: str, largest: int = LARGEST) -> dict[str, Any]:
    """An image inside the page; larger ones are scaled down."""
    picture = read_image(path).convert("RGB")
    if max(picture.size) > largest:
        picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    return {"name": name, "width": picture.width, "height": picture.height, "source": f"data:image/png;base64,{data}"}


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(read_text(TEMPLATE))


def from_markdown(text: str) -> str:
    """HTML of the Markdown that flexclear writes: headings, tables, lists, lines of text. Everything else in it, such as HTML,
    links and emphasis, is plain text, because it comes from names of variants and layers."""
    parser = MarkdownIt("zero", {"breaks": True}).enable(["table", "heading", "list", "escape", "newline"])
    parser.add_render_rule("table_open", lambda self, *rest: '<div class="wide"><table>\n')
    parser.add_render_rule("table_close", lambda self, *rest: "</table></div>\n")
    for rule in ("heading_open", "heading_close"):
        parser.add_render_rule(rule, _as_third)
    return parser.render(text)


def _as_third(self: Any, tokens: Any, number: int, options: Any, environment: Any) -> str:
    """Put a file's headings one level below that of its section."""
    tokens[number].tag = "h3"
    return self.renderToken(tokens, number, options, environment)
