"""Scaled-down models that take packed tokens and position ids, with random weights, and calls as their pipelines make them.

In addition to the FLUX-like models in ``models``: LongCat-Image, Ovis-Image, Bria 3.2, Bria FIBO, FLUX.3 and Krea 2. Sizes are
in tokens; ``references`` are the sizes of reference images, whose tokens follow the image's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .models import raster_ids

Grid = tuple[int, int]

HEAD_64 = {"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
"""Heads of 64, for any of these models but FLUX.3."""

FLUX3_HEAD_64 = {"attention_head_dim": 64, "axes_dims_rope": (16, 16, 16, 16)}


def varied(model: torch.nn.Module) -> torch.nn.Module:
    """The model in eval mode, with random numbers in place of diffusers' initial zeros and ones, so that each matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if bool((parameter == 1).all()):
                parameter.uniform_(0.5, 2)
            elif bool((parameter == 0).all()):
                parameter.normal_(std=0.3)
    return model.eval()


def _sizes(**more: Any) -> dict[str, Any]:
    """Configuration that the FLUX-like models share: 2 + 2 blocks, 2 heads x 16, text of 12 channels."""
    return {
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "axes_dims_rope": (4, 6, 6),
        **more,
    }


class _Noise:
    """Random tensors, one after the other."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def tokens_of(grids: Sequence[Grid]) -> int:
    """Number of tokens of all grids."""
    return sum(height * width for height, width in grids)


def numbered_ids(grids: Sequence[Grid], dtype: torch.dtype = torch.float32) -> Tensor:
    """Position ids (index, y, x) of the image, index 0, and of reference images, index 1, 2, ...: ``[tokens, 3]``."""
    each = [raster_ids(*grid) for grid in grids]
    for index, ids in enumerate(each):
        ids[:, 0] = index
    return torch.cat(each).to(dtype)


def tiny_longcat(seed: int = 0, **config: Any):
    """A LongCatImageTransformer2DModel of 2 + 2 blocks."""
    from diffusers import LongCatImageTransformer2DModel

    torch.manual_seed(seed)
    return varied(LongCatImageTransformer2DModel(**{**_sizes(pooled_projection_dim=12), **config}))


def longcat_call(
    height: int, width: int, text_len: int, batch: int = 1, seed: int = 0, references: Sequence[Grid] = ()
) -> dict[str, Any]:
    """Keyword arguments of a LongCat-Image call, or with references of LongCat-Image-Edit.

    The ids are (modality, y, x): text 0, image 1, references from 2 on. Image tokens begin at y = x = 512, the length of the
    longest prompt, or in editing at the length of the text. In editing the ids are float64, like the pipeline's.
    """
    from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids

    noise, grids = _Noise(seed), ((height, width), *references)
    start = (text_len, text_len) if references else (512, 512)
    ids = [
        prepare_pos_ids(modality_id=1 + number, type="image", start=start, height=grid[0], width=grid[1])
        for number, grid in enumerate(grids)
    ]
    return {
        "hidden_states": noise(batch, tokens_of(grids), 8),
        "timestep": torch.full((batch,), 0.5),
        "guidance": None,
        "encoder_hidden_states": noise(batch, text_len, 12),
        "txt_ids": prepare_pos_ids(modality_id=0, type="text", start=(0, 0), num_token=text_len),
        "img_ids": torch.cat([ids[0], *(more.to(torch.float64) for more in ids[1:])]),
    }


def tiny_ovis(seed: int = 0, **config: Any):
    """An OvisImageTransformer2DModel of 2 + 2 blocks."""
    from diffusers import OvisImageTransformer2DModel

    torch.manual_seed(seed)
    return varied(OvisImageTransformer2DModel(**{**_sizes(out_channels=8), **config}))


def ovis_call(
    height: int, width: int, text_len: int, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Keyword arguments of an Ovis-Image call; ids (0, y, x) in the text encoder's type, text ids (0, i, i)."""
    noise = _Noise(seed)
    text_ids = torch.zeros(text_len, 3)
    text_ids[:, 1:] = torch.arange(text_len)[:, None]
    return {
        "hidden_states": noise(batch, height * width, 8).to(dtype),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "encoder_hidden_states": noise(batch, text_len, 12).to(dtype),
        "txt_ids": text_ids.to(dtype),
        "img_ids": raster_ids(height, width, dtype),
        "joint_attention_kwargs": {},
    }


def tiny_bria(seed: int = 0, **config: Any):
    """A BriaTransformer2DModel of 2 + 2 blocks."""
    from diffusers import BriaTransformer2DModel

    torch.manual_seed(seed)
    return varied(BriaTransformer2DModel(**{**_sizes(), **config}))


def bria_call(
    height: int, width: int, text_len: int, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Keyword arguments of a Bria 3.2 call; text is padded with zeros, which are attended to, and has id 0."""
    noise = _Noise(seed)
    return {
        "hidden_states": noise(batch, height * width, 8).to(dtype),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, text_len, 12).to(dtype),
        "attention_kwargs": None,
        "txt_ids": torch.zeros(text_len, 3),
        "img_ids": raster_ids(height, width, dtype),
    }


def tiny_fibo(seed: int = 0, **config: Any):
    """A BriaFiboTransformer2DModel of 2 + 2 blocks."""
    from diffusers import BriaFiboTransformer2DModel

    torch.manual_seed(seed)
    return varied(BriaFiboTransformer2DModel(**{**_sizes(text_encoder_dim=6), **config}))


def fibo_call(
    height: int,
    width: int,
    text_len: int,
    batch: int = 1,
    seed: int = 0,
    references: Sequence[Grid] = (),
    keep: Tensor | None = None,
    blocks: int = 4,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Keyword arguments of a Bria FIBO call, or with references of FIBO Edit.

    Args:
        height, width, text_len, batch, seed, references: as in the other calls.
        keep: which text is not padding, bool ``[batch, text_len]``; if none is, the pipeline passes no mask.
        blocks: number of blocks of the model, each with its own layer of the text encoder; there must be no more layers.
        dtype: dtype of tokens and ids.
    """
    noise, grids = _Noise(seed), ((height, width), *references)
    count = tokens_of(grids)
    mask = {}
    if keep is not None and not keep.all():
        whole = torch.cat([keep, torch.ones(batch, count, dtype=torch.bool)], 1)
        mask = {"attention_mask": whole[:, None, None, :]}
    return {
        "hidden_states": noise(batch, count, 8).to(dtype),
        "timestep": torch.full((batch,), 500.0, dtype=dtype),
        "encoder_hidden_states": noise(batch, text_len, 12).to(dtype),
        "text_encoder_layers": [noise(batch, text_len, 6).to(dtype) for _ in range(blocks)],
        "joint_attention_kwargs": mask,
        "txt_ids": torch.zeros(text_len, 3, dtype=dtype),
        "img_ids": numbered_ids(grids, dtype),
    }


def tiny_flux3(seed: int = 0, **config: Any):
    """A Flux3Transformer2DModel of 2 blocks a mode (text, image, references) and 2 joint ones; ``flow_map`` distilled."""
    from diffusers import Flux3Transformer2DModel

    torch.manual_seed(seed)
    sizes = _sizes(cond_in_channels=8, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4))
    model = varied(Flux3Transformer2DModel(**{**sizes, **config}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("to_out.0.weight"):
                weight *= 4  # or attention hardly matters beside the feed-forward layer, to which it is added
    return model


def flux3_call(
    height: int,
    width: int,
    text_len: int,
    batch: int = 1,
    seed: int = 0,
    references: Sequence[Grid] = (),
    flow_map: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of a FLUX.3 call; ids (t, y / 2, x / 2, l) with l = 0 for the image, -1, -2, ... for references."""
    from diffusers.modular_pipelines.flux3.before_denoise import Flux3TextRoPEInputsStep, _prepare_image_ids

    noise = _Noise(seed)
    text = noise(batch, text_len, 12)
    call = {
        "hidden_states": noise(batch, height * width, 8),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": _prepare_image_ids(height, width, 0.5),
        "encoder_hidden_states": text,
        "txt_ids": Flux3TextRoPEInputsStep._prepare_text_ids(text),
    }
    if references:
        ids = [_prepare_image_ids(*grid, 0.5, l_coord=-1 - number) for number, grid in enumerate(references)]
        call["image_cond_hidden_states"] = noise(batch, tokens_of(references), 8)
        call["image_cond_ids"] = torch.cat(ids)
    if flow_map:
        call["target_timestep"] = torch.full((batch,), 0.25)
    return call


def tiny_krea2(seed: int = 0, **config: Any):
    """A Krea2Transformer2DModel of 2 blocks, 4 query and 2 key heads x 16, and 1 + 1 text blocks."""
    from diffusers import Krea2Transformer2DModel

    torch.manual_seed(seed)
    sizes = {
        "in_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "timestep_embed_dim": 16,
        "text_hidden_dim": 12,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    }
    return varied(Krea2Transformer2DModel(**{**sizes, **config}))


def krea2_call(
    height: int, width: int, text_len: int, batch: int = 1, seed: int = 0, keep: Tensor | None = None
) -> dict[str, Any]:
    """Keyword arguments of a Krea 2 call, with the ids of text (all 0) and image in one tensor, and always with a mask.

    Args:
        height, width, text_len, batch, seed: as in the other calls.
        keep: which text is not padding, bool ``[batch, text_len]``; None for all. See ``krea2_keep``.
    """
    from diffusers import Krea2Pipeline

    noise = _Noise(seed)
    return {
        "hidden_states": noise(batch, height * width, 8),
        "encoder_hidden_states": noise(batch, text_len, 3, 12),
        "timestep": torch.full((batch,), 0.5),
        "position_ids": Krea2Pipeline.prepare_position_ids(text_len, height, width, torch.device("cpu")),
        "encoder_attention_mask": torch.ones(batch, text_len, dtype=torch.bool) if keep is None else keep,
        "attention_kwargs": None,
    }


def krea2_keep(kept: Sequence[int], text_len: int, suffix: int = 5) -> Tensor:
    """Krea 2's mask: a prompt of ``kept - suffix`` tokens, padding, and the template's last ``suffix`` tokens."""
    keep = torch.zeros(len(kept), text_len, dtype=torch.bool)
    for sample, length in enumerate(kept):
        keep[sample, : length - suffix] = keep[sample, text_len - suffix :] = True
    return keep
