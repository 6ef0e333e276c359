"""The paper's quality tables: the columns of each, and what a column is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

REFERENCE, REAL, PROMPTS, ITSELF, CONDITION, MODEL = "reference", "real", "prompts", "itself", "condition", "model"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: heading in the tables.
        metric: a key of ``flexclear.evaluation.METRICS``; None: not computed from images.
        against: what the images are compared with: those of the reference variant (``REFERENCE``), real ones (``REAL``), their
            prompts, their conditions, or nothing (``ITSELF``); ``MODEL``: from the cost model.
        digits: decimal places.
    """

    title: str
    metric: str | None
    against: str
    digits: int = 2


COLUMNS: Mapping[str, Column] = {
    "psnr": Column("PSNR", "psnr", REFERENCE),
    "ssim": Column("SSIM", "ssim", REFERENCE, 4),
    "fid_orig": Column("FID vs original", "fid", REFERENCE),
    "lpips_orig": Column("LPIPS vs original", "lpips", REFERENCE),
    "clip_i": Column("CLIP-I", "clip-i", REFERENCE),
    "dino": Column("DINO", "dino", REFERENCE),
    "fid_real": Column("FID vs real", "fid", REAL),
    "lpips_real": Column("LPIPS vs real", "lpips", REAL),
    "clip_t": Column("CLIP-T", "clip-t", PROMPTS),
    "is": Column("IS", "is", ITSELF),
    "stlpips_alex_orig": Column("ST-LPIPS (AlexNet) vs original", "stlpips-alex", REFERENCE, 4),
    "stlpips_vgg_orig": Column("ST-LPIPS (VGG-16) vs original", "stlpips-vgg", REFERENCE, 4),
    "fd_lite0_orig": Column("FD (EfficientNet-Lite0) vs original", "fd-lite0", REFERENCE),
    "stlpips_alex_real": Column("ST-LPIPS (AlexNet) vs real", "stlpips-alex", REAL, 4),
    "stlpips_vgg_real": Column("ST-LPIPS (VGG-16) vs real", "stlpips-vgg", REAL, 4),
    "fd_lite0_real": Column("FD (EfficientNet-Lite0) vs real", "fd-lite0", REAL),
    "score_lite0": Column("class score (EfficientNet-Lite0)", "score-lite0", ITSELF),
    "rmse": Column("RMSE to condition", "rmse", CONDITION, 4),
    "gflops": Column("GFLOPs per layer", None, MODEL, 1),
}

QUALITY = ("fid_orig", "lpips_orig", "clip_i", "dino", "fid_real", "lpips_real", "clip_t", "is", "gflops")
GUIDED = ("psnr", "ssim", "fid_orig", "lpips_orig", "clip_i", "dino", "clip_t", "is", "gflops")
CONTROLLED = ("psnr", "ssim", "fid_orig", "lpips_orig", "clip_i", "dino", "clip_t", "rmse")
PATCHES = ("fid_orig", "lpips_orig", "clip_i", "dino", "fid_real", "lpips_real")


@dataclass(frozen=True)
class Table:
    """A table of the paper: its title and columns."""

    title: str
    columns: tuple[str, ...]


TABLES: Mapping[int, Table] = {
    2: Table("text to image, FLUX.1-dev at 1024 px", QUALITY),
    3: Table("image-guided, FLUX.1-dev at 2048 and 4096 px", GUIDED),
    4: Table("the same weights on FLUX.1-schnell", QUALITY),
    5: Table("ControlNet, grey images, FLUX.1-dev", CONTROLLED),
    6: Table("one image on several devices", PATCHES),
    8: Table("text to image, SD3.5", QUALITY),
    9: Table("ControlNet, tile and blurred images, FLUX.1-dev", CONTROLLED),
}
"""Tables by the paper's number. Titles say what the paper measured; here the tables are filled for the given model."""


def cell(name: str, value: float | None) -> str:
    """Format a column's value for the tables. Costs of small models keep two significant digits."""
    if value is None:
        return "-"
    text = f"{value:.{COLUMNS[name].digits}f}"
    return f"{value:.2g}" if value and not float(text) else text


BAR = "\\|"
"""A vertical bar inside a cell."""


def markdown(table: Table, rows: Mapping[str, Mapping[str, float | None]], more: Sequence[str] = ()) -> str:
    """A table in Markdown.

    Args:
        table: its columns.
        rows: values by row title and column; None or missing: not computed.
        more: additional columns.
    """
    columns = [*table.columns, *(name for name in more if name not in table.columns)]
    lines = ["| | " + " | ".join(COLUMNS[name].title for name in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for title, row in rows.items():
        cells = [cell(name, row.get(name)) for name in columns]
        lines.append(f"| {title.replace('|', BAR)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
