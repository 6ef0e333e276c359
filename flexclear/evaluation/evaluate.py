"""``flexclear eval``: metrics of one folder of images compared with another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexclear.common.metrics import METRICS, PAIRS, SETS, TEXTS, parse_metrics, require_for_metrics
from flexclear.common.versions import versions
from flexclear.compile.files import whole_file
from flexclear.evaluation.judge import Judge, OnProgress, Score
from flexclear.evaluation.networks import Networks
from flexclear.evaluation.pictures import Size, pair_names, read_captions, read_folder
from flexclear.evaluation.store import Store
from flexclear.evaluation.views import check_pictures

STORE = "known.sqlite"


@dataclass(frozen=True)
class Evaluation:
    """Scores of the images of ``a`` against those of ``b``.

    Attributes:
        a, b: the folders.
        size: the size that all images were scaled to first, or None.
        scores: in the requested order.
    """

    a: str
    b: str
    size: Size | None
    scores: tuple[Score, ...]

    def as_dict(self) -> dict[str, Any]:
        """What ``scores.json`` holds."""
        told = []
        for score in self.scores:
            metric = METRICS[score.metric]
            told.append({**asdict(score), "better": metric.better, "rule": metric.rule, "sizes": metric.sizes})
        return {"a": self.a, "b": self.b, "size": self.size, "versions": versions(), "scores": told}

    def markdown(self) -> str:
        """The scores as a table, and how they were computed."""
        lines = [
            f"A: {self.a}",
            f"B: {self.b}",
            "",
            "| metric | A to B | deviation | of | better |",
            "|---|---|---|---|---|",
        ]
        for score in self.scores:
            metric = METRICS[score.metric]
            if score.value is None:
                lines.append(f"| {metric.title} | not computed |  |  | {metric.better} |")
                continue
            deviation = "" if score.deviation is None else f"{score.deviation:.4g}"
            lines.append(f"| {metric.title} | {score.value:.4f} | {deviation} | {score.pictures} | {metric.better} |")
        lines.append("")
        for score in self.scores:
            metric = METRICS[score.metric]
            told = [f"{metric.rule}; {metric.sizes}"]
            if score.network is not None:
                told.append(f"network: {score.network}")
            if score.note is not None:
                told.append(score.note)
            if score.reason is not None:
                told.append(f"not computed: {score.reason}")
            lines.append(f"- {metric.title}: {'. '.join(told)}.")
        if self.size is not None:
            lines.append(f"- All images were scaled to {self.size[0]} x {self.size[1]} px first.")
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``scores.json`` and ``scores.md``; return their paths."""
        data, page = folder / "scores.json", folder / "scores.md"
        with whole_file(data) as beside:
            beside.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        with whole_file(page) as beside:
            beside.write_text(self.markdown(), encoding="utf-8")
        return data, page


def evaluate(
    a: str | Path,
    b: str | Path,
    metrics: str | Sequence[str] = "all",
    *,
    prompts: str | Path | None = None,
    size: Size | None = None,
    networks: Networks | None = None,
    batch: int = 16,
    out: str | Path | None = None,
    common: bool = False,
    on_progress: OnProgress = lambda metric, done, total: None,
) -> Evaluation:
    """Score the images of ``a`` against those of ``b``, paired by file name.

    >>> flexclear.evaluation.evaluate("clear", "dense", "psnr,ssim,lpips", out="scores")     # doctest: +SKIP

    Args:
        a: folder of the images to score.
        b: folder of the images to compare with.
        metrics: names from ``flexclear.evaluation.METRICS``.
        prompts: prompts of the images in ``a``, for CLIP-T; see ``read_captions``.
        size: (height, width) in pixels to which every image is scaled first.
        networks: where networks come from; the user's caches by default.
        batch: images per batch.
        out: folder for ``scores.json``, ``scores.md``, and each image's intermediate results. The same call then resumes where
            it was stopped, and a call with more images only computes the new ones.
        common: measure the existing pairs if an image lacks its partner.
        on_progress: see ``OnProgress``.

    Returns:
        The scores. A metric has a reason instead of a value if its network is missing; if all metrics are requested, also if
        its package is missing or it needs larger images.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ImportError: a metric needs a package that is not installed.
        ValueError: images do not form pairs or are too small, a prompt is missing, or images of a pair differ in size.
    """
    asked = parse_metrics(metrics)
    require_for_metrics(asked)
    kinds = {METRICS[name].kind for name in asked}
    judged, reference = read_folder(a), read_folder(b)
    names = pair_names(judged, reference, common) if PAIRS in kinds else []
    captions = read_captions(prompts, judged) if TEXTS in kinds else {}
    if asked != tuple(METRICS):
        check_pictures(asked, [folder.files[name] for name in names for folder in (judged, reference)], size)
    store = Store() if out is None else Store(Path(out).expanduser() / STORE)
    judge = Judge(networks, store, size, batch, on_progress)
    scores = []
    for name in asked:
        kind = METRICS[name].kind
        if kind == SETS:
            scores.append(judge.sets(name, judged.files, reference.files))
        elif kind == PAIRS:
            scores.append(judge.pairs(name, {n: (judged.files[n], reference.files[n]) for n in names}))
        else:
            scores.append(judge.texts(name, {n: (judged.files[n], captions[n]) for n in captions}))
    store.close()
    found = Evaluation(str(judged.path), str(reference.path), size, tuple(scores))
    if out is not None:
        found.write(Path(out).expanduser())
    return found
