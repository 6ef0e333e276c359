"""Transformers of published shapes with random weights and few blocks of each kind, and their pipelines' calls of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.common.choices import EMBEDDED
from flexclear.common.reading import parse_json, read_text
from flexclear.common.shipped import model_directory
from flexclear.families import Family, family_of
from flexclear.families.target import px_per_token
from flexclear.measuring.names import CONFIGS, Published
from flexclear.runtime.family import blocks_of


@dataclass(frozen=True)
class Model:
    """A transformer to measure.

    Attributes:
        name: name in tables.
        transformer: all blocks, without weights, on the meta device.
        family: its family.
        text_len: text tokens.
        px: pixels per token and side.
    """

    name: str
    transformer: nn.Module
    family: Family
    text_len: int
    px: int

    @property
    def counts(self) -> dict[str, int]:
        """Number of blocks by stack."""
        return {path: len(blocks_of(self.transformer, path)) for path in self.family.stacks}

    @property
    def heads(self) -> int:
        """Heads of attention."""
        return next(iter(self.family.layers(self.transformer))).heads

    @property
    def head_dim(self) -> int:
        """Channels of each."""
        return next(iter(self.family.layers(self.transformer))).head_dim


def find_model(name: str, dtype: torch.dtype, text_len: int | None = None) -> Model:
    """Find a model by a name in ``CONFIGS`` or a folder with a ``config.json``. Downloads nothing and reads no weights.

    Args:
        name: name or path.
        dtype: type of the weights.
        text_len: text tokens; the pipeline's number by default.

    Raises:
        ValueError: it is not known how to call its class.
        FileNotFoundError: there is no such folder.
    """
    known = CONFIGS.get(name)
    if name == EMBEDDED:
        known = replace(_from_folder(model_directory()), text_len=64, px=8)
    elif known is None:
        known = _from_folder(Path(name))
    import diffusers

    made = getattr(diffusers, known.model_class, None)
    if known.model_class not in CALLS or made is None:
        raise ValueError(f"{name} is a {known.model_class}; flexclear bench supports {', '.join(sorted(CALLS))}")
    with torch.device("meta"):
        # Not diffusers' own .to, which warns about modules that should stay in float32, though there are none.
        transformer = nn.Module.to(made.from_config(known.config), dtype).eval().requires_grad_(False)
    length = known.text_len if text_len is None else text_len
    return Model(name, transformer, family_of(transformer), length, known.px or px_per_token(transformer))


def _from_folder(folder: Path) -> Published:
    inside = folder / "transformer"
    file = (inside if inside.is_dir() else folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    config = parse_json(read_text(file))
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise ValueError(f"{file} is not the configuration of a diffusers model: it has no _class_name")
    known = next((one for one in CONFIGS.values() if one.model_class == config["_class_name"]), None)
    return Published(config["_class_name"], config, 512 if known is None else known.text_len)


def few_blocks(model: Model, blocks: int | None) -> nn.Module:
    """Copy the model's transformer, still without weights, with at most ``blocks`` blocks of each kind; None: all."""
    from copy import deepcopy

    transformer = deepcopy(model.transformer)
    if blocks is not None:
        for path in model.family.stacks:
            found = blocks_of(transformer, path)
            if len(found) > blocks:
                parent, _, name = path.rpartition(".")
                setattr(transformer.get_submodule(parent), name, found[:blocks])
    return transformer


def with_random_weights(transformer: nn.Module, device: torch.device, seed: int = 0) -> nn.Module:
    """Give a transformer on the meta device random weights, made directly on ``device`` in their final type.

    Every layer gets some, including the gates: a gate of zero would hide what attention computes.
    """
    transformer = transformer.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in [*transformer.named_parameters(), *transformer.named_buffers()]:
        if tensor.ndim >= 2:
            tensor.normal_(std=1 / math.sqrt(tensor[0].numel()), generator=generator)
        elif name.endswith("weight"):
            tensor.normal_(mean=1, std=0.1, generator=generator)
        else:
            tensor.normal_(std=0.02, generator=generator)
    return transformer


def call_of(model: Model, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of one step over ``grid`` (rows, columns of image tokens) for one sample, as the pipeline would make them."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    made = CALLS[type(model.transformer).__name__](model.transformer.config, grid, model.text_len, noise)
    ids = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in made.items()
        if isinstance(tensor, Tensor)
    }
    return {**made, **ids, "timestep": torch.full((1,), 0.5, device=device, dtype=dtype), "return_dict": False}


Noise = Callable[..., Tensor]


def _positions(grid: tuple[int, int], axes: int) -> Tensor:
    ids = torch.zeros(*grid, axes)
    ids[..., 1], ids[..., 2] = torch.arange(grid[0])[:, None], torch.arange(grid[1])
    return ids.view(-1, axes)


def _flux(config: Any, grid: tuple[int, int], text: int, noise: Noise) -> dict[str, Any]:
    guidance = {"guidance": torch.full((1,), 3.5)} if config.guidance_embeds else {}
    return {
        "hidden_states": noise(1, grid[0] * grid[1], config.in_channels),
        "encoder_hidden_states": noise(1, text, config.joint_attention_dim),
        "pooled_projections": noise(1, config.pooled_projection_dim),
        "img_ids": _positions(grid, 3),
        "txt_ids": torch.zeros(text, 3),
        **guidance,
    }


def _flux2(config: Any, grid: tuple[int, int], text: int, noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, grid[0] * grid[1], config.in_channels),
        "encoder_hidden_states": noise(1, text, config.joint_attention_dim),
        "guidance": torch.full((1,), 3.5),
        "img_ids": _positions(grid, 4).long()[None],
        "txt_ids": torch.zeros(1, text, 4, dtype=torch.int64),
    }


def _sd3(config: Any, grid: tuple[int, int], text: int, noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, config.in_channels, config.patch_size * grid[0], config.patch_size * grid[1]),
        "encoder_hidden_states": noise(1, text, config.joint_attention_dim),
        "pooled_projections": noise(1, config.pooled_projection_dim),
    }


def _qwen(config: Any, grid: tuple[int, int], text: int, noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, grid[0] * grid[1], config.in_channels),
        "encoder_hidden_states": noise(1, text, config.joint_attention_dim),
        "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, *grid)]],
    }


CALLS: dict[str, Callable[[Any, tuple[int, int], int, Noise], dict[str, Any]]] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "SD3Transformer2DModel": _sd3,
    "QwenImageTransformer2DModel": _qwen,
}
"""What pipelines pass besides the timestep, by transformer class."""
