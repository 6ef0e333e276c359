"""CogVideoX: text first, latents with frames before channels, positions passed in by the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flexclear.families.latents import LatentsFamily
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.facts import Call
from flexclear.runtime.grid import GridReader
from flexclear.runtime.switches import Switches


@dataclass(frozen=True)
class CogVideoXFamily(LatentsFamily):
    """``CogVideoXTransformer3DModel``. For image to video, the image's latents are additional channels."""

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        call = super().read(model, kwargs, grids)
        rotary = kwargs.get("image_rotary_emb")
        (height, width), frames = call.grids[0], call.frames
        if rotary is not None and len(rotary[0]) != frames * height * width:
            raise ValueError(
                f"image_rotary_emb has positions of {len(rotary[0])} tokens, and hidden_states of shape "
                f"{tuple(call.tokens.shape)} are {frames} x {height} x {width} = {frames * height * width}"
            )
        return call

    def sides(self, model: nn.Module, latents: Tensor) -> tuple[int, int, int]:
        if latents.ndim != 5:
            raise ValueError(
                f"a transformed {type(model).__name__} takes latents of one video, [batch, frames, channels, height, width], "
                f"got {list(latents.shape)}"
            )
        return super().sides(model, latents.transpose(1, 2))

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, switches: Switches
    ) -> tuple[dict[str, Any], CallPlan]:
        kwargs, plan = super().enter(model, kwargs, plan, exact_ids, switches)
        rotary = kwargs.get("image_rotary_emb")
        if rotary is not None:
            # The pipeline's tables are views of a grid, whose strides differ by size: Dynamo would compile for each.
            kwargs = {**kwargs, "image_rotary_emb": tuple(part.clone() for part in rotary)}
        return kwargs, plan


COGVIDEOX = CogVideoXFamily(
    model_class="CogVideoXTransformer3DModel",
    processors=("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
    stacks={"transformer_blocks": "attn1"},
    carrier_argument="attention_kwargs",
    rope=False,
    no_ntk="has no base of its own: its pipelines make the rotary embedding and hand it over",
    video=True,
    pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
    notes=(
        "text and image to video, 1.0 and 1.5 (patches of two frames); text padding is attended to, as in diffusers; 5B I2V has "
        "learned positions for a single size"
    ),
)
