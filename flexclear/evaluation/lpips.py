"""LPIPS (Zhang et al., arXiv 1801.03924) without torchvision, each of whose wheels requires one build of torch.

The convolutions are AlexNet's or VGG-16's, from a state dict with torchvision's names; the learned channel weights come with
torchmetrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexclear.common.extras import require

MEAN, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Shift and scale of the channels of images with values from -1 to 1."""


def _alexnet() -> tuple[nn.Sequential, tuple[int, ...]]:
    convolutions = [
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]
    return nn.Sequential(*convolutions), (1, 4, 7, 9, 11)


def _vgg() -> tuple[nn.Sequential, tuple[int, ...]]:
    layers: list[nn.Module] = []
    taken, channels = [], 3
    for stage, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        if stage:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        taken.append(len(layers) - 1)
    return nn.Sequential(*layers), tuple(taken)


NETWORKS = {"alex": _alexnet, "vgg": _vgg}


class FeatureDistance(nn.Module):
    """Weighted squared distance between convolutional feature maps of images, summed over several depths.

    Args:
        features: the convolutions.
        taken: numbers of the layers whose maps are compared.
        weights: channel weights for each of these layers, ``[1, C, 1, 1]``.
    """

    def __init__(self, features: nn.Sequential, taken: tuple[int, ...], weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.features, self.taken = features, taken
        for number, weight in enumerate(weights):
            self.register_buffer(f"weight_{number}", weight)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.eval()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances ``[B]`` of two batches ``[B, 3, height, width]`` with values from -1 to 1."""
        total = first.new_zeros(len(first))
        for number, (a, b) in enumerate(zip(self._maps(first), self._maps(second), strict=True)):
            difference = (_unit(a) - _unit(b)).square()
            total = total + F.conv2d(difference, self.get_buffer(f"weight_{number}")).mean((1, 2, 3))
        return total

    def _maps(self, pictures: Tensor) -> list[Tensor]:
        maps, out = [], (pictures - self.get_buffer("mean")) / self.get_buffer("scale")
        for index, layer in enumerate(self.features):
            out = layer(out)
            if index in self.taken:
                maps.append(out)
        return maps


class LearnedDistance(FeatureDistance):
    """LPIPS, version 0.1, for images with values from -1 to 1.

    Args:
        state: ``features.*`` of AlexNet or VGG-16; the first layer's shape tells which.
        weights: learned channel weights at each of five depths, ``[1, C, 1, 1]``; torchmetrics' by default.

    Raises:
        ValueError: the state belongs to another network.
        ImportError: torchmetrics is needed and missing.
    """

    def __init__(self, state: Mapping[str, Tensor], weights: list[Tensor] | None = None) -> None:
        first = state.get("features.0.weight")
        shape = None if first is None else tuple(first.shape)
        kinds = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}
        if shape not in kinds:
            raise ValueError(f"LPIPS needs the weights of AlexNet or VGG-16; features.0.weight here is {shape}")
        kind = kinds[shape]
        super().__init__(*NETWORKS[kind](), learned_weights(kind) if weights is None else weights)
        self.kind = kind
        self.features.load_state_dict(
            {name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")}
        )


def _unit(maps: Tensor) -> Tensor:
    return maps / (maps.square().sum(1, keepdim=True).sqrt() + 1e-10)


def learned_weights(kind: str) -> list[Tensor]:
    """The channel weights that LPIPS learned, one ``[1, C, 1, 1]`` per depth.

    Raises:
        ImportError: torchmetrics, which contains them, is not installed.
    """
    require("torchmetrics", "LPIPS, whose learned weights it carries,")
    spec = find_spec("torchmetrics")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "functional" / "image" / "lpips_models" / f"{kind}.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[name] for name in sorted(state)]
