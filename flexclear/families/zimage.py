"""Z-Image: the image first, then its padding, the caption and the caption's padding, which the window treats as text.

The tokens of each image and of each caption are padded to a multiple of 32, and these pads are visible like any other
tokens. Two refiner blocks attend over the image and its pads only (scope ``IMAGE``); two more attend over captions only and
have no window; the rest attend over everything (``JOINT``). If captions in a batch differ in length, nobody sees the places
after the end of the shorter ones (``Call.keep``).

The model cuts images into patches itself, so the entry permutes whole patches of the latents, and the exit puts the patches
of the result back. The model's own rotary embedding, in raster order, is not used for image tokens: the plan holds one in
its order, with the NTK factor applied to its base. The caption refiner keeps the model's own.

On one of several ranks the model gets an image made of the rank's own patches, and pads it. The window treats pads as text,
of which every rank has all, so a hook before the first block replaces them by as many pads as the whole image has. A hook
after the last layer makes the output as long as the model expects.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.compile.calls import carried_by
from flexclear.compile.derivatives import function_transforms
from flexclear.families.zimage_pads import padding, pads_of, room_for
from flexclear.masks.defaults import independent
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.carrying import Hook, here
from flexclear.runtime.checks import required_tensor
from flexclear.runtime.facts import JOINT, Call, Layer
from flexclear.runtime.family import Family, InnerHooks
from flexclear.runtime.grid import GridReader
from flexclear.runtime.plan import Plan
from flexclear.runtime.rotary import Rotary, cos_and_sin
from flexclear.runtime.switches import Switches

IMAGE = "image"
"""Scope of the refiner blocks that see the image and its padding."""


class CastHook(Hook):
    """Forward hook on ``t_embedder``: casts its output to the dtype of the latents, which the model would do afterwards."""

    after = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        plan = getattr(here, "entering", None)
        return output if plan is None else output.to(plan.dtype)


class PadsOfBand(Hook):
    """Forward pre-hook on the first windowed block: appends the pads of the whole image to a rank's tokens, in place of those
    that the model has added. All pads are one parameter at one position.

    Attributes:
        before_captions: whether captions follow, as they do without a noise refiner.
    """

    def __init__(self, before_captions: bool) -> None:
        self.before_captions = before_captions

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        plan = carried_by((*args, *kwargs.values()))
        if plan is None or plan.band is None:
            return args, kwargs  # the ControlNet calls the refiner
        x, own, pads = args[0], len(plan.base.rows), pads_of(plan)
        end = x.shape[1] - (plan.base.layout.text_len - pads if self.before_captions else 0)
        parts = [x[:, :own], x[:, end - 1 : end].expand(-1, pads, -1), x[:, end:]]
        return (torch.cat(parts, 1), *args[1:]), kwargs


class OutputOfBand(Hook):
    """Forward hook on the last layer: pads the output to as many tokens as the model expects of a rank's image. Tokens after
    the rank's own are cut off again at the exit.

    Attributes:
        positions: see ``room_for``.
    """

    after = True

    def __init__(self, positions: tuple[int, ...]) -> None:
        self.positions = positions

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        plan = carried_by(kwargs.values())
        if plan is None or plan.band is None:
            return output
        height, width = room_for(len(plan.base.rows), pads_of(plan), self.positions)
        return torch.nn.functional.pad(output, (0, 0, 0, max(height * width - output.shape[1], 0)))


@dataclass(frozen=True)
class ZImageFamily(Family):
    """``ZImageTransformer2DModel``."""

    def layers(self, model: nn.Module) -> Iterator[Layer]:
        # The ControlNet shares the transformer's noise refiner.
        yield from (replace(layer, shared=layer.scope == IMAGE) for layer in super().layers(model))

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        required_tensor(kwargs, "t", model)
        if "functionalize" in function_transforms():
            raise ValueError(
                f"a transformed {type(model).__name__} under torch.func.functionalize: the plan is attached to a tensor, and is "
                "lost when that is replaced by another. flexclear.restore(model) first"
            )
        pictures, captions = _pictures(model, kwargs), _captions(model, kwargs)
        if len(captions) != len(pictures):
            raise ValueError(f"x holds {len(pictures)} images, cap_feats {len(captions)} captions; one each is needed")
        height, width = _grid(model, pictures[0], _patch_size(model, kwargs))
        lengths = [len(caption) + padding(len(caption)) for caption in captions]
        _check_positions(model, height, width, max(lengths))
        pads = padding(height * width)
        text_len = pads + max(lengths)
        _check_residuals(kwargs.get("controlnet_block_samples"), height * width + text_len)
        keep = {}
        if min(lengths) < max(lengths):
            keep[JOINT] = kept(text_len, tuple(pads + length for length in lengths), pictures[0].device)
        tokens = next((picture for picture in pictures if picture.requires_grad), pictures[0])
        return Call(tokens, ((height, width),), {JOINT: text_len, IMAGE: pads}, keep)

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, switches: Switches
    ) -> tuple[dict[str, Any], CallPlan]:
        pictures = torch.stack(_pictures(model, kwargs))
        lengths = [len(caption) + padding(len(caption)) for caption in _captions(model, kwargs)]
        plan = replace(plan, rotary=_rotary(model.rope_embedder, plan.base, lengths, switches.ntk_factor))
        changed = dict(kwargs)
        patches = plan.to_image_order(_patches(pictures, _whole(plan)), -1)
        changed["x"] = list(_picture(patches, _inside(model, plan)).unbind(0))
        residuals = kwargs.get("controlnet_block_samples")
        if residuals is not None:
            image_len = plan.base.layout.image_len
            changed["controlnet_block_samples"] = {
                layer: torch.cat([plan.to_image_order(residual[:, :image_len]), residual[:, image_len:]], 1)
                for layer, residual in residuals.items()
            }
        return changed, plan

    def hooks(self, model: nn.Module, names: Iterable[str]) -> InnerHooks:
        embedder: Any = model.t_embedder
        # Cast here, because a cast inside the model would make another tensor without the plan.
        return [(embedder, CastHook()), *super().hooks(model, names)]

    def parallel_hooks(self, model: nn.Module, current: Any) -> InnerHooks:
        parts: Any = model
        first = next(iter([*parts.noise_refiner, *parts.layers]))
        output = OutputOfBand(tuple(parts.rope_embedder.axes_lens))
        return [
            (first, PadsOfBand(before_captions=not len(parts.noise_refiner))),
            *((layer, output) for layer in parts.all_final_layer.values()),
        ]

    def leave(self, model: nn.Module, output: Any, plan: CallPlan) -> Any:
        pictures = output[0] if isinstance(output, tuple) else output.sample
        patches = _patches(torch.stack(pictures), _inside(model, plan))[..., : len(plan.base.rows)]
        pictures = list(_picture(plan.to_raster(patches, -1), _whole(plan)).unbind(0))
        if isinstance(output, tuple):
            return (pictures, *output[1:])
        output.sample = pictures
        return output


@functools.lru_cache(maxsize=64)
@independent
def kept(text_len: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Which text tokens are within each sample's own length, bool ``[B, text_len]``. Cached, so that no step has to wait for a
    GPU."""
    return (torch.arange(text_len) < torch.tensor(lengths)[:, None]).to(device)


def _pictures(model: nn.Module, kwargs: dict[str, Any]) -> list[Tensor]:
    """The latents, each ``[C, 1, H, W]``, all of one shape.

    Raises:
        ValueError: they are missing, are nested, differ in shape, or have several frames.
    """
    given = kwargs.get("x")
    omni = [name for name in ("siglip_feats", "image_noise_mask") if kwargs.get(name) is not None]
    if isinstance(given, Sequence) and any(isinstance(picture, Sequence) for picture in given):
        omni.insert(0, "nested lists in x")
    if omni:
        raise ValueError(
            f"a transformed {type(model).__name__} got {', '.join(omni)}: the Omni mode, which lines up several images of "
            "any size in one sequence. There is no window for it; flexclear.restore(model) first, or give one image a sample"
        )
    pictures = list(given) if isinstance(given, Sequence | Tensor) else []
    if not pictures or not all(isinstance(picture, Tensor) for picture in pictures):
        raise ValueError(f"a transformed {type(model).__name__} needs x as a list of latents, got {given!r}")
    shapes = sorted({tuple(picture.shape) for picture in pictures})
    if len(shapes) > 1:
        raise ValueError(
            f"the latents of one call must have one shape, since they share a window; got {', '.join(map(str, shapes))}. "
            "Call the model once for each size"
        )
    if len(shapes[0]) != 4 or shapes[0][1] != 1:
        raise ValueError(f"latents must have shape [channels, 1, height, width] (one frame), got {shapes[0]}")
    return pictures


def _captions(model: nn.Module, kwargs: dict[str, Any]) -> list[Tensor]:
    """The captions' features, each ``[tokens, C]``.

    Raises:
        ValueError: they are missing or have other shapes.
    """
    given = kwargs.get("cap_feats")
    captions = list(given) if isinstance(given, Sequence | Tensor) else []
    if not captions or not all(isinstance(caption, Tensor) and caption.ndim == 2 for caption in captions):
        raise ValueError(
            f"a transformed {type(model).__name__} needs cap_feats as a list of tensors [tokens, channels], one for each "
            f"image, got {type(given).__name__}"
        )
    return captions


def _patch_size(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """Side of a patch in latents.

    Raises:
        ValueError: patches span several frames, or the model has no patches of that size.
    """
    patch, frames = kwargs.get("patch_size", 2), kwargs.get("f_patch_size", 1)
    if frames != 1:
        raise ValueError(f"f_patch_size={frames}: windows are made for patches of one frame, f_patch_size=1")
    known: Any = model.all_patch_size
    if patch not in known:
        raise ValueError(f"patch_size={patch!r}: this {type(model).__name__} has {', '.join(map(str, known))}")
    return patch


def _grid(model: nn.Module, picture: Tensor, patch: int) -> tuple[int, int]:
    height, width = picture.shape[-2:]
    if height % patch or width % patch or not height or not width:
        raise ValueError(f"latents of {height} x {width} do not divide into patches of {patch} x {patch}")
    return height // patch, width // patch


def _check_positions(model: nn.Module, height: int, width: int, text_len: int) -> None:
    """Raise if the model's rotary tables are too short.

    Raises:
        ValueError: the image or a caption is too large for them.
    """
    embed: Any = model.rope_embedder
    first, rows, columns = embed.axes_lens
    if height > rows or width > columns or text_len + 2 > first:
        raise ValueError(
            f"an image of {height} x {width} tokens behind a caption of {text_len} is too large for the positions of this "
            f"{type(model).__name__}: they end at {rows} x {columns} tokens and a caption of {max(first - 2, 0)} (axes_lens="
            f"{list(embed.axes_lens)}). Choose a smaller one; a window does not extend positions"
        )


def _check_residuals(residuals: Any, length: int) -> None:
    for layer, residual in (residuals or {}).items():
        if residual.ndim != 3 or residual.shape[1] != length:
            raise ValueError(
                f"controlnet_block_samples[{layer}] of shape {tuple(residual.shape)} does not fit this call's sequence of "
                f"{length} tokens; [batch, tokens, channels] is expected"
            )


def _whole(plan: CallPlan) -> tuple[int, int]:
    """The grid of the whole image."""
    return plan.base.layout.height, plan.base.layout.width


def _inside(model: nn.Module, plan: CallPlan) -> tuple[int, int]:
    """The grid that the model gets: the image's own, or on one of several ranks a grid into which the rank's tokens fit."""
    if plan.band is None:
        return _whole(plan)
    embed: Any = model.rope_embedder
    return room_for(len(plan.base.rows), pads_of(plan), tuple(embed.axes_lens))


def _patches(pictures: Tensor, grid: tuple[int, int]) -> Tensor:
    """The patches of ``[B, C, 1, H, W]``, row by row: ``[B, C, 1, patch, patch, tokens]``."""
    parts = pictures.unflatten(-1, (grid[1], -1)).unflatten(-3, (grid[0], -1))  # [B, C, 1, h, p, w, p]
    return parts.movedim((3, 5), (-2, -1)).flatten(-2)


def _picture(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Undoes ``_patches``; missing patches are zero."""
    missing = grid[0] * grid[1] - patches.shape[-1]
    parts = torch.nn.functional.pad(patches, (0, missing)) if missing else patches
    return parts.unflatten(-1, grid).movedim((-2, -1), (3, 5)).flatten(-2).flatten(-3, -2)


@independent
def _rotary(embed: Any, base: Plan, lengths: list[int], ntk_factor: float) -> Rotary:
    """Rotary embedding of the joint sequence: the image in the plan's order, its pads, the caption.

    On the first axis a caption's tokens are numbered from 1 to its length, and all tokens of the image have the next
    number; on the other axes the image's tokens have row and column. Pads of the image are at 0.

    Args:
        embed: the model's ``RopeEmbedder``.
        base: the plan of the joint sequence.
        lengths: tokens of each caption, including its padding.
        ntk_factor: factor on the base of the frequencies.
    """
    if ntk_factor != 1:
        embed = _embedder(embed.theta * ntk_factor, tuple(embed.axes_dims), tuple(embed.axes_lens))
    image = torch.stack([torch.zeros_like(base.rows), base.rows, base.columns], dim=1).long()
    ids = image.new_zeros(len(image) + base.layout.text_len, 3)  # on one of several ranks: its own image tokens
    ids[: len(image)] = image
    start = len(ids) - max(lengths)
    tables = {}
    for length in set(lengths):
        own = ids.clone()
        own[: len(image), 0] = length + 1
        own[start : start + length, 0] = torch.arange(1, length + 1, device=ids.device)
        tables[length] = embed(own)
    table = torch.stack([tables[length] for length in (lengths if len(tables) > 1 else lengths[:1])]).unsqueeze(2)
    return cos_and_sin(table)


@functools.lru_cache(maxsize=8)
def _embedder(theta: float, dims: tuple[int, ...], lens: tuple[int, ...]) -> Any:
    from diffusers.models.transformers.transformer_z_image import RopeEmbedder

    return RopeEmbedder(theta=theta, axes_dims=dims, axes_lens=lens)


ZIMAGE = ZImageFamily(
    model_class="ZImageTransformer2DModel",
    processors=("ZSingleStreamAttnProcessor",),
    stacks={"noise_refiner": "attention", "layers": "attention"},
    carriers=("t_embedder",),
    block_argument="freqs_cis",
    text_first=False,
    scopes={"noise_refiner": IMAGE},
    given={"attention_mask": None},
    pipelines=(
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
    ),
    notes=(
        "Z-Image and Turbo, captions of different lengths in a batch, noise refiner included (dense where the ControlNet, "
        "which shares it, calls it); all images of a batch of one size; no Omni"
    ),
)
