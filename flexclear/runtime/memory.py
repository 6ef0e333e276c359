"""Out-of-memory errors in calls of a transformed model: they state the size of the call and what would need less memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexclear.compile.quantize import MIN_FEATURES, is_quantized, linears, quantized_elsewhere, weight_bytes, why_kept
from flexclear.runtime.call_plan import CallPlan


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error`` says that a device or the host is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def note(error: BaseException, text: str) -> None:
    """Add a note to ``error``, which tracebacks show; before Python 3.11, add it to the message."""
    if hasattr(error, "add_note"):
        error.add_note(text)
    else:
        error.args = (f"{error}\n{text}",)


def what_takes_less(model: nn.Module, plan: CallPlan, batch: int) -> str:
    """A message with the size of a call in tokens, the size of the weights, and ways to reduce memory.

    Args:
        model: the transformed model.
        plan: the call's plan.
        batch: number of sequences in the call.
    """
    layout = plan.base.layout
    grids = " + ".join(f"{height} x {width}" for height, width in layout.grids)
    size = f"{grids} image tokens and {layout.text_len} of text" + (f", batch {batch}" if batch > 1 else "")
    advice = [
        "a smaller image (memory besides the weights grows with the number of tokens: half the sides need a quarter)"
    ]
    if batch > 1:
        advice.append("fewer images at a time")
    masks = (slot.mask for slot in plan.slots)
    dense = next((mask for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) > 1), None)
    if dense is not None:
        advice.append(
            "flexclear.transform(..., backend='flex'), which needs no dense mask (here "
            f"{_gib(dense.numel() * dense.element_size())}, and as many scores)"
        )
    saved = _saved_by_eight_bits(model)
    if saved:
        advice.append(f"eight-bit weights: flexclear.optimize(pipe, fp8=True or 'weight_only') saves {_gib(saved)}")
    advice += [
        "pipe.enable_model_cpu_offload(), which keeps one part at a time on the device",
        "pipe.vae.enable_tiling(), for decoding",
    ]
    return (
        f"flexclear: {type(model).__name__} ran out of memory over {size} ({layout.seq_len} tokens); its weights take "
        f"{_gib(weight_bytes(model))}. What needs less: {'; '.join(advice)}"
    )


def _saved_by_eight_bits(model: nn.Module) -> int:
    """Bytes that quantizing the big linears would save; 0 if they are quantized already."""
    if is_quantized(model) or quantized_elsewhere(model) is not None:
        return 0
    return sum(
        linear.weight.numel() * (linear.weight.element_size() - 1)
        for name, linear, in_block in linears(model)
        if why_kept(name, linear, in_block, MIN_FEATURES) is None
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
