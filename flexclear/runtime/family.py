"""What ``transform`` and the hooks ask of a model family; ``flexclear.families`` has those that there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import nn

from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.facts import Call, Layer
from flexclear.runtime.mechanism import Formula


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
        """Further ``inner_hooks`` of a model that runs on several ranks; ``current()`` is the call's ``Band``."""
        return []

    def inner_hooks(self, model: nn.Module) -> list[tuple[nn.Module, Any]]:
        """``flexclear.runtime.hooks.Hook``s, with keyword arguments, on modules inside the model; none by default."""
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
