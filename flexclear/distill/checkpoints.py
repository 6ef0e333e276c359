"""Atomic checkpoints, and what a run must have in common with the one it resumes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexclear.common.reading import parse_json, read_text
from flexclear.compile.files import whole_file, write_errors
from flexclear.distill.config import DistillConfig, as_mapping
from flexclear.distill.samples import Samples
from flexclear.parallel.facts import digest
from flexclear.runtime.hooks import entry_hook_of

FOLDER = "checkpoints"
TRAINED = "trained.safetensors"
AVERAGE = "average.pt"
RUN = "run.json"
TEACHER = "weights"
FREE = (
    "output",
    "model",
    "data",
    "steps",
    "tracker",
    "device",
    "backend",
    "checkpoints",
    "sheets",
    "gradient_checkpointing",
)
"""Settings that may differ when a run is resumed; steps only if the learning rate does not depend on them."""


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def latest(output: Path) -> tuple[int, Path] | None:
    """Step and folder of the last complete checkpoint."""
    places = (output / FOLDER).glob("step_*") if (output / FOLDER).is_dir() else ()
    found = [(int(match[1]), place) for place in places if (match := re.fullmatch(r"step_(\d+)", place.name))]
    return max(found, default=None)


def identity(
    config: DistillConfig, global_batch: int, samples: Samples, fingerprint: str | None, models: dict[str, str]
) -> dict[str, Any]:
    """What must be equal for a run to resume as if it had not stopped. A cache counts by its contents, not its path, and so do
    the models; see ``models_of_run``."""
    kept = {name: value for name, value in as_mapping(config).items() if name not in FREE}
    for part in ("batch_size", "gradient_accumulation"):
        del kept[part]  # The global batch counts; so does the batch per device, which groups samples.
    held_out = {"count": kept.pop("held_out")["count"]}
    if not config.optimizer.schedule.startswith("constant"):
        kept["steps"] = config.steps
    return {
        **kept,
        "held_out": held_out,
        "batch_size": config.batch_size,
        "global_batch": global_batch,
        "samples": len(samples),
        "contents": getattr(samples, "work", None),
        "encoders": fingerprint,
        **models,
    }


def models_of_run(accelerator: Any, student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """The student's windows, and a digest of some numbers of each parameter of both models before they train.

    Args:
        accelerator: of the run; of several processes the first one's weights count.
        student, teacher: whole, not yet sharded.
    """
    entry = entry_hook_of(student)
    assert entry is not None
    settings = entry.settings
    found = hashlib.sha256()
    for model in (teacher, student):
        for name, parameter in model.named_parameters():
            found.update(f"{name}={digest(parameter)};".encode())
    weights = [found.hexdigest()[:16]]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(weights)
    windows = dict.fromkeys(repr(window) for window in settings.windows.values())
    layers = hashlib.sha256(repr((list(settings.windows.items()), settings.formula)).encode()).hexdigest()[:8]
    shown = (
        next(iter(windows)) if len(windows) == 1 and settings.formula is None else f"of {len(windows)} kinds, {layers}"
    )
    return {"windows": shown, "switches": repr(settings.switches), TEACHER: weights[0]}


def check_identity(place: Path, now: dict[str, Any]) -> None:
    """Raise if the checkpoint is from a run with other settings.

    Raises:
        ValueError: it is, or it is damaged.
    """
    try:
        then = dict(parse_json(read_text(place / RUN))["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place} is not a checkpoint of a distillation: {error}") from error
    now = json.loads(json.dumps(now))
    differing = [
        f"{key}: {then.get(key)} then, {now.get(key)} now" for key in {**then, **now} if then.get(key) != now.get(key)
    ]
    if differing:
        trained = then.get(TEACHER) != now.get(TEACHER)
        hint = (
            " A model that has been trained is not its own teacher: load the original weights again." if trained else ""
        )
        raise ValueError(
            f"{place} is from a run with other settings ({'; '.join(differing)}).{hint} Name another output, or delete "
            f"{place.parent} to start again"
        )


class Checkpoints:
    """Writes and reads the checkpoints of a run. Every process calls the same methods.

    Args:
        accelerator: the one that has prepared everything.
        output: folder of the run.
        keep: how many checkpoints to keep.
        trained: the trained parameters by name.
        average: a diffusers ``EMAModel``, or None.
        identity: see ``identity``.
    """

    def __init__(
        self,
        accelerator: Any,
        output: Path,
        keep: int,
        trained: dict[str, nn.Parameter],
        average: Any,
        identity: dict[str, Any],
    ) -> None:
        self._accelerator, self._folder, self._keep = accelerator, output / FOLDER, keep
        self._trained, self._average, self._identity = trained, average, identity
        self._hooks = [
            accelerator.register_save_state_pre_hook(self._write_trained),
            accelerator.register_load_state_pre_hook(self._read_trained),
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def save(self, step: int) -> Path:
        """Write the checkpoint after ``step`` steps, then delete the oldest ones.

        Raises:
            OSError: it cannot be written, for example on a full disk; nothing of it is left, and earlier ones stay.
        """
        place = self._folder / name_of(step)
        partial = self._folder / f".{name_of(step)}.partial"
        try:
            with write_errors(place):
                self._write(step, partial, place)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = latest(self._folder.parent)
            told = "There is no earlier one" if kept is None else f"{kept[1]} is kept; the same command resumes from it"
            cause = error.strerror or error
            raise OSError(error.errno, f"the checkpoint of step {step} cannot be written: {cause}. {told}") from error
        if self._accelerator.is_main_process:
            older = sorted(old for old in self._folder.glob("step_*") if old.name < place.name)
            for old in older[: max(0, len(older) - self._keep + 1)]:
                gone = old.with_name(
                    f".{old.name}.partial"
                )  # Never leave half a checkpoint under the name of a complete one.
                shutil.rmtree(gone, ignore_errors=True)
                old.rename(gone)
                shutil.rmtree(gone)
        self._accelerator.wait_for_everyone()
        return place

    def _write(self, step: int, partial: Path, place: Path) -> None:
        accelerator = self._accelerator
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        # Frozen weights are left out. Otherwise, DeepSpeed's files would hold them.
        accelerator.save_state(str(partial), **({"exclude_frozen_parameters": True} if self._deepspeed() else {}))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if self._average is not None:
                torch.save(self._average.state_dict(), partial / AVERAGE)
            (partial / RUN).write_text(json.dumps({"step": step, "identity": self._identity}), encoding="utf-8")
            for file in partial.rglob("*"):
                if file.is_file():
                    with file.open("r+b") as stream:
                        os.fsync(stream.fileno())
            if place.exists():
                shutil.rmtree(place)
            partial.rename(place)

    def load(self, place: Path) -> None:
        """Resume from a checkpoint.

        Raises:
            ValueError: it is from a run with other settings.
        """
        check_identity(place, self._identity)
        self._accelerator.load_state(str(place), **({"load_module_strict": False} if self._deepspeed() else {}))
        if self._average is not None:
            self._average.load_state_dict(torch.load(place / AVERAGE, map_location="cpu", weights_only=True))
            self._average.to(self._accelerator.device)

    def clean(self) -> None:
        """Delete what a killed run left half-written."""
        if self._accelerator.is_main_process:
            for left in self._folder.glob(".step_*.partial"):
                shutil.rmtree(left)

    def _deepspeed(self) -> bool:
        from accelerate import DistributedType

        return bool(self._accelerator.distributed_type == DistributedType.DEEPSPEED)

    def _write_trained(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if not weights:
            return  # FSDP and DeepSpeed write their own.
        weights.clear()
        if self._accelerator.is_main_process:
            from safetensors.torch import save_file

            tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self._trained.items()}
            with whole_file(Path(folder) / TRAINED) as beside:
                save_file(tensors, beside)

    def _read_trained(self, models: list[nn.Module], folder: str) -> None:
        if not models:
            return
        models.clear()
        from safetensors.torch import load_file

        values = load_file(Path(folder) / TRAINED)
        if values.keys() != self._trained.keys():
            raise ValueError(f"{folder} holds other parameters than this run trains")
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(values[name])
