"""FLUX.1: 19 double-stream and 38 single-stream blocks, text first, RoPE over (index, y, x); with pooled keys and formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flexclear.families.tokens import TokensFamily
from flexclear.runtime.facts import Layer
from flexclear.runtime.mechanism import Formula
from flexclear.runtime.processors import WindowProcessor, window_processor

STACKS = {"transformer_blocks": "attn", "single_transformer_blocks": "attn"}
PROCESSORS = ("FluxAttnProcessor", "FluxIPAdapterAttnProcessor")
WITHOUT_IMAGES = {"ip_hidden_states": ()}
"""Without images in a call, an IP-Adapter adds nothing."""

RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")
"""Arguments with which FLUX-like models take a ControlNet's residuals, one row per image token."""


@dataclass(frozen=True)
class FluxFamily(TokensFamily):
    """A model whose layers may have an additional parameter: pooling weights, or weights of a formula."""

    def processor(
        self, layer: Layer, original: Any, slot: int, down_factor: int | None, formula: Formula | None
    ) -> WindowProcessor:
        weight = None
        if formula is not None:
            shape = formula.weight_shape(layer.module.inner_dim)
            if shape is not None:
                weight, beside = ("compression_weight", _filled(layer, shape, formula.initial_weight())), formula.kind
                _refuse_adapter(layer, original, f"attention={beside!r} does not support")
        elif down_factor is not None:
            shape = (1, 1, 1, down_factor, 1, down_factor, 1)
            weight = ("spatial_weight", _filled(layer, shape, 1 / down_factor**2))
            beside = f"down-sampled keys (down_factor={down_factor}) do not support yet"
            _refuse_adapter(layer, original, beside)
        return window_processor(original, slot, given=self.given, weight=weight)


def _refuse_adapter(layer: Layer, original: Any, beside: str) -> None:
    """Raise if a layer's processor has modules of its own, like an IP-Adapter's.

    Raises:
        ValueError: it has.
    """
    if isinstance(original, torch.nn.Module):
        raise ValueError(f"{layer.name} has an IP-Adapter, which {beside}. pipe.unload_ip_adapter() first")


def _filled(layer: Layer, shape: tuple[int, ...], value: float) -> torch.Tensor:
    """Initial value of a parameter of a layer's processor, on the layer's device and in its dtype."""
    weight = next(layer.module.parameters())
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    # Offloaded layers are empty between calls. These few numbers stay on the CPU, and move to the keys' device in each call.
    device = torch.device("cpu") if weight.is_meta else weight.device
    with torch.inference_mode(False):  # a tensor made in inference mode never gets a gradient, and nothing says so
        return torch.full(shape, value, device=device, dtype=dtype)


FLUX = FluxFamily(
    model_class="FluxTransformer2DModel",
    processors=PROCESSORS,
    stacks=STACKS,
    carrier_argument="joint_attention_kwargs",
    text_mask=True,
    given=WITHOUT_IMAGES,
    residuals=RESIDUALS,
    pools=True,
    clips_ntk=True,
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
        "FluxPriorReduxPipeline",
    ),
    notes="dev, schnell, Fill, Control, Kontext (its reference images are further grids), Redux, true CFG",
)
