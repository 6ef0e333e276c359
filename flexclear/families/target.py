"""What users give, a pipeline or a model in wrappers, and the model of a family in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from flexclear.families import FAMILIES, Family, family_of


def model_of(model_or_pipe: Any) -> nn.Module:
    """The transformer itself: ``model_or_pipe``, or the ``transformer`` of a diffusers pipeline.

    Raises:
        TypeError: neither, or a wrapper around the model; the message names what was given and what would do.
    """
    model, compiled = below_compile(model_or_pipe)
    if compiled:
        raise TypeError(
            f"the {type(model).__name__} given is already wrapped by torch.compile(model). Transform first, then "
            "compile: model.compile_repeated_blocks(fullgraph=True) or torch.compile"
        )
    return model


def below_compile(model_or_pipe: Any) -> tuple[nn.Module, bool]:
    """The same below ``torch.compile(model)`` too, and whether that is where it is.

    Raises:
        TypeError: see ``model_of``.
    """
    from torch._dynamo.eval_frame import OptimizedModule

    bare = isinstance(model_or_pipe, nn.Module)
    model: Any = model_or_pipe if bare else getattr(model_or_pipe, "transformer", None)
    compiled = isinstance(model, OptimizedModule)
    model = model._orig_mod if compiled else model
    if not isinstance(model, nn.Module):
        supported = ", ".join(family.model_class for family in FAMILIES)
        raise TypeError(
            f"expected a diffusers model or a pipeline with a transformer, got {type(model_or_pipe).__name__}. "
            f"Supported models: {supported}"
        )
    inside, path = _inside(model)
    if path:
        raise TypeError(
            f"the {type(model).__name__} given wraps a {type(inside).__name__}, and flexclear works on the model itself. Give "
            f"it before it is wrapped, or give {'model' if bare else 'pipe.transformer'}{path}"
        )
    return model, compiled


def _inside(model: Any) -> tuple[nn.Module, str]:
    """The supported model inside wrappers such as peft's, DDP's, FSDP's and DeepSpeed's, and how to reach it; the model
    given and no path where it is none of these."""
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
    """Pixels per token and side: of a pipeline's VAE and patches; for a model alone, of its family's published VAE.

    Raises:
        TypeError: neither a model that flexclear supports nor a pipeline with one.
    """
    factor = getattr(model_or_pipe, "vae_scale_factor", None)
    if factor is not None and getattr(model_or_pipe, "transformer", None) is None:
        return factor * getattr(
            model_or_pipe, "patch_size", Family.latents_per_token
        )  # one that has not been loaded yet
    family = family_of(_inside(below_compile(model_or_pipe)[0])[0])
    if factor is None:
        return family.px_per_token
    return factor * getattr(model_or_pipe, "patch_size", family.latents_per_token)
