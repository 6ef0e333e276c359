"""FLUX.2 dev and klein: double- and single-stream blocks, text first, RoPE over (image, y, x, place in the text)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from flexclear.families.flux import STACKS
from flexclear.families.tokens import TokensFamily
from flexclear.runtime.checks import required_tensor
from flexclear.runtime.facts import Call
from flexclear.runtime.grid import GridReader

CACHE_ARGUMENTS = ("kv_cache_mode", "kv_cache", "num_ref_tokens")


@dataclass(frozen=True)
class Flux2Family(TokensFamily):
    """A model that can be asked to cache the keys and values of its reference images, which is refused."""

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        required_tensor(kwargs, self.text_ids, model)
        for arguments in (kwargs.get(self.attention_kwargs) or {}, kwargs):
            _refuse_cache(arguments)
        return super().read(model, kwargs, grids)


def _refuse_cache(arguments: dict[str, Any]) -> None:
    """Raise if the call fills or uses a cache of the reference images' keys and values.

    Raises:
        ValueError: it does.
    """
    for name in CACHE_ARGUMENTS:
        given = arguments.get(name)
        if given is not None and given != 0:
            shown = repr(given) if isinstance(given, str | int) else f"a {type(given).__name__}"
            raise ValueError(
                f"{name}={shown} asks FLUX.2 to cache its reference images' keys and values. They then see only "
                "themselves, and the image sees all of them: no window does that. Call the model without it "
                "(Flux2KleinPipeline in place of Flux2KleinKVPipeline), or flexclear.restore(model) first"
            )


FLUX2 = Flux2Family(
    model_class="Flux2Transformer2DModel",
    processors=(
        "Flux2AttnProcessor",
        "Flux2KVAttnProcessor",
        "Flux2ParallelSelfAttnProcessor",
        "Flux2KVParallelSelfAttnProcessor",
    ),
    stacks=STACKS,
    carrier_argument="joint_attention_kwargs",
    text_mask=True,
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline"),
    notes=(
        "dev and klein; reference images are further grids. Key-value caching of reference images (Flux2KleinKVPipeline) "
        "raises: with it they see only themselves, which no window does"
    ),
)
