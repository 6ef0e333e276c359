"""What each metric computes from pixels: features of images, or distances of pairs. Used for files and for tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flexclear.common.metrics import COSINES, FRECHET, METRICS, OWN, PAIRS, PIXELS, SCORE, TEXTS, Metric, parse_metrics
from flexclear.evaluation import formulas
from flexclear.evaluation.networks import Networks
from flexclear.evaluation.pictures import Size
from flexclear.images.reading import image_size


class TooSmall(ValueError):
    """A metric cannot process images this small."""


class View(NamedTuple):
    """How a metric computes features or distances.

    Attributes:
        compute: takes one batch of uint8 images (features), or two (distances).
        identity: distinguishes results of different networks; ``""`` without one.
        title: the network's title, or None.
    """

    compute: Callable[..., Tensor]
    identity: str
    title: str | None


def view_of(metric: Metric, networks: Networks) -> View:
    """The view of a metric. ``PIXELS``, ``OWN``: distances ``[B]`` of two batches; ``SCORE``: log-probabilities; else: features.

    Raises:
        ImportError, NetworkMissing: the network is not available.
    """
    if metric.formula == PIXELS:
        return View(getattr(formulas, metric.name), "", None)
    assert metric.network is not None
    network = getattr(networks, metric.network)
    compute = {OWN: "distances", SCORE: "log_probabilities", FRECHET: "features", COSINES: "features"}[metric.formula]
    return View(getattr(network, compute), network.identity, network.title)


def check_sizes(asked: Sequence[str], height: int, width: int, what: str) -> None:
    """Raise unless these metrics can process images of this size.

    Args:
        asked: names of metrics.
        height, width: image size in pixels.
        what: how the message names the images.

    Raises:
        TooSmall: a side is too short for one of them.
    """
    for name in asked:
        smallest = METRICS[name].smallest
        if min(height, width) < smallest:
            raise TooSmall(
                f"{name} needs images of at least {smallest} x {smallest} px, and {what} {height} x {width}. Scale them "
                f"(--size HEIGHTxWIDTH), or leave {name} out"
            )


def check_pictures(asked: Sequence[str], paths: Iterable[Path], size: Size | None) -> None:
    """Raise unless these metrics can process these images, scaled to ``size`` if it is given.

    Raises:
        TooSmall: one is too small.
    """
    if all(METRICS[name].smallest == 1 for name in asked):
        return
    if size is not None:
        check_sizes(asked, *size, "size is")
        return
    for path in paths:
        check_sizes(asked, *image_size(path)[::-1], f"{path} is")


def score_tensors(
    judged: Tensor,
    reference: Tensor | None,
    metrics: str | Sequence[str],
    *,
    networks: Networks | None = None,
    batch: int = 16,
) -> dict[str, float]:
    """Compute metrics of images in memory, without a store.

    >>> score_tensors(judged, reference, "psnr,stlpips-alex,fd-lite0")                     # doctest: +SKIP
    {'psnr': 21.4, 'stlpips-alex': 0.113, 'fd-lite0': 8.1}

    Args:
        judged, reference: uint8 ``[n, 3, height, width]``, paired by index. A class score needs no reference.
        metrics: names of pair or set metrics from ``flexclear.evaluation.METRICS``.
        networks: where networks come from; the user's caches by default.
        batch: images per batch.

    Returns:
        The score by metric; for pair metrics, the mean.

    Raises:
        ImportError, NetworkMissing: a network is not available.
        TypeError, ValueError: the images are not in this form, or a metric cannot be computed for them.
    """
    asked, networks = parse_metrics(metrics), networks or Networks()
    other = judged if reference is None else reference
    for name, pictures in (("judged", judged), ("reference", other)):
        if pictures.dtype != torch.uint8:
            raise TypeError(f"{name} must be uint8 images, got {pictures.dtype}")
        if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.shape[0] < 1:
            raise ValueError(f"{name} must be [n, 3, height, width], got {list(pictures.shape)}")
    if judged.shape != other.shape:
        raise ValueError(f"judged and reference must be pairs, got {list(judged.shape)} and {list(other.shape)}")
    check_sizes(asked, judged.shape[-2], judged.shape[-1], "these are")
    for name in asked:
        if METRICS[name].kind == TEXTS:
            raise ValueError(f"{name} needs prompts; evaluate, of folders, computes it")
        if reference is None and METRICS[name].formula != SCORE:
            raise ValueError(f"{name} needs a reference, and reference is None")
    found: dict[str, float] = {}
    for name in asked:
        metric = METRICS[name]
        compute = view_of(metric, networks).compute
        if metric.kind == PAIRS and metric.formula != COSINES:
            values = [compute(a, b) for a, b in zip(judged.split(batch), other.split(batch), strict=True)]
            found[name] = float(torch.cat(values).double().mean())
            continue
        own = torch.cat([compute(part) for part in judged.split(batch)])
        if metric.formula == SCORE:
            found[name] = formulas.inception_score(own)[0]
            continue
        theirs = torch.cat([compute(part) for part in other.split(batch)])
        of_pairs = metric.formula == COSINES
        found[name] = (
            float(formulas.cosines(own, theirs).mean()) if of_pairs else formulas.frechet_distance(own, theirs)
        )
    return found
