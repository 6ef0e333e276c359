"""The settings in an image, as the options of ``flexclear generate`` that draw it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAME = (
    *(
        "model",
        "steps",
        "guidance",
        "r",
        "down_factor",
        "weights",
        "recipe",
        "min_features",
        "text_len",
        "dtype",
        "device",
    ),
    *(
        "backend",
        "compile",
        "num_frames",
        "frame_radius",
        "fps",
        "format",
        "negative_prompt",
        "true_cfg_scale",
        "image",
    ),
    *(
        "strength",
        "control_image",
        "controlnet",
        "control_mode",
        "control_scale",
        "lora",
        "offload",
        "batch",
        "vae_tiling",
    ),
)
"""Settings with the same names as their options."""

FOUND = ("pipeline", "window", "fingerprints", "stages", "frame")
"""Settings that are not options but results of checks."""

FILES = ("model", "weights", "lora", "image", "control_image", "controlnet")
"""Options that name files, whose contents are in ``fingerprints``."""


def options_of(settings: Mapping[str, Any], name: object) -> dict[str, Any]:
    """Return options by parameter name, without those that were not given.

    Args:
        settings: from ``flexclear.images.files.read_settings``.
        name: name of the file, for the message.

    Raises:
        ValueError: a setting is missing, or this version does not know it.
    """
    left = {key: value for key, value in settings.items() if key not in FOUND}
    try:
        found: dict[str, Any] = {"prompt": [left.pop("prompt")], "seed": [left.pop("seed")]}
        size = f"{left.pop('height')}x{left.pop('width')}"
        if (highres := left.pop("highres", None)) is None:
            found["size"] = [size]
        else:
            sizes = ",".join(str(one) if isinstance(one, int) else f"{one[0]}x{one[1]}" for one in highres["sizes"])
            found |= {"highres": sizes, "highres_method": highres["method"]}
            found |= {key: highres[key] for key in ("strength", "shift")}
        if left.pop("ranks", None) is not None:
            found |= {"parallel": True, "parallel_text": left.pop("text"), "exchange": left.pop("exchange")}
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{name} carries no settings of an image of flexclear generate: {error!r}") from error
    for key, value in left.items():
        if key not in SAME:
            raise ValueError(f"{name} carries a setting that this version does not know: {key}")
        found[key] = value
    return {key: value for key, value in found.items() if value is not None}


def read_options(path: Path) -> dict[str, Any]:
    """The options that draw an image or a video of ``flexclear generate`` again.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it contains no settings.
    """
    from flexclear.images.files import read_settings

    return options_of(read_settings(path)["settings"], path)


def changed_since(path: Path, fingerprints: tuple[str, ...], versions: Mapping[str, str]) -> list[str]:
    """Why an image might not be reproduced exactly, one line per cause.

    Args:
        path: the image.
        fingerprints: those of ``flexclear.generation.check.Setup`` for the same options.
        versions: versions of the libraries.
    """
    from flexclear.images.files import read_settings

    told = read_settings(path)
    found = []
    if told["settings"].get("fingerprints") != list(fingerprints):
        found.append(f"{path} was drawn with other contents of these files: they have changed since")
    before = told.get("versions") or {}
    others = [
        f"{name} {before.get(name)}, here {version}"
        for name, version in versions.items()
        if before.get(name) != version
    ]
    if others:
        found.append(f"{path} was drawn with {'; '.join(others)}")
    return found
