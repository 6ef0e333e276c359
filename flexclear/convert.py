"""``transform`` and ``restore``: a pretrained model's attention made local, in place and reversibly."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from flexclear.attention import BACKENDS
from flexclear.families import FAMILIES, family_of
from flexclear.hooks import EntryHook, Settings, entry_hook_of, install, uninstall
from flexclear.masks import Disc, Layout
from flexclear.masks.blocks import check_block_size
from flexclear.masks.layout import ORDERS

Target = TypeVar("Target")


def model_of(model_or_pipe: Any) -> nn.Module:
    """The transformer itself: ``model_or_pipe``, or the ``transformer`` of a diffusers pipeline.

    Raises:
        TypeError: neither; the message names what was given.
    """
    from torch._dynamo.eval_frame import OptimizedModule

    model = model_or_pipe if isinstance(model_or_pipe, nn.Module) else getattr(model_or_pipe, "transformer", None)
    if isinstance(model, OptimizedModule):
        raise TypeError(
            f"the {type(model._orig_mod).__name__} given is already wrapped by torch.compile(model). Transform first, then "
            "compile: model.compile_repeated_blocks(fullgraph=True) or torch.compile"
        )
    if not isinstance(model, nn.Module):
        supported = ", ".join(family.model_class for family in FAMILIES)
        raise TypeError(
            f"expected a diffusers model or a pipeline with a transformer, got {type(model_or_pipe).__name__}. "
            f"Supported models: {supported}"
        )
    return model


def transform(
    model_or_pipe: Target,
    r: int = 16,
    *,
    backend: str = "auto",
    order: str = "tiled",
    block_size: int | tuple[int, int] | None = None,
    exact_position_ids: bool = True,
) -> Target:
    """Give every attention layer CLEAR's circular window, in place (paper section 3.2).

    Image queries then see image keys closer than ``r`` tokens, and all text; text sees everything. Weights, softmax,
    scaling and projections stay. The grid is read from each call, so one transformed model serves every resolution
    and aspect ratio. Callers only ever see raster token order.

    >>> pipe = flexclear.transform(pipe, r=16)                              # doctest: +SKIP
    >>> pipe("a small blue plane", height=2048, width=1024).images[0]       # doctest: +SKIP

    Args:
        model_or_pipe: a ``FluxTransformer2DModel``, or any diffusers pipeline that holds one as ``transformer``.
        r: window radius in tokens (16 px each in FLUX.1), 1 or more. Published radii: 8, 16, 32.
        backend: ``"auto"``: compiled FlexAttention where it can run (CUDA; CPU without gradients), else masked SDPA.
            ``"flex"`` or ``"sdpa"`` insist.
        order: ``"tiled"`` (fast) or ``"raster"`` token order inside the model; results are the same.
        block_size: tokens per block of the BlockMask, or a (query, key-value) pair; multiples of 16 from 16 to 256.
            Chosen by ``flexclear.masks.blocks.default_block_size`` for each resolution otherwise.
        exact_position_ids: hand exact float32 position ids to the model. diffusers makes FLUX's ids in the pipeline's
            type, and bfloat16 cannot tell neighbouring rows above 256 apart. False keeps the caller's.

    Returns:
        What was given. A model that is already transformed is transformed anew: the last call holds.

    Raises:
        TypeError: an unsupported model, a plugin's attention processor, or an argument of the wrong type.
        ValueError: an argument out of range, or a model without the blocks of its class. Nothing is changed then.
    """
    model = model_of(model_or_pipe)
    family = family_of(model)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {backend!r}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {sorted(ORDERS)}, got {order!r}")
    if not isinstance(exact_position_ids, bool):
        raise TypeError(f"exact_position_ids must be True or False, got {exact_position_ids!r}")
    asked = None if block_size is None else check_block_size(block_size, Layout(1, 1))
    settings = Settings(Disc(r), backend, order, asked, exact_position_ids)
    modules = dict(family.attention_modules(model))

    restore(model)
    entry = EntryHook(family, settings, {name: attn.processor for name, attn in modules.items()})
    for attn in modules.values():
        attn.set_processor(family.processor())
    install(model, entry)
    return model_or_pipe


def restore(model_or_pipe: Target) -> Target:
    """Undo ``transform``: the processors that were there before, no hook left, outputs bit-identical to the original's.

    A model that was not transformed is left as it is.

    Returns:
        What was given.

    Raises:
        TypeError: neither a model nor a pipeline with a transformer.
    """
    model = model_of(model_or_pipe)
    entry = entry_hook_of(model)
    if entry is not None:
        for name, processor in entry.processors.items():
            attn: Any = model.get_submodule(name)
            attn.set_processor(processor)
        uninstall(model)
    return model_or_pipe
