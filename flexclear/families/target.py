"""Finds the model inside what users pass: a pipeline, or a model in wrappers."""

from __future__ import annotations

from typing import Any

from torch import nn

from flexclear.families import FAMILIES, Family, family_of
from flexclear.families.latents import frames_of_patch
from flexclear.masks.checks import check_int
from flexclear.runtime.hooks import entry_hook_of

TRANSFORMERS = ("transformer", "transformer_2", "transformer_ref")
"""Names of the models in pipelines. Some pipelines have several: one for the first and one for the later denoising steps (Wan
2.2), or one for calls with references (MiniMax-H3)."""

SPATIAL = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")
TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
"""Pipeline attributes with the number of pixels or frames per latent."""


def model_of(model_or_pipe: Any) -> nn.Module:
    """The transformer: ``model_or_pipe`` itself, or the only one in a diffusers pipeline.

    Raises:
        TypeError: neither, or a wrapper around the model, or a pipeline with several; the message says what was passed and what
            would work.
    """
    found = models_of(model_or_pipe)
    if len(found) > 1:
        names = " or ".join(f"pipe.{name}" for name in names_of(model_or_pipe))
        raise TypeError(
            f"this {type(model_or_pipe).__name__} has {len(found)} transformers, and this works on one: pass {names}"
        )
    return found[0]


def models_of(model_or_pipe: Any) -> list[nn.Module]:
    """The transformers of a diffusers pipeline, or the model itself.

    Raises:
        TypeError: neither, or a wrapper around a model; the message says what was passed and what would work.
    """
    found = below_compile(model_or_pipe)
    for (model, compiled), name in zip(found, names_of(model_or_pipe), strict=True):
        if compiled and entry_hook_of(model) is not None:
            given = "model" if isinstance(model_or_pipe, nn.Module) else f"pipe.{name}"
            raise TypeError(
                f"the transformed {type(model).__name__} given is wrapped by torch.compile(model). Pass the model inside the "
                f"wrapper, {given}._orig_mod; to transform or optimize it again, do so before wrapping it"
            )
        if compiled:
            raise TypeError(
                f"the {type(model).__name__} given is already wrapped by torch.compile(model). Transform first, then "
                "compile: model.compile_repeated_blocks(fullgraph=True) or torch.compile"
            )
    return [model for model, _ in found]


def names_of(model_or_pipe: Any) -> list[str]:
    """The pipeline's attribute names of ``models_of``; for a model alone, the first such name."""
    if isinstance(model_or_pipe, nn.Module):
        return [TRANSFORMERS[0]]
    return [name for name, _ in _transformers(model_or_pipe)]


def below_compile(model_or_pipe: Any) -> list[tuple[nn.Module, bool]]:
    """``models_of``, also inside ``torch.compile(model)``, each with whether it is inside such a wrapper.

    Raises:
        TypeError: see ``models_of``.
    """
    bare = isinstance(model_or_pipe, nn.Module)
    found = (
        [("model", model_or_pipe)]
        if bare
        else [(f"pipe.{name}", model) for name, model in _transformers(model_or_pipe)]
    )
    if not found:
        supported = ", ".join(family.model_class for family in FAMILIES)
        raise TypeError(
            f"expected a diffusers model or a pipeline with a transformer, got {type(model_or_pipe).__name__}. "
            f"Supported models: {supported}"
        )
    return [_below_compile(model, name) for name, model in found]


def _transformers(pipe: Any) -> list[tuple[str, nn.Module]]:
    """The models of a pipeline by name, each once."""
    found: list[tuple[str, nn.Module]] = []
    for name in TRANSFORMERS:
        model = getattr(pipe, name, None)
        if isinstance(model, nn.Module) and all(model is not other for _, other in found):
            found.append((name, model))
    return found


def _below_compile(model: Any, where: str) -> tuple[nn.Module, bool]:
    from torch._dynamo.eval_frame import OptimizedModule

    compiled = isinstance(model, OptimizedModule)
    model = model._orig_mod if compiled else model
    inside, path = _inside(model)
    if path:
        raise TypeError(
            f"the {type(model).__name__} given wraps a {type(inside).__name__}, but flexclear works on the model itself. Pass "
            f"it before it is wrapped, or pass {where}{path}"
        )
    return model, compiled


def _inside(model: Any) -> tuple[nn.Module, str]:
    """The supported model inside wrappers such as those of peft, DDP, FSDP and DeepSpeed, and the path to it; or the given model
    and an empty path if it is not wrapped like this."""
    inside, path = model, ""
    while not any(family.matches(inside) for family in FAMILIES):
        if callable(getattr(inside, "get_base_model", None)):
            inside, path = inside.get_base_model(), f"{path}.get_base_model()"
            continue
        name = next(
            (name for name in ("module", "_orig_mod") if isinstance(getattr(inside, name, None), nn.Module)), None
        )
        if name is None:
            return model, ""
        inside, path = getattr(inside, name), f"{path}.{name}"
    return inside, path


def px_per_token(model_or_pipe: Any) -> int:
    """Side of a token in pixels: from a pipeline's VAE and patches, or for a model alone from its family's published VAE.

    Raises:
        TypeError: neither a model that flexclear supports nor a pipeline with one.
    """
    factor = _of_vae(model_or_pipe, *SPATIAL)
    if factor is not None and not _transformers(model_or_pipe):
        return factor * getattr(
            model_or_pipe, "patch_size", Family.latents_per_token
        )  # a pipeline whose model has not been loaded yet
    family = family_of(below_compile(model_or_pipe)[0][0])
    if factor is None:
        return family.px_per_token
    patch = getattr(model_or_pipe, "patch_size", family.latents_per_token)
    return factor * (patch if isinstance(patch, int) else patch[-1])


def latent_frames(model_or_pipe: Any, num_frames: int) -> int:
    """Number of token frames of a video with ``num_frames`` frames: from a pipeline's VAE, or for a model alone from its family's
    published VAE, and from the patches.

    Raises:
        TypeError: neither a model that flexclear supports nor a pipeline with one.
        ValueError: the model makes images.
    """
    model = below_compile(model_or_pipe)[0][0]
    family = family_of(model)
    if not family.video:
        raise ValueError(
            f"num_frames={num_frames}: {type(model).__name__} makes images, which have no frames. Leave it out"
        )
    check_int("num_frames", num_frames, 1, None, "in frames of the video")
    factor = _of_vae(model_or_pipe, *TEMPORAL)
    latents = family.latent_frames(num_frames, factor or family.frames_per_latent)
    return -(-latents // frames_of_patch(model))


def _of_vae(pipe: Any, *names: str) -> int | None:
    """The first of these attributes of a pipeline that is an int, or None."""
    return next((found for found in (getattr(pipe, name, None) for name in names) if isinstance(found, int)), None)
