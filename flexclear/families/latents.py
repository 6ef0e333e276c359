"""Models that take latents ``[B, C, H, W]``, and make tokens and positions of them themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.carrying import Hook, here
from flexclear.runtime.checks import refuse_mask, required_tensor
from flexclear.runtime.facts import JOINT, Call
from flexclear.runtime.family import Family, InnerHooks
from flexclear.runtime.grid import GridReader
from flexclear.runtime.switches import Switches

ADDED_MASK = (
    "diffusers adds it to the scores, as 1 and 0, which hides nothing. Its pipelines give none; leave it out, or "
    "flexclear.restore(model) first"
)
OWN_ROTARY = "the window travels with the rotary embedding that the model makes itself. Leave it out"


class StretchHook(Hook):
    """Forward hook of the module that makes the rotary embedding: of a call with another base, what that makes."""

    after = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        plan: CallPlan | None = getattr(here, "leaving", None)
        if plan is None or plan.embedder is None:
            return output
        # Its class's, not one that a hook has put on the module that it is a copy of.
        return type(plan.embedder).forward(plan.embedder, *args, **kwargs)


@dataclass(frozen=True)
class LatentsFamily(Family):
    """A model whose image tokens are the patches of its latents, row by row, with one text before or behind them.

    They stay in raster order, but for attention.

    Attributes:
        embedder: path of the module that makes the rotary embedding and has its base as ``theta``; the first carrier by default.
        text: argument with the text's features, ``[B, tokens, C]``.
        registers: tokens of the model's own that go with the text.
        positions: path of the number of learned positions, which are a square grid's; None where no size is too large.
        refuses: arguments that a call must not have, and why.
    """

    raster: bool = True
    embedder: str | None = None
    text: str = "encoder_hidden_states"
    registers: int = 0
    positions: str | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        latents, text = (required_tensor(kwargs, name, model) for name in ("hidden_states", self.text))
        refuse_mask(kwargs.get("attention_kwargs") or {}, "attention_kwargs")
        for name, why in self.refuses.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"a transformed {type(model).__name__} takes no {name}: {why}")
        return Call(latents, (self.grid(model, latents),), {JOINT: text.shape[1] + self.registers})

    def grid(self, model: nn.Module, latents: Tensor) -> tuple[int, int]:
        """Height and width in tokens.

        Raises:
            ValueError: the latents have another shape or several frames, do not divide into patches, or have more tokens
                to a side than the model has positions.
        """
        *frames, tall, wide = patch_of(model)
        if latents.ndim != 4 + len(frames) or any(frames != 1 for frames in (*latents.shape[2:-2], *frames)):
            expected = ", ".join(("batch", "channels", *(("1 frame",) if frames else ()), "height", "width"))
            raise ValueError(
                f"a transformed {type(model).__name__} whose patches are {patch_of(model)} takes latents of one image, "
                f"[{expected}], got {list(latents.shape)}"
            )
        (height, rest), (width, beside) = divmod(latents.shape[-2], tall), divmod(latents.shape[-1], wide)
        if rest or beside or not height or not width:
            raise ValueError(
                f"latents of {latents.shape[-2]} x {latents.shape[-1]} do not divide into the patches of {tall} x {wide} of "
                f"this {type(model).__name__}"
            )
        if self.positions is not None:
            most = int(attrgetter(self.positions)(model) ** 0.5)
            if max(height, width) > most:
                px = self.px_per_token
                raise ValueError(
                    f"latents of shape {tuple(latents.shape)} are {height} x {width} tokens ({height * px} x {width * px} "
                    f"px), but the learned positions of this {type(model).__name__} end at {most} x {most} tokens "
                    f"({most * px} x {most * px} px; {self.positions}={most**2}). Choose a smaller image; a window does not "
                    "extend positions"
                )
        return height, width

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, switches: Switches
    ) -> tuple[dict[str, Any], CallPlan]:
        if switches.ntk_factor == 1:
            return kwargs, plan
        if not self.rope:
            raise ValueError(f"ntk_factor={switches.ntk_factor}: {type(model).__name__} has no rotary positions")
        return kwargs, replace(plan, embedder=self.stretched(model, switches.ntk_factor))

    def stretched(self, model: nn.Module, factor: float) -> Any:
        """A module like the one that makes the rotary embedding, of a base that is larger by ``factor``."""
        embedder: Any = copy.copy(self.embedder_of(model))
        embedder.theta *= factor
        return embedder

    def embedder_of(self, model: nn.Module) -> nn.Module:
        """The module that makes the rotary embedding."""
        return model.get_submodule(self.embedder or self.carriers[0])

    def hooks(self, model: nn.Module, names: Iterable[str]) -> InnerHooks:
        stretching: InnerHooks = [(self.embedder_of(model), StretchHook())] if self.rope else []
        return [*stretching, *super().hooks(model, names)]


def patch_of(model: nn.Module) -> tuple[int, ...]:
    """Sides of a patch in latents: height and width, of some models frames before them."""
    config: Any = model.config
    given = config.patch_size
    return (given, given) if isinstance(given, int) else tuple(given)


AURAFLOW = LatentsFamily(
    model_class="AuraFlowTransformer2DModel",
    processors=("AuraFlowAttnProcessor2_0", "FusedAuraFlowAttnProcessor2_0"),
    stacks={"joint_transformer_blocks": "attn", "single_transformer_blocks": "attn"},
    carriers=("time_step_proj",),
    block_argument="attention_kwargs",
    registers=8,
    positions="pos_embed.pos_embed_max_size",
    rope=False,
    pipelines=("AuraFlowPipeline",),
    notes="sizes up to the model's learned positions",
)

COGVIEW4 = LatentsFamily(
    model_class="CogView4Transformer2DModel",
    processors=("CogView4AttnProcessor",),
    stacks={"transformer_blocks": "attn1"},
    carriers=("rope",),
    refuses={"attention_mask": ADDED_MASK, "image_rotary_emb": OWN_ROTARY},
    pipelines=("CogView4Pipeline", "CogView4ControlPipeline"),
    notes="control images; positions are counted on a grid of 256 x 256, however large the image",
)
