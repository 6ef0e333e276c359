"""Which processes and devices accelerate gives a run, and what they do not support."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from flexclear.distill.config import DistillConfig
from flexclear.distill.sharding import sharding_of

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
        # Without an accelerator, accelerate treats each of several processes as the only one unless told otherwise.
        cpu=config.device == "cpu" or (started() > 1 and not torch.accelerator.is_available()),
        log_with=config.tracker,
        project_dir=str(config.output),
        **options,
    )


def started() -> int:
    """Number of processes that torchrun or accelerate launch has started."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


def _asked(plugin: str) -> bool:
    """Whether accelerate's configuration asks for ``"FSDP"`` or ``"DEEPSPEED"``."""
    return os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() in ("1", "true", "yes")


def _check_deepspeed() -> None:
    """Raise if accelerate's configuration asks for DeepSpeed and it cannot be imported.

    Raises:
        ImportError: it cannot.
    """
    if _asked("DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            "accelerate's configuration asks for DeepSpeed, whose package is missing: pip install deepspeed. FSDP "
            "(distributed_type: FSDP, fsdp_version: 2) shards weights without it"
        )


def check_accelerator(accelerator: Any, config: DistillConfig) -> None:
    """Compare what was requested with what accelerate made of it, and with the settings.

    Raises:
        ValueError: the run would not be what was requested, or its settings are incompatible with sharding.
    """
    from accelerate import DistributedType

    if accelerator.mixed_precision not in DTYPES:
        raise ValueError(f"mixed precision {accelerator.mixed_precision!r} is not supported; {list(DTYPES)} are")
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    if processes < started():
        raise ValueError(
            f"{started()} processes were started, but accelerate knows of {processes}: each would train alone and write the "
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
    _check_asked(accelerator, config)
    losses = config.losses
    if processes > 1 and not losses.flow and not losses.prediction:
        raise ValueError(
            "losses: attention alone leaves the layers behind the last compared one without gradients, which several "
            "processes cannot average. Set a weight for losses.flow or losses.prediction, or use one process"
        )
    sharded = sharding_of(accelerator) is not None
    if sharded and config.teacher == "shared":
        raise ValueError(
            f"teacher: shared needs whole weights on every device, but {kind} shards them; use teacher: copy"
        )
    if sharded and config.ema is not None:
        raise ValueError(f"ema needs whole weights on every device, but {kind} shards them")
    if kind == DistributedType.DEEPSPEED:
        match_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, config)


def _check_asked(accelerator: Any, config: DistillConfig) -> None:
    """Raise if a caller's own accelerator has another value than a setting that it alone decides.

    Raises:
        ValueError: it has.
    """
    from accelerate import DistributedType

    asked: dict[str, tuple[Any, Any]] = {"mixed_precision": (config.mixed_precision, accelerator.mixed_precision)}
    if accelerator.distributed_type != DistributedType.DEEPSPEED:  # see match_deepspeed
        asked["gradient_accumulation"] = (config.gradient_accumulation, accelerator.gradient_accumulation_steps)
    asked["device"] = (config.device, accelerator.device.type)
    trackers = [getattr(tracker, "value", getattr(tracker, "name", None)) for tracker in accelerator.log_with]
    asked["tracker"] = (config.tracker, config.tracker if config.tracker in trackers else None)
    for name, (wanted, got) in asked.items():
        if wanted is not None and wanted != got:
            raise ValueError(
                f"the accelerator has {name} {got!r}, the settings have {name}: {wanted}. Make the accelerator with the same "
                "value, or leave it to distill, which makes one from the settings"
            )


def check_precision(accelerator: Any, dtype: torch.dtype) -> None:
    """Compare the accelerator's precision with the weights' data type.

    Raises:
        ValueError: weights of that type cannot train in it.
    """
    from accelerate import DistributedType

    precision = accelerator.mixed_precision
    if dtype in (torch.bfloat16, torch.float16) and precision == "no":
        fitting = "bf16" if dtype == torch.bfloat16 else "fp16"
        raise ValueError(f"a model in {dtype} trains with mixed_precision: {fitting}")
    if accelerator.distributed_type == DistributedType.DEEPSPEED and dtype != DTYPES[precision]:
        raise ValueError(
            f"DeepSpeed in {precision} casts the whole model, while the teacher stays in {dtype}: load the model in "
            f"{DTYPES[precision]}"
        )


def match_deepspeed(own: dict[str, Any], config: DistillConfig) -> None:
    """Fill in from the settings what DeepSpeed's configuration leaves out or at "auto".

    Raises:
        ValueError: it names another value than the settings.
    """
    wanted: dict[str, tuple[str, float]] = {
        "train_micro_batch_size_per_gpu": ("batch_size", config.batch_size),
        "gradient_clipping": ("max_grad_norm", config.max_grad_norm),
    }
    if config.gradient_accumulation is not None:
        wanted["gradient_accumulation_steps"] = ("gradient_accumulation", config.gradient_accumulation)
    for name, (setting, value) in wanted.items():
        if own.get(name, "auto") not in ("auto", value):
            raise ValueError(
                f'DeepSpeed\'s configuration has {name}: {own[name]}, the settings have {setting}: {value}; set it to "auto"'
            )
        own[name] = value
