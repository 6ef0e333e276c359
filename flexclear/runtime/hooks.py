"""The two hooks of a transformed model: tokens into tile order at its entry, back into raster order at its exit.

Nothing about a call is kept on the model. ``flexclear.runtime.carrying`` explains how its plan reaches the attention layers.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flexclear.compile import why_not_compiled
from flexclear.compile.calls import Given
from flexclear.compile.derivatives import has_tangent, refuse_over_compiled, tensors_of, transforms_in_force
from flexclear.masks import Layout, Window, suited
from flexclear.runtime.attention import Mask, choose_backend
from flexclear.runtime.call_plan import LOCALLY, ByFormula, CallPlan, InBand, Means, SlotPlan
from flexclear.runtime.carrying import Hook, enter, leave
from flexclear.runtime.facts import JOINT, Call, Settings
from flexclear.runtime.family import Family
from flexclear.runtime.grid import GridReader
from flexclear.runtime.mechanism import Formula
from flexclear.runtime.memory import is_out_of_memory, note, what_takes_less
from flexclear.runtime.modes import NO_EXPORT, refuse_export, refuse_raster_readers
from flexclear.runtime.partition import Partition
from flexclear.runtime.plan import Plan, get_plan
from flexclear.runtime.processors import WindowProcessor
from flexclear.runtime.switches import Switches, in_force, proportional_gain


def _tensors(*trees: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    yield from (leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor))


def _needs_grad(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether this call's attention is differentiated: for the model's weights, or for any tensor passed in.

    In a frozen model, ControlNet residuals, text, or images of an IP-Adapter may need gradients.
    """
    return torch.is_grad_enabled() and (
        any(given.requires_grad for given in _tensors(dict(kwargs)))
        or any(parameter.requires_grad for parameter in model.parameters())
    )


def _transforms(model: nn.Module, kwargs: Mapping[str, Any]) -> str | None:
    """Names of other transforms that differentiate the call or map over it, or None.

    Raises:
        RuntimeError: they do not reach through the model's compiled modules.
    """
    found = transforms_in_force(itertools.chain(_tensors(dict(kwargs)), tensors_of(model)))
    if found is not None:
        refuse_over_compiled(model, found)
    return found


def check_formula(formula: Formula | None, switches: Switches) -> None:
    """Raise if a formula would run under a switch that is only defined for softmax over a mask.

    Raises:
        ValueError: it would.
    """
    if formula is not None and switches.proportional_attention:
        raise ValueError(
            f"proportional_attention scales the scores of softmax attention over windows; attention={formula.kind!r} has "
            "its own formula. Leave it out"
        )


@functools.cache
def _arguments(forward: Any) -> list[str]:
    """Names of the arguments of a model's forward."""
    return list(inspect.signature(forward).parameters)[1:]


def _submodule(model: nn.Module, path: list[str]) -> Any:
    """``model.get_submodule``, but fast enough for every layer in every call."""
    module: Any = model
    for name in path:
        module = module._modules.get(name)
        if module is None:  # Inside a wrapper that forwards attributes.
            return model.get_submodule(".".join(path))
    return module


class EntryHook(Hook):
    """Forward pre-hook: reads the grids from the call, gets the plan, permutes the arguments that have a token axis."""

    def __init__(self, family: Family, settings: Settings, parallel: Partition | None = None) -> None:
        self.family = family
        self.settings = settings
        self._reader = GridReader()
        slots = [window for _, window in settings.slots]
        self._places = [
            (name, name.split("."), [slot for slot, each in enumerate(slots) if each == window])
            for name, window in settings.windows.items()
        ]
        self.parallel = parallel
        """The run over several ranks in which the model takes part (``flexclear.parallel``), or None."""

    @torch.compiler.disable(reason=NO_EXPORT)
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict]:
        refuse_export()
        names = _arguments(type(model).forward)
        if len(args) > len(names):
            raise TypeError(f"{type(model).__name__} takes {len(names)} arguments, got {len(args)} positional ones")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        layers = self._layers(model)
        call = self.family.read(model, kwargs, self._reader)
        kwargs = self._reader.guarded(kwargs, self.family.tokens)
        order = "raster" if self.family.raster else call.order or self.settings.order
        shared = self.parallel is not None
        refuse_raster_readers(model, layers, order, shared)
        switches = in_force(self.settings.switches)
        if switches.ntk_floor and not self.family.clips_ntk:
            raise ValueError(
                f"ntk_floor={switches.ntk_floor} is defined for FluxTransformer2DModel, got {type(model).__name__}"
            )
        if self.parallel is not None:
            self.parallel.begin(model, kwargs, call, self.family, self.settings)
        plan = self.plan(model, call, switches, _needs_grad(model, kwargs), _transforms(model, kwargs))
        entered, plan = self.family.enter(model, kwargs, plan, self.settings.exact_position_ids, switches)
        if model._compiled_call_impl is not None:
            Given(model, (), entered).mark(plan)
        return (), enter(plan, entered, self.family.carrier_argument)

    def plan(
        self, model: nn.Module, call: Call, switches: Switches, needs_grad: bool, transforms: str | None = None
    ) -> CallPlan:
        """The plan of one call.

        Args:
            model: the transformed model.
            call: facts about the call.
            switches: the switches in force.
            needs_grad: whether a backward pass will follow.
            transforms: see ``choose_backend``.
        """
        settings = self.settings
        device, dtype = call.tokens.device, call.tokens.dtype
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(device.type)
        differentiated = needs_grad or transforms is not None
        if differentiated and self.parallel is not None:
            asked = "needs gradients" if transforms is None else f"runs under {transforms}"
            raise ValueError(
                f"one image on several ranks is for inference, and this call {asked}: call the model under "
                "torch.no_grad() alone, as pipelines do, or flexclear.parallel.disable(model)"
            )
        backend = choose_backend(settings.backend, device, dtype, needs_grad, transforms)
        if backend == "sdpa" and settings.backend == "auto" and not differentiated and settings.formula is None:
            self._say_why(device)
        dense = settings.steps.is_dense(switches.dense_steps)
        formula = None if dense else settings.formula
        check_formula(settings.formula, switches)

        order = call.order or settings.order
        if self.family.raster and (dense or not any(settings.windows.values())):
            order = "raster"  # If all attention is dense, the order makes no difference.

        def plan_of(scope: str, window: Window | None) -> Plan:
            text_len = call.text_lens[scope]
            (height, width), *references = call.grids_of(scope)
            layout = Layout(
                height, width, text_len, self.family.text_first, order, tuple(references), frames=call.frames
            )
            if order == "tiled" and call.frames > 1:
                # If tokens are permuted at the model's entry, one order must serve all windows.
                alone = self.family.raster and self.parallel is None
                suits = window if alone else next(filter(None, (each for _, each in settings.slots)), None)
                layout = layout.with_order("raster") if suits is None else suited(layout, suits)
            backward = needs_grad and backend == "flex"
            text_padded = scope in call.keep
            kernel = settings.kernel(backend, device, dtype, layout.seq_len, backward, text_padded)
            if self.parallel is not None:
                return self.parallel.part(layout, window, backend, kernel, device, text_padded)
            return get_plan(layout, window, backend, kernel, device, backward, text_padded)

        def mask_of(scope: str, plan: Plan) -> Mask:
            keep = call.keep.get(scope)
            return plan.mask if keep is None else plan.masked(keep)

        plans = [plan_of(scope, None if dense else window) for scope, window in settings.slots]
        base = next((p for p, (scope, _) in zip(plans, settings.slots, strict=True) if scope == JOINT), plans[0])
        gains: list[Tensor | None] = [None] * len(plans)
        if switches.proportional_attention:
            gains = [
                proportional_gain(p.layout.seq_len, p.pooling is not None, device, switches.training_tokens)
                for p in plans
            ]
        masks = tuple(mask_of(scope, plan) for plan, (scope, _) in zip(plans, settings.slots, strict=True))
        means: Means = LOCALLY
        if self.parallel is not None:
            means = InBand(self.parallel.band(plans, masks, settings.slots, call.keep))
        elif formula is not None:
            if not all(bool(keep.all()) for keep in call.keep.values()):
                raise ValueError(
                    f"attention={formula.kind!r} is over all tokens, and the attention_mask of this call hides some of the text. "
                    "Leave the mask out, or use windows"
                )
            means = ByFormula(formula.bind(base))

        def order_of(scope: str, plan: Plan) -> tuple[Tensor, Tensor] | None:
            if call.text_adjoins and scope in call.keep:
                return plan.adjoining_order(call.keep[scope])
            if call.start is not None:
                return plan.packed_order(call.start)
            return plan.whole_order if self.family.raster else None

        orders = [order_of(scope, plan) for plan, (scope, _) in zip(plans, settings.slots, strict=True)]
        slots = tuple(
            SlotPlan(mask, plan.pooling, gain, order=order)
            for plan, mask, gain, order in zip(plans, masks, gains, orders, strict=True)
        )
        return CallPlan(base, slots, means, call.tokens.dtype)

    def _layers(self, model: nn.Module) -> list[nn.Module]:
        """The model's attention layers that have a window.

        Raises:
            RuntimeError: the processor of one was replaced since: it would attend densely, in tile order. The message names
                the layer and says what to do.
        """
        layers = []
        for name, path, slots in self._places:
            layer = _submodule(model, path)
            processor = layer.processor
            # A plugin may put back the processor of an earlier transform, whose slot may belong to another window now.
            if not isinstance(processor, WindowProcessor) or processor.slot not in slots:
                raise RuntimeError(
                    f"{name} of this transformed {type(model).__name__} was given a {type(processor).__name__} after "
                    "flexclear.transform (by load_ip_adapter, fuse_qkv_projections, set_attn_processor or the like). "
                    f"{self._advice(model)}"
                )
            layers.append(layer)
        return layers

    def _advice(self, model: nn.Module) -> str:
        """Advice for processors that are no longer ours."""
        try:
            list(self.family.layers(model))
        except (TypeError, ValueError) as error:
            return f"Put diffusers' own back, or flexclear.restore(model), which keeps what is there: {error}"
        return "Call flexclear.transform(model, ...) again: it takes over what is there now"

    @staticmethod
    def _say_why(device: torch.device) -> None:
        reason = why_not_compiled(device)
        if reason is not None:
            warnings.warn(
                f"flexclear: compiled FlexAttention cannot run here: {reason}. Masked SDPA runs instead: same results, "
                "but no speed-up, and a dense mask",
                stacklevel=4,
            )


class ExitHook(Hook):
    """Forward hook: puts the model's output back in raster order. It is also called after an exception, to add advice to it."""

    def __init__(self, family: Family) -> None:
        self.family = family

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        plan = leave()
        if output is None:
            self._explain(model, kwargs, plan, sys.exc_info()[1])
            return None
        assert plan is not None
        output = self.family.leave(model, output, plan)
        self._check_tangents(model, kwargs, output)
        return output

    @staticmethod
    def _check_tangents(model: nn.Module, kwargs: dict[str, Any], output: Any) -> None:
        """Raise if forward-mode tangents were lost inside the model, as they are under ``torch.compile(model)``.

        Raises:
            RuntimeError: they were.
        """
        if has_tangent(_tensors(kwargs)) and not has_tangent(_tensors(output)):
            raise RuntimeError(
                f"the tangents passed to this {type(model).__name__} have no effect on its output: compiled code does "
                "not propagate them. Differentiate the uncompiled model"
            )

    def _explain(
        self, model: nn.Module, kwargs: dict[str, Any], plan: CallPlan | None, error: BaseException | None
    ) -> None:
        """Add advice on memory to the model's out-of-memory error if there was a plan already."""
        if error is None or plan is None or not is_out_of_memory(error):
            return
        batch = next((len(value) for value in kwargs.values() if isinstance(value, Tensor) and value.ndim > 1), 1)
        note(error, what_takes_less(model, plan, batch))


def entry_hook_of(model: nn.Module) -> EntryHook | None:
    """The entry hook of a transformed model, or None for any other model."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, EntryHook)), None)
