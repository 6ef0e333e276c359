"""ERNIE-Image: one sequence of the image followed by the padded text; blocks take the sequence's axis first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.families.latents import LatentsFamily
from flexclear.runtime.checks import required_tensor
from flexclear.runtime.facts import JOINT, Call
from flexclear.runtime.grid import GridReader


@dataclass(frozen=True)
class ErnieImageFamily(LatentsFamily):
    """``ErnieImageTransformer2DModel``. ``text_lens`` gives the length of each sample's text."""

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        call = super().read(model, kwargs, grids)
        lengths, most = required_tensor(kwargs, "text_lens", model), call.text_lens[JOINT]
        if lengths.shape != call.tokens.shape[:1]:
            raise ValueError(
                f"text_lens must hold one length for each of the {len(call.tokens)} samples, got {tuple(lengths.shape)}"
            )
        shortest, longest = grids.once(lengths, _shortest_and_longest)
        if shortest < 0 or longest > most:
            raise ValueError(f"text_lens from {shortest} to {longest} do not fit text_bth, which has {most} tokens")
        if shortest == most:
            return call
        keep = torch.arange(most, device=lengths.device) < lengths[:, None]
        return replace(call, keep={JOINT: keep})


def _shortest_and_longest(lengths: Tensor) -> tuple[int, int]:
    return int(lengths.min()), int(lengths.max())


ERNIE_IMAGE = ErnieImageFamily(
    model_class="ErnieImageTransformer2DModel",
    processors=("ErnieImageSingleStreamAttnProcessor",),
    stacks={"layers": "self_attention"},
    carriers=("pos_embed",),
    text_first=False,
    given={"attention_mask": None},
    text="text_bth",
    latents_per_token=1,
    pipelines=("ErnieImagePipeline",),
    notes="padded text is masked",
)
