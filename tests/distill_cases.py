"""What the processes of ``parallel_group.Group`` train. Every function is called on every rank."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
from distill_samples import random_samples

from flexclear.distill import DistillConfig, OptimizerConfig, distill
from flexclear.distill.config import CheckpointConfig, HeldOutConfig
from flexclear.distill.students import trained_parameters

from models import tiny_flux

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "FluxTransformerBlock,FluxSingleTransformerBlock",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What ``accelerate launch`` makes of a configuration with FSDP."""


def config(output, **changed):
    """Settings of a short run whose steps do not magnify rounding, as Adam's do where a gradient is nearly zero."""
    settings = {
        "output": Path(output),
        "r": 2,
        "backend": "sdpa",
        "steps": 4,
        "batch_size": 2,
        "gradient_accumulation": 1,
        "device": "cpu",
        "optimizer": OptimizerConfig(learning_rate=1e-2, epsilon=1e-3, schedule="constant_with_warmup", warmup_steps=2),
        "checkpoints": CheckpointConfig(every=2),
        "held_out": HeldOutConfig(count=2),
    }
    return DistillConfig(**{**settings, **changed})


def train(output, own_output=False, accelerator=None, **changed):
    """A run of a tiny FLUX: its records, and the weights that it leaves in the model."""
    if own_output:
        output = Path(output) / str(dist.get_rank() if dist.is_initialized() else os.environ.get("RANK", "0"))
    model = tiny_flux(num_single_layers=3)
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
    """Trained parameters as arrays, which processes can hand over; none of a sharded model."""
    if any(type(parameter) is not torch.nn.Parameter for parameter in model.parameters()):
        return {}
    return {name: parameter.detach().numpy().copy() for name, parameter in trained_parameters(model).items()}


@contextlib.contextmanager
def accelerate_with_fsdp():
    """accelerate with its FSDP on CPUs. It has that on accelerators only, so it is told that these are some."""
    from accelerate import DistributedType, PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    before = {name: os.environ.get(name) for name in SHARDED}
    os.environ.update(SHARDED)
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
    with accelerate_with_fsdp():
        return train(output, teacher="copy", **changed)


def fsdp_on_cpus(output):
    """FSDP where accelerate leaves it out."""
    os.environ.update(SHARDED)
    try:
        return train(output, teacher="copy")
    finally:
        for name in SHARDED:
            del os.environ[name]
