"""One attention function for every family. Its mask knows the layout; the function knows nothing about models."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from flexclear.compile import compiled_flex_attention, why_not_compiled
from flexclear.compile.derivatives import needs_composite
from flexclear.compile.direct import Held
from flexclear.masks.apart import TextApart

Mask = BlockMask | TextApart | Tensor | None
"""What a layer may see; see ``windowed_attention``."""

FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TRAINED: tuple[tuple[SDPBackend, Callable[[], bool]], ...] = (
    (SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.mem_efficient_sdp_enabled),
    (SDPBackend.MATH, torch.backends.cuda.math_sdp_enabled),
)
"""SDPA's kernels other than cuDNN's that take a mask, and whether the process allows them."""
_switching = threading.Lock()
"""Which kernels SDPA may use is a setting of the process."""


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    scale: float | None = None,
    held: Held | None = None,
) -> Tensor:
    """Softmax attention over the pairs that ``mask`` allows (paper Eq. 3).

    Args:
        query, key, value: ``[B, heads, N, head_dim]`` in the mask's sequence order; more keys than queries if the mask has
            more. Key and value may have fewer heads, each of which serves a run of query heads.
        mask: a BlockMask (compiled FlexAttention), ``TextApart`` (FlexAttention for the image, SDPA for the text), a bool mask
            that broadcasts to ``[B, heads, N, keys]`` (masked SDPA), or None: every pair (SDPA).
        scale: factor on the scores, ``1 / sqrt(head_dim)`` by default.
        held: see ``compiled_flex_attention``.

    Returns:
        ``[B, heads, N, head_dim]``.

    Under forward-mode AD and ``torch.func``, SDPA is computed with plain operations, which support all derivatives but store
    all scores; fused kernels have only a backward pass.

    Raises:
        UnfusedAttentionError: FlexAttention would not be fused, or would be differentiated in one of these ways.
    """
    # Under autocast the norms return query and key in float32. SDPA would cast them, but FlexAttention raises.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if isinstance(mask, BlockMask):
        return compiled_flex_attention(query, key, value, mask, scale, held)
    if isinstance(mask, TextApart):
        return _apart(query, key, value, mask, scale, held)
    grouped = query.shape[1] != key.shape[1]
    if grouped and mask is not None:
        # Of SDPA's GPU kernels only cuDNN's supports grouped heads with a mask; the others would store all scores.
        groups, grouped = query.shape[1] // key.shape[1], False
        key, value = (tokens.repeat_interleave(groups, dim=1) for tokens in (key, value))
    if not torch.compiler.is_compiling() and needs_composite((query, key, value)):
        bias = None if mask is None else torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, bias, scale=scale, enable_gqa=grouped
        )[0]
    if mask is not None:
        return masked_sdpa(query, key, value, mask, scale)
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)


def masked_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """SDPA under a bool mask, differentiated by other kernels than cuDNN's.

    On Hopper and later GPUs PyTorch prefers cuDNN's kernel for 16-bit floats since 2.11. Its backward pass is known to give NaN
    under some masks (https://github.com/pytorch/pytorch/issues/196678), and training through masked SDPA in bfloat16 ended in
    NaN or an illegal memory access on an H100 (bench/results/gpu-fourth.md). So a call that is differentiated there is left to
    the other kernels: those that the process allows, unless it allows none; in compiled code, all of them.

    Args:
        query, key, value: ``[B, heads, N, head_dim]``, all with as many heads.
        mask: bool, broadcasts to ``[B, heads, N, keys]``.
        scale: factor on the scores, ``1 / sqrt(head_dim)`` by default.

    Returns:
        ``[B, heads, N, head_dim]``.
    """

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    differentiated = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not differentiated or not _is_for_cudnn(query):
        return attend()
    if torch.compiler.is_compiling():  # Dynamo cannot ask what the process allows.
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return attend()
    with _switching:
        kinds = [kind for kind, allowed in _TRAINED if allowed()]
        if not kinds:
            return attend()
        with sdpa_kernel(kinds):
            return attend()


def _is_for_cudnn(query: Tensor) -> bool:
    """Whether cuDNN's kernel can be chosen: for 16-bit floats, which autocast makes of float32."""
    if query.device.type != "cuda":
        return False
    return query.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda")


def _apart(
    query: Tensor, key: Tensor, value: Tensor, mask: TextApart, scale: float | None, held: Held | None
) -> Tensor:
    """Text queries by SDPA, image queries by FlexAttention, joined in the memory layout that the model reads next."""
    length, text, rows = query.shape[2], mask.text.shape[0], mask.rows
    if not mask.layout.text_first:
        of_image = compiled_flex_attention(query[:, :, :rows], key, value, mask.image, scale, held)
        return _joined(of_image, windowed_attention(query[:, :, rows:], key, value, None, scale))
    of_text = windowed_attention(query[:, :, :text], key, value, None, scale)
    first = length - rows
    if not torch.compiler.is_compiling():
        of_image = compiled_flex_attention(query[:, :, first:], key, value, mask.image, scale, held)
        return _joined(of_text, of_image[:, :, text - first :])
    # Dynamo would specialize a slice on whether it starts at 0, which depends on the text length. And with one sample and head
    # a slice is contiguous, so that its offset would be lost, see compiled_flex_attention.
    place = torch.arange(length, device=query.device)
    of_image = compiled_flex_attention(query.index_select(2, place[:rows] + first), key, value, mask.image, scale, held)
    return _joined(of_text, of_image).index_select(2, place + (place >= text) * (text - first))


def _joined(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first.transpose(1, 2), second.transpose(1, 2)], dim=1).transpose(1, 2)


def choose_backend(
    wanted: str, device: torch.device, dtype: torch.dtype, needs_grad: bool, transforms: str | None = None
) -> str:
    """``"flex"`` or ``"sdpa"``, for a call on ``device`` with tensors of ``dtype``.

    Args:
        wanted: one of ``BACKENDS``.
        device, dtype: device and dtype of the call.
        needs_grad: whether a backward pass must follow.
        transforms: names of other transforms that differentiate the call (``flexclear.compile.derivatives``), or None.

    Raises:
        ValueError: ``wanted`` is ``"flex"`` and it cannot run; the message says why.
    """
    if wanted == "sdpa":
        return "sdpa"
    obstacle = why_not_compiled(device, needs_grad)
    if transforms is not None:
        obstacle = f"it has a backward pass at most, and this call runs under {transforms}"
    if obstacle is None and dtype not in FLEX_DTYPES:
        obstacle = f"it computes in float32, bfloat16 or float16, but the model computes in {dtype}"
    if obstacle is None:
        return "flex"
    if wanted == "flex":
        raise ValueError(f"backend='flex' cannot run compiled FlexAttention: {obstacle}. backend='auto' would use sdpa")
    return "sdpa"
