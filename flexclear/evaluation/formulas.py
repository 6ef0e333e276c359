"""The formulas behind the metrics, over pixels or network features; from torchmetrics if it has them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.common.extras import require

SPLITS = 10
"""Number of parts of the images over which the Inception score is averaged."""

LARGEST_PSNR = 120.0
"""PSNR in dB assigned to equal images."""

Pictures = Tensor


class _Given(nn.Module):
    """Takes the place of torchmetrics' network, since the features are already computed."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(judged: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two sets of features ``[n, features]``, in float64; FID, if Inception v3 made the features.

    |mean difference|^2 + tr(S + T - 2 (S T)^(1/2)), where S and T are the covariances. With S = A^T A and T = B^T B, the trace
    of the root is the sum of the singular values of A B^T. So no matrix root is needed, and neither A nor B has more rows than
    there are images or features.

    Raises:
        ValueError: a set has fewer than two images, so it has no covariance.
    """
    if len(judged) < 2 or len(reference) < 2:
        raise ValueError(f"a Fréchet distance needs two images a side or more, got {len(judged)} and {len(reference)}")
    means, factors = [], []
    for features in (judged.double(), reference.double()):
        means.append(features.mean(0))
        factor = (features - means[-1]) / (len(features) - 1) ** 0.5
        factors.append(torch.linalg.qr(factor, mode="r")[1] if len(factor) > factor.shape[1] else factor)
    traces = sum(factor.square().sum() for factor in factors)
    root = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    return float((means[0] - means[1]).square().sum() + traces - 2 * root)


def inception_score(log_probabilities: Tensor) -> tuple[float, float, int]:
    """exp of the mean divergence from the mean distribution: mean and deviation over parts, and number of parts.

    Args:
        log_probabilities: ``[n, classes]``. Parts are drawn with a fixed seed.
    """
    require("torchmetrics", "a score of classes")
    from torchmetrics.image.inception import InceptionScore

    splits = min(SPLITS, len(log_probabilities))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        metric = InceptionScore(feature=_Given(log_probabilities.shape[1]), splits=splits)
    metric.update(log_probabilities.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, deviation = metric.compute()
    return float(mean), float(deviation) if splits > 1 else 0.0, splits


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """100 times the cosine of each pair of features ``[n, features]``, as float64 ``[n]``."""
    return 100 * torch.cosine_similarity(first.double(), second.double(), dim=1)


def psnr(first: Pictures, second: Pictures) -> Tensor:
    """PSNR in dB of uint8 images ``[B, 3, height, width]``, over all pixels and channels: ``[B]``."""
    require("torchmetrics", "PSNR")
    from torchmetrics.functional.image import peak_signal_noise_ratio

    found = peak_signal_noise_ratio(
        first.double(), second.double(), data_range=255.0, reduction="none", dim=(1, 2, 3), base=10.0
    )
    return found.clamp_max(LARGEST_PSNR)


def ssim(first: Pictures, second: Pictures) -> Tensor:
    """Structural similarity of uint8 images ``[B, 3, height, width]``, Gaussian window of 11 px, sigma 1.5: ``[B]``.

    Raises:
        ValueError: a side is shorter than the window.
    """
    if min(first.shape[-2:]) < 11:
        raise ValueError(
            f"SSIM looks through a window of 11 x 11 px, got images of {first.shape[-2]} x {first.shape[-1]}"
        )
    require("torchmetrics", "SSIM")
    from torchmetrics.functional.image import structural_similarity_index_measure

    found: Any = structural_similarity_index_measure(
        first.double(), second.double(), data_range=255.0, reduction="none", gaussian_kernel=True, sigma=1.5
    )
    return found


def rmse(first: Pictures, second: Pictures) -> Tensor:
    """Root mean squared difference of uint8 images ``[B, 3, height, width]``, for values scaled to 0 to 1: ``[B]``."""
    return ((first.double() - second.double()) / 255).square().mean((1, 2, 3)).sqrt()
