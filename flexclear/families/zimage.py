"""Z-Image: the image first, behind it the image's padding, the caption and the caption's padding, all text to the window.

Each picture's tokens are padded to a multiple of 32, each caption's likewise, and these pads are tokens that are seen
like any others. Two refiner blocks attend over the picture and its pads only (scope ``IMAGE``); two more over captions
only, which no window concerns; the rest over everything (``JOINT``). Captions of different lengths in a batch leave
places at the end of the shorter ones that nobody sees (``Call.keep``).

How order and plan travel. The model takes pictures apart itself, so the entry exchanges whole patches of the latents, and
the exit puts the patches of the result back. No argument of the model reaches the attention processors. What does reach
every block is the embedding of ``t``, so the plan rides on it: the entry hands over a ``Timestep``, whose product with
the model's time scale carries the plan as an attribute; a hook on ``t_embedder`` passes it on from the input to the
embedding; and a hook before each windowed block puts it in the place of ``freqs_cis``, which the block gives to its
attention unread. So nothing of a call is kept on the model, in a global or in a context, an exception leaves nothing
behind, a checkpointed block finds its plan again in the backward pass, and compiled blocks read it off an argument. The
model's own rotary embedding, in raster order, is not used where there are image tokens: the plan holds one in its order,
with the NTK factor on its base. The refiner of captions keeps the model's own.

On one of several ranks the model gets a picture of the rank's own patches, and pads that. A hook before the first block puts
as many pads there as the whole picture has, since they are text to the window and every rank has all of it; and one behind
the last layer makes its output as long as the model takes it to be.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.compile.derivatives import function_transforms
from flexclear.families.checks import attention_of, required_tensor
from flexclear.families.zimage_pads import padding, pads_of, room_for
from flexclear.masks.defaults import independent
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.facts import JOINT, Call, Layer
from flexclear.runtime.family import Family
from flexclear.runtime.grid import GridReader

IMAGE = "image"
"""Scope of the refiner blocks, which see the picture and its padding."""


class ZImageFamily(Family):
    """``ZImageTransformer2DModel``."""

    model_class = "ZImageTransformer2DModel"
    text_first = False
    pipelines = (
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
    )
    notes = (
        "Z-Image and Turbo, captions of different lengths in a batch, noise refiner included (dense where the ControlNet, "
        "which shares it, calls it); all images of a batch of one size; no Omni"
    )

    def layers(self, model: nn.Module) -> Iterator[Layer]:
        from diffusers.models.attention_processor import Attention
        from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

        found = 0
        for stack, scope in (("noise_refiner", IMAGE), ("layers", JOINT)):
            for index, block in enumerate(getattr(model, stack, ())):
                where = f"{stack}[{index}]"
                attn = attention_of(model, block, where, "attention", Attention, (ZSingleStreamAttnProcessor,))
                found += 1
                yield Layer(f"{stack}.{index}.attention", attn, scope)
        if not found:
            raise ValueError(
                f"this {type(model).__name__} has no blocks in noise_refiner or layers: nothing to transform"
            )

    def processor(self, layer: Layer, original: Any, slot: int, down_factor: int | None) -> Any:
        from flexclear.families.zimage_attention import ZImageWindowProcessor

        return ZImageWindowProcessor(slot, original if layer.scope == IMAGE else None)

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        required_tensor(kwargs, "t", model)
        if "functionalize" in function_transforms():
            raise ValueError(
                f"a transformed {type(model).__name__} under torch.func.functionalize: the plan rides on a tensor, and would "
                "get lost where that puts another in its place. flexclear.restore(model) first"
            )
        pictures, captions = _pictures(model, kwargs), _captions(model, kwargs)
        if len(captions) != len(pictures):
            raise ValueError(
                f"x holds {len(pictures)} pictures, cap_feats {len(captions)} captions; one each is needed"
            )
        height, width = _grid(model, pictures[0], _patch_size(model, kwargs))
        lengths = [len(caption) + padding(len(caption)) for caption in captions]
        _check_positions(model, height, width, max(lengths))
        pads = padding(height * width)
        text_len = pads + max(lengths)
        _check_residuals(kwargs.get("controlnet_block_samples"), height * width + text_len)
        keep = {}
        if min(lengths) < max(lengths):
            keep[JOINT] = _kept(text_len, tuple(pads + length for length in lengths), pictures[0].device)
        tokens = next((picture for picture in pictures if picture.requires_grad), pictures[0])
        return Call(tokens, ((height, width),), {JOINT: text_len, IMAGE: pads}, keep)

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, ntk_factor: float
    ) -> dict[str, Any]:
        from flexclear.families.zimage_attention import Timestep, rotary

        pictures = torch.stack(_pictures(model, kwargs))
        lengths = [len(caption) + padding(len(caption)) for caption in _captions(model, kwargs)]
        plan = replace(plan, rotary=rotary(model.rope_embedder, plan.base, lengths, ntk_factor))
        changed = {**kwargs, "t": Timestep(kwargs["t"], plan, pictures.dtype)}
        patches = plan.to_image_order(_patches(pictures, _whole(plan)), -1)
        changed["x"] = list(_picture(patches, _inside(model, plan)).unbind(0))
        residuals = kwargs.get("controlnet_block_samples")
        if residuals is not None:
            image_len = plan.base.layout.image_len
            changed["controlnet_block_samples"] = {
                layer: torch.cat([plan.to_image_order(residual[:, :image_len]), residual[:, image_len:]], 1)
                for layer, residual in residuals.items()
            }
        return changed

    def inner_hooks(self, model: nn.Module) -> list[tuple[nn.Module, Any]]:
        from flexclear.families.zimage_attention import PlanToBlock, PlanToEmbedding

        parts: Any = model
        blocks = [*parts.noise_refiner, *parts.layers]
        return [(parts.t_embedder, PlanToEmbedding()), *((block, PlanToBlock()) for block in blocks)]

    def parallel_hooks(self, model: nn.Module, current: Any) -> list[tuple[nn.Module, Any]]:
        from flexclear.families.zimage_attention import OutputOfBand, PadsOfBand

        parts: Any = model
        first = next(iter([*parts.noise_refiner, *parts.layers]))
        output = OutputOfBand(tuple(parts.rope_embedder.axes_lens))
        return [
            (first, PadsOfBand(before_captions=not len(parts.noise_refiner))),
            *((layer, output) for layer in parts.all_final_layer.values()),
        ]

    def plan_of(self, kwargs: dict[str, Any]) -> CallPlan:
        return kwargs["t"].plan

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
def _kept(text_len: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Which text tokens are within each sample's own length, bool ``[B, text_len]``; kept, so that a GPU is not waited
    for in every step."""
    return (torch.arange(text_len) < torch.tensor(lengths)[:, None]).to(device)


def _pictures(model: nn.Module, kwargs: dict[str, Any]) -> list[Tensor]:
    """The latents, each ``[C, 1, H, W]``, all of one shape.

    Raises:
        ValueError: they are missing, nested, of several shapes, or have several frames.
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
            f"picture, got {type(given).__name__}"
        )
    return captions


def _patch_size(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """Side of a patch in latents.

    Raises:
        ValueError: patches span several frames, or the model has none of that size.
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
    """Raise where the model's rotary tables end.

    Raises:
        ValueError: the picture or a caption is too large for them.
    """
    embed: Any = model.rope_embedder
    first, rows, columns = embed.axes_lens
    if height > rows or width > columns or text_len + 2 > first:
        raise ValueError(
            f"a picture of {height} x {width} tokens behind a caption of {text_len} is too large for the positions of this "
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
    """The grid of the picture."""
    return plan.base.layout.height, plan.base.layout.width


def _inside(model: nn.Module, plan: CallPlan) -> tuple[int, int]:
    """The grid that the model gets: the picture's own, or on one of several ranks one that the rank's tokens fit into."""
    if plan.band is None:
        return _whole(plan)
    embed: Any = model.rope_embedder
    return room_for(len(plan.base.rows), pads_of(plan), tuple(embed.axes_lens))


def _patches(pictures: Tensor, grid: tuple[int, int]) -> Tensor:
    """The patches of ``[B, C, 1, H, W]``, row by row: ``[B, C, 1, patch, patch, tokens]``."""
    parts = pictures.unflatten(-1, (grid[1], -1)).unflatten(-3, (grid[0], -1))  # [B, C, 1, h, p, w, p]
    return parts.movedim((3, 5), (-2, -1)).flatten(-2)


def _picture(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Undoes ``_patches``; zeros where there are fewer."""
    missing = grid[0] * grid[1] - patches.shape[-1]
    parts = torch.nn.functional.pad(patches, (0, missing)) if missing else patches
    return parts.unflatten(-1, grid).movedim((-2, -1), (3, 5)).flatten(-2).flatten(-3, -2)
