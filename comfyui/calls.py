"""Facts about the tokens of one model call: where they lie, what text is padding, what else is attended to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexclear.masks import Layout


@dataclass(frozen=True, eq=False)
class Tokens:
    """The sequence of a model's self-attention.

    Attributes:
        layout: the sequence's grids and its text, which comes first.
        masked: whether attention gets a mask, which carries no more than ``keep``.
        keep: bool ``[B, text_len]``, False for text that is padding; None: there is no padding.
        beside: key counts of cross-attention, which stays as it is.
    """

    layout: Layout
    masked: bool = False
    keep: Tensor | None = None
    beside: frozenset[int] = frozenset()


Read = Callable[[Any, Mapping[str, Any]], Tokens]


def _sides(latent: Tensor, patch: Sequence[int], name: str) -> tuple[int, ...]:
    """Sides in tokens of a latent whose last axes are cut into patches. The model pads them.

    Raises:
        ValueError: it has the wrong number of axes.
    """
    if latent.ndim != 2 + len(patch):
        axes = "batch, channels, " + ("frames, " if len(patch) == 3 else "") + "height, width"
        raise ValueError(f"{name} of shape {tuple(latent.shape)} is no latent [{axes}]")
    return tuple(-(-size // side) for size, side in zip(latent.shape[2:], patch, strict=True))


def _flux(model: Any, given: Mapping[str, Any]) -> Tokens:
    """FLUX.1, FLUX.2 and LongCat-Image: reference latents are grids beside the image.

    Raises:
        ValueError: attention has a mask over text and image.
    """
    if given.get("attention_mask") is not None:
        raise ValueError(
            "this call of Flux has an attention_mask over text and image (of Apply Style Model with strength_type attn_bias, "
            "for one), which weights pairs of tokens. A window supports no such mask: use strength_type multiply, or no window"
        )
    patch = (model.patch_size, model.patch_size)
    grids = [_sides(latent, patch, "a latent of Flux") for latent in (given["x"], *(given.get("ref_latents") or ()))]
    return Tokens(_layout(grids, given["context"]))


def _qwen(model: Any, given: Mapping[str, Any]) -> Tokens:
    """Qwen-Image, Edit and Layered: layers and reference latents are grids beside the image."""
    patch = (1, model.patch_size, model.patch_size)
    grids: list[tuple[int, ...]] = []
    for latent in (given["x"], *(given.get("ref_latents") or ())):
        count, *sides = _sides(latent, patch, "a latent of Qwen-Image")
        grids += [tuple(sides)] * count
    mask, text = given.get("attention_mask"), given["context"]
    layout = _layout(grids, text)
    if mask is None:
        return Tokens(layout)
    keep = _kept(mask, text)
    return Tokens(layout, masked=True, keep=None if bool(keep.all()) else keep)


def _kept(mask: Tensor, text: Tensor) -> Tensor:
    """Which text a mask keeps, bool ``[B, text_len]``. The mask has 1 and 0, or is added to scores of kept and hidden keys.

    Raises:
        ValueError: it weights text, or is not a mask over the text.
    """
    if mask.ndim != 2 or mask.shape[1] != text.shape[1] or mask.shape[0] not in (1, text.shape[0]):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} is not a mask over the text, which has {text.shape[1]} tokens in "
            f"{text.shape[0]} samples"
        )
    added = mask.is_floating_point()
    keep = mask == (0 if added else 1)
    hidden = mask <= 0.5 * torch.finfo(mask.dtype).min if added else mask == 0
    if not bool((keep | hidden).all()):
        raise ValueError(
            "attention_mask weights text tokens: under a window, text is either seen or hidden. Use a mask of "
            "zeros and ones, or no window"
        )
    return keep.expand(text.shape[0], -1)


def _wan(model: Any, given: Mapping[str, Any]) -> Tokens:
    """Wan 2.1, 2.2 and VACE: self-attention is only over the video.

    Raises:
        ValueError: there are tokens of other images beside the video's, or the number of keys does not distinguish
            self-attention from cross-attention.
    """
    for name, reason in (
        ("reference_latent", "a reference image in front of the video (Wan Fun)"),
        ("context_latents", "reference videos behind it"),
    ):
        present = given.get(name) is not None and (name != "reference_latent" or model.ref_conv is not None)
        if present:
            raise ValueError(
                f"{name} puts {reason}, and windows have no place for those. Leave it out, or use no window"
            )
    frames, height, width = _sides(given["x"], model.patch_size, "a latent of Wan")
    if given.get("time_dim_concat") is not None:
        frames += _sides(given["time_dim_concat"], model.patch_size, "time_dim_concat")[0]
    layout = Layout(height, width, 0, frames=frames)
    image = given.get("clip_fea")
    beside = {given["context"].shape[1], *([] if image is None else [image.shape[-2]])}
    if layout.seq_len in beside:
        raise ValueError(
            f"this video has {frames} x {height} x {width} = {layout.seq_len} tokens, as many as the text or image that it "
            "attends to, and attention over either looks the same to a window. Use another size"
        )
    return Tokens(layout, beside=frozenset(beside))


def _layout(grids: Sequence[tuple[int, ...]], text: Tensor) -> Layout:
    (height, width), *references = grids
    return Layout(height, width, text.shape[1], references=tuple((rows, columns) for rows, columns in references))


IMAGES: dict[str, Read] = {
    "comfy.ldm.flux.model.Flux": _flux,
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": _qwen,
}
VIDEOS: dict[str, Read] = {
    "comfy.ldm.wan.model.WanModel": _wan,
    "comfy.ldm.wan.model.VaceWanModel": _wan,
}


def reader(model: Any, video: bool) -> Read:
    """Return the function that reads the calls of a model.

    Args:
        model: ComfyUI's transformer.
        video: whether the window has frames.

    Raises:
        TypeError: its class is not known, or belongs to the other node.
    """
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    own, other = (VIDEOS, IMAGES) if video else (IMAGES, VIDEOS)
    if name in own:
        return own[name]
    if name in other:
        kinds = ("videos", "image") if not video else ("images", "video")
        raise TypeError(
            f"{type(model).__name__} makes {kinds[0]}: use Window Attention ({'image' if video else 'video'}), not "
            f"Window Attention ({kinds[1]})"
        )
    known = ", ".join(known.rpartition(".")[2] for known in (*IMAGES, *VIDEOS))
    raise TypeError(
        f"windows are not known for {name}. They are for {known}; a subclass or a compiled model may attend in other ways"
    )


def bound(forward: Callable[..., Any], model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The arguments of one call by name, as ``inspect.BoundArguments``, with those of ``**kwargs`` under ``kwargs``."""
    return inspect.signature(forward).bind(model, *args, **kwargs)


def by_name(arguments: Any) -> dict[str, Any]:
    """Merge all arguments into one dictionary."""
    found = dict(arguments.arguments)
    return {**found, **found.pop("kwargs", {})}
