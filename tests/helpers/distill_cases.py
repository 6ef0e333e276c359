"""Training runs for the processes of ``parallel_group.Group``. Every function is called on every rank."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist

from flexclear.distill import DistillConfig, OptimizerConfig, distill
from flexclear.distill.config import CheckpointConfig, HeldOutConfig, SheetConfig
from flexclear.distill.students import trained_parameters

from helpers.distill_samples import random_samples
from helpers.models import tiny_flux

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "FluxTransformerBlock,FluxSingleTransformerBlock",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""The environment that ``accelerate launch`` makes from a configuration with FSDP."""


def config(output, **changed):
    """Settings of a short run whose steps do not magnify rounding, as Adam's do when a gradient is nearly zero."""
    settings = {
        "output": Path(output),
        "r": 2,
        "backend": "sdpa",
        "steps": 4,
        "batch_size": 2,
        "gradient_accumulation": 1,
        "device": "cpu",
        "optimizer": OptimizerConfig(
            "adamw", learning_rate=1e-2, epsilon=1e-3, schedule="constant_with_warmup", warmup_steps=2
        ),
        "checkpoints": CheckpointConfig(every=2),
        "held_out": HeldOutConfig(count=2),
    }
    return DistillConfig(**{**settings, **changed})


def train(output, own_output=False, accelerator=None, dtype=torch.float32, **changed):
    """A run with a tiny FLUX: its records, and the final weights of the model."""
    if own_output:
        output = Path(output) / str(dist.get_rank() if dist.is_initialized() else os.environ.get("RANK", "0"))
    model = tiny_flux(num_single_layers=3).to(dtype)
    done = distill(model, config(output, **changed), random_samples(10), accelerator=accelerator)
    return {
        "losses": [{name: value for name, value in record.items() if name != "seconds"} for record in done.losses],
        "held_out": list(done.held_out),
        "steps": done.steps,
        "file": str(done.weights),
        "weights": whole_weights(model),
        "parameters": sorted({type(parameter).__name__ for parameter in model.parameters()}),
    }


def whole_weights(model):
    """Trained parameters as arrays, which can be sent between processes; none for a sharded model."""
    if any(type(parameter) is not torch.nn.Parameter for parameter in model.parameters()):
        return {}
    return {name: parameter.detach().float().numpy().copy() for name, parameter in trained_parameters(model).items()}


@contextlib.contextmanager
def accelerate_as_on_gpus(environment):
    """accelerate with FSDP or DeepSpeed on CPUs. It supports them only on accelerators, so it is told that CPUs are such."""
    from accelerate import DistributedType, PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def train_sharded(output, **changed):
    """The same run under FSDP."""
    with accelerate_as_on_gpus(SHARDED):
        return train(output, teacher="copy", **changed)


def draw_sheets(output, accelerator=None, teacher="copy"):
    """The sheet that a run of one step draws with the embedded pipeline, as an array."""
    import numpy as np
    from PIL import Image

    sheets = SheetConfig(every=1, steps=2, prompts=("a red apple on a blue background",), height=64, width=64)
    samples = random_samples(4, 16, 16, channels=8, text_width=96, pooled_width=96)
    settings = config(
        output, model="embedded", steps=1, sheets=sheets, teacher=teacher, held_out=HeldOutConfig(count=0)
    )
    done = distill(None, settings, samples, accelerator=accelerator)
    [sheet] = (Path(output) / "sheets").iterdir()
    return {"sheet": np.asarray(Image.open(sheet)).astype(int), "steps": done.steps}


def draw_sheets_sharded(output):
    """The same under FSDP."""
    with accelerate_as_on_gpus(SHARDED):
        return draw_sheets(output)


def draw_sheets_by_deepspeed(output, file):
    """The same by DeepSpeed."""
    with deepspeed_as_on_gpus(file) as made:
        return draw_sheets(output, made)


@contextlib.contextmanager
def deepspeed_as_on_gpus(file, gradient_accumulation=1, mixed_precision="no"):
    """An accelerator with DeepSpeed, which computes on CPUs, and the configuration in ``file``."""
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file), "DS_ACCELERATOR": "cpu"}
    with accelerate_as_on_gpus(asked):
        import deepspeed
        from accelerate import Accelerator

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles its own in place of gloo's
        yield Accelerator(gradient_accumulation_steps=gradient_accumulation, mixed_precision=mixed_precision)


def train_by_deepspeed(output, file, **changed):
    """The same run by DeepSpeed with the configuration in ``file``."""
    asked = {name: changed[name] for name in ("gradient_accumulation", "mixed_precision") if name in changed}
    with deepspeed_as_on_gpus(file, **asked) as made:
        return {**train(output, accelerator=made, **changed), "kind": made.distributed_type.value}


def fsdp_on_cpus(output):
    """FSDP where accelerate leaves it out."""
    os.environ.update(SHARDED)
    try:
        return train(output, teacher="copy")
    finally:
        for name in SHARDED:
            del os.environ[name]
