"""Videos in ``flexclear generate``: number of frames, which of them a window sees, and how they are written."""

from __future__ import annotations

import inspect
from typing import Any

from flexclear.common.choices import ALL_FRAMES, VIDEO_FORMATS
from flexclear.generation.settings import DENSE, GenerateSettings
from flexclear.images.videos import check_video

FPS = 16
"""Default frames per second: those that Wan was trained on."""


def draws_videos(kind: Any) -> bool:
    """Whether a pipeline class draws videos: it takes a number of frames."""
    return "num_frames" in inspect.signature(kind.__call__).parameters


def format_of(settings: GenerateSettings) -> str:
    """File format of a video: the requested one, else by the suffix of ``out``, else GIF."""
    if settings.format is not None:
        return settings.format
    ending = settings.out.suffix.lower().removeprefix(".")
    return ending if ending in VIDEO_FORMATS and ending != "png" else "gif"


def suffix_of(settings: GenerateSettings) -> str:
    """Suffix of a video's file; empty for a folder of frames."""
    kind = format_of(settings)
    return "" if kind == "png" else f".{kind}"


def fps_of(settings: GenerateSettings) -> float:
    return FPS if settings.fps is None else settings.fps


def check_images(name: str, settings: GenerateSettings) -> None:
    """Raise for video settings when images are drawn.

    Args:
        name: name of the pipeline's class.
        settings: the requested settings.

    Raises:
        ValueError: there are such settings.
    """
    asked = {
        "--num-frames": settings.num_frames,
        "--frame-radius": settings.frame_radius,
        "--fps": settings.fps,
        "--format": settings.format,
    }
    given = [f"{option} {value}" for option, value in asked.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: {name} draws images, which have no frames; leave it out")


def check_videos(name: str, settings: GenerateSettings) -> None:
    """Raise for settings that a video model does not support or needs.

    Raises:
        ImportError: MP4 is requested, but PyAV is not installed.
        ValueError: a setting is unsupported or missing.
    """
    if settings.highres:
        raise ValueError(f"--highres enlarges images, and {name} draws videos; give --size")
    if settings.down_factor is not None:
        raise ValueError(f"--down-factor pools cells of images, and {name} draws videos; leave it out")
    if settings.r != DENSE and settings.weights is None and settings.frame_radius is None:
        raise ValueError(
            f"--frame-radius is missing: {name} draws videos, and a radius does not say which frames are seen. Give a number of "
            f"frames of the latents on either side, or {ALL_FRAMES!r}; --r dense draws with the plain model"
        )
    check_video(format_of(settings), fps_of(settings))


def check_clip(pipe: Any, config: Any, settings: GenerateSettings) -> None:
    """Raise for a size or a number of frames that a video pipeline would round, or a window deeper than the clip.

    Args:
        pipe: a pipeline, with weights or without.
        config: configuration of its transformer.
        settings: the requested settings.

    Raises:
        ValueError: one of these is found.
    """
    name, factor = type(pipe).__name__, temporal_factor(pipe)
    multiple = _side_multiple(pipe, config)
    for height, width in settings.sizes:
        if multiple is not None and (height % multiple or width % multiple):
            near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
            raise ValueError(
                f"{name} draws sizes that are multiples of {multiple} pixels, got {height}x{width}; near it: "
                f"{near[0]}x{near[1]}"
            )
    if factor is None:
        return
    frames = settings.num_frames
    if frames is not None and (frames - 1) % factor:
        low = (frames - 1) // factor * factor + 1
        raise ValueError(
            f"--num-frames {frames}: the VAE of {name} makes one frame of the first and one of every {factor} after it, so "
            f"that there are {factor} n + 1; near it: {low} and {low + factor}"
        )
    if frames is None:
        frames = inspect.signature(type(pipe).__call__).parameters["num_frames"].default
    if not isinstance(frames, int) or settings.frame_radius in (None, ALL_FRAMES) or settings.r == DENSE:
        return
    latent = -(-((frames - 1) // factor + 1) // _frames_of_patch(config))
    if int(settings.frame_radius or 0) >= max(latent, 2):
        raise ValueError(
            f"--frame-radius {settings.frame_radius}: {frames} frames are {latent} after the VAE, so that a window would see "
            f"all of them; {ALL_FRAMES!r} says so, a smaller number sees fewer"
        )


def _side_multiple(pipe: Any, config: Any) -> int | None:
    """Pixels that must divide a side: those per latent times latents per patch. None if not known."""
    names = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio")
    latent = next((factor for name in names if (factor := getattr(pipe, name, None)) is not None), None)
    patch = config.get("patch_size")
    if latent is None or patch is None:
        return None
    return latent * (patch if isinstance(patch, int) else patch[-1])


def _frames_of_patch(config: Any) -> int:
    """Number of latent frames in one token."""
    patch = config.get("patch_size")
    return patch[0] if isinstance(patch, list | tuple) and len(patch) == 3 else config.get("patch_size_t") or 1


def temporal_factor(pipe: Any) -> int | None:
    """Number of frames that the VAE merges into one, after the first; None if the pipeline does not say."""
    for name in ("vae_scale_factor_temporal", "vae_temporal_compression_ratio"):
        if (factor := getattr(pipe, name, None)) is not None:
            return factor
    return None
