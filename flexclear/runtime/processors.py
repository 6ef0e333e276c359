"""Windowed attention processors: diffusers' own code, in which the name of the attention function stands for ours.

The code of a processor's ``__call__`` looks up ``dispatch_attention_fn``, or ``scaled_dot_product_attention`` in ``F``, among
its globals. ``windowed(stock)`` is a subclass that runs that same code with globals in which this one name is bound to what
attends under the call's plan. Projections, norms, rotary embedding and fused or adapter's parts stay diffusers' own, and so
do its modules: nothing of them is changed.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexclear.runtime.call_plan import CallPlan, Rotary, ordered
from flexclear.runtime.carrying import CARRIED, here, plan_here
from flexclear.runtime.modes import known_to_hooks, scores_skipped

ROTARY = ("image_rotary_emb", "freqs_cis", "rotary_emb")
"""What processors call the rotary embedding among their arguments."""


NO_PLAN = (
    "a transformed block was called without its window. Call the transformer or the pipeline, whose entry makes it; "
    "flexclear.restore(model) gives the plain block back. If this is gradient checkpointing: it must hand the block its own "
    "arguments again, so not with use_reentrant=True, nor under hooks on saved tensors such as save_on_cpu"
)


def is_ours(processor: Any) -> bool:
    """Whether ``processor`` is of a class of flexclear's own; a subclass from elsewhere may compute anything."""
    return isinstance(processor, WindowProcessor) and type(processor).__module__ == __name__


class WindowProcessor:
    """An attention processor that attends under the call's plan; ``windowed`` makes its classes.

    Attributes:
        slot: which part of the plan is this layer's. Layers with the same window share a slot, so that equal blocks share
            one compiled graph. None: diffusers made the processor anew, and the model must be transformed again.
        given: what the code gets for arguments of these names: None for a mask that the plan stands for; anything else where
            the call leaves the argument out.
        shared: whether another model calls the layer too, without a plan, for which it attends as it did before.
        in_parts: whether its code attends over one part of the sequence after the other, and only the last, the image's rows
            over all keys, is windowed. Its argument ``segments`` has those before, or is None.
        groups: how often the code repeats each head of keys and values, one after the other, before it asks for attention.
            Attention gets the first of each.
    """

    stock: ClassVar[type]
    """The class whose code it runs."""

    names: ClassVar[tuple[str, ...]]
    """Its arguments."""

    weight_name: ClassVar[str | None] = None
    """Name of the parameter that it has beside what that class has, or None."""

    slot: int | None = None
    given: Mapping[str, Any] = {}
    shared: bool = False
    in_parts: bool = False
    groups: int = 1

    _replaced: tuple[Any, ...] = ()

    def __init__(self) -> None:
        # What load_ip_adapter does to every processor that it does not know.
        if self.weight_name is not None:
            raise TypeError(
                f"this model's processors have trained weights of their own ({self.weight_name}), which a plugin is about to "
                "drop. flexclear.restore(model) first, or transform without down_factor or attention"
            )

    @property
    def replaced(self) -> Any | None:
        """The processor in whose place it is, for ``flexclear.restore``; None where diffusers made ours anew."""
        return self._replaced[0] if self._replaced else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the stock processor takes and returns.

        Raises:
            ValueError: no plan: the block was called without the model's entry, where windows are made.
        """
        raise NotImplementedError

    def attend(self, plan: CallPlan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Windowed attention, ``[B, N, heads, head_dim]`` in sequence order, as diffusers lays them out; key and value may
        have fewer heads than the query.

        Raises:
            ValueError: the processor was made by a plugin and belongs to no window.
        """
        if self.slot is None:
            raise ValueError(
                "a processor that a plugin has made anew has no window: flexclear.transform(model, ...) again"
            )
        if self.groups > 1:
            key, value = key[:, :, :: self.groups], value[:, :, :: self.groups]
        if scores_skipped():
            groups = query.shape[2] // value.shape[2]
            return (value if groups == 1 else value.repeat_interleave(groups, dim=2)).to(query.dtype)
        weight = self.pooling_weight(query.device)
        out = plan.attend(self.slot, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), weight)
        return out.transpose(1, 2).to(query.dtype)

    def pooling_weight(self, device: torch.device) -> Tensor | None:
        """Pooling weights of a layer with down-sampled keys, or weights of its formula, on ``device``; None: it has none."""
        if self.weight_name is None:
            return None
        # accelerate takes the weights of every module away and brings them back for its forward; a processor's never runs.
        hook: Any = getattr(self, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self)
        weight = getattr(self, self.weight_name).to(device)
        if hook is not None:
            hook.post_forward(self, None)
        return weight

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (self.stock, self.weight_name), vars(self).copy()

    # diffusers assigns these two on every processor (set_attention_backend, enable_parallelism). Taking the value and
    # ignoring it would break silently.
    @property
    def _attention_backend(self) -> None:
        return None

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        if backend is not None:
            raise ValueError(
                f"attention backend {backend!r} cannot be set on a transformed model: its attention is windowed. Choose "
                "backend='auto', 'flex' or 'sdpa' in flexclear.transform, or flexclear.restore(model) first"
            )

    @property
    def _parallel_config(self) -> None:
        return None

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        if config is not None:
            raise ValueError(
                "context parallelism cannot be enabled on a transformed model: its windows are made for whole images. "
                "flexclear.restore(model) first"
            )


class _Adapted:
    """Of a processor with parts of its own, such as an IP-Adapter's: the one replaced has them, and what is set on ours
    (its scale) is set there."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            replaced = vars(self).get("_replaced")
            if not replaced:
                raise
            return getattr(replaced[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        replaced = vars(self).get("_replaced")
        if replaced and name in vars(replaced[0]):
            setattr(replaced[0], name, value)
        else:
            super().__setattr__(name, value)


def window_processor(
    original: Any,
    slot: int,
    code: type | None = None,
    given: Mapping[str, Any] | None = None,
    shared: bool = False,
    weight: tuple[str, Tensor] | None = None,
) -> WindowProcessor:
    """A processor for the place of ``original``, which it remembers; see ``WindowProcessor``.

    Args:
        original: diffusers' own processor.
        slot, given, shared: see ``WindowProcessor``.
        code: the class whose code runs, where that is not ``original``'s.
        weight: name and initial value of a parameter of its own, or None.

    Raises:
        TypeError: its code calls no attention function that could be replaced.
    """
    processor = _blank(type(original) if code is None else code, None if weight is None else weight[0])
    if isinstance(original, nn.Module):
        # The same dictionaries, so that its parameters have the names that they had, and move with the model.
        for name in ("_parameters", "_buffers", "_modules"):
            vars(processor)[name] = vars(original)[name]
    if weight is not None:
        setattr(processor, weight[0], nn.Parameter(weight[1]))
    processor.slot, processor.shared = slot, shared
    processor.given = {name: value for name, value in (given or {}).items() if name in processor.names}
    # In a tuple: its parts are registered once.
    processor._replaced = (original,)
    return processor


def _blank(stock: type, weight_name: str | None) -> WindowProcessor:
    kind = windowed(stock, weight_name)
    processor = kind.__new__(kind)
    if isinstance(processor, nn.Module):
        nn.Module.__init__(processor)
    return processor


def windowed(stock: type, weight_name: str | None = None) -> type[WindowProcessor]:
    """The class of windowed processors that run ``stock``'s code.

    Args:
        stock: class of a processor of diffusers.
        weight_name: of a parameter that its processors have besides.

    Raises:
        TypeError: its code calls no attention function that could be replaced.
    """
    return _windowed(stock, weight_name)


@functools.cache
def _windowed(stock: type, weight_name: str | None) -> type[WindowProcessor]:
    call: Any = stock.__call__
    own = _rebound(stock, call)
    names = tuple(call.__code__.co_varnames[1 : call.__code__.co_argcount])
    rotary = next((name for name in ROTARY if name in names), None)

    @functools.wraps(call)  # diffusers asks for its signature
    def __call__(self: WindowProcessor, *args: Any, **kwargs: Any) -> Any:
        plan = plan_here()
        if plan is None:
            if self.shared:
                return self.replaced(*args, **kwargs)  # type: ignore[misc]
            raise ValueError(NO_PLAN)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given.pop(CARRIED, None)
        for name, value in self.given.items():
            if value is None or given.get(name) is None:
                given[name] = value
        if plan.rotary is not None and rotary is not None:
            given[rotary] = None
        here.attending = self
        here.before = len(given.get("segments") or ()) if self.in_parts else 0
        return own(self, **given)

    # Asked for in every call: looked up, not found anew.
    __call__.__signature__ = _with_plan(inspect.signature(call))  # type: ignore[attr-defined]
    module = issubclass(stock, nn.Module)
    bases = [
        WindowProcessor,
        *([_Adapted] if module else []),
        *([nn.Module] if weight_name and not module else []),
        stock,
    ]
    body = {
        "__module__": __name__,
        "__doc__": f"``{stock.__name__}`` under the call's window.",
        "stock": stock,
        "names": names,
        "weight_name": weight_name,
        "__call__": __call__,
    }
    kind: Any = type(f"Windowed{stock.__name__}", tuple(bases), body)
    known_to_hooks(kind, stock)
    return kind


def _with_plan(signature: inspect.Signature) -> inspect.Signature:
    """The same with the plan among the keywords, so that attention modules, which drop arguments that their processor does not
    know, and warn of them, know it."""
    own = inspect.Parameter(CARRIED, inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    rest = parameters[-1:] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    found: Any = signature.replace(parameters=[*parameters[: len(parameters) - len(rest)], own, *rest])
    # Dynamo reads no proxy of a dictionary once the model has changed any, as diffusers' do with the scale of a LoRA.
    found._parameters = dict(found.parameters)
    return found


def why_not_windowed(stock: type) -> str | None:
    """Why a class of processors cannot run under a window, or None."""
    code = getattr(vars(stock).get("__call__"), "__code__", None)
    if code is None or not {"dispatch_attention_fn", "scaled_dot_product_attention"}.intersection(code.co_names):
        return (
            f"{stock.__name__} computes attention by neither dispatch_attention_fn nor scaled_dot_product_attention in its "
            "__call__, where flexclear would put its own"
        )
    return None


def _rebound(stock: type, call: Any) -> Callable[..., Any]:
    """``call`` with globals in which attention is ours.

    Raises:
        TypeError: it computes none there.
    """
    reason = why_not_windowed(stock)
    if reason is not None:
        raise TypeError(reason)
    space = dict(call.__globals__)
    # Dynamo would look names up in the module of that name.
    del space["__name__"]
    for name in call.__code__.co_names:
        if name == "dispatch_attention_fn":
            space[name] = _dispatching(space[name])
        elif space.get(name) is F:
            space[name] = _windowed_functional()
    own = types.FunctionType(call.__code__, space, call.__name__, call.__defaults__, call.__closure__)
    own.__kwdefaults__ = call.__kwdefaults__
    return own


def _attending() -> tuple[WindowProcessor | None, CallPlan | None]:
    """The processor whose attention over the sequence is asked for, and its plan; None of an attention after that."""
    processor = getattr(here, "attending", None)
    here.attending = None
    return processor, plan_here()


def _dispatching(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What stands for diffusers' ``dispatch_attention_fn``: ours in a processor's first attention, which is the one over the
    sequence; theirs after it (an IP-Adapter's)."""

    def dispatch_attention_fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        before = getattr(here, "before", 0)
        if before:
            here.before = before - 1
            return theirs(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, *args, **kwargs)
        processor, plan = _attending()
        if processor is None or plan is None:
            return theirs(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, *args, **kwargs)
        if processor.in_parts:
            # Rows of the text, which a window does not have on its own; what they would see is thrown away.
            rows = key.shape[1] - query.shape[1]
            query = F.pad(query, (0, 0, 0, 0, rows, 0))
            return _attend(processor, plan, query, key, value, None, dropout_p, is_causal, scale)[:, rows:]
        return _attend(processor, plan, query, key, value, attn_mask, dropout_p, is_causal, scale)

    return dispatch_attention_fn


@functools.cache
def _windowed_functional() -> types.ModuleType:
    """``torch.nn.functional`` with another ``scaled_dot_product_attention``."""
    ours = types.ModuleType(F.__name__)
    vars(ours).update(vars(F))

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        processor, plan = _attending()
        if processor is None or plan is None:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return _attend(processor, plan, query, key, value, attn_mask, dropout_p, is_causal, scale).transpose(1, 2)

    ours.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[attr-defined]
    return ours


def _attend(
    processor: WindowProcessor,
    plan: CallPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Attention of a processor, ``[B, N, heads, head_dim]``, in place of what its code asks for.

    Raises:
        ValueError: that is masked by something that the plan does not stand for, is causal, or drops out.
    """
    if mask is not None or causal or dropout:
        what = "a mask" if mask is not None else "causal attention" if causal else f"dropout {dropout}"
        raise ValueError(
            f"{type(processor).stock.__name__} asks for attention under {what}, which this model's window does not stand for. "
            "Call the model without it, or flexclear.restore(model) first"
        )
    if scale is not None and scale != query.shape[-1] ** -0.5:
        query = query * (scale * query.shape[-1] ** 0.5)
    if plan.rotary is not None:
        query, key = rotated(query, plan.rotary), rotated(key, plan.rotary)
    order = None if processor.slot is None else plan.slots[processor.slot].order
    if order is None:
        return processor.attend(plan, query, key, value)
    there, back = order
    return ordered(processor.attend(plan, *(ordered(tokens, there) for tokens in (query, key, value))), back)


def rotated(states: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys ``[B, N, heads, head_dim]`` with neighbouring channels turned as pairs."""
    # Attention over the image alone, which is the sequence's beginning where there is such attention (Z-Image).
    cos, sin = (table[:, : states.shape[1]] for table in rotary)
    # Real numbers where diffusers has complex ones, which Inductor does not fuse; a sum last, because Inductor's
    # FlexAttention on CPU (torch 2.13) does not take a concatenation for its query.
    first, second = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-second, first], dim=-1).flatten(-2)
    return (states.float() * cos + across * sin).to(states.dtype)


def cos_and_sin(frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each twice in a row, ``[..., head_dim]``, of diffusers' complex numbers, ``[..., head_dim / 2]``."""
    return frequencies.real.repeat_interleave(2, dim=-1), frequencies.imag.repeat_interleave(2, dim=-1)
