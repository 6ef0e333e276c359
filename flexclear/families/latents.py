"""Models that take latents, ``[B, C, H, W]`` or a video's ``[B, C, F, H, W]``, and make tokens and positions themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flexclear.compile.derivatives import tensors_of
from flexclear.families.sharing import GatherHook, OrderHook, RowsHook
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
    """Forward hook of the module that makes the rotary embedding: in a call with another base, returns that embedding."""

    after = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        plan: CallPlan | None = getattr(here, "leaving", None)
        if plan is None or plan.embedder is None:
            return output
        embedder = on_device_of(output, plan.embedder)
        # The class's forward: the embedder is a copy, and may have copied a forward that a hook put on the original.
        return type(embedder).forward(embedder, *args, **kwargs)


def on_device_of(output: Any, embedder: nn.Module) -> nn.Module:
    """``embedder``, or a copy of it, on the device of ``output``: an offloaded model moves there only after its entry."""
    if torch.compiler.is_compiling():
        return embedder
    device = next(each.device for each in tree_leaves(output) if isinstance(each, Tensor))
    if all(tensor.device == device for tensor in tensors_of(embedder)):
        return embedder
    return copy.deepcopy(embedder).to(device)


@dataclass(frozen=True)
class LatentsFamily(Family):
    """A model whose image tokens are the patches of its latents, frame by frame and row by row, with one text before or
    after them, or with none if text is seen by cross-attention, which is unchanged.

    Tokens stay in raster order except inside attention. The size of a patch is the configuration's ``patch_size``, with
    ``patch_size_t`` frames if there is such an entry.

    Attributes:
        embedder: path of the module that makes the rotary embedding, with its base as ``theta``; the first carrier by default.
        text: argument with the text's features, ``[B, tokens, C]``.
        registers: number of the model's own tokens that are counted as text.
        positions: path of the number of learned positions, which form a square grid; None if sizes are unlimited.
        refuses: arguments that a call must not have, and why.
        rows: for a model that several ranks can share: the axis of the embedder's output with a row for each image token. Such
            a model's blocks take tokens first, and its ``proj_out`` turns tokens into patches.
    """

    raster: bool = True
    embedder: str | None = None
    text: str = "encoder_hidden_states"
    registers: int = 0
    positions: str | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    rows: int | None = None

    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: GridReader) -> Call:
        latents, text = (required_tensor(kwargs, name, model) for name in ("hidden_states", self.text))
        refuse_mask(kwargs.get("attention_kwargs") or {}, "attention_kwargs")
        for name, why in self.refuses.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"a transformed {type(model).__name__} takes no {name}: {why}")
        frames, height, width = self.sides(model, latents)
        text_len = text.shape[1] if self.joins else 0
        return Call(latents, ((height, width),), {JOINT: text_len + self.registers}, frames=frames)

    def sides(self, model: nn.Module, latents: Tensor) -> tuple[int, int, int]:
        """Frames, height and width in tokens; an image has 1 frame.

        Raises:
            ValueError: the latents have another shape, have several frames although the model takes only images, do not divide
                into patches, or have more tokens along a side than the model has positions.
        """
        patch = patch_of(model)
        if self.video and len(patch) == 2:
            patch = (1, *patch)
        several = self.video or all(count == 1 for count in (*latents.shape[2:-2], *patch[:-2]))
        if latents.ndim != 2 + len(patch) or not several:
            inner = [("frames" if self.video else "1 frame"), "height", "width"][-len(patch) :]
            raise ValueError(
                f"a transformed {type(model).__name__} whose patches are {patch} takes latents of one "
                f"{'video' if self.video else 'image'}, [{', '.join(['batch', 'channels', *inner])}], got "
                f"{list(latents.shape)}"
            )
        given = tuple(latents.shape[2:])
        if any(side % part or not side for side, part in zip(given, patch, strict=True)):
            raise ValueError(
                f"latents of {' x '.join(map(str, given))} do not divide into the patches of {' x '.join(map(str, patch))} of "
                f"this {type(model).__name__}"
            )
        *frames, height, width = (side // part for side, part in zip(given, patch, strict=True))
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
        return (frames or [1])[0], height, width

    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, switches: Switches
    ) -> tuple[dict[str, Any], CallPlan]:
        if switches.ntk_factor == 1:
            return kwargs, plan
        if not self.rope:
            raise ValueError(f"ntk_factor={switches.ntk_factor}: {type(model).__name__} {self.no_ntk}")
        return kwargs, replace(plan, embedder=self.stretched(model, switches.ntk_factor))

    def stretched(self, model: nn.Module, factor: float) -> Any:
        """A module like the one that makes the rotary embedding, but with its base multiplied by ``factor``."""
        embedder: Any = copy.copy(self.embedder_of(model))
        embedder.theta *= factor
        return embedder

    def embedder_of(self, model: nn.Module) -> nn.Module:
        """The module that makes the rotary embedding."""
        return model.get_submodule(self.embedder or self.carriers[0])

    def why_not_parallel(self, model: nn.Module) -> str | None:
        return super().why_not_parallel(model) if self.rows is None else None

    def why_not_parallel_call(self, model: nn.Module, kwargs: dict[str, Any]) -> str | None:
        times = kwargs.get("timestep")
        if isinstance(times, Tensor) and times.ndim > 1:
            return "it has a time for each token or frame, which ranks do not share"
        return None

    def parallel_hooks(self, model: nn.Module, current: Any) -> InnerHooks:
        assert self.rows is not None
        first: Any = model.get_submodule(f"{next(iter(self.stacks))}.0")
        out = model.get_submodule("proj_out")
        return [(self.embedder_of(model), RowsHook(self.rows)), (first, OrderHook()), (out, GatherHook(current))]

    def hooks(self, model: nn.Module, names: Iterable[str]) -> InnerHooks:
        stretching: InnerHooks = [(self.embedder_of(model), StretchHook())] if self.rope else []
        return [*stretching, *super().hooks(model, names)]


def patch_of(model: nn.Module) -> tuple[int, ...]:
    """Sides of a patch in latents: (height, width), or (frames, height, width) for some models."""
    config: Any = model.config
    given = config.patch_size
    sides = (given, given) if isinstance(given, int) else tuple(given)
    return (config.patch_size_t or 1, *sides) if "patch_size_t" in config and len(sides) == 2 else sides


def frames_of_patch(model: nn.Module) -> int:
    """Number of latent frames in a patch."""
    config: Any = model.config
    return patch_of(model)[-3] if "patch_size" in config and len(patch_of(model)) > 2 else 1


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
