"""ST-LPIPS, the shift-tolerant LPIPS (Ghildyal and Liu, arXiv 2207.13686), for the weights of the package stlpips-pytorch.

The package's own modules need torchvision. These follow the paper and the names and shapes in the package's files. Where
AlexNet and VGG-16 halve their maps, these modules blur them first, so that maps barely change when an image moves by a pixel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexclear.evaluation.lpips import FeatureDistance

IN_FILE = re.compile(r"net\.slice\d\.(\d+\.(?:weight|bias|filt))")
"""Name of a layer's tensor; the files number layers consecutively across slices."""


class Blur(nn.Module):
    """Halves maps ``[B, channels, height, width]`` with the binomial filter 1 2 1 in both directions and mirrored borders."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filt", (line[:, None] * line).repeat(channels, 1, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        return F.conv2d(F.pad(maps, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=maps.shape[1])


def _alexnet() -> tuple[list[nn.Module], tuple[int, ...]]:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, padding=2), Blur(64), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 1), Blur(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 1), Blur(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]
    return layers, (2, 6, 10, 12, 14)


def _vgg() -> tuple[list[nn.Module], tuple[int, ...]]:
    layers: list[nn.Module] = []
    taken, channels = [], 3
    for stage, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        if stage:
            layers += [nn.MaxPool2d(2, 1), Blur(channels)]
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        taken.append(len(layers) - 1)
    return layers, tuple(taken)


NETWORKS = {"alex": _alexnet, "vgg": _vgg}


class ShiftTolerantDistance(FeatureDistance):
    """ST-LPIPS for images with values from -1 to 1.

    Args:
        kind: ``"alex"`` or ``"vgg"``.
        state: contents of the package's file for it.

    Raises:
        RuntimeError, KeyError: the state belongs to another network.
    """

    def __init__(self, kind: str, state: Mapping[str, Tensor]) -> None:
        layers, taken = NETWORKS[kind]()
        weights = [state[f"lin{depth}.model.1.weight"] for depth in range(len(taken))]
        super().__init__(nn.Sequential(*layers), taken, weights)
        self.features.load_state_dict(
            {found[1]: value for name, value in state.items() if (found := IN_FILE.fullmatch(name)) is not None}
        )
