"""The settings that all images of a run share, as stored in each of them."""

from __future__ import annotations

from typing import Any

import torch

from flexclear.generation.check import Setup
from flexclear.generation.clips import draws_videos, format_of, fps_of
from flexclear.generation.loading import RADIUS, min_features_of, window_names, windows_of
from flexclear.generation.settings import DENSE, GenerateSettings
from flexclear.masks import Disc, Downsampled


def metadata(pipe: Any, settings: GenerateSettings, setup: Setup, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that all images share, as stored in each file."""
    distinct = set(windows_of(pipe).values())
    window = distinct.pop() if len(distinct) == 1 else None
    inner = window.window if isinstance(window, Downsampled) else window
    true_only = arguments.get("negative_prompt") is not None and arguments.get("guidance_scale") is None
    guidance = "true_cfg_scale" if true_only else "guidance_scale"
    return {
        "steps": arguments["num_inference_steps"],
        "guidance": arguments.get(guidance),
        **(_highres(settings) if settings.highres else {}),
        "model": settings.model,
        "pipeline": type(pipe).__name__,
        "r": DENSE if settings.r == DENSE else inner.radius if isinstance(inner, Disc) else _asked_radius(settings),
        "down_factor": window.factor if isinstance(window, Downsampled) else None,
        "window": window_names(pipe),
        "weights": settings.weights,
        "fingerprints": list(setup.fingerprints),
        "recipe": setup.recipe,
        "min_features": min_features_of(settings) if setup.recipe else None,
        "text_len": arguments.get("max_sequence_length"),
        "dtype": str(setup.dtype).removeprefix("torch."),
        "device": str(setup.device),
        "backend": None if settings.r == DENSE else settings.backend,
        "compile": settings.compile,
        **_asked(settings),
        **(_clip(settings, arguments) if draws_videos(type(pipe)) else {}),
        **(_ranks(settings) if settings.parallel else {}),
    }


def _asked(settings: GenerateSettings) -> dict[str, Any]:
    """Settings that most images do not have."""
    told = {
        "negative_prompt": settings.negative_prompt,
        "true_cfg_scale": settings.true_cfg_scale,
        "image": None if settings.image is None else str(settings.image),
        "strength": None if settings.highres else settings.strength,
        "control_image": None if settings.control_image is None else str(settings.control_image),
        "controlnet": settings.controlnet,
        "control_mode": settings.control_mode,
        "control_scale": settings.control_scale,
        "lora": [f"{path}:{scale:g}" for path, scale in settings.loras] or None,
        "offload": settings.offload,
        "batch": settings.batch if settings.batch > 1 else None,
        "vae_tiling": settings.vae_tiling or None,
    }
    return {name: value for name, value in told.items() if value is not None}


def _asked_radius(settings: GenerateSettings) -> int | str | None:
    """The requested radius of a video's window, which may have others in distant frames; None if the weights file sets it."""
    return RADIUS if settings.r is None and settings.weights is None else settings.r


def _clip(settings: GenerateSettings, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_frames": arguments.get("num_frames"),
        "frame_radius": settings.frame_radius,
        "fps": float(arguments.get("frame_rate") or fps_of(settings)),
        "format": format_of(settings),
    }


def _highres(settings: GenerateSettings) -> dict[str, Any]:
    """Requested settings for all stages; None is each stage's own."""
    asked = {
        "sizes": settings.highres,
        "method": settings.highres_method,
        "strength": settings.strength,
        "shift": settings.shift,
    }
    return {"steps": settings.steps, "guidance": settings.guidance, "highres": asked}


def _ranks(settings: GenerateSettings) -> dict[str, Any]:
    return {"ranks": torch.distributed.get_world_size(), "text": settings.text, "exchange": settings.exchange}
