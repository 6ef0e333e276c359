"""The dense model on several ranks, with diffusers' own context parallelism."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import nn

from flexclear.families.target import model_of
from flexclear.parallel.group import ranks_of
from flexclear.runtime.hooks import entry_hook_of
from flexclear.runtime.modes import context_parallelism_of

Target = TypeVar("Target")

KINDS = ("ring", "ulysses")
MARK = "flexclear.parallel.enable_dense"


def enable_dense(model_or_pipe: Target, kind: str = "ring") -> Target:
    """Share the dense model's images among all ranks with diffusers' own context parallelism, for comparison.

    Call it on every rank; ``disable`` undoes it. Ranks that stop or differ are not reported here: the others wait until the
    default process group times out. The numbers of image and of text tokens must be multiples of the number of ranks.

    Args:
        model_or_pipe: a model that is not transformed, or a pipeline with one.
        kind: ``"ring"``: keys and values travel round the ranks, and partial results are merged by their log-sum-exp. Needs an
            attention backend that returns it: ``model.set_attention_backend("_native_cudnn")`` in bfloat16 on CUDA,
            ``"_native_flash"`` on CPUs. Neither supports attention masks, and diffusers makes the backend the default for every
            model in the process; to undo that, wrap everything in ``with diffusers.attention_backend("native"):``.
            ``"ulysses"``: each rank attends over the whole image with its share of the heads, with any backend.

    Returns:
        ``model_or_pipe``.

    Raises:
        ValueError: the model is transformed, already runs in parallel or cannot be shared like this, or there is no
            process group. The model is unchanged.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be 'ring' or 'ulysses', got {kind!r}")
    model: Any = model_of(model_or_pipe)
    name = type(model).__name__
    if entry_hook_of(model) is not None:
        raise ValueError(f"this {name} has windows: use flexclear.parallel.enable, or call flexclear.restore first")
    refuse_other_parallelism(model)
    if getattr(model, "_cp_plan", None) is None:
        raise ValueError(f"diffusers has no plan for sharing the dense {name} (_cp_plan)")
    if kind == "ring":
        _refuse_without_log_sum_exp(model)
    count = len(ranks_of(None))
    if count == 1:
        raise ValueError("there is only one rank: start with torchrun --nproc-per-node N, N >= 2")
    heads = getattr(model.config, "num_attention_heads", None)
    if kind == "ulysses" and heads is not None and heads % count:
        raise ValueError(
            f"kind='ulysses' distributes heads, and the {heads} of this {name} are not divisible by {count} ranks"
        )
    from diffusers import ContextParallelConfig

    if kind == "ring" and _only_cpus():
        _flash_attention_on_cpus()
    config: Any = ContextParallelConfig(**{f"{kind}_degree": count})
    config.enabled_by = MARK
    # diffusers numbers the devices modulo their count, which torch gives as 0 on machines with only CPUs.
    devices = max(1, torch.accelerator.device_count())
    try:
        with mock.patch.object(torch.accelerator, "device_count", return_value=devices):
            model.enable_parallelism(config=config)
    except BaseException:
        # diffusers stores the settings in the model before it checks the attention backend.
        disable_dense(model)
        raise
    return model_or_pipe


def disable_dense(model: nn.Module) -> None:
    """Undo ``enable_dense``, but leave parallelism that was enabled elsewhere."""
    if getattr(context_parallelism_of(model), "enabled_by", None) != MARK:
        return
    from diffusers.hooks.context_parallel import remove_context_parallel

    remove_context_parallel(model, model._cp_plan)
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = None  # type: ignore[union-attr]
    model._parallel_config = None  # type: ignore[assignment]


def refuse_other_parallelism(model: nn.Module) -> None:
    """
    Raises:
        ValueError: the model has diffusers' context parallelism.
    """
    inner = context_parallelism_of(model)
    if inner is not None:
        raise ValueError(
            f"this {type(model).__name__} has diffusers' context parallelism (ring_degree={inner.ring_degree}, "
            f"ulysses_degree={inner.ulysses_degree}), which distributes the dense attention. Use either that, or windows: "
            "load the model without enable_parallelism, then flexclear.transform and flexclear.parallel.enable. Both at once "
            "would cut the image twice"
        )


def _refuse_without_log_sum_exp(model: Any) -> None:
    """
    Raises:
        ValueError: the attention backend does not return the log-sum-exp, by which a ring merges results.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    named = {getattr(getattr(module, "processor", None), "_attention_backend", None) for module in model.modules()}
    backend = next((AttentionBackendName(name) for name in named if name is not None), None)
    if backend is None:
        backend, _ = _AttentionBackendRegistry.get_active_backend()
    if _only_cpus():
        enough, fitting = backend == AttentionBackendName._NATIVE_FLASH, "model.set_attention_backend('_native_flash')"
    else:
        enough = backend != AttentionBackendName.NATIVE
        fitting = "model.set_attention_backend('_native_cudnn') with the model in bfloat16"
    if not enough:
        raise ValueError(
            f"a ring merges results by their log-sum-exp, which the attention backend {backend.value!r} of this "
            f"{type(model).__name__} does not return here: use {fitting}, or kind='ulysses'"
        )


def _only_cpus() -> bool:
    return torch.accelerator.device_count() == 0


@cache
def _flash_attention_on_cpus() -> torch.library.Library | None:
    """Give the operator behind diffusers' "_native_flash" a kernel for CPUs, if torch has none.

    torch has flash attention with log-sum-exps on CPUs, under another name and without the outputs that only dropout needs.
    The kernel stays until the process ends, which does no harm: nothing else calls an operator without a kernel.
    """
    name = "_scaled_dot_product_flash_attention"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CPU"):
        return None

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[torch.Tensor | int, ...]:
        out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, scale=scale
        )
        none = torch.empty(0, dtype=torch.int64)
        return out, log_sum_exp, none, none, query.shape[2], key.shape[2], none, none, query.new_empty(0)

    library = torch.library.Library("aten", "IMPL")
    library.impl(name, attend, "CPU")
    return library
