"""Where a pipeline's weights are while it draws, and peak memory."""

from __future__ import annotations

from typing import Any

import torch

from flexclear.common.resident import forget_highest, highest
from flexclear.generation.settings import GenerateSettings


def check_offload(config: dict[str, Any], settings: GenerateSettings, device: torch.device) -> None:
    """Raise for an ``--offload`` that would do nothing, or that a component of the pipeline does not support.

    Args:
        config: the pipeline's configuration.
        settings: the requested settings.
        device: the device to run on.

    Raises:
        ValueError: it is such an ``--offload``.
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
    """Keep a pipeline's weights in main memory and move to ``device`` what runs.

    Call this last: after windows, weights, LoRA, quantization and compilation.

    Args:
        pipe: the pipeline.
        how: ``"model"``: one model at a time; ``"sequential"``: one layer at a time; ``"group"``: one block of a transformer at
            a time, one layer of everything else.
        device: the device to run on.
    """
    pipe.to("cpu")  # quantization may have left parts on the device
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
        # Compiled blocks accept no hooks inside. Encoders and VAEs have no blocks that diffusers finds.
        blocks = name in TRANSFORMERS
        options: dict[str, Any] = {"offload_type": "block_level" if blocks else "leaf_level"}
        if blocks:
            options["num_blocks_per_group"] = 1
        apply_group_offloading(part, onload_device=device, offload_device=torch.device("cpu"), **options)


class Peak:
    """Measures peak memory.

    Args:
        device: device to measure. On CUDA, bytes of the device's allocator; elsewhere, resident bytes of the process.
        process: whether to measure if the device is not CUDA.

    Attributes:
        bytes_seen: peak between ``begin`` and ``end``; None if nothing is measured.
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
