"""The model behind a name: its folder, what its files say without its weights, and a fingerprint of its encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from flexclear.common.choices import EMBEDDED, HUB_ID
from flexclear.common.fingerprints import counts, fingerprint_files
from flexclear.common.foreign import from_pretrained
from flexclear.common.shipped import model_directory
from flexclear.distill.calls import CALLERS

ENCODED = ("FluxTransformer2DModel",)
"""Transformer classes whose pipelines ``flexclear data cache`` can use to encode images."""

ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def pipeline_folder(model: str) -> Path:
    """Folder of the pipeline ``model``, downloaded if it is on the hub.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be downloaded.
    """
    if model == EMBEDDED:
        return model_directory()
    place = Path(model).expanduser()
    if place.is_dir():
        if not (place / "model_index.json").is_file():
            raise FileNotFoundError(f"model: {place} is not a pipeline folder: it has no model_index.json")
        return place
    if place.exists() or HUB_ID.fullmatch(model) is None or model.startswith("."):
        raise FileNotFoundError(f"model: there is no folder {model}, and it is not a hub id such as 'owner/name'")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(model))
    except OSError as error:
        raise OSError(f"cannot load {model}: {error}") from error


def text_len_of(model: str) -> int:
    """Number of text tokens that training pads captions to by default: FLUX.1's 512, the embedded model's 64."""
    return 64 if model == EMBEDDED else 512


def check_class(name: str | None) -> None:
    """Raise unless the trainer can call a model of this class.

    Raises:
        TypeError: it cannot.
    """
    if name not in CALLERS:
        raise TypeError(f"distillation trains {' or '.join(CALLERS)}; this is a {name}")


def check_encoded(name: str | None) -> None:
    """Raise unless images can be encoded with a pipeline whose transformer is of this class.

    Raises:
        TypeError: they cannot.
    """
    if name in CALLERS and name not in ENCODED:
        raise TypeError(
            f"images with captions can be encoded for {' or '.join(ENCODED)}; this is a {name}, for which samples are passed: "
            "distill(pipe, config, MemorySamples([...]))"
        )
    check_class(name)


def transformer_class(folder: Path) -> str | None:
    """Class name of the pipeline's transformer."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return (index.get("transformer") or (None, None))[1]


def skeleton(folder: Path) -> Any:
    """The transformer without weights, on the meta device.

    Raises:
        TypeError: the trainer cannot call it.
    """
    import diffusers

    name = transformer_class(folder)
    check_class(name)
    kind = getattr(diffusers, name)  # type: ignore[arg-type]
    with torch.device("meta"):
        return kind.from_config(kind.load_config(folder, subfolder="transformer"))


def load_pipeline(model: str, folder: Path, dtype: torch.dtype, whole: bool) -> Any:
    """Load the pipeline, or only its transformer if ``whole`` is False."""
    if whole:
        if model == EMBEDDED:
            from flexclear.embedded import pipeline

            return pipeline(dtype)
        from diffusers import DiffusionPipeline

        return from_pretrained(DiffusionPipeline, folder, dtype)
    import diffusers

    name = transformer_class(folder)
    check_class(name)
    loaded = from_pretrained(getattr(diffusers, name), folder, dtype, subfolder="transformer")  # type: ignore
    loaded.register_to_config(_name_or_path=model)
    return loaded


def fingerprint(folder: Path) -> str:
    """Fingerprint VAE, text encoders and tokenizers: their configurations, and size and samples of every weights file.

    Two pipelines with equal files of these parts (FLUX.1-dev and schnell) have equal fingerprints.
    """
    files = (file for part in ENCODERS for file in sorted((folder / part).glob("*")))
    return fingerprint_files(folder, (file for file in files if counts(file)))
