"""The interface of a model family that ``transform`` and the hooks use; the families are in ``flexclear.families``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.carrying import BlockHook, CarrierHook
from flexclear.runtime.checks import attention_of
from flexclear.runtime.facts import JOINT, Call, Layer
from flexclear.runtime.mechanism import Formula
from flexclear.runtime.processors import WindowProcessor, window_processor
from flexclear.runtime.switches import Switches

InnerHooks = list[tuple[nn.Module, Any]]
"""Modules inside a model, and a ``flexclear.runtime.carrying.Hook`` for each."""


@dataclass(frozen=True)
class Family(ABC):
    """Where tokens enter and leave, where the grid comes from, which attention modules are replaced, where text sits.

    All of it is data, or a method if a model needs special treatment. Instances hold no state of a model: whatever varies is
    passed in the arguments of the model's call.

    Attributes:
        model_class: name of the model's class.
        processors: names of the attention processor classes that are replaced, exactly these: a subclass may compute anything.
        stacks: where blocks with windowed attention are: path of the list of blocks, and the names of the attention modules in
            each block.
        carriers: paths of the modules whose outputs together reach every such block as arguments and so carry a call's plan.
        carrier_argument: name of a dictionary argument of the model that reaches every block and its attention, and carries the
            plan instead of carriers or in addition to them. This is more robust: wrappers that replace the tensors that a module
            returns (DeepSpeed's ZeRO 3, reentrant checkpointing) leave a dictionary alone.
        block_argument: name of the blocks' argument that carries a plan on to their attention in whole graphs, for a model whose
            attention gets none of the arguments that carry it to the blocks; see ``BlockHook``.
        tokens: argument with the image's tokens or latents, a tensor or a list of them.
        text_first: whether text precedes the image in attention's sequence.
        joins: whether text is part of attention's sequence; otherwise it is seen by cross-attention, which is left unchanged.
        scopes: which tokens an attention module attends over if not ``JOINT``, by its name or its stack's.
        given: values that the processors' code gets for arguments of these names, such as None for padding masks; see
            ``WindowProcessor``.
        unbuilt: names in the processors' code whose assignments are left out: N x N masks that it would otherwise build in
            every layer; see ``WindowProcessor``.
        raster: whether image tokens reach attention in raster order, because the model makes them and their positions itself.
            Attention then permutes them into the layout's order and back.
        video: whether the model is for video, so that a radius alone does not determine the window (``frame_radius``).
        px_per_token: side of a token in pixels.
        latents_per_token: side of a token in pixels, divided by the ``vae_scale_factor`` of its pipelines, unless these have a
            ``patch_size`` that says otherwise.
        frames_per_latent: video frames per latent frame, except for the first latent frame, which stands for one.
        pools: whether it supports down-sampled keys (``down_factor``).
        rope: whether positions are rotary, so that an NTK factor makes sense.
        no_ntk: why an NTK factor is not supported, if it is not.
        clips_ntk: whether it supports ``ntk_floor``.
        idles: whether its model runs without any image tokens, as on ranks that get no part of a small image.
        pipelines: diffusers pipelines that its tests run end to end, for the support table.
        notes: remarks for the support table.
    """

    model_class: str
    processors: tuple[str, ...]
    stacks: Mapping[str, str | tuple[str, ...]]
    carriers: tuple[str, ...] = ()
    carrier_argument: str | None = None
    block_argument: str | None = None
    tokens: str = "hidden_states"
    text_first: bool = True
    joins: bool = True
    scopes: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    unbuilt: tuple[str, ...] = ()
    raster: bool = False
    video: bool = False
    px_per_token: int = 16
    latents_per_token: int = 2
    frames_per_latent: int = 4
    pools: bool = False
    rope: bool = True
    no_ntk: str = "has no rotary positions"
    clips_ntk: bool = False
    idles: bool = True
    pipelines: tuple[str, ...] = ()
    notes: str = ""

    def latent_frames(self, num_frames: int, frames_per_latent: int) -> int:
        """Number of latent frames of a video with ``num_frames`` frames, ``frames_per_latent`` of which become one."""
        return (num_frames - 1) // frames_per_latent + 1

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` is an instance of the family's model class or a subclass. Does not import diffusers."""
        return self.base_of(model) is not None

    def base_of(self, model: nn.Module) -> type[nn.Module] | None:
        """The class named ``model_class`` among the classes of ``model``."""
        return next((base for base in type(model).__mro__ if base.__name__ == self.model_class), None)

    def layers(self, model: nn.Module) -> Iterator[Layer]:
        """Each attention layer whose processor will be replaced, in the order of the forward pass.

        Raises:
            ValueError: the model lacks the blocks of its class.
            TypeError: an attention layer has a processor that the family cannot replace.
        """
        found = 0
        for stack, given in self.stacks.items():
            names = (given,) if isinstance(given, str) else given
            for index, block in enumerate(blocks_of(model, stack)):
                for name in names:
                    if self.attends(block, name):
                        found += 1
                        module = attention_of(model, block, f"{stack}[{index}]", name, self.processors)
                        scope = self.scopes.get(name, self.scopes.get(stack, JOINT))
                        yield Layer(f"{stack}.{index}.{name}", module, scope)
        if not found:
            raise ValueError(
                f"this {type(model).__name__} has no blocks in {' or '.join(self.stacks)}: nothing to transform"
            )

    def attends(self, block: nn.Module, name: str) -> bool:
        """Whether a block of a stack has the attention module of that name. By default all blocks do."""
        return True

    def processor(
        self, layer: Layer, original: Any, slot: int, down_factor: int | None, formula: Formula | None
    ) -> WindowProcessor:
        """The replacement for ``original``, the processor that ``layer`` has when not transformed.

        Args:
            layer: the layer.
            original: its processor.
            slot: see ``WindowProcessor``.
            down_factor: side in tokens of the cells whose keys are pooled, for a family that ``pools``, or None.
            formula: a formula that replaces softmax over a mask, or None.

        Raises:
            ValueError: the processor cannot be replaced under these settings.
        """
        if formula is not None:
            raise ValueError(
                f"attention={formula.kind!r} is defined for FluxTransformer2DModel, got {self.model_class}. The alternatives "
                "that are masks ('strided', 'swin', 'neighborhood') run on every model of images"
            )
        return window_processor(original, slot, given=self.given, shared=layer.shared, unbuilt=self.unbuilt)

    @abstractmethod
    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: Any) -> Call:
        """The facts of one call. ``grids`` is the model's ``GridReader``.

        Raises:
            ValueError: the call cannot be windowed; the message names what was given.
        """

    @abstractmethod
    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, switches: Switches
    ) -> tuple[dict[str, Any], CallPlan]:
        """The call's arguments in the plan's token order, and the plan. The caller's own arguments are not modified.

        A family puts its own rotary embedding into the plan (``CallPlan.rotary``) if its model computes one in raster order or
        in numbers that do not compile, or if ``switches`` change the frequencies.

        Raises:
            ValueError: an NTK factor other than 1 on a model without rotary positions.
        """

    def leave(self, model: nn.Module, output: Any, plan: CallPlan) -> Any:
        """The model's output in raster order. By default its first element or ``sample`` is ``[B, tokens, C]``."""
        if self.raster:
            return output
        if isinstance(output, tuple):
            return (plan.to_raster(output[0]), *output[1:])
        output.sample = plan.to_raster(output.sample)
        return output

    def why_not_parallel(self, model: nn.Module) -> str | None:
        """Why several ranks cannot share an image (``flexclear.parallel``), or None. They can if tokens go through
        ``plan.to_image_order`` at the entry and through ``plan.to_raster`` at the exit."""
        return "the model makes its tokens itself, and every rank would make all of them" if self.raster else None

    def why_not_parallel_call(self, model: nn.Module, kwargs: dict[str, Any]) -> str | None:
        """Why several ranks cannot share the image of this call, or None."""
        return None

    def parallel_hooks(self, model: nn.Module, current: Any) -> InnerHooks:
        """Additional ``inner_hooks`` of a model that runs on several ranks; ``current()`` returns the call's ``Band``."""
        return []

    def inner_hooks(self, model: nn.Module) -> InnerHooks:
        """The family's own hooks, which run after those of ``hooks``; none by default."""
        return []

    def hooks(self, model: nn.Module, names: Iterable[str]) -> InnerHooks:
        """The hooks that bring a call's plan to the attention layers of these names (``flexclear.runtime.carrying``), and
        the family's own."""
        carriers = [(model.get_submodule(path), CarrierHook(path == self.carriers[-1])) for path in self.carriers]
        paths = dict.fromkeys(map(block_of, names))
        blocks = [(block, BlockHook(block, self.block_argument)) for block in map(model.get_submodule, paths)]
        return [*carriers, *blocks, *self.inner_hooks(model)]


def block_of(name: str) -> str:
    """Path of the block that contains the attention module at path ``name``."""
    return name.rpartition(".")[0]


def blocks_of(model: nn.Module, stack: str) -> Any:
    """The blocks of a stack; empty if the model has no such stack."""
    found: Any = model
    for part in stack.split("."):
        found = found.get(part) if isinstance(found, Mapping) else getattr(found, part, None)
        if found is None:
            return ()
    return found
