"""Windowed attention processors: diffusers' own code, in which the name of the attention function refers to ours.

The code of a processor's ``__call__`` looks up ``dispatch_attention_fn``, or ``scaled_dot_product_attention`` in ``F``, among
its globals. ``windowed(stock)`` is a subclass that runs the same code with this name as an additional argument: each call
passes a function that attends under the call's plan. Projections, norms, rotary embedding, fused projections and adapters are
diffusers' own. diffusers' modules are not changed, and nothing about a call is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexclear.compile.calls import CARRIED, carried_by
from flexclear.runtime.call_plan import CallPlan, ordered
from flexclear.runtime.carrying import plan_here
from flexclear.runtime.modes import known_to_hooks, scores_skipped
from flexclear.runtime.rotary import rotated
from flexclear.runtime.stock_code import as_called, with_attention_given

ROTARY = ("image_rotary_emb", "freqs_cis", "rotary_emb")
"""Names of the rotary embedding among the arguments of processors."""


NO_PLAN = (
    "a transformed block was called without its window. Call the transformer or the pipeline, whose entry makes it; "
    "flexclear.restore(model) brings the plain block back. If this is gradient checkpointing: it must pass the block the same "
    "arguments again, so use neither use_reentrant=True nor hooks on saved tensors such as save_on_cpu"
)


def is_ours(processor: Any) -> bool:
    """Whether the class of ``processor`` is flexclear's own. A subclass from elsewhere may compute anything."""
    return isinstance(processor, WindowProcessor) and type(processor).__module__ == __name__


class WindowProcessor:
    """An attention processor that attends under the call's plan; ``windowed`` makes its classes.

    Attributes:
        slot: number of this layer's part of the plan. Layers with the same window share a slot, so that identical blocks share
            one compiled graph. None: diffusers has created a new instance, and the model must be transformed again.
        given: values that the code gets for arguments of these names: None for a mask that the plan replaces; any other value
            applies if the call leaves the argument out.
        shared: whether another model also calls the layer, without a plan; it then attends as it did before.
        in_parts: whether its code attends over one part of the sequence after the other, and only the last part, the image's
            rows over all keys, is windowed.
        before: how many parts come before that one; None: as many as the argument ``segments`` has, which may be None.
        groups: how often the code repeats each key and value head consecutively before it calls attention. Attention gets the
            first of each group.
    """

    stock: ClassVar[type]
    """The class whose code it runs."""

    names: ClassVar[tuple[str, ...]]
    """Names of its arguments."""

    weight_name: ClassVar[str | None] = None
    """Name of the parameter that it has in addition to those of that class, or None."""

    unbuilt: ClassVar[tuple[str, ...]] = ()
    """Names whose assignments are left out of its code; see ``with_attention_given``."""

    slot: int | None = None
    given: Mapping[str, Any] = {}
    shared: bool = False
    in_parts: bool = False
    before: int | None = None
    groups: int = 1

    _replaced: tuple[Any, ...] = ()

    def __init__(self) -> None:
        # load_ip_adapter calls this for every processor that it does not know.
        if self.weight_name is not None:
            raise TypeError(
                f"this model's processors have trained weights of their own ({self.weight_name}), which a plugin is about to "
                "drop. Call flexclear.restore(model) first, or transform without down_factor or attention"
            )

    @property
    def replaced(self) -> Any | None:
        """The processor that it replaces, for ``flexclear.restore``; None if diffusers has created this instance."""
        return self._replaced[0] if self._replaced else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns the same as the stock processor.

        Raises:
            ValueError: there is no plan: the block was called without the model's entry, where windows are made.
        """
        raise NotImplementedError

    def attend(self, plan: CallPlan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Windowed attention, ``[B, N, heads, head_dim]`` in sequence order, as diffusers lays them out; key and value may
        have fewer heads than the query.

        Raises:
            ValueError: the processor was created by a plugin and has no window.
        """
        if self.slot is None:
            raise ValueError(
                "a processor that a plugin has replaced has no window: call flexclear.transform(model, ...) again"
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
        """Pooling weights of a layer with down-sampled keys, or weights of its formula, on ``device``; None if it has none."""
        if self.weight_name is None:
            return None
        # accelerate removes the weights of every module and restores them for its forward, but a processor's forward never runs.
        hook: Any = getattr(self, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self)
        weight = getattr(self, self.weight_name).to(device)
        if hook is not None:
            hook.post_forward(self, None)
        return weight

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (self.stock, self.weight_name, self.unbuilt), vars(self).copy()

    # diffusers assigns these two on every processor (set_attention_backend, enable_parallelism). Silently ignoring the value
    # would be wrong.
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
                "Call flexclear.restore(model) first"
            )


class _Adapted:
    """For processors with state, such as an IP-Adapter's: the replaced processor holds the state, and attributes set on ours
    (its scale) are set there."""

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
    unbuilt: tuple[str, ...] = (),
) -> WindowProcessor:
    """A processor that replaces ``original`` and remembers it; see ``WindowProcessor``.

    Args:
        original: diffusers' own processor.
        slot, given, shared: see ``WindowProcessor``.
        code: the class whose code runs, if it is not ``original``'s.
        weight: name and initial value of an additional parameter, or None.
        unbuilt: see ``WindowProcessor``.

    Raises:
        TypeError: its code calls no attention function that could be replaced.
    """
    processor = _blank(type(original) if code is None else code, None if weight is None else weight[0], unbuilt)
    if isinstance(original, nn.Module):
        # The same dictionaries, so that its parameters keep their names and move with the model.
        for name in ("_parameters", "_buffers", "_modules"):
            vars(processor)[name] = vars(original)[name]
    if weight is not None:
        setattr(processor, weight[0], nn.Parameter(weight[1]))
    processor.slot, processor.shared = slot, shared
    processor.given = {name: value for name, value in (given or {}).items() if name in processor.names}
    # In a tuple, so that its parameters are not registered a second time.
    processor._replaced = (original,)
    return processor


def _blank(stock: type, weight_name: str | None, unbuilt: tuple[str, ...] = ()) -> WindowProcessor:
    kind = windowed(stock, weight_name, unbuilt)
    processor = kind.__new__(kind)
    if isinstance(processor, nn.Module):
        nn.Module.__init__(processor)
    return processor


def windowed(stock: type, weight_name: str | None = None, unbuilt: tuple[str, ...] = ()) -> type[WindowProcessor]:
    """The class of windowed processors that run ``stock``'s code.

    Args:
        stock: class of a diffusers processor.
        weight_name: name of an additional parameter of its processors, or None.
        unbuilt: see ``WindowProcessor``.

    Raises:
        TypeError: its code calls no attention function that could be replaced.
    """
    return _windowed(stock, weight_name, unbuilt)


@functools.cache
def _windowed(stock: type, weight_name: str | None, unbuilt: tuple[str, ...]) -> type[WindowProcessor]:
    call: Any = stock.__call__
    own, theirs = with_attention_given(stock, unbuilt)
    makers = {
        name: _Functional if value is F else functools.partial(_dispatching, value) for name, value in theirs.items()
    }
    names = tuple(call.__code__.co_varnames[1 : call.__code__.co_argcount])
    rotary = next((name for name in ROTARY if name in names), None)

    def run(self: WindowProcessor, given: dict[str, Any], rest: dict[str, Any], carried: CallPlan | None) -> Any:
        plan = carried or carried_by(given.values()) or plan_here()
        if plan is None:
            if self.shared:
                return self.replaced(**given, **rest)  # type: ignore[misc]
            raise ValueError(NO_PLAN)
        for name, value in self.given.items():
            if value is None or given[name] is None:
                given[name] = value
        if plan.rotary is not None and rotary is not None:
            given[rotary] = None
        before = self.before
        if before is None:
            before = len(given["segments"] or ()) if self.in_parts else 0
        attention = _Attention(self, plan, before, _length(given) if isinstance(self, _Adapted) else None)
        return own(self, **given, **rest, **{name: make(attention) for name, make in makers.items()})

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
        "unbuilt": unbuilt,
        "__call__": as_called(call, run, CARRIED),
    }
    kind: Any = type(f"Windowed{stock.__name__}", tuple(bases), body)
    known_to_hooks(kind, stock)
    return kind


class _Attention:
    """Attention of one call of a processor.

    Attributes:
        processor, plan: the processor, and the plan of the call.
        before: for a processor that attends in parts, how many parts still come before the windowed one.
        length: for a processor that also attends to an adapter's keys, the length of the sequence; else None.
    """

    def __init__(self, processor: WindowProcessor, plan: CallPlan, before: int, length: int | None) -> None:
        self.processor, self.plan, self.before, self.length = processor, plan, before, length

    def is_ours(self, query: Tensor, key: Tensor) -> bool:
        """Whether this attention is over the sequence. An IP-Adapter's attention, of image queries over its own keys, is not.

        Args:
            query, key: ``[B, N, heads, head_dim]``.
        """
        if self.length is not None:
            return query.shape[1] == self.length
        if not self.processor.in_parts:
            return True
        self.before -= 1
        return self.before < 0


def _length(given: Mapping[str, Any]) -> int:
    """Number of image and text tokens among the arguments of a processor."""
    text = given.get("encoder_hidden_states")
    return given["hidden_states"].shape[1] + (0 if text is None else text.shape[1])


def _dispatching(theirs: Callable[..., Tensor], attention: _Attention) -> Callable[..., Tensor]:
    """Stand-in for diffusers' ``dispatch_attention_fn``."""

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
        if not attention.is_ours(query, key):
            return theirs(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, *args, **kwargs)
        processor, plan = attention.processor, attention.plan
        if processor.in_parts:
            # A window needs rows for the text as well; the result of these padded rows is discarded.
            rows = key.shape[1] - query.shape[1]
            query = F.pad(query, (0, 0, 0, 0, rows, 0))
            return _attend(processor, plan, query, key, value, None, dropout_p, is_causal, scale)[:, rows:]
        return _attend(processor, plan, query, key, value, attn_mask, dropout_p, is_causal, scale)

    return dispatch_attention_fn


class _Functional:
    """Stand-in for ``torch.nn.functional`` with another ``scaled_dot_product_attention``; all else is the original."""

    def __init__(self, attention: _Attention) -> None:
        self.attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention under the window, ``[B, heads, N, head_dim]``."""
        processor, plan = self.attention.processor, self.attention.plan
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return _attend(processor, plan, query, key, value, attn_mask, dropout_p, is_causal, scale).transpose(1, 2)


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
    """Windowed attention of a processor, ``[B, N, heads, head_dim]``, in place of the attention that its code asks for.

    Raises:
        ValueError: the code asks for a mask that the plan does not replace, for causal attention or dropout, or for keys other
            than the sequence's.
    """
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            f"{type(processor).stock.__name__} asks for attention of {query.shape[1]} queries over {key.shape[1]} keys, for "
            "which this model's window is not made. Call the model without a cache, or call flexclear.restore(model) first"
        )
    if mask is not None or causal or dropout:
        what = "a mask" if mask is not None else "causal attention" if causal else f"dropout {dropout}"
        raise ValueError(
            f"{type(processor).stock.__name__} asks for attention under {what}, which this model's window does not cover. "
            "Call the model without it, or call flexclear.restore(model) first"
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
