"""Scores images: known results come from the store; the others are computed in batches and stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexclear.common.metrics import COSINES, METRICS, SCORE, Metric
from flexclear.evaluation import formulas
from flexclear.evaluation.networks import NetworkMissing, Networks
from flexclear.evaluation.pictures import Size, batches, content_key, read_picture
from flexclear.evaluation.store import Store, fingerprint
from flexclear.evaluation.views import TooSmall, View, check_pictures, view_of

OnProgress = Callable[[str, int, int], None]
"""Called with a metric's name, the number of images or pairs done, and their total."""

STABLE_FID = 2048
"""With fewer images, FID says more about their number than about them: there are as many features."""


@dataclass(frozen=True)
class Score:
    """The result of a metric.

    Attributes:
        metric: its name.
        value: the score; None: not computed.
        deviation: standard deviation over images or pairs (of the Inception score: over its parts), or None.
        pictures: number of images or pairs; for FID the number of judged images.
        network: the network it used, or None.
        reason: why it was not computed, or None.
        note: a caveat, or None.
        each: the score of each image or pair by name, if the metric has one.
    """

    metric: str
    value: float | None
    deviation: float | None = None
    pictures: int = 0
    network: str | None = None
    reason: str | None = None
    note: str | None = None
    each: Mapping[str, float] = field(default_factory=dict)


class Judge:
    """Computes scores.

    Args:
        networks: where networks come from; the user's caches by default.
        store: keeps results; in memory by default.
        size: (height, width) in pixels that all images are scaled to first, or None.
        batch: images per batch.
        on_progress: see ``OnProgress``.

    A missing network, or images too small for it, raise no exception: the score then has no value, but a reason.
    """

    def __init__(
        self,
        networks: Networks | None = None,
        store: Store | None = None,
        size: Size | None = None,
        batch: int = 16,
        on_progress: OnProgress = lambda metric, done, total: None,
    ) -> None:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch must be a whole number >= 1, got {batch!r}")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size must be (height, width) in pixels, got {size!r}")
        self.networks = networks or Networks()
        self.store = store or Store()
        self.size, self.batch, self.on_progress = size, batch, on_progress

    def sets(self, metric: str, judged: Mapping[str, Path], reference: Mapping[str, Path] | None = None) -> Score:
        """Compute a metric of all images together.

        Args:
            metric: one of the kind ``SETS``.
            judged, reference: images by name; a Fréchet distance needs both.
        """

        def found() -> Score:
            kind = METRICS[metric]
            view = view_of(kind, self.networks)
            note = None
            if kind.formula == SCORE:
                values = self._embed(metric, list(judged.values()), view)
                value, deviation, parts = formulas.inception_score(values)
                if parts < formulas.SPLITS:
                    note = f"{parts} parts of one image each; {formulas.SPLITS} images or more make sense"
                return Score(metric, value, deviation, len(judged), view.title, note=note)
            paths = [*judged.values(), *(reference or {}).values()]
            features = self._embed(metric, paths, view)
            few = min(len(judged), len(paths) - len(judged))
            if few < STABLE_FID:
                note = f"{few} images on the smaller side: {kind.title} is biased upwards below some thousands"
            value = formulas.frechet_distance(features[: len(judged)], features[len(judged) :])
            return Score(metric, value, None, len(judged), view.title, note=note)

        return _or_reason(metric, found)

    def pairs(self, metric: str, pairs: Mapping[str, tuple[Path, Path]]) -> Score:
        """Compute the mean of a metric over pairs of images.

        Args:
            metric: one of the kind ``PAIRS``.
            pairs: (judged, reference) by name.

        Raises:
            ValueError: the images of a pair differ in size, and the metric compares pixels.
        """

        def found() -> Score:
            kind = METRICS[metric]
            view = view_of(kind, self.networks)
            check_pictures([metric], [path for pair in pairs.values() for path in pair], self.size)
            if kind.formula == COSINES:
                features = self._embed(metric, [path for pair in pairs.values() for path in pair], view)
                values = formulas.cosines(features[0::2], features[1::2])
            else:
                values = self._compare(metric, list(pairs.values()), view)
            return _mean(kind, list(pairs), values, view.title)

        return _or_reason(metric, found)

    def texts(self, metric: str, captioned: Mapping[str, tuple[Path, str]]) -> Score:
        """Compute CLIP's agreement between images and their prompts.

        Args:
            metric: ``"clip-t"``.
            captioned: (image, prompt) by name.
        """

        def found() -> Score:
            network = self.networks.clip
            paths, prompts = zip(*captioned.values(), strict=True)
            pictures = self._embed(metric, list(paths), view_of(METRICS[metric], self.networks))
            texts = self._lookup(
                metric,
                [fingerprint("text", network.identity, prompt) for prompt in prompts],
                [(prompt,) for prompt in prompts],
                lambda rows: network.texts([prompt for (prompt,) in rows]),
            )
            values = formulas.cosines(pictures, texts).clamp_min(0)
            return _mean(METRICS[metric], list(captioned), values, network.title)

        return _or_reason(metric, found)

    def _embed(self, metric: str, paths: Sequence[Path], view: View) -> Tensor:
        """A network's features of each image, ``[n, features]``."""
        what = "probabilities" if METRICS[metric].formula == SCORE else "features"
        keys = [fingerprint(what, view.identity, str(self.size), content_key(path)) for path in paths]

        def compute(rows: Sequence[tuple[Path, ...]]) -> Tensor:
            return view.compute(torch.stack([read_picture(path, self.size) for (path,) in rows]))

        return self._lookup(metric, keys, [(path,) for path in paths], compute, pictures=True)

    def _compare(
        self,
        metric: str,
        pairs: Sequence[tuple[Path, Path]],
        view: View,
    ) -> Tensor:
        """The metric of each pair, ``[n]``."""
        keys = [fingerprint(metric, view.identity, str(self.size), *map(content_key, pair)) for pair in pairs]

        def compute(rows: Sequence[tuple[Path, ...]]) -> Tensor:
            first, second = (torch.stack([read_picture(row[side], self.size) for row in rows]) for side in range(2))
            if first.shape != second.shape:
                (a, b), *_ = rows
                raise ValueError(
                    f"{a} is {first.shape[-2]} x {first.shape[-1]} px, {b} {second.shape[-2]} x {second.shape[-1]}: "
                    f"{metric} compares pixels. --size HEIGHTxWIDTH scales both"
                )
            return view.compute(first, second)[:, None]

        return self._lookup(metric, keys, list(pairs), compute, pictures=True)[:, 0]

    def _lookup(
        self,
        metric: str,
        keys: Sequence[str],
        rows: Sequence[tuple[Any, ...]],
        compute: Callable[[Sequence[tuple[Any, ...]]], Tensor],
        pictures: bool = False,
    ) -> Tensor:
        """Return rows of the store under ``keys``, after computing each missing one once."""
        known = self.store.get(keys)
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        total = len(missing) + len(known)
        self.on_progress(metric, len(known), total)
        todo = list(missing.values())
        groups = (
            batches(todo, self.size, self.batch)
            if pictures
            else [todo[start : start + self.batch] for start in range(0, len(todo), self.batch)]
        )
        names = iter(missing)
        for group in groups:
            values = compute(group).numpy().astype(np.float32)
            fresh = {next(names): value for value in values}
            self.store.put(fresh)
            known |= fresh
            self.on_progress(metric, len(known), total)
        return torch.from_numpy(np.stack([known[key] for key in keys]))


def _or_reason(metric: str, found: Callable[[], Score]) -> Score:
    try:
        return found()
    except (NetworkMissing, TooSmall, ImportError) as error:
        return Score(metric, None, reason=str(error))


def _mean(metric: Metric, names: Sequence[str], values: Tensor, network: str | None) -> Score:
    values = values.double()
    deviation = float(values.std(correction=0)) if len(values) else None
    mean = float(values.mean())
    if not math.isfinite(mean):
        raise ValueError(f"{metric.title} is not finite for {names[int((~values.isfinite()).nonzero()[0])]!r}")
    return Score(
        metric.name, mean, deviation, len(values), network, each=dict(zip(names, values.tolist(), strict=True))
    )
