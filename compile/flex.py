"""Compiled FlexAttention that never silently becomes the unfused one.

``flex_attention`` outside a compiled region materializes all N x N scores: at 4096 px it is a hundred times slower and
needs terabytes. Dynamo silently falls back to it when compilation is disabled, an error is suppressed or the recompile limit
is reached. Here each of these raises an error that says what to do.
"""

from __future__ import annotations

import functools
import os
import platform
import types
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flexclear.compile.derivatives import transforms_in_force
from flexclear.compile.direct import Held, plain
from flexclear.compile.kernels import HALF, Options, as_dict, choose, completed
from flexclear.masks.carried import KERNEL_OPTIONS, LENGTHS
from flexclear.masks.cpu import PACKED_TYPES


class UnfusedAttentionError(RuntimeError):
    """FlexAttention would have run unfused, which materializes the whole score matrix."""


_ADVICE = (
    "Unfused, it would materialize the whole {n} x {n} score matrix. Enable torch.compile (unset TORCHDYNAMO_DISABLE, "
    "TORCH_COMPILE_DISABLE and torch._dynamo.config.suppress_errors, leave torch.compiler.set_stance at 'default'), or "
    "choose backend='sdpa' in flexclear.transform for small images."
)


def _not_compiled(query: Tensor) -> UnfusedAttentionError:
    return UnfusedAttentionError(
        "flexclear: FlexAttention was about to run without torch.compile. " + _ADVICE.format(n=query.shape[2])
    )


@functools.lru_cache(maxsize=256)
def _compiled(facts: Hashable, options: Options, grouped: bool) -> Callable[..., Tensor]:
    """Attention compiled for calls that share ``facts`` and kernel options; ``grouped``: there are fewer key heads than query
    heads.

    Dynamo counts recompiles per code object, and each of these facts costs one. With one code object per set of facts, the
    models, types and devices in a process never add up to the limit, however many there are.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
        # When traced, this condition is False and leaves no code behind. If this line ever runs, nothing is compiled.
        if not torch.compiler.is_compiling():
            raise _not_compiled(query)
        return flex_attention(
            query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=as_dict(options)
        )

    name = f"attend_{abs(hash((facts, options))):x}"
    copy = types.FunctionType(attend.__code__.replace(), attend.__globals__, name, None, attend.__closure__)
    return torch.compile(copy, fullgraph=True, dynamic=True)


def _codes(function: object) -> tuple[Hashable, ...]:
    """The code objects of a ``mask_mod`` and of the functions that it captures: the same for a whole family of windows."""
    code: Hashable = getattr(function, "__code__", None)
    if code is None:
        return (type(function).__qualname__,)
    cells = getattr(function, "__closure__", None) or ()
    inner = (cell.cell_contents for cell in cells)
    return (code, *(_codes(content) for content in inner if isinstance(content, types.FunctionType)))


def compiled_flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scale: float | None = None,
    held: Held | None = None,
) -> Tensor:
    """FlexAttention, always fused: traced into the caller's graph while compiling, compiled here otherwise.

    One graph serves every sequence length, every window of one family and every batch size above 1, for the same types,
    heads, block size and kernel options. The mask carries its kernel options; otherwise ``flexclear.compile.kernels`` chooses
    them. A custom ``mask_mod`` should capture its numbers as tensors: FlexAttention compiles Python numbers in, so every new
    value would need a new graph.

    On a CPU without AMX, bfloat16 and float16 are computed in float32, and the result is rounded once.

    Args:
        query, key, value: ``[B, heads, N, head_dim]``, of the same dtype and on the same device; key and value may have fewer
            heads, each of which serves a run of consecutive query heads.
        mask: block mask over ``N x N`` on the same device.
        scale: factor on the scores, ``1 / sqrt(head_dim)`` by default.
        held: guards that earlier layers in the same call of a model have passed (``flexclear.compile.direct``).

    Returns:
        ``[B, heads, N, head_dim]``.

    Raises:
        UnfusedAttentionError: it cannot be compiled here or now; the message says why and what to do.
        ValueError: its kernels do not support the mask's blocks on this GPU.
    """
    if query.device.type == "cpu" and query.dtype in HALF and query.dtype not in PACKED_TYPES:
        # The products would be in float32 anyway, and each number converted whenever it is used: 1.4 to 1.7 times the time.
        wide = (query.float(), key.float(), value.float())
        return compiled_flex_attention(*wide, mask, scale, held).to(query.dtype)
    if torch.compiler.is_compiling():
        if query.device.type == "cpu":
            # Inductor's C++ kernel (torch 2.13) loses the offset of a view made in the same graph: values that are the
            # last third of a fused projection would be read from its first third.
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        return flex_attention(
            query,
            key,
            value,
            block_mask=_symbolic(mask),
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options=as_dict(getattr(mask, KERNEL_OPTIONS, ())),
        )
    transforms = transforms_in_force((query, key, value))
    if transforms is not None:
        raise UnfusedAttentionError(
            f"flexclear: compiled FlexAttention has a backward pass at most, but was called under {transforms}: its result "
            "would have no tangent. Use masked SDPA, as backend='auto' and 'sdpa' of flexclear.transform do"
        )
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not needs_grad:
        query, key, value = plain(query), plain(key), plain(value)
        direct = None if held is None else held.find(query, key, value, mask, scale)
        if direct is not None:
            return direct(query, key, value, mask, scale)
    if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        # torch.compile would return the plain function, which would be kept after compilation is enabled again.
        raise _not_compiled(query)
    facts = (
        query.device,
        query.dtype,
        query.shape[0] == 1,
        query.shape[1],
        key.shape[1],
        query.shape[3],
        mask.BLOCK_SIZE,
        mask.kv_indices.shape[-2] == 1,
        mask.kv_indices.shape[-1] == 1,
        scale,
        needs_grad,
        torch.is_inference_mode_enabled(),
        _codes(mask.mask_mod),
    )
    try:
        attend = _compiled(facts, options_for(query, mask, needs_grad), query.shape[1] != key.shape[1])
        out = attend(query, key, value, mask, scale)
        if held is not None and not needs_grad:
            held.learn(attend, query, key, value, mask, scale)
        return out
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise UnfusedAttentionError(
            f"flexclear: Dynamo's recompile limit ({torch._dynamo.config.recompile_limit}) is reached for attention over "
            f"{tuple(query.shape)} {query.dtype}. If the mask_mod captures Python values, capture 0-d tensors "
            "instead; otherwise raise torch._dynamo.config.recompile_limit, or call torch.compiler.reset(). "
            + _ADVICE.format(n=query.shape[2])
        ) from error


def options_for(query: Tensor, mask: BlockMask, needs_grad: bool) -> Options:
    """Kernel options for a call: those that the mask carries, or those from the table for its blocks and lengths.

    Raises:
        ValueError: the kernels do not support the mask's blocks on this GPU.
    """
    carried: Options | None = getattr(mask, KERNEL_OPTIONS, None)
    if carried is not None:
        return carried
    block_size = (mask.BLOCK_SIZE[0], mask.BLOCK_SIZE[1])
    kernel = choose(query.device, query.dtype, query.shape[3], backward=needs_grad, block_size=block_size)
    return completed(kernel, mask)


def _symbolic(mask: BlockMask) -> BlockMask:
    """``mask`` with lengths that are the sizes of a tensor (``flexclear.masks.lengths``), so that they are not compiled in."""
    lengths = getattr(mask, LENGTHS, None)
    if lengths is None:
        return mask
    return BlockMask(
        seq_lengths=(lengths.shape[0], lengths.shape[1]),
        kv_num_blocks=mask.kv_num_blocks,
        kv_indices=mask.kv_indices,
        full_kv_num_blocks=mask.full_kv_num_blocks,
        full_kv_indices=mask.full_kv_indices,
        q_num_blocks=mask.q_num_blocks,
        q_indices=mask.q_indices,
        full_q_num_blocks=mask.full_q_num_blocks,
        full_q_indices=mask.full_q_indices,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask.mask_mod,
    )


def why_not_compiled(device: torch.device, needs_grad: bool = False) -> str | None:
    """Why compiled FlexAttention cannot run on ``device``, or None if it can.

    Args:
        device: where query, key and value are.
        needs_grad: whether a backward pass must follow.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (7, 0) else f"its kernels need compute capability 7.0; this GPU has {capability}"
    if device.type != "cpu":
        return f"device type {device.type!r} is not one that flexclear runs compiled FlexAttention on (cuda, cpu)"
    if needs_grad:
        return "on CPU it has no backward pass"
    return _why_not_compiled_on_cpu()


def _why_not_compiled_on_cpu() -> str | None:
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.system() != "Linux" or not capability.startswith("AVX"):
        return f"on CPU its kernels need Linux and AVX2; this is {platform.system()} with {capability}"
    return why_no_cpp_compiler()


@functools.cache
def why_no_cpp_compiler() -> str | None:
    """Why Inductor cannot compile C++, or None if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler was found (Debian: apt-get install g++ python3-dev)"
    return None
