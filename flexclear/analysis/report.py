"""``flexclear report``: what ``eval``, ``eval run`` and ``analyze`` left in a folder, as one HTML page that stands alone."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from flexclear.common.reading import lines_of, parse_json, read_text
from flexclear.common.versions import versions
from flexclear.compile.files import whole_file
from flexclear.images.reading import read_image

NAME = "report.html"
LARGEST = 1024
"""Longer side in pixels of an image in the page."""

SECTIONS = (
    ("results.md", "Variants", ("sheet.png",)),
    ("scores.md", "Scores", ()),
    ("mass.md", "Attention", ("picture.png", "mass.png", "maps_*.png")),
    ("perturb.md", "Clipped relative distances", ("perturb.png",)),
    ("cost.md", "Cost", ("cost.png",)),
)
"""A section for each of these files: its title, and the images that lie beside it."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 0 1rem 3rem; color: #1a1a1a }
h1 { font-size: 1.6rem } h2 { border-top: 1px solid #ccc; padding-top: 1rem } figure { margin: 1rem 0 }
img { max-width: 100%; height: auto; display: block } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem } td, th { border: 1px solid #ccc; padding: .25rem .5rem; text-align: left }
.pair { position: relative; max-width: 40rem } .pair img { width: 100% }
.pair .upper { position: absolute; inset: 0; clip-path: inset(0 0 0 50%) }
input[type=range] { width: 100%; max-width: 40rem; height: 2.5rem; margin: 0; display: block }
.names { display: flex; justify-content: space-between; max-width: 40rem } li, p, figcaption { overflow-wrap: anywhere }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem }
pre { overflow-x: auto; background: #f4f4f4; padding: .5rem }
"""

SCRIPT = """
for (const slider of document.querySelectorAll('input[type=range]')) {
  const upper = slider.parentElement.querySelector('.upper');
  slider.addEventListener('input', () => { upper.style.clipPath = `inset(0 0 0 ${slider.value}%)`; });
}
"""


def write_report(folder: str | Path, most_pairs: int = 12) -> Path:
    """Write ``report.html`` into ``folder``: tables, curves, images side by side under a slider. Returns its path.

    Args:
        folder: of results; those in folders below it count, too.
        most_pairs: pairs of images per section.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no results.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    parts = []
    for name, title, pictures in SECTIONS:
        for file in sorted(folder.rglob(name)):
            where = file.parent.relative_to(folder).as_posix()
            parts.append(f"<section><h2>{html.escape(title if where == '.' else f'{title}: {where}')}</h2>")
            parts.append(_from_markdown(read_text(file)))
            pairs = list(_pairs(file))[:most_pairs]
            if pairs:
                parts.append('<div class="pairs">' + "".join(_slider(*pair) for pair in pairs) + "</div>")
            for pattern in pictures:
                for picture in sorted(file.parent.glob(pattern)):
                    parts.append(f'<figure class="wide">{_image(picture, picture.stem, LARGEST * 2)}</figure>')
            parts.append(_settings(file) + "</section>")
    if not parts:
        raise ValueError(
            f"{folder} holds no results of flexclear eval or flexclear analyze ({', '.join(name for name, *_ in SECTIONS)})"
        )
    told = ", ".join(f"{name} {version}" for name, version in versions().items())
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>flexclear: {html.escape(folder.resolve().name)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(folder.resolve().name)}</h1><p>{html.escape(told)}</p>"
        f"{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"
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
    """What was asked for, folded away."""
    config = _json(file.with_name("results.json")).get("config") if file.name == "results.md" else None
    if config is None:
        return ""
    return f"<details><summary>Settings</summary><pre>{html.escape(json.dumps(config, indent=1))}</pre></details>"


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = parse_json(read_text(file))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def _slider(left: Path, right: Path, left_name: str, right_name: str, caption: str) -> str:
    label = f"{caption}: {left_name} and {right_name}" if caption else f"{left_name} and {right_name}"
    return (
        f'<figure><div class="pair">{_image(left, left_name)}{_image(right, right_name, kind="upper")}</div>'
        f'<input type="range" min="0" max="100" value="50" aria-label="{html.escape(label)}">'
        f'<div class="names"><span>{html.escape(left_name)}</span><span>{html.escape(right_name)}</span></div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _image(path: Path, alternative: str, largest: int = LARGEST, kind: str = "") -> str:
    """An image inside the page; larger ones are scaled down."""
    picture = read_image(path).convert("RGB")
    if max(picture.size) > largest:
        picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<img class="{kind}" alt="{html.escape(alternative)}" width="{picture.width}" height="{picture.height}" '
        f'src="data:image/png;base64,{data}">'
    )


def _from_markdown(text: str) -> str:
    """The Markdown that flexclear writes: headings, tables, lists, lines of text."""
    out: list[str] = []
    for block in re.split(r"\n\s*\n|(?<=\n)(?=## )", text.strip()):
        lines = lines_of(block.strip())
        while lines and lines[0].startswith("#"):
            out.append(f"<h3>{html.escape(lines.pop(0).lstrip('# '))}</h3>")
        table = [line for line in lines if line.startswith("|")]
        if table:
            rows = [[html.escape(cell.strip()) for cell in line.strip().strip("|").split("|")] for line in table]
            head, body = rows[0], [row for row in rows[1:] if not re.fullmatch(r"[-: ]*", "".join(row)) or not any(row)]
            told = "".join(f"<th>{cell}</th>" for cell in head)
            cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
            out.append(f'<div class="wide"><table><thead><tr>{told}</tr></thead><tbody>{cells}</tbody></table></div>')
        items = [line[2:] for line in lines if line.startswith("- ")]
        if items:
            out.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>")
        rest = [line for line in lines if not line.startswith(("|", "- "))]
        out += [f"<p>{html.escape(line)}</p>" for line in rest]
    return "".join(out)
