"""Where a pipeline's weights are while it draws, and how much memory that takes at most."""

from __future__ import annotations

from typing import Any

import torch

from flexclear.common.resident import forget_highest, highest
from flexclear.generation.settings import GenerateSettings


def check_offload(config: dict[str, Any], settings: GenerateSettings, device: torch.device) -> None:
    """Raise for an ``--offload`` that would do nothing, or that a part of the pipeline does not take.

    Args:
        config: of the pipeline.
        settings: what was asked for.
        device: where it runs.

    Raises:
        ValueError: see there.
    """
    if settings.offload is None:
        return
    if device.type == "cpu":
        raise ValueError(
            f"--offload {settings.offload} keeps weights in main memory until an accelerator needs them, and --device is "
            "'cpu', where they are anyway; leave it out"
        )
    if settings.offload != "group":
        return
    import diffusers

    for part, (library, name) in ((key, value) for key, value in config.items() if isinstance(value, list | tuple)):
        kind = getattr(diffusers, str(name), None) if library == "diffusers" else None
        if getattr(kind, "_supports_group_offloading", True) is False:
            raise ValueError(f"--offload group: the {part} of {settings.model}, a {name}, does not take it; give model")


def offload(pipe: Any, how: str, device: torch.device) -> None:
    """Keep a pipeline's weights in main memory and bring to ``device`` what runs.

    Last of all: after windows, weights, LoRA, quantizing and compiling.

    Args:
        pipe: the pipeline.
        how: ``"model"``: one model at a time; ``"sequential"``: one layer at a time; ``"group"``: of transformers one block at
            a time, of the rest one layer.
        device: where it runs.
    """
    pipe.to("cpu")  # where quantizing has left parts on the device
    if how == "model":
        pipe.enable_model_cpu_offload(device=device)
        return
    if how == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
        return
    from diffusers.hooks import apply_group_offloading

    from flexclear.families.target import TRANSFORMERS

    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        # Blocks may have been compiled, into which no hook goes. Encoders and VAEs have no blocks that diffusers finds.
        blocks = name in TRANSFORMERS
        options: dict[str, Any] = {"offload_type": "block_level" if blocks else "leaf_level"}
        if blocks:
            options["num_blocks_per_group"] = 1
        apply_group_offloading(part, onload_device=device, offload_device=torch.device("cpu"), **options)


class Peak:
    """Most memory in use while something is done.

    Args:
        device: whose. On CUDA, bytes of the device's allocator; elsewhere, bytes of the process that are resident.
        process: whether to measure where the device is not CUDA.

    Attributes:
        bytes_seen: between ``begin`` and ``end``; None where nothing is measured.
    """

    def __init__(self, device: torch.device, process: bool) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._process = process and not self._cuda
        self.bytes_seen: int | None = None

    @property
    def of(self) -> str | None:
        """``"device"``, ``"process"``, or None: nothing is measured."""
        return "device" if self._cuda else "process" if self._process else None

    def begin(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._process:
            forget_highest()

    def end(self) -> None:
        if self._cuda:
            self.bytes_seen = torch.cuda.max_memory_allocated(self._device)
        elif self._process:
            self.bytes_seen = highest()
