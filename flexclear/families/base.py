"""What ``transform`` asks of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from flexclear.alternatives.mechanism import Formula
from flexclear.call_plan import CallPlan
from flexclear.families.processors import is_ours

JOINT = "joint"
"""Scope of attention over text and image together; every family has it."""


@dataclass(frozen=True)
class Layer:
    """One attention layer whose processor is replaced.

    Attributes:
        name: path of the module in the model.
        module: the attention module; has ``processor`` and ``set_processor``.
        scope: which tokens it attends over, ``JOINT`` or a name of the family's own.
    """

    name: str
    module: Any
    scope: str = JOINT


@dataclass(frozen=True)
class Call:
    """One call of a model as the entry hook sees it, read before any work.

    Attributes:
        tokens: a floating-point input, for its device and type.
        grids: (height, width) in tokens of the image, then of each reference picture.
        text_lens: number of text tokens by scope.
        keep: by scope, bool ``[B, text_len]`` with False for text that is padding; absent where nothing is.
        order: token order of a call that cannot have the one that ``transform`` was given, else None.
    """

    tokens: Tensor
    grids: tuple[tuple[int, int], ...]
    text_lens: dict[str, int]
    keep: dict[str, Tensor] = field(default_factory=dict)
    order: str | None = None


class Family(ABC):
    """Where tokens enter and leave, where the grid comes from, which attention modules count, where text sits.

    Implementations hold no state: all that varies travels in the arguments of the model's call.
    """

    model_class: str
    """Name of the diffusers class."""

    text_first: bool
    """Whether text precedes the image in the attention's sequence."""

    px_per_token: int = 16
    """Pixels per token and side."""

    pools: bool = False
    """Whether down-sampled keys (``down_factor``) are known for it."""

    rope: bool = True
    """Whether positions are rotary, so that an NTK factor has a meaning."""

    clips_ntk: bool = False
    """Whether ``CallPlan.ntk_floor`` is known for it."""

    idles: bool = True
    """Whether its model runs without any image tokens, as ranks do that get no part of a small picture."""

    pipelines: tuple[str, ...] = ()
    """diffusers pipelines that its tests run end to end, for the support table."""

    notes: str = ""
    """What the support table says about it."""

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` is of this family, or of a subclass; does not import diffusers."""
        return diffusers_class(model, self.model_class) is not None

    @abstractmethod
    def layers(self, model: nn.Module) -> Iterator[Layer]:
        """Each attention layer whose processor is to be replaced, in the order of the forward pass.

        Raises:
            ValueError: the model lacks the blocks of its class.
            TypeError: an attention layer has a processor that the family cannot replace.
        """

    @abstractmethod
    def processor(self, layer: Layer, original: Any, slot: int, down_factor: int | None) -> Any:
        """A ``WindowProcessor`` for ``layer`` in place of ``original``, the processor that it has when not transformed.

        Raises:
            ValueError: that one cannot be replaced under these settings.
        """

    def formula_processor(self, layer: Layer, original: Any, slot: int, formula: Formula) -> Any:
        """The same where ``formula`` attends in place of softmax over a mask; families do without by default.

        Raises:
            ValueError: the family has no formulas, or the processor cannot be replaced under this one.
        """
        raise ValueError(
            f"attention={formula.kind!r} is defined for FluxTransformer2DModel, got {self.model_class}. The alternatives "
            "that are masks ('strided', 'swin', 'neighborhood') run on every model"
        )

    @abstractmethod
    def read(self, model: nn.Module, kwargs: dict[str, Any], grids: Any) -> Call:
        """The facts of one call. ``grids`` is the model's ``GridReader``.

        Raises:
            ValueError: the call cannot be windowed; the message names what was given.
        """

    @abstractmethod
    def enter(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan, exact_ids: bool, ntk_factor: float
    ) -> dict[str, Any]:
        """The call's arguments in the plan's token order, the plan among them; the caller's own stay as they are.

        ``ntk_factor`` multiplies the base of the rotary frequencies. A family whose model computes its rotary embedding
        where no argument reaches it, or in raster order, puts its own into the plan (``CallPlan.rotary``).

        Raises:
            ValueError: an ``ntk_factor`` other than 1 on a model without rotary positions.
        """

    @abstractmethod
    def plan_of(self, kwargs: dict[str, Any]) -> CallPlan:
        """The plan that ``enter`` put into the arguments."""

    def leave(self, model: nn.Module, output: Any, plan: CallPlan) -> Any:
        """The model's output back in raster order; by default its first element or ``sample`` is ``[B, tokens, C]``."""
        if isinstance(output, tuple):
            return (plan.to_raster(output[0]), *output[1:])
        output.sample = plan.to_raster(output.sample)
        return output

    def why_not_parallel(self, model: nn.Module) -> str | None:
        """Why a picture cannot be shared by several ranks (``flexclear.parallel``), or None. It can where tokens go through
        ``plan.to_image_order`` at the entry and through ``plan.to_raster`` at the exit."""
        return None

    def why_not_parallel_call(self, model: nn.Module, kwargs: dict[str, Any]) -> str | None:
        """The same of one call."""
        return None

    def parallel_hooks(self, model: nn.Module, current: Any) -> list[tuple[nn.Module, Any]]:
        """Further ``inner_hooks`` of a model that runs on several ranks; ``current()`` is the call's ``BandCall``."""
        return []

    def inner_hooks(self, model: nn.Module) -> list[tuple[nn.Module, Any]]:
        """``flexclear.hooks.Hook``s, with keyword arguments, on modules inside the model; none by default."""
        return []


def diffusers_class(module: nn.Module, name: str | None = None) -> type[nn.Module] | None:
    """The first class of diffusers among those that ``module`` is of, or the one called ``name``; None where there is none."""
    return next(
        (
            base
            for base in type(module).__mro__
            if base.__module__.startswith("diffusers.")
            and issubclass(base, nn.Module)
            and name in (None, base.__name__)
        ),
        None,
    )


def refuse_other_forward(module: nn.Module, where: str, base: type[nn.Module] | None) -> None:
    """Raise if ``module`` is of a subclass of ``base``, a class of diffusers, that has a forward of its own.

    Windows are made for what diffusers' own forward does: another may attend by itself, or read positions off the order of
    the tokens, which differs inside a transformed model. A subclass that leaves forward alone is what its base is.

    Raises:
        TypeError: it is; ``where`` says what it is in the message.
    """
    if base is not None and type(module).forward is not base.forward:
        raise TypeError(
            f"{where} is a {type(module).__name__}, which has a forward of its own in place of {base.__name__}'s: what it "
            f"computes is not known to flexclear. Use {base.__name__} itself, or a subclass that does not override forward"
        )


def attention_of(
    model: nn.Module, block: nn.Module, where: str, name: str, kind: type[nn.Module], replaced: tuple[type, ...]
) -> Any:
    """The attention module ``name`` of a block, once it is known that flexclear can replace its processor.

    Args:
        model: for messages.
        block: the block.
        where: its place in the model, such as ``transformer_blocks[0]``.
        name: of the attribute that holds the module.
        kind: class that it has in diffusers.
        replaced: the processors that the family replaces: these classes exactly, since a subclass may compute anything.

    Raises:
        ValueError: it is another module.
        TypeError: its processor is another; or it or the block is of a subclass with a forward of its own.
    """
    attention: Any = getattr(block, name, None)
    if not isinstance(attention, kind):
        raise ValueError(
            f"{where} of this {type(model).__name__} has no {kind.__name__} named {name} (found "
            f"{type(attention).__name__}): not the blocks that this model has in diffusers"
        )
    refuse_other_forward(block, where, diffusers_class(block))
    refuse_other_forward(attention, f"{where}.{name}", kind)
    processor = attention.processor
    if type(processor) not in replaced and not is_ours(processor):
        known = " and ".join(known.__name__ for known in replaced)
        derived = any(isinstance(processor, known) for known in replaced)
        raise TypeError(
            f"{where}.{name} has a {type(processor).__name__}; flexclear replaces {known}"
            f"{', not what derives from them' if derived else ''}. Unload the plugin that installed it, then transform"
        )
    return attention


def required_tensor(kwargs: dict[str, Any], name: str, model: nn.Module) -> Tensor:
    """The tensor argument ``name``.

    Raises:
        ValueError: it is missing or no tensor.
    """
    value = kwargs.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"a transformed {type(model).__name__} needs {name} as a tensor, got {value!r}")
    return value


def refuse_mask(attention_kwargs: dict[str, Any], where: str) -> None:
    """Raise if the caller hands an attention mask to the processors.

    Raises:
        ValueError: it does.
    """
    given = attention_kwargs.get("attention_mask")
    if given is not None:
        raise ValueError(
            f"{where} holds an attention_mask ({type(given).__name__} of shape {tuple(getattr(given, 'shape', ()))}), but "
            "flexclear makes the mask of a transformed model. Leave it out, or flexclear.restore(model) first"
        )
