"""Which processes and devices a run has, by accelerate, and what they cannot do."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from flexclear.distill.config import DistillConfig

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(config: DistillConfig) -> Any:
    """Return the ``accelerate.Accelerator`` that the settings and accelerate's own configuration ask for.

    Raises:
        ImportError: DeepSpeed is asked for and missing.
    """
    from accelerate import Accelerator

    _check_deepspeed()
    options: dict[str, Any] = {}
    if config.gradient_accumulation is not None:
        options["gradient_accumulation_steps"] = config.gradient_accumulation
    return Accelerator(
        mixed_precision=config.mixed_precision,
        # Without an accelerator and without being told so, accelerate takes each of several processes for the only one.
        cpu=config.device == "cpu" or (_started() > 1 and not torch.accelerator.is_available()),
        log_with=config.tracker,
        project_dir=str(config.output),
        **options,
    )


def _started() -> int:
    """Number of processes that torchrun or accelerate launch has started."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


def _asked(plugin: str) -> bool:
    """Whether accelerate's configuration asks for ``"FSDP"`` or ``"DEEPSPEED"``."""
    return os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() in ("1", "true", "yes")


def _check_deepspeed() -> None:
    """Raise where accelerate's configuration asks for DeepSpeed and it cannot be imported.

    Raises:
        ImportError: it cannot.
    """
    if _asked("DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            "accelerate's configuration asks for DeepSpeed, whose package is missing: pip install deepspeed. FSDP "
            "(distributed_type: FSDP, fsdp_version: 2) shards weights without it"
        )


def check_accelerator(accelerator: Any, config: DistillConfig) -> None:
    """Compare what was asked for with what accelerate has made of it, and with the settings.

    Raises:
        ValueError: the run would not be what was asked for, or its settings need what sharding takes away.
    """
    from accelerate import DistributedType

    if accelerator.mixed_precision not in DTYPES:
        raise ValueError(f"mixed precision {accelerator.mixed_precision!r} is not known here; {list(DTYPES)} are")
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    if processes < _started():
        raise ValueError(
            f"{_started()} processes were started, and accelerate knows of {processes}: each would train alone and write the "
            "same files. On CPUs its Accelerator needs cpu=True, which device: cpu gives it"
        )
    if _asked("FSDP") and kind != DistributedType.FSDP:
        raise ValueError(
            f"accelerate's configuration asks for FSDP, which it has only where there are several accelerators such as GPUs; "
            f"this run is {kind.value}, and each device would hold all weights. Take FSDP out of the configuration"
        )
    if _asked("DEEPSPEED") and kind != DistributedType.DEEPSPEED:
        raise ValueError(
            f"accelerate's configuration asks for DeepSpeed, which accelerate leaves out on CPUs; this run is {kind.value}. Take "
            "DeepSpeed out of the configuration"
        )
    losses = config.losses
    if processes > 1 and not losses.flow and not losses.prediction:
        raise ValueError(
            "losses: attention alone leaves the layers behind the last compared one without gradients, which several "
            "processes cannot average. Give losses.flow or losses.prediction a weight, or use one process"
        )
    sharded = kind == DistributedType.FSDP or (
        kind == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3
    )
    if sharded and config.teacher == "shared":
        raise ValueError(f"teacher: shared needs whole weights on every device, {kind} shards them; teacher: copy")
    if sharded and config.ema is not None:
        raise ValueError(f"ema needs whole weights on every device, {kind} shards them")
    if kind == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size
