"""HiDream-I1: the image first, then padding if it is not square, then the text features of T5 and of two Llama layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flexclear.families.latents import LatentsFamily
from flexclear.runtime.facts import JOINT, Call
from flexclear.runtime.grid import GridReader

PACKED = "tokens that are packed already may be of several sizes. Give latents [batch, channels, height, width]"


@dataclass(frozen=True)
class HiDreamFamily(LatentsFamily):
    """``HiDreamImageTransformer2DModel``.

    Latents that are not square are padded to ``model.max_seq`` tokens. The padding takes part in attention, with keys of zero,
    and the window treats it as text.
    """

    def read(self, model: Any, kwargs: dict[str, Any], grids: GridReader) -> Call:
        call = super().read(model, kwargs, grids)
        layers = kwargs.get("encoder_hidden_states_llama3")
        if layers is None or not len(layers):
            raise ValueError(
                f"a transformed {type(model).__name__} needs encoder_hidden_states_llama3 as a tensor or list of the "
                f"features of Llama's layers, got {layers!r}"
            )
        height, width = call.grids[0]
        filling = 0 if height == width else model.max_seq - height * width
        if filling < 0:
            raise ValueError(
                f"latents of {height} x {width} = {height * width} tokens: this {type(model).__name__} takes images that are "
                f"not square of {model.max_seq} tokens at most (max_resolution={tuple(model.config.max_resolution)} latents)"
            )
        text_len = call.text_lens[JOINT] + 2 * layers[model.config.llama_layers[0]].shape[-2]
        return replace(call, text_lens={JOINT: filling + text_len})


HIDREAM = HiDreamFamily(
    model_class="HiDreamImageTransformer2DModel",
    processors=("HiDreamAttnProcessor",),
    stacks={"double_stream_blocks": "block.attn1", "single_stream_blocks": "block.attn1"},
    carriers=("pe_embedder",),
    text_first=False,
    text="encoder_hidden_states_t5",
    refuses={"img_ids": PACKED, "img_sizes": PACKED, "hidden_states_masks": PACKED},
    pipelines=("HiDreamImagePipeline",),
    notes=(
        "images that are not square are padded to the largest number of tokens (4096), as in the dense model, and the padding "
        "counts as text; experts are chosen on the host, so blocks with them do not compile to whole graphs"
    ),
)
