"""Which metrics there are, what each is computed from, and how images are brought to size for it."""

from __future__ import annotations

from dataclasses import dataclass

PAIRS, SETS, TEXTS = "pairs", "sets", "texts"

AS_GIVEN = (
    "pixels as they are, or scaled by PIL's Lanczos filter to --size; both images of a pair must then be of one size"
)
INCEPTION = "Inception v3 scales images (after --size) to 299 x 299 px itself, without regard to the aspect ratio"
PROCESSOR = "scaled and cut (after --size) by the image processor that lies beside the network"


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: as the command line has it.
        title: for tables.
        kind: ``PAIRS``: the mean over pairs of images; ``SETS``: of all images together; ``TEXTS``: the mean over
            images and their prompts.
        network: what it looks through, or None.
        better: ``"higher"`` or ``"lower"``.
        rule: how it is computed.
        sizes: how images are brought to size.
    """

    name: str
    title: str
    kind: str
    network: str | None
    better: str
    rule: str
    sizes: str


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "fid",
            "FID",
            SETS,
            "inception",
            "lower",
            "Fréchet distance of Inception v3 features, all images of A to all of B, in float64",
            INCEPTION,
        ),
        Metric(
            "is",
            "IS",
            SETS,
            "inception",
            "higher",
            "Inception score of A: mean and deviation over 10 parts, drawn by a fixed seed; no bias in the last layer",
            INCEPTION,
        ),
        Metric(
            "lpips",
            "LPIPS",
            PAIRS,
            "lpips",
            "lower",
            "learned perceptual distance, version 0.1, of AlexNet (or VGG-16) features",
            AS_GIVEN,
        ),
        Metric("clip-i", "CLIP-I", PAIRS, "clip", "higher", "100 x cosine of CLIP's image embeddings", PROCESSOR),
        Metric(
            "clip-t",
            "CLIP-T",
            TEXTS,
            "clip",
            "higher",
            "100 x cosine of CLIP's embeddings of an image of A and its prompt, at least 0",
            PROCESSOR,
        ),
        Metric("dino", "DINO", PAIRS, "dino", "higher", "100 x cosine of the class tokens", PROCESSOR),
        Metric(
            "psnr",
            "PSNR",
            PAIRS,
            None,
            "higher",
            "dB over all pixels and channels of 8-bit RGB, mean over pairs; equal images count as 120",
            AS_GIVEN,
        ),
        Metric(
            "ssim",
            "SSIM",
            PAIRS,
            None,
            "higher",
            "structural similarity of 8-bit RGB, Gaussian window of 11 px with sigma 1.5, mean over channels and all pixels, "
            "images mirrored at their borders",
            AS_GIVEN,
        ),
        Metric("rmse", "RMSE", PAIRS, None, "lower", "root mean squared difference of values from 0 to 1", AS_GIVEN),
    )
}
"""Metrics by name."""
