"""Windows on a ComfyUI model, through ComfyUI's own extension points.

``windowed`` sets two things on a copy of the model (``ModelPatcher.clone``). A wrapper around each call of the transformer
reads the call's tokens. The attention override then handles every attention in that call: it puts queries, keys and values into
the window's order, attends, and restores the order. To all other code of the model, tokens are where they were.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexclear.compile import why_not_compiled
from flexclear.compile.direct import Held
from flexclear.compile.kernels import Kernel
from flexclear.compile.tuned import choose_tuned
from flexclear.masks import Window, suited
from flexclear.masks.blocks import default_block_size
from flexclear.runtime.attention import Mask, choose_backend, windowed_attention
from flexclear.runtime.plan import Plan, get_plan

from .calls import Read, Tokens, bound, by_name, reader

NAME = "flexclear"
"""Key of our entries in ComfyUI's dictionaries."""

OVERRIDE = "optimized_attention_override"
TORCH_COMPILE = "torch.compile"
APPLY_MODEL, DIFFUSION_MODEL = "apply_model", "diffusion_model"
"""Kinds of wrappers: ``comfy.patcher_extension.WrappersMP``."""

HINTS = {"transformer_options", "_inside_attn_wrapper", "low_precision_attention"}
"""Arguments of ComfyUI's attention that do not change what it computes."""

COMPILED = (
    "TorchCompileModel does not go with windows: it leaves out the checks by which torch.compile would notice them, so code that "
    "was compiled without a window would be used with one, and the other way round. Remove that node; attention under windows is "
    "compiled anyway"
)

logger = logging.getLogger(NAME)


def windowed(model: Any, window: Window, video: bool, dense_steps: tuple[int, int] = (0, 0)) -> Any:
    """Copy a model and give the copy's self-attention a window, replacing any earlier window.

    Args:
        model: ComfyUI's ``ModelPatcher``, which is not changed.
        window: window over the image's tokens.
        video: whether the window is over frames.
        dense_steps: (first, last): number of the sampler's steps at either end that stay dense.

    Raises:
        TypeError: windows are not known for the model.
        ValueError: it is compiled, or has another attention override.
    """
    read = reader(model.get_model_object("diffusion_model"), video)
    if model.get_wrappers(APPLY_MODEL, TORCH_COMPILE):
        raise ValueError(COMPILED)
    before = model.model_options["transformer_options"].get(OVERRIDE)
    if before is not None and not isinstance(before, Windows):
        raise ValueError(
            f"another node has given this model its own attention ({_named(before)}), which does not know windows. Leave one of "
            "them out"
        )
    changed = model.clone()
    windows = Windows(read, window, dense_steps)
    changed.model_options["transformer_options"][OVERRIDE] = windows
    for kind, wrapper in ((APPLY_MODEL, windows.around_apply), (DIFFUSION_MODEL, windows.around_model)):
        changed.remove_wrappers_with_key(kind, NAME)
        changed.add_wrapper_with_key(kind, NAME, wrapper)
    return changed


class Windows:
    """What ComfyUI calls: its methods wrap the model, and the object itself replaces attention.

    Args:
        read: reads calls of the model's class.
        window, dense_steps: see ``windowed``.
    """

    def __init__(self, read: Read, window: Window, dense_steps: tuple[int, int]) -> None:
        self.read, self.window, self.dense_steps = read, window, dense_steps

    def around_apply(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wraps ``BaseModel.apply_model``, outside of what TorchCompileModel compiles.

        Raises:
            ValueError: the model is compiled.
        """
        given = by_name(bound(type(executor.class_obj).apply_model, executor.class_obj, args, kwargs))
        if given["transformer_options"].get("wrappers", {}).get(APPLY_MODEL, {}).get(TORCH_COMPILE):
            raise ValueError(COMPILED)
        return executor(*args, **kwargs)

    def around_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wraps the transformer: reads the call's tokens for the attention inside.

        Raises:
            ValueError: windows are not defined for this call, or another node has replaced them.
            RuntimeError: no attention reached the window.
        """
        model = executor.class_obj
        arguments = bound(type(model).forward, model, args, kwargs)
        options = arguments.arguments["transformer_options"]
        if options.get(OVERRIDE) is not self:
            raise ValueError(
                f"a node behind the window has given the model its own attention ({_named(options.get(OVERRIDE))}), which does "
                "not know windows. Leave one of them out"
            )
        if self._is_dense(options):
            return executor(*args, **kwargs)
        call = WindowedCall(self.read(model, by_name(arguments)), self.window)
        # A separate dictionary, so that nothing outside the transformer ever sees the call.
        arguments.arguments["transformer_options"] = {**options, NAME: call}
        out = executor(*arguments.args[1:], **arguments.kwargs)
        if call.attended == 0:
            raise RuntimeError(
                f"{type(model).__name__} has attended without asking ComfyUI's attention override, so the window had no effect: "
                "something has replaced or compiled its blocks"
            )
        return out

    def __call__(self, attention: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Replaces ComfyUI's ``attention``. Anything outside a windowed call (a ControlNet, a dense step) stays as it is."""
        call = (kwargs.get("transformer_options") or {}).get(NAME)
        if call is None:
            return attention(*args, **kwargs)
        return call.attend(attention, *args, **kwargs)

    def _is_dense(self, options: dict[str, Any]) -> bool:
        """Whether this is a dense step, judging by its noise level among the sampler's.

        Raises:
            ValueError: the sampler does not report its noise levels.
        """
        first, last = self.dense_steps
        if not first and not last:
            return False
        levels, now = options.get("sample_sigmas"), options.get("sigmas")
        if levels is None or now is None:
            raise ValueError(
                f"dense_first={first} and dense_last={last} need a sampler that says its noise levels (sample_sigmas)"
            )
        # An evaluation between two levels belongs to the step that leads to the lower one.
        passed = int((levels[:-1].double().cpu() > now.double().max().cpu() * (1 + 1e-6)).sum())
        steps = len(levels) - 1
        return passed < first or passed >= steps - last


class WindowedCall:
    """One call of a transformer.

    Attributes:
        attended: number of windowed attention calls.
    """

    def __init__(self, tokens: Tokens, window: Window) -> None:
        self.tokens, self.window, self.attended = tokens, window, 0
        self._plan: Plan | None = None
        self._mask: Mask = None
        self._held = Held()

    @torch.compiler.disable  # blocks compiled by other nodes break here: attention has its own compiled code
    def attend(
        self,
        attention: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        mask: Tensor | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **others: Any,
    ) -> Tensor:
        """Run self-attention under the window, and cross-attention unchanged.

        Args:
            attention: ComfyUI's function.
            query, key, value: ``[B, tokens, heads * head_dim]``, or with ``skip_reshape`` ``[B, heads, tokens, head_dim]``.
            heads: number of heads.
            mask, skip_reshape, skip_output_reshape, others: see ComfyUI's attention.

        Returns:
            ``[B, tokens, heads * head_dim]``, or with ``skip_output_reshape`` ``[B, heads, tokens, head_dim]``.

        Raises:
            ValueError: tokens, mask or options do not match the call.
        """
        count, keys, expected = query.shape[-2], key.shape[-2], self.tokens.layout.seq_len
        if count == expected and keys in self.tokens.beside:
            kwargs = {"mask": mask, "skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape, **others}
            return attention(query, key, value, heads, **kwargs)
        self._check(count, keys, mask, others)
        if not skip_reshape:
            query, key, value = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        if self._plan is None:
            self._prepare(query, key, value)
        assert self._plan is not None
        order = self._plan.whole_order
        if order is not None:
            query, key, value = (t.index_select(2, order[0]) for t in (query, key, value))
        out = windowed_attention(query, key, value, self._mask, held=self._held)
        if order is not None:
            out = out.index_select(2, order[1])
        self.attended += 1
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def _check(self, count: int, keys: int, mask: Tensor | None, others: dict[str, Any]) -> None:
        layout = self.tokens.layout
        if count != layout.seq_len or keys != layout.seq_len:
            grids = " + ".join(f"{height} x {width}" for height, width in layout.grids)
            frames = f"{layout.frames} frames of " if layout.frames > 1 else ""
            raise ValueError(
                f"attention from {count} to {keys} tokens, in a call with {frames}{grids} image tokens and {layout.text_len} of "
                f"text, {layout.seq_len} in all: another node adds tokens, and windows do not know where those belong. Leave one "
                "of them out"
            )
        if (mask is not None) != self.tokens.masked:
            done = "removed" if mask is None else "added"
            raise ValueError(
                f"another node has {done} the mask of attention, which a window replaces. Leave one of them out"
            )
        unknown = sorted(name for name, value in others.items() if name not in HINTS and value is not None)
        if unknown:
            raise ValueError(f"attention under a window has no {', '.join(unknown)}; another node asks for it")

    def _prepare(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Get the plan for these tokens on this device, which all layers share."""
        device, dtype, keep = value.device, value.dtype, self.tokens.keep
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        backend = choose_backend("auto", device, dtype, needs_grad)
        if backend == "flex":
            layout = suited(self.tokens.layout, self.window)
            kernel = choose_tuned(
                device,
                dtype,
                value.shape[-1],
                reach=self.window.reach,
                backward=needs_grad,
                seq_len=layout.seq_len,
                text_padded=keep is not None,
            )
        else:
            _say_why(why_not_compiled(device, needs_grad) or f"it does not compute in {dtype}")
            layout = self.tokens.layout.with_order("raster")
            kernel = Kernel(default_block_size(layout.seq_len, device=device))
        backward = needs_grad and backend == "flex"
        self._plan = get_plan(layout, self.window, backend, kernel, device, backward, keep is not None)
        self._mask = self._plan.mask if keep is None else self._plan.masked(keep.to(device))


def _named(override: Any) -> str:
    if override is None:
        return "none"
    name = getattr(override, "__qualname__", type(override).__qualname__)
    return f"{getattr(override, '__module__', type(override).__module__)}.{name}"


@functools.cache
def _say_why(reason: str) -> None:
    logger.warning("masked SDPA runs instead of compiled FlexAttention: %s. Same results, but no speed-up", reason)
