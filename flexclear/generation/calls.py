"""Arguments of the pipeline's call, under the names that each pipeline uses."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

from flexclear.generation.kinds import parameters_of
from flexclear.generation.settings import GenerateSettings


def call_arguments(kind: Any, settings: GenerateSettings, defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """Make the arguments of a pipeline's call that all images share.

    Args:
        kind: the pipeline's class.
        settings: the requested settings.
        defaults: default arguments of the call; None: those of its signature.

    Raises:
        ValueError: the pipeline has no such argument, or uses it only together with another one.
    """
    defaults = parameters_of(kind) if defaults is None else defaults
    asked: dict[str, Any] = {"num_inference_steps": settings.steps, "max_sequence_length": settings.text_len}
    asked |= {"num_frames": settings.num_frames}
    if "frame_rate" in defaults:  # LTX: positions in time depend on it
        asked |= {"frame_rate": settings.fps}
    if settings.image is not None and not settings.highres:
        asked["strength"] = settings.strength
    if settings.control_scale is not None:
        asked["controlnet_conditioning_scale"] = settings.control_scale
    asked |= _guidance(kind, settings, defaults)
    given = {name: value for name, value in asked.items() if value is not None}
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}; leave the option out")
    return {name: defaults[name] for name in asked if name in defaults and defaults[name] is not _MISSING} | given


_MISSING = inspect.Parameter.empty


def _guidance(kind: Any, settings: GenerateSettings, defaults: dict[str, Any]) -> dict[str, Any]:
    name, negative = kind.__name__, settings.negative_prompt
    if negative is not None and "negative_prompt" not in defaults:
        raise ValueError(f"--negative-prompt: {name} has none; leave it out")
    true_only = "true_cfg_scale" in defaults and defaults.get("guidance_scale") is None
    if settings.true_cfg_scale is not None and ("true_cfg_scale" not in defaults or true_only):
        raise ValueError(f"--true-cfg-scale: --guidance is the weight of a negative prompt in {name}; give that")
    if true_only:
        # Qwen-Image: guidance is relative to a negative prompt, so there must be one.
        scale: Any = settings.guidance
        asked: dict[str, Any] = {} if scale is None else {"true_cfg_scale": scale, "negative_prompt": " "}
        option, scale = "--guidance", defaults["true_cfg_scale"] if scale is None else scale
    else:
        asked = {"guidance_scale": settings.guidance, "true_cfg_scale": settings.true_cfg_scale}
        asked = {key: value for key, value in asked.items() if value is not None}
        if "true_cfg_scale" in defaults:
            option, scale = "--true-cfg-scale", asked.get("true_cfg_scale", defaults["true_cfg_scale"])
        else:
            option, scale = "--guidance", asked.get("guidance_scale", defaults.get("guidance_scale"))
    if negative is None:
        return asked
    if isinstance(scale, int | float) and not _guides(kind, scale):
        raise ValueError(
            f"--negative-prompt: {name} uses it only with {option} above {_threshold(kind)}, but that is {scale:g}; give "
            f"{option} such as 4. Each step then takes twice as long"
        )
    return {**asked, "negative_prompt": negative}


def _guides(kind: Any, scale: float) -> bool:
    """Whether a pipeline applies classifier-free guidance at this scale, by its own rule if it exposes one."""
    rule = getattr(kind, "do_classifier_free_guidance", None)
    if isinstance(rule, property) and rule.fget is not None and "true_cfg_scale" not in parameters_of(kind):
        try:
            return bool(rule.fget(SimpleNamespace(_guidance_scale=scale)))
        except AttributeError:
            pass
    return scale > 1


def _threshold(kind: Any) -> int:
    return 0 if _guides(kind, 0.5) else 1
