"""The distillation itself: a student that attends locally learns from its dense self (method, section 5)."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from flexclear.common.choices import EMBEDDED
from flexclear.common.stopping import StopFlag
from flexclear.convert import transform
from flexclear.distill import checkpoints as files
from flexclear.distill import records
from flexclear.distill.batches import Batch, BatchMaker, held_out_batches, held_out_indices
from flexclear.distill.config import DistillConfig
from flexclear.distill.losses import Losses, Objective
from flexclear.distill.model_state import as_found, start_from, write_lora, write_weights
from flexclear.distill.models import load_pipeline
from flexclear.distill.optimizers import make_optimizer
from flexclear.distill.preparing import Prepared, prepare
from flexclear.distill.processes import DTYPES, check_accelerator, check_precision, make_accelerator
from flexclear.distill.records import HELD_OUT, LORA, LOSSES, SHEETS, WEIGHTS, Record
from flexclear.distill.samples import Samples
from flexclear.distill.sharding import clip, fill, follow, gather, loaded_whole, sharding_of, window_like
from flexclear.distill.sheets import draw, write_sheet
from flexclear.distill.students import add_lora, make_teacher, merge_lora, trained_parameters
from flexclear.families.target import model_of
from flexclear.runtime.hooks import entry_hook_of

OnStep = Callable[[Record], None]


@dataclass(frozen=True)
class Distilled:
    """The result of a run.

    Attributes:
        steps: optimizer steps done, including those of earlier runs that this one resumed.
        weights: the file for ``flexclear.load_weights``; None if the run was interrupted; a checkpoint is kept.
        losses: this run's records in ``losses.jsonl``, one per step.
        held_out: this run's records in ``held_out.jsonl``.
    """

    steps: int
    weights: Path | None
    losses: tuple[Record, ...]
    held_out: tuple[Record, ...]

    @property
    def interrupted(self) -> bool:
        return self.weights is None


def distill(
    model_or_pipe: Any = None,
    config: DistillConfig | None = None,
    data: Samples | None = None,
    *,
    accelerator: Any = None,
    on_step: OnStep = lambda record: None,
    say: Callable[[str], None] = lambda text: None,
) -> Distilled:
    """Train a model's attention to match its dense self under a window. A run that was stopped resumes.

    >>> distill(pipe, DistillConfig(output=Path("runs/r16"), data=Path("cache"), r=16))     # doctest: +SKIP

    Args:
        model_or_pipe: the teacher, or a pipeline with it. It becomes the student in place: transformed as in the settings,
            unless it already is, and with the trained weights at the end. None: the model that ``config.model`` names.
        config: the settings.
        data: samples to use instead of those that ``config.data`` names.
        accelerator: an ``accelerate.Accelerator``; by default one is made from the settings and accelerate's own
            configuration.
        on_step: called with each step's record on the main process.
        say: called with messages for the user.

    SIGTERM and Ctrl-C let the current step finish, write a checkpoint and end the run.

    Returns:
        The result. ``config.output`` then holds the weights file, ``losses.jsonl``, ``held_out.jsonl``, and checkpoints.

    Raises:
        FloatingPointError: a loss, a gradient or a trained parameter is not finite. Checkpoints only ever hold finite weights.
        OSError: a file cannot be written, for example on a full disk; the last checkpoint is kept.
        Others: see ``prepare``.
    """
    if config is None:
        raise TypeError("distill needs its settings: distill(pipe, DistillConfig(output=...), data)")
    ready = prepare(config, model_or_pipe, data, say)
    accelerator = make_accelerator(config) if accelerator is None else accelerator
    check_accelerator(accelerator, config)
    if model_or_pipe is None:
        assert config.model is not None
        assert ready.folder is not None
        dtype = DTYPES[accelerator.mixed_precision]
        with loaded_whole(accelerator):
            model_or_pipe = load_pipeline(config.model, ready.folder, dtype, bool(config.sheets.every))
    model = model_of(model_or_pipe)
    check_precision(accelerator, cast(torch.dtype, model.dtype))
    if entry_hook_of(model) is None:
        mechanism = config.mechanism
        if mechanism is None:
            transform(
                model_or_pipe,
                config.radius,
                frame_radius=config.frame_radius,
                down_factor=config.down_factor,
                backend=config.backend,
            )
        else:
            transform(model_or_pipe, attention=mechanism, backend=config.backend)
    with as_found(model):
        return _Run(model_or_pipe, config, ready, accelerator, on_step, say).run()


class _Run:
    def __init__(
        self, model_or_pipe: Any, config: DistillConfig, ready: Prepared, accelerator: Any, on_step: OnStep, say: Any
    ) -> None:
        self.pipe = None if isinstance(model_or_pipe, nn.Module) else model_or_pipe
        self.model: Any = model_of(model_or_pipe)
        self.config, self.ready, self.accelerator = config, ready, accelerator
        self.on_step, self.say = on_step, say
        self.device = accelerator.device
        self.dtype = cast(torch.dtype, self.model.dtype)
        precision = accelerator.mixed_precision
        self.compute = self.dtype if precision == "no" else DTYPES[precision]
        self.stop = StopFlag()
        self._build()

    def _build(self) -> None:
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        config, model, accelerator = self.config, self.model, self.accelerator
        projections = trained_parameters(model)
        own = () if config.train == "lora" and config.initial_weights is None else projections.values()
        self.teacher = make_teacher(model, own if config.teacher == "shared" else None)
        if config.initial_weights is not None:
            start_from(model, config.initial_weights)
            projections = trained_parameters(model)
        models = files.models_of_run(accelerator, model, self.teacher)
        model.requires_grad_(False)
        self.trained = (
            add_lora(model, config.lora.rank, config.lora.alpha, config.seed) if config.train == "lora" else projections
        )
        for parameter in self.trained.values():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        model.train()
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.parameters = list(self.trained.values())
        optimizer = make_optimizer(config.optimizer, self.parameters)
        schedule = get_scheduler(
            config.optimizer.schedule,
            optimizer,
            num_warmup_steps=config.optimizer.warmup_steps * accelerator.num_processes,
            num_training_steps=config.steps * accelerator.num_processes,
        )
        model.to(self.device)
        self.teacher.to(self.device)
        self.student, self.optimizer, self.schedule = accelerator.prepare(model, optimizer, schedule)
        self.sharding = sharding_of(accelerator)
        self.trained = follow(self.sharding, model, self.trained)
        self.parameters = list(self.trained.values())
        self.average = None if config.ema is None else EMAModel(self.parameters, decay=config.ema)
        if self.average is not None:
            self.average.to(self.device)
        self.objective = Objective(model, self.teacher, config.losses, config.guidance, accelerator.autocast)
        samples = self.ready.samples
        kept_out = held_out_indices(config.held_out.count, len(samples), config.seed)
        training = sorted(set(range(len(samples))) - set(kept_out))
        embedded = EMBEDDED in (config.model, getattr(samples, "model", None))
        drawn = config.latents == "sample" or (config.latents is None and not embedded)
        self.maker = BatchMaker(samples, training, config.batch_size, config.seed, config.timesteps, drawn)
        self.held_out = held_out_batches(samples, kept_out, config.held_out.batch_size, config.seed, drawn)
        self.accumulation = accelerator.gradient_accumulation_steps
        batches_per_step = self.accumulation * accelerator.num_processes
        self.batches_per_step = batches_per_step
        identity = files.identity(config, batches_per_step * config.batch_size, samples, self.ready.fingerprint, models)
        self.checkpoints = files.Checkpoints(
            accelerator, config.output, config.checkpoints.keep, self.trained, self.average, identity
        )

    def run(self) -> Distilled:
        config, accelerator = self.config, self.accelerator
        start = self._resume()
        losses: list[Record] = []
        held_out: list[Record] = []
        if config.tracker is not None:
            facts = {"output": str(config.output), "r": config.radius, "attention": config.attention}
            accelerator.init_trackers("flexclear", config=facts)
        try:
            with self.stop, ThreadPoolExecutor(1) as reader:
                if start == 0:
                    self._measure(0, held_out)
                numbers = self._numbers(start)
                ahead = reader.submit(self.maker.make, next(numbers))
                step = saved = start
                while step < config.steps and not self._stopped():
                    record, ahead = self._step(step, ahead, lambda: reader.submit(self.maker.make, next(numbers)))
                    step += 1
                    losses.append(record)
                    self._write(LOSSES, record)
                    if accelerator.is_main_process:
                        self.on_step(record)
                    last = step == config.steps
                    if last or (config.held_out.every and step % config.held_out.every == 0):
                        self._measure(step, held_out)
                    if config.sheets.every and (last or step % config.sheets.every == 0):
                        self._draw(step)
                    if last or step % config.checkpoints.every == 0:
                        self._check_weights(step)
                        self.checkpoints.save(step)
                        saved = step
                ahead.cancel()
                if step < config.steps:
                    if saved < step:
                        self._check_weights(step)
                        self.checkpoints.save(step)
                    self.say(f"interrupted after {step} of {config.steps} steps; the same command resumes there")
                    return Distilled(step, None, tuple(losses), tuple(held_out))
            return Distilled(step, self._output(), tuple(losses), tuple(held_out))
        finally:
            self.checkpoints.close()
            if config.tracker is not None:
                accelerator.end_training()
            accelerator.free_memory()

    def _numbers(self, start: int) -> Iterator[int]:
        """Numbers of this process's batches, starting with those of step ``start``."""
        number = start * self.batches_per_step + self.accelerator.process_index
        while True:
            yield number
            number += self.accelerator.num_processes

    def _step(self, step: int, ahead: Any, read: Callable[[], Any]) -> tuple[Record, Any]:
        accelerator, begin = self.accelerator, time.perf_counter()
        sums: dict[str, torch.Tensor] = {}
        norm: float | None = None
        rate = self.schedule.get_last_lr()[0]
        for _ in range(self.accumulation):
            batch, ahead = ahead.result(), read()
            with accelerator.accumulate(self.student):
                losses = self._losses(batch)
                if not bool(torch.isfinite(losses.total)):
                    raise self._not_finite(f"the loss of step {step + 1} is {losses.total.item()}")
                accelerator.backward(losses.total)
                if accelerator.sync_gradients and self.config.max_grad_norm:
                    norm = clip(accelerator, self.sharding, self.student, self.parameters, self.config.max_grad_norm)
                    # In float16 the scaler skips such a step by itself and tries a smaller scale.
                    if not math.isfinite(norm) and accelerator.mixed_precision != "fp16":
                        raise self._not_finite(f"the gradient norm of step {step + 1} is {norm}")
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            for name, value in losses.values().items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / self.accumulation
        if self.average is not None:
            self.average.step(self.parameters)
        means = {name: accelerator.reduce(value, reduction="mean").item() for name, value in sums.items()}
        record: Record = {"step": step + 1, **means, "learning_rate": rate}
        if norm is not None and math.isfinite(norm):  # JSON has no other numbers
            record["gradient_norm"] = norm
        if self.config.tracker is not None:
            accelerator.log(record, step=step + 1)
        return {**record, "seconds": time.perf_counter() - begin}, ahead

    def _not_finite(self, found: str) -> FloatingPointError:
        kept = files.latest(self.config.output)
        told = "there is no checkpoint yet" if kept is None else f"{kept[1]} is kept"
        return FloatingPointError(f"{found}: a lower learning rate or max_grad_norm may help; {told}")

    def _check_weights(self, step: int) -> None:
        """Raise before non-finite weights replace good ones on disk. For sharded weights, the losses show it.

        Raises:
            FloatingPointError: a trained parameter is not finite.
        """
        if not self.sharding and not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            raise self._not_finite(f"a trained parameter is not finite after step {step}")

    def _losses(self, batch: Batch) -> Losses:
        return self.objective(batch.to(self.device, self.compute), self.student)

    @torch.no_grad()
    def _measure(self, step: int, kept: list[Record]) -> None:
        """Measure the losses on the held-out samples, averaged over samples."""
        if not self.held_out:
            return
        sums: dict[str, float] = {}
        with self._averaged():
            for batch in self.held_out:
                for name, value in self._losses(batch).values().items():
                    sums[name] = sums.get(name, 0.0) + value.item() * len(batch.sigmas)
        count = sum(len(batch.sigmas) for batch in self.held_out)
        record: Record = {"step": step, **{name: value / count for name, value in sums.items()}}
        if not math.isfinite(record["loss"]):
            raise self._not_finite(f"the loss on the held-out samples after step {step} is {record['loss']}")
        kept.append(record)
        self._write(HELD_OUT, record)
        if self.config.tracker is not None:
            self.accelerator.log({f"held_out/{name}": value for name, value in record.items()}, step=step)

    def _draw(self, step: int) -> None:
        # Sharded weights are gathered only if every process computes with them.
        if self.pipe is None or not (self.accelerator.is_main_process or self.sharding):
            return
        self.pipe.to(self.device)
        with self._averaged(), self.accelerator.autocast():
            pictures = draw(self.pipe, self.config.sheets)
        if self.accelerator.is_main_process:
            write_sheet(pictures, self.config.output / SHEETS / f"{files.name_of(step)}.png")

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Use the averaged weights, if there is an average, inside the block."""
        if self.average is None:
            yield
            return
        self.average.store(self.parameters)
        try:
            self.average.copy_to(self.parameters)
            yield
        finally:
            self.average.restore(self.parameters)

    def _output(self) -> Path:
        """Write the trained weights and leave them in the model, in its own type. Sharded weights are only written."""
        accelerator, path = self.accelerator, self.config.output / WEIGHTS
        accelerator.wait_for_everyone()
        if self.sharding:
            gathered = gather(accelerator, self.sharding, self.student, self.model)
            if accelerator.is_main_process:
                self._write_gathered(gathered, path)
        else:
            if self.average is not None:
                self.average.copy_to(self.parameters)
            self._merge(self.model)
            for parameter in self.parameters:
                parameter.data = parameter.data.to(self.dtype)
            if accelerator.is_main_process:
                write_weights(self.model, path)
        accelerator.wait_for_everyone()
        return path

    def _merge(self, model: Any) -> None:
        """Write the LoRA separately, if there is one, and merge it into the base weights."""
        if self.config.train == "lora":
            if self.accelerator.is_main_process:
                write_lora(model, self.config.output / LORA)
            merge_lora(model)

    def _write_gathered(self, gathered: dict[str, torch.Tensor], path: Path) -> None:
        """Write the sharded student's weights through the teacher, which is whole and no longer needed."""
        model: Any = self.teacher
        window_like(model, self.model)
        if self.config.train == "lora":
            add_lora(model, self.config.lora.rank, self.config.lora.alpha, self.config.seed)
        fill(model, gathered)
        self._merge(model)
        write_weights(model, path)

    def _resume(self) -> int:
        found = files.latest(self.config.output)
        self.checkpoints.clean()
        if found is None:
            step = 0
        else:
            step, place = found
            if step > self.config.steps:
                raise ValueError(f"{place} has {step} steps already, but steps is {self.config.steps}")
            self.checkpoints.load(place)
            self.say(f"resuming from step {step} ({place})")
        if self.accelerator.is_main_process:
            self.config.output.mkdir(parents=True, exist_ok=True)
            for name in (LOSSES, HELD_OUT):
                records.cut(self.config.output / name, step if found else -1)
        self.accelerator.wait_for_everyone()
        return step

    def _write(self, name: str, record: Record) -> None:
        if self.accelerator.is_main_process:
            records.append(self.config.output / name, record)

    def _stopped(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.stop()
        told = torch.tensor(float(self.stop()), device=self.device)
        return bool(self.accelerator.reduce(told, reduction="sum").item())
