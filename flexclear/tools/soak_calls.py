"""The random calls of the soak test: a service's requests over days, generated from a seed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flexclear
from flexclear.common.choices import EMBEDDED
from flexclear.common.foreign import from_pretrained
from flexclear.compile import compile_blocks, repeated_blocks
from flexclear.families.target import model_of

PROMPTS = (
    "a red apple on a blue background",
    "a sunflower on a white background",
    "a rocket on a gray background",
    "a mushroom",
    "",
)
RANK = 4


@dataclass(frozen=True)
class Settings:
    """What a soak test runs.

    Attributes:
        model: ``"embedded"``, a folder of a diffusers pipeline, or ``MODULE:NAME``, a function that returns one.
        seed: seed of sizes, radii, prompts, adapters and noise.
        backend: as in ``flexclear.transform``.
        compile: compile the blocks; adapters are then swapped in place (hot swap).
        compile_backend: backend of ``torch.compile``.
        sizes: number of different (height, width) pairs.
        largest: largest side in pixels.
        radii: window radii in tokens.
        text_lens: values of ``max_sequence_length``.
        lora: swap LoRA adapters (needs peft).
        device: device to run on.
        threads: CPU threads of this process, so that the fresh one can use as many; None: unchanged.
    """

    model: str = EMBEDDED
    seed: int = 0
    backend: str = "auto"
    compile: bool = False
    compile_backend: str = "inductor"
    sizes: int = 8
    largest: int = 192
    radii: tuple[int, ...] = (2, 3, 5, 8)
    text_lens: tuple[int, ...] = (16, 32)
    lora: bool = True
    device: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True)
class Call:
    """One call: an image with these settings, or an attempt that ``stop`` ends after the first step."""

    number: int
    height: int
    width: int
    r: int
    prompt: str
    text_len: int
    steps: int
    lora: int | None
    seed: int
    stop: bool


class Stopped(Exception):
    """Raised in a step callback to interrupt a call."""


def load(settings: Settings) -> Any:
    """Load the pipeline, not transformed yet, without its progress bar.

    Raises:
        ValueError: ``settings.model`` is neither a folder nor a function that can be imported.
    """
    if settings.model == EMBEDDED:
        from flexclear import embedded

        pipe: Any = embedded.pipeline()
    elif Path(settings.model).is_dir():
        from diffusers import DiffusionPipeline

        pipe = from_pretrained(DiffusionPipeline, settings.model, local_files_only=True)
    else:
        module, _, name = settings.model.partition(":")
        sys.path.insert(0, str(Path.cwd()))
        try:
            pipe = getattr(importlib.import_module(module), name)()
        except Exception as error:  # It is the user's function, and may raise anything.
            raise ValueError(
                f"the model must be {EMBEDDED!r}, a folder or MODULE:NAME; {settings.model!r} cannot be loaded: {error}"
            ) from error
        finally:
            sys.path.pop(0)
    pipe = pipe.to(settings.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def can_swap_lora(pipe: Any) -> bool:
    """Whether adapters can be loaded into the pipeline here."""
    return hasattr(pipe, "load_lora_weights") and importlib.util.find_spec("peft") is not None


def set_up(pipe: Any, settings: Settings) -> None:
    """Do what a service does once: transform, make room for adapters, compile."""
    flexclear.transform(pipe, r=settings.radii[0], backend=settings.backend)
    if settings.compile:
        if settings.lora:
            pipe.load_lora_weights(adapter(pipe, None), adapter_name="soak")
        compile_blocks(model_of(pipe), backend=settings.compile_backend)


def calls(settings: Settings, px: int) -> Iterator[Call]:
    """An endless stream of random calls, the same for the same settings.

    Args:
        settings: sizes, radii, text lengths, seed.
        px: number of pixels that must divide height and width.
    """
    rng = random.Random(settings.seed)
    sides = range(4, max(settings.largest // px, 5) + 1)
    sizes = [(px * rng.choice(sides), px * rng.choice(sides)) for _ in range(settings.sizes)]
    number, lora = 0, None
    while True:
        height, width = rng.choice(sizes)
        if settings.lora and rng.random() < 0.3:
            lora = rng.choice([None, rng.randrange(1000)])
        yield Call(
            number=number,
            height=height,
            width=width,
            r=rng.choice(settings.radii),
            prompt=rng.choice(PROMPTS),
            text_len=rng.choice(settings.text_lens),
            steps=rng.choice((1, 2)),
            lora=lora,
            seed=rng.randrange(1 << 30),
            stop=rng.random() < 0.1,
        )
        number += 1


def adapter(pipe: Any, seed: int | None) -> dict[str, Tensor]:
    """A LoRA with random weights for the projections of every block; ``seed`` None: one that changes nothing."""
    model = model_of(pipe)
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(seed or 0)
    inside = {id(module) for block in repeated_blocks(model) for module in block.modules()}
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        linear = getattr(module, "base_layer", module)
        if id(module) not in inside or not isinstance(linear, nn.Linear) or not name.endswith(("to_q", "to_k", "to_v")):
            continue
        down = torch.randn(RANK, linear.in_features, generator=generator) / linear.in_features**0.5
        up = torch.randn(linear.out_features, RANK, generator=generator) * (0.0 if seed is None else 0.5)
        for part, value in (("lora_A", down), ("lora_B", up)):
            weights[f"transformer.{name}.{part}.weight"] = value.to(parameter.device, parameter.dtype)
    return weights


class Swapper:
    """Loads each call's adapter into the pipeline, and removes it again."""

    def __init__(self, pipe: Any, settings: Settings) -> None:
        self._pipe, self._settings = pipe, settings
        self._present: int | None = None

    def __call__(self, wanted: int | None) -> None:
        """Swap the adapter unless it is already loaded."""
        if wanted == self._present or not self._settings.lora:
            return
        if self._settings.compile:
            self._pipe.load_lora_weights(adapter(self._pipe, wanted), adapter_name="soak", hotswap=True)
        else:
            if self._present is not None:
                self._pipe.unload_lora_weights()
            if wanted is not None:
                self._pipe.load_lora_weights(adapter(self._pipe, wanted), adapter_name="soak")
        self._present = wanted


def perform(pipe: Any, swap: Swapper, call: Call, settings: Settings) -> Tensor | None:
    """Make one call; return the image ``[1, 3, height, width]`` on the CPU, or None if it was stopped."""
    flexclear.transform(pipe, r=call.r, backend=settings.backend)
    swap(call.lora)
    known = inspect.signature(type(pipe).__call__).parameters
    options: dict[str, Any] = {"max_sequence_length": call.text_len} if "max_sequence_length" in known else {}
    if call.stop and "callback_on_step_end" in known:

        def stop(*_: Any) -> dict[str, Any]:
            raise Stopped

        options["callback_on_step_end"] = stop
    try:
        return pipe(
            prompt=call.prompt,
            height=call.height,
            width=call.width,
            num_inference_steps=call.steps,
            generator=torch.Generator().manual_seed(call.seed),
            output_type="pt",
            **options,
        ).images.cpu()
    except Stopped:
        return None
