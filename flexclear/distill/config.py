"""Settings of a distillation: a YAML file read into dataclasses. Every mistake is reported before anything runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexclear.alternatives.names import named
from flexclear.common.choices import ALL_FRAMES, BACKENDS
from flexclear.common.settings import build, check_number, check_one_of, check_values, check_whole, read_settings_file
from flexclear.masks import Disc, Downsampled
from flexclear.runtime.mechanism import Formula, Mechanism

TRAIN = ("projections", "lora")
TEACHERS = ("shared", "copy")
OPTIMIZERS = ("adamw", "prodigy")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
SAMPLINGS = ("uniform", "logit_normal", "mode")
PRECISIONS = ("no", "bf16", "fp16")
LATENTS = ("sample", "mean")
TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the three losses (method, section 5). 0 switches a loss off, along with everything that only it needs.

    Attributes:
        flow: against noise - latent.
        prediction: against the teacher's prediction.
        attention: against the teacher's attention outputs.
        attention_every: the layers that are compared: single-stream ones whose number among all attention layers, counted from
            0, is a multiple of it; see ``compared_layers``.
    """

    flow: float = 1.0
    prediction: float = 0.5
    attention: float = 0.5
    attention_every: int = 4

    def check(self) -> None:
        for name in ("flow", "prediction", "attention"):
            check_number(f"losses.{name}", getattr(self, name), 0)
        check_whole("losses.attention_every", self.attention_every, 1)
        if not (self.flow or self.prediction or self.attention):
            raise ValueError("losses: all three weights are 0, so there is nothing to learn from")


@dataclass(frozen=True)
class OptimizerConfig:
    """Attributes:
    name: ``"prodigy"`` (package prodigyopt) or ``"adamw"``.
    learning_rate: None: 1 for Prodigy, which multiplies its estimated step size by it; 1e-4 for AdamW.
    betas, epsilon, weight_decay: for both; the decay is decoupled from the gradient.
    use_bias_correction, safeguard_warmup: Prodigy's, named as in its package. On, as published; its own default is off.
    schedule, warmup_steps: for the learning rate, named as in diffusers.
    """

    name: str = "prodigy"
    learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    epsilon: float = 1e-8
    use_bias_correction: bool = True
    safeguard_warmup: bool = True
    schedule: str = "constant"
    warmup_steps: int = 0

    @property
    def rate(self) -> float:
        return (1.0 if self.name == "prodigy" else 1e-4) if self.learning_rate is None else self.learning_rate

    def check(self) -> None:
        check_one_of("optimizer.name", self.name, OPTIMIZERS)
        check_one_of("optimizer.schedule", self.schedule, SCHEDULES)
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise ValueError(f"optimizer.learning_rate must be positive and finite, got {self.learning_rate!r}")
        if self.name == "prodigy" and self.rate < 0.1:
            raise ValueError(
                f"optimizer.learning_rate: Prodigy estimates the step size and multiplies it by this, usually 1; "
                f"{self.rate} would hardly train. name: adamw takes rates such as 1e-4"
            )
        for name in ("use_bias_correction", "safeguard_warmup"):
            if self.name != "prodigy" and not getattr(self, name):
                raise ValueError(f"optimizer.{name} is for name: prodigy, not for {self.name}; leave it out")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers from 0 to below 1, got {self.betas!r}")
        check_number("optimizer.weight_decay", self.weight_decay, 0)
        check_number("optimizer.epsilon", self.epsilon, 0)
        check_whole("optimizer.warmup_steps", self.warmup_steps, 0)


@dataclass(frozen=True)
class LoraConfig:
    """For ``train: lora``: rank and alpha of every attention projection's adapter."""

    rank: int = 16
    alpha: int = 16

    def check(self) -> None:
        check_whole("lora.rank", self.rank, 1)
        check_whole("lora.alpha", self.alpha, 1)


@dataclass(frozen=True)
class TimestepConfig:
    """How noise levels are drawn. ``diffusers.training_utils.compute_density_for_timestep_sampling`` takes ``sampling``,
    ``mean``, ``std`` and ``mode_scale``; ``shift`` then shifts the levels."""

    sampling: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0

    def check(self) -> None:
        check_one_of("timesteps.sampling", self.sampling, SAMPLINGS)
        if not self.shift > 0 or not self.std > 0:
            raise ValueError(f"timesteps: shift and std must be positive, got {self.shift!r} and {self.std!r}")


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint after every ``every`` steps and at the end; the last ``keep`` are kept."""

    every: int = 500
    keep: int = 2

    def check(self) -> None:
        check_whole("checkpoints.every", self.every, 1)
        check_whole("checkpoints.keep", self.keep, 1)


@dataclass(frozen=True)
class HeldOutConfig:
    """``count`` samples are kept out of training. Their losses, always with the same noise, are measured before the first
    step, after every ``every`` steps (0: not in between) and after the last one."""

    count: int = 0
    every: int = 0
    batch_size: int = 4

    def check(self) -> None:
        check_whole("held_out.count", self.count, 0)
        check_whole("held_out.every", self.every, 0)
        check_whole("held_out.batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class SheetConfig:
    """Images of ``prompts`` by the student after every ``every`` steps (0: none), drawn by the whole pipeline."""

    every: int = 0
    prompts: tuple[str, ...] = ()
    steps: int = 16
    seed: int = 0
    height: int | None = None
    width: int | None = None

    def check(self) -> None:
        check_whole("sheets.every", self.every, 0)
        check_whole("sheets.steps", self.steps, 1)
        for name in ("height", "width"):
            if (side := getattr(self, name)) is not None:
                check_whole(f"sheets.{name}", side, 1)
        if self.every and not self.prompts:
            raise ValueError("sheets.every is set, and sheets.prompts names nothing to draw")


@dataclass(frozen=True)
class DistillConfig:
    """A distillation (method, section 5). The defaults are the published settings.

    Settings that depend on the machine are left out: ``gradient_accumulation`` (published: 4 on each of 4 GPUs, 32 images in
    total), ``mixed_precision`` (bf16), ``gradient_checkpointing`` (on) and accelerate's own configuration (DeepSpeed's ZeRO
    stage 2).

    Attributes:
        output: folder for checkpoints, losses and the weights file.
        model: pipeline folder, hub id, or ``"embedded"``; not needed if a pipeline is passed.
        data: folder from ``flexclear data cache``, or images with captions in the form that this command takes, which one
            process encodes into ``output/cache`` first; not needed if samples are passed.
        r, frame_radius, down_factor, backend, attention: as in ``flexclear.transform``, for a model that is not transformed;
            ``sizes`` are those of ``attention``. r None: 16.
        initial_weights: a weights file that the student starts from, or None for the teacher's weights.
        train: ``"projections"``, including pooling weights, or ``"lora"``.
        teacher: ``"shared"``: it shares the student's frozen weights; ``"copy"``: a separate model, for sharding (FSDP).
        steps: optimizer steps.
        batch_size: images per device and forward pass.
        gradient_accumulation: forward passes per step and device; None: what accelerate's own configuration says.
        max_grad_norm: gradients are clipped to it; 0: no clipping.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; None: what accelerate's own configuration says. Frozen
            weights are loaded in that type, trained ones are kept in float32.
        guidance: fed to teacher and student if they have a guidance embedding.
        latents: ``"sample"``: sampled from the VAE's moments, as published; ``"mean"``: their means. None: sampled, except for
            the embedded model, which was trained on the means and whose VAE has meaningless variances.
        ema: decay of a moving average of the trained weights, which is written instead of them; None: no average.
        seed: of data order, noise and noise levels.
        tracker: ``"tensorboard"``, ``"wandb"`` or None.
        device: ``"cpu"``, or None for what accelerate chooses.
    """

    output: Path
    model: str | None = None
    data: Path | None = None
    r: int | None = None
    frame_radius: int | str | None = None
    down_factor: int | None = None
    backend: str = "auto"
    attention: str = "clear"
    sizes: dict[str, int] = field(default_factory=dict)
    initial_weights: Path | None = None
    train: str = "projections"
    teacher: str = "shared"
    steps: int = 10_000
    batch_size: int = 2
    gradient_accumulation: int | None = None
    max_grad_norm: float = 1.0
    mixed_precision: str | None = None
    gradient_checkpointing: bool = False
    guidance: float = 3.5
    latents: str | None = None
    ema: float | None = None
    seed: int = 0
    tracker: str | None = None
    device: str | None = None
    losses: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    sheets: SheetConfig = field(default_factory=SheetConfig)

    @property
    def radius(self) -> int:
        return 16 if self.r is None else self.r

    @property
    def mechanism(self) -> Mechanism | None:
        """The mechanism that ``attention`` and ``sizes`` name; None: CLEAR's windows.

        Raises:
            TypeError, ValueError: they name nothing.
        """
        return named(self.attention, **self.sizes)

    def check(self) -> None:
        """Check everything that can be known from the settings alone.

        Raises:
            TypeError, ValueError, FileNotFoundError: a setting is invalid; the message begins with its name.
        """
        check_values(self)
        mechanism = self.mechanism
        if mechanism is not None and (self.r is not None or self.down_factor is not None):
            raise ValueError(f"r and down_factor are for attention: clear; leave them out for {self.attention}")
        if isinstance(mechanism, Formula) and self.initial_weights is not None:
            raise ValueError(f"initial_weights are for windows; attention: {self.attention} has its own formula")
        Disc(self.radius)
        if self.down_factor is not None:
            Downsampled(Disc(self.radius), self.down_factor)
        if isinstance(self.frame_radius, str) and self.frame_radius != ALL_FRAMES:
            raise ValueError(f"frame_radius must be a number of frames or {ALL_FRAMES!r}, got {self.frame_radius!r}")
        check_one_of("backend", self.backend, BACKENDS)
        check_one_of("train", self.train, TRAIN)
        check_one_of("teacher", self.teacher, TEACHERS)
        if self.mixed_precision is not None:
            check_one_of("mixed_precision", self.mixed_precision, PRECISIONS)
        if self.latents is not None:
            check_one_of("latents", self.latents, LATENTS)
        if self.tracker is not None:
            check_one_of("tracker", self.tracker, TRACKERS)
        if self.device not in (None, "cpu"):
            raise ValueError(f"device must be 'cpu' or left out: accelerate chooses the GPU; got {self.device!r}")
        check_whole("steps", self.steps, 1)
        check_whole("batch_size", self.batch_size, 1)
        if self.gradient_accumulation is not None:
            check_whole("gradient_accumulation", self.gradient_accumulation, 1)
        check_number("max_grad_norm", self.max_grad_norm, 0)
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be a decay between 0 and 1, got {self.ema!r}")
        if self.initial_weights is not None and not self.initial_weights.is_file():
            raise FileNotFoundError(f"initial_weights: no file {self.initial_weights}")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output must be a folder, but {self.output} is a file")
        for part in dataclasses.fields(self):
            value: Any = getattr(self, part.name)
            if hasattr(value, "check"):
                value.check()


def read_config(path: str | Path) -> DistillConfig:
    """Read and check the settings of a YAML file. Relative paths in it are relative to the file.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: it is not valid YAML, has unknown settings, lacks some, or one is invalid.
    """

    def made(found: Mapping[str, Any], folder: Path) -> DistillConfig:
        config = from_mapping(found, folder)
        for name in ("model", "data"):
            if getattr(config, name) is None:
                raise ValueError(f"{name} is missing")
        config.check()
        return config

    return read_settings_file(path, made)


def from_mapping(found: Mapping[str, Any], folder: Path | None = None) -> DistillConfig:
    """Make unchecked settings from parsed YAML or JSON.

    Raises:
        TypeError, ValueError: settings are unknown, missing, or of another type.
    """
    config = build(DistillConfig, found, "")
    if folder is None:
        return config
    places = {
        name: folder / value.expanduser()
        for name in ("output", "data", "initial_weights")
        if (value := getattr(config, name)) is not None
    }
    if config.model is not None and config.model.startswith((".", "~")):
        places["model"] = str(folder / Path(config.model).expanduser())
    return dataclasses.replace(config, **places)


def as_mapping(config: DistillConfig) -> dict[str, Any]:
    """Return the settings in a form that JSON can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))
