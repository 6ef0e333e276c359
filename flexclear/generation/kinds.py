"""Chooses the diffusers pipeline that draws: a model's own, or its family's for an input image or a ControlNet."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from flexclear.common.choices import EMBEDDED
from flexclear.common.foreign import from_pretrained
from flexclear.generation.settings import GenerateSettings

CONTROLNETS = {
    "FluxPipeline": ("FluxControlNetPipeline", "FluxControlNetModel"),
    "StableDiffusion3Pipeline": ("StableDiffusion3ControlNetPipeline", "SD3ControlNetModel"),
    "QwenImagePipeline": ("QwenImageControlNetPipeline", "QwenImageControlNetModel"),
}
"""Pipelines with a ControlNet and the ControlNet's class, by the pipeline without one."""

NEEDS_IMAGE = ("Edit", "ImageToVideo", "Layered", "Refiner")
"""Parts of the names of pipelines that require an image, whether or not their signature says so."""


def parameters_of(kind: Any) -> dict[str, Any]:
    """Names of a pipeline's arguments and their defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(kind.__call__).parameters.items()}


def needs_image(name: str, has: dict[str, Any]) -> bool:
    """Whether a pipeline of class ``name`` with these arguments requires an image."""
    return has.get("image") is inspect.Parameter.empty or ("image" in has and any(x in name for x in NEEDS_IMAGE))


def drawing_kind(name: str, settings: GenerateSettings) -> Any:
    """The diffusers class that draws what is requested with the components of a pipeline of class ``name``.

    Raises:
        ValueError: there is none, or it needs something that was not given; the message names the option.
    """
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None:
        asked = {
            "--image": settings.image,
            "--control-image": settings.control_image,
            "--negative-prompt": settings.negative_prompt,
        }
        given = [option for option, value in asked.items() if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: {name} is not a diffusers pipeline, so its arguments are unknown")
        return None
    if settings.control_image is not None:
        kind = _controlled(kind, settings)
    if settings.image is not None and not settings.highres:
        kind = _from_image(kind)
    has = parameters_of(kind)
    if needs_image(name, has) and settings.image is None:
        raise ValueError(f"{name} draws from an image: give --image FILE")
    if "control_image" in has and settings.control_image is None:
        raise ValueError(f"{name} follows an image: give --control-image FILE")
    if has.get("video") is inspect.Parameter.empty:
        raise ValueError(f"{name} draws from a video, which this command has no option for")
    if settings.image is not None and not settings.highres and settings.strength is not None and "strength" not in has:
        raise ValueError(f"--strength {settings.strength}: {kind.__name__} draws all steps from --image; leave it out")
    if settings.sizes and not {"height", "width"} <= has.keys():
        raise ValueError(f"--size: {kind.__name__} takes its size from --image; leave it out")
    return kind


def check_cleaning(kind: Any) -> None:
    """Raise if a pipeline cannot process prompts. Some of diffusers' clean prompts with ftfy without checking for it.

    Raises:
        ImportError: ftfy is missing.
    """
    module = sys.modules[kind.__module__]
    clean = getattr(getattr(module, "basic_clean", None), "__code__", None)
    used = () if clean is None else clean.co_names
    if "ftfy" in used and "is_ftfy_available" not in used and not hasattr(module, "ftfy"):
        raise ModuleNotFoundError(f"{kind.__name__} of diffusers needs ftfy: pip install ftfy", name="ftfy")


def _controlled(kind: Any, settings: GenerateSettings) -> Any:
    import diffusers

    name, has = kind.__name__, parameters_of(kind)
    if settings.controlnet is None:
        if "control_image" in has:
            return kind
        known = (
            f"give --controlnet FOLDER_OR_ID with a {CONTROLNETS[name][1]}" if name in CONTROLNETS else "leave it out"
        )
        raise ValueError(f"--control-image: {name} follows none by itself; {known}")
    if "control_image" in has:
        raise ValueError(f"--controlnet: {name} follows --control-image by itself; leave it out")
    if name not in CONTROLNETS:
        raise ValueError(f"--controlnet: diffusers has none for {name} here; it has for {', '.join(CONTROLNETS)}")
    return getattr(diffusers, CONTROLNETS[name][0])


def _from_image(kind: Any) -> Any:
    """The pipeline with the same components that takes an image."""
    import diffusers

    name, has = kind.__name__, parameters_of(kind)
    if "image" in has:
        return kind
    if "num_frames" in has:
        raise ValueError(f"--image: {name} draws videos from text alone; a model of image to video takes one")
    found = getattr(diffusers, f"{name.removesuffix('Pipeline')}Img2ImgPipeline", None)
    if found is None:
        raise ValueError(f"--image: diffusers has no pipeline from image to image for {name}; leave it out")
    return found


def own_image(kind: Any) -> bool:
    """Whether a pipeline takes an image in addition to the prompt, at the image's own size and possibly several, as Kontext,
    FLUX.2 and Qwen-Image-Edit do, rather than an image to start from."""
    has = parameters_of(kind)
    return "image" in has and "strength" not in has and "num_frames" not in has


def check_controlnet(kind: Any, folder: str, settings: GenerateSettings) -> int | None:
    """Check that a ControlNet has the class that ``kind`` takes; return its mode.

    Args:
        kind: the pipeline with a ControlNet, or one that follows an image by itself.
        folder: the ControlNet's folder or hub id; empty if ``kind`` brings its own.
        settings: the requested settings.

    Raises:
        OSError: its configuration cannot be read.
        ValueError: it has another class, or its mode is missing or unknown to it.
    """
    import diffusers

    has = parameters_of(kind)
    mode = _mode(settings.control_mode)
    if mode is not None and "control_mode" not in has:
        raise ValueError(f"--control-mode {settings.control_mode}: {kind.__name__} has none; leave it out")
    if settings.control_scale is not None and "controlnet_conditioning_scale" not in has:
        raise ValueError(f"--control-scale {settings.control_scale}: {kind.__name__} has none; leave it out")
    if not folder:
        return mode
    wanted = next(
        net for pipeline, net in CONTROLNETS.values() if kind.__name__.startswith(pipeline.removesuffix("Pipeline"))
    )
    config = getattr(diffusers, wanted).load_config(folder)
    if config.get("_class_name") != wanted:
        raise ValueError(
            f"--controlnet {settings.controlnet} is a {config.get('_class_name')}, {kind.__name__} takes a {wanted}"
        )
    modes = config.get("num_mode")
    if modes is None and mode is not None:
        raise ValueError(
            f"--control-mode {settings.control_mode}: {settings.controlnet} is for one kind of image; leave it out"
        )
    if modes is not None and (mode is None or not 0 <= mode < modes):
        named = ""
        if settings.controlnet == EMBEDDED:
            from flexclear.embedded.control import MODES

            named = f" ({', '.join(MODES)})"
        raise ValueError(
            f"--control-mode must be from 0 to {modes - 1}{named} for {settings.controlnet}, got {settings.control_mode}"
        )
    return mode


def _mode(text: str | None) -> int | None:
    from flexclear.embedded.control import MODES

    if text is None:
        return None
    if text in MODES:
        return MODES[text]
    if not text.isdecimal():
        raise ValueError(
            f"--control-mode is a number, or of the embedded ControlNet one of {list(MODES)}; got {text!r}"
        )
    return int(text)


def load_pipeline(kind: Any, settings: GenerateSettings, folder: str, controlnet: str, dtype: Any) -> Any:
    """Load the pipeline with its weights into main memory.

    Args:
        kind: from ``drawing_kind``; None: whatever the folder says.
        settings: the requested settings.
        folder: the pipeline's folder or hub id.
        controlnet: folder or hub id; empty: none other than the pipeline's own.
        dtype: type of the weights.
    """
    import diffusers

    parts: dict[str, Any] = {}
    if controlnet:
        if settings.controlnet == EMBEDDED:
            from flexclear.embedded import controlnet as embedded_controlnet

            parts["controlnet"] = embedded_controlnet(dtype)
        else:
            wanted = next(
                net
                for pipeline, net in CONTROLNETS.values()
                if kind.__name__.startswith(pipeline.removesuffix("Pipeline"))
            )
            parts["controlnet"] = from_pretrained(getattr(diffusers, wanted), controlnet, dtype)
    if settings.model != EMBEDDED:
        return from_pretrained(kind or diffusers.DiffusionPipeline, folder, dtype, **parts)
    from flexclear.embedded import pipeline

    pipe: Any = pipeline(dtype)
    if type(pipe) is kind:
        return pipe
    taken = inspect.signature(kind.__init__).parameters
    made = kind(**{name: part for name, part in pipe.components.items() if name in taken}, **parts)
    made.default_sample_size = pipe.default_sample_size
    return made
