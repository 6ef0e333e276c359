"""``flexclear generate``: images from a pipeline, windowed and quantized as requested, with their settings and times.

``check`` looks for everything that can be wrong before weights are read. Then come ``load`` and ``draw``; ``generate`` does all
three.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flexclear.common.choices import EMBEDDED
from flexclear.common.versions import versions
from flexclear.generation.calls import call_arguments
from flexclear.generation.check import Setup, check
from flexclear.generation.clips import draws_videos, format_of
from flexclear.generation.inputs import Inputs
from flexclear.generation.kinds import parameters_of
from flexclear.generation.loading import Say, load
from flexclear.generation.memory import Peak
from flexclear.generation.metadata import metadata
from flexclear.generation.resuming import find_finished
from flexclear.generation.settings import GenerateSettings
from flexclear.images.files import png_bytes, slug
from flexclear.images.videos import video_content

__all__ = ["Drawn", "GenerateSettings", "Setup", "check", "draw", "generate", "load"]

EMBEDDED_DEFAULTS = {"num_inference_steps": 16, "max_sequence_length": 64}
"""Defaults for the embedded pipeline: FLUX.1's own take longer without improving its images."""

OnStep = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Drawn:
    """One image or video on disk.

    Attributes:
        path: the file, or the folder of a video's frames.
        prompt, height, width, seed, steps: settings of the image.
        seconds: time of the pipeline's call, from prompt to image, including compilation in a first call.
        step_seconds: time of each denoising step but the first.
        peak_memory_bytes: peak of the CUDA device's allocator while this image was drawn; on other devices, of the whole
            process if requested (``memory``), else None.
        peak_memory_of: ``"device"``, ``"process"``, or None.
        frames: number of frames of a video; None for an image.
        batch: number of images that the same call drew; times and memory are those of the call.
    """

    path: Path
    prompt: str
    height: int
    width: int
    seed: int
    steps: int
    seconds: float
    step_seconds: tuple[float, ...]
    peak_memory_bytes: int | None
    frames: int | None = None
    batch: int = 1
    peak_memory_of: str | None = None

    @property
    def median_step_seconds(self) -> float | None:
        """None if there is only one step."""
        return statistics.median(self.step_seconds) if self.step_seconds else None

    def as_json(self) -> str:
        """Everything on one line of JSON."""
        told = {
            **asdict(self),
            "path": str(self.path),
            "seconds_per_step": self.seconds / self.steps,
            "median_step_seconds": self.median_step_seconds,
        }
        return json.dumps(told)


def draw(
    pipe: Any,
    settings: GenerateSettings,
    setup: Setup,
    on_step: OnStep = lambda picture, step, steps: None,
    on_kept: Callable[[Path], None] = lambda path: None,
) -> Iterator[Drawn]:
    """Draw and write the images in order. What was yielded is on disk. If several processes share images (``parallel``),
    only the first one writes and yields.

    Args:
        pipe: from ``load``.
        settings: what to draw.
        setup: from ``check``.
        on_step: called after each denoising step with the image's number from 1 (the last one's in a batch), the step's number
            from 1, and the image's total steps.
        on_kept: called with the path of each already finished image of the set (``resume``), before the first one is drawn.

    Raises:
        ValueError: the pipeline has no such option, or cannot draw this; or, with ``resume``, the existing images belong to
            other sets.
    """
    drawer = Drawer(pipe, settings, setup)
    wishes = wishes_of(settings, setup)
    target = setup.target
    kept: dict[int, Path] = {}
    if settings.resume:
        kept, target = find_finished(target, [{**wish.told, **drawer.told} for wish in wishes], versions())
        for path in kept.values():
            on_kept(path)
    for together in in_calls([wish for wish in wishes if wish.number not in kept], settings.batch):
        for made in drawer.draw(together, on_step):
            yield made.at(target.write(made.wish.number, made.wish.prompt, made.content))


@dataclass(frozen=True)
class Wish:
    """One image of a set: its number from 1, prompt, (height, width) or None for the pipeline's own, and seed."""

    number: int
    prompt: str
    size: tuple[int, int] | None
    seed: int

    @property
    def told(self) -> dict[str, Any]:
        """The settings in its file that are known before it is drawn."""
        size = {} if self.size is None else {"height": self.size[0], "width": self.size[1]}
        return {"prompt": self.prompt, **size, "seed": self.seed}


def wishes_of(settings: GenerateSettings, setup: Setup) -> list[Wish]:
    """The images of a set, in order."""
    sizes = settings.sizes or setup.sizes or (None,)
    combinations = itertools.product(settings.prompts, sizes, settings.seeds)
    return [Wish(number, prompt, size, seed) for number, (prompt, size, seed) in enumerate(combinations, 1)]


def in_calls(wishes: Sequence[Wish], batch: int) -> Iterator[list[Wish]]:
    """Group images into calls: up to ``batch`` consecutive ones of the same size."""
    for _, alike in itertools.groupby(wishes, key=lambda wish: wish.size):
        together = list(alike)
        for first in range(0, len(together), batch):
            yield together[first : first + batch]


@dataclass(frozen=True)
class Made:
    """One image or video that is drawn but not written yet.

    Attributes:
        wish: the request.
        content: contents of its file, or of the files of its folder by name.
        facts: arguments of ``Drawn``, except for the path.
    """

    wish: Wish
    content: bytes | Mapping[str, bytes]
    facts: Mapping[str, Any]

    def at(self, path: Path) -> Drawn:
        """What to report once it is written."""
        return Drawn(path=path, **self.facts)


class Drawer:
    """Draws images of one set with a loaded pipeline.

    Args:
        pipe: from ``load``.
        settings: what to draw.
        setup: from ``check``.

    Attributes:
        told: the settings that all images share, as stored in their files.

    Raises:
        ValueError: the pipeline has no such option.
    """

    def __init__(self, pipe: Any, settings: GenerateSettings, setup: Setup) -> None:
        self._pipe, self._settings, self._setup = pipe, settings, setup
        kind = type(pipe)
        defaults = parameters_of(kind) | (EMBEDDED_DEFAULTS if settings.model == EMBEDDED else {})
        self._fixed = call_arguments(kind, settings, defaults)
        self.told = metadata(pipe, settings, setup, {**defaults, **self._fixed})
        self._inputs = Inputs(kind, settings, setup.control_mode)

    def draw(self, wishes: Sequence[Wish], on_step: OnStep = lambda picture, step, steps: None) -> Iterator[Made]:
        """Draw images of one size in one call. If several processes share images, only the first one yields them.

        Raises:
            ValueError: the pipeline cannot draw this.
        """
        settings, videos = self._settings, draws_videos(type(self._pipe))
        call = _Call(self._pipe, settings, self._setup, wishes, on_step)
        pictures, stages = call.run(self._fixed, self._inputs)
        if settings.parallel and torch.distributed.get_rank() != 0:
            return
        for wish, made in zip(wishes, pictures, strict=True):
            frames = made if videos else [made]
            width, height = frames[0].size
            told = {"prompt": wish.prompt, "height": height, "width": width, "seed": wish.seed, **self.told, **stages}
            if videos:
                content = video_content(format_of(settings), frames, self.told["fps"], told, versions())
            else:
                content = png_bytes(made, told, versions())
            facts = {
                **{name: told[name] for name in ("prompt", "height", "width", "seed")},
                "steps": call.steps,
                "seconds": call.seconds,
                "step_seconds": tuple(b - a for a, b in itertools.pairwise(call.ends)),
                "peak_memory_bytes": call.peak.bytes_seen,
                "peak_memory_of": call.peak.of,
                "frames": len(frames) if videos else None,
                "batch": len(wishes),
            }
            yield Made(wish, content, facts)


class _Call:
    """One call of the pipeline, with its times and its peak of memory.

    Attributes:
        ends: end time of each step.
        steps: number of steps that ran.
        seconds: total time.
        peak: peak memory.
    """

    def __init__(
        self, pipe: Any, settings: GenerateSettings, setup: Setup, wishes: Sequence[Wish], on_step: OnStep
    ) -> None:
        self._pipe, self._settings, self._setup, self._wishes, self._on_step = pipe, settings, setup, wishes, on_step
        self.ends: list[float] = []
        self.steps, self.seconds = 1, 0.0
        self.peak = Peak(setup.device, settings.memory)

    def _wait(self) -> None:
        if self._setup.device.type == "cuda":
            torch.cuda.synchronize(self._setup.device)

    def _ended(self, step: int, steps: int) -> None:
        self._wait()
        self.ends.append(time.perf_counter())
        self._on_step(self._wishes[-1].number, step, steps)

    def run(self, fixed: dict[str, Any], inputs: Inputs) -> tuple[list[Any], dict[str, Any]]:
        """Run the call. Returns images, or lists of frames, and additional settings for their files.

        Args:
            fixed: arguments that all calls share.
            inputs: images to draw from.
        """
        self.peak.begin()
        self._wait()
        begin = time.perf_counter()
        if self._settings.highres:
            [wish] = self._wishes
            picture, stages = _cascade(self._pipe, self._settings, wish, fixed, inputs.image, self._ended)
            pictures: list[Any] = [picture]
            self.steps = max(1, len(self.ends))
        else:
            pictures, stages = self._plain(fixed, inputs), {}
        self._wait()
        self.seconds = time.perf_counter() - begin
        self.peak.end()
        return pictures, stages

    def _plain(self, fixed: dict[str, Any], inputs: Inputs) -> list[Any]:
        has, count = parameters_of(type(self._pipe)), len(self._wishes)
        total = fixed["num_inference_steps"]

        def step_end(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            # When drawing from an image, only some of the steps run.
            ran = getattr(pipe, "_num_timesteps", None) if "strength" in fixed else None
            self._ended(step + 1, ran or total)
            return tensors

        generators = [torch.Generator().manual_seed(wish.seed) for wish in self._wishes]
        prompts = [wish.prompt for wish in self._wishes]
        size, negative = self._wishes[0].size, fixed.get("negative_prompt")
        made = self._pipe(
            prompt=prompts[0] if count == 1 else prompts,
            generator=generators[0] if count == 1 else generators,
            **({"callback_on_step_end": step_end} if "callback_on_step_end" in has else {}),
            **({} if size is None else {"height": size[0], "width": size[1]}),
            **({"output_type": "pil"} if draws_videos(type(self._pipe)) else {}),
            **{**fixed, **({} if negative is None or count == 1 else {"negative_prompt": [negative] * count})},
            **inputs.arguments(size, count),
        )
        self.steps = len(self.ends) if "strength" in fixed and self.ends else total
        return list(made.frames if draws_videos(type(self._pipe)) else made.images)[:count]


def _cascade(
    pipe: Any,
    settings: GenerateSettings,
    wish: Wish,
    fixed: dict[str, Any],
    image: Any,
    ended: Callable[[int, int], None],
) -> tuple[Any, dict[str, Any]]:
    """Draw an image of ``--highres``; return it with the settings of its stages for its file."""
    from flexclear.highres import upscale_cascade

    done = upscale_cascade(
        pipe,
        wish.prompt,
        settings.highres,
        method=settings.highres_method,
        image=image,
        steps=settings.steps,
        strength=settings.strength,
        guidance=settings.guidance,
        shift=settings.shift,
        seed=wish.seed,
        max_sequence_length=fixed.get("max_sequence_length"),
        folder=None if settings.stages is None else settings.stages / f"{slug(wish.prompt)}_{wish.seed}",
        on_step=lambda stage, step, steps: ended(step, steps),
    )
    stages = [{name: value for name, value in stage.as_json().items() if name != "windows"} for stage in done.stages]
    return done.image, {"stages": stages}


def generate(
    settings: GenerateSettings,
    *,
    say: Say = lambda text: None,
    on_step: OnStep = lambda picture, step, steps: None,
) -> Iterator[Drawn]:
    """Call ``check``, ``load`` and ``draw``. Nothing happens before the first image is requested.

    Args:
        settings: what to draw.
        say: called with messages for the user.
        on_step: see ``draw``.
    """
    setup = check(settings, videos=True)
    yield from draw(load(settings, setup, say), settings, setup, on_step)
