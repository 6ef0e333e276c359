"""``flexclear generate``: images from a pipeline, windowed and quantised as asked, each with its settings and times.

Everything that can be wrong is looked for before a weight is read: ``check``. Then ``load``, then ``draw``;
``generate`` is all three.
"""

from __future__ import annotations

import inspect
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flexclear.common.choices import EMBEDDED, parse_size
from flexclear.common.foreign import from_pretrained
from flexclear.common.versions import versions
from flexclear.generation.check import Setup, check, check_sizes, loading
from flexclear.generation.clips import check_clip, draws_videos, format_of, fps_of
from flexclear.generation.resuming import find_finished
from flexclear.generation.settings import DENSE, GenerateSettings, parse_radius, read_prompts
from flexclear.images.files import png_bytes, slug
from flexclear.images.videos import video_content
from flexclear.masks import Disc, Downsampled

__all__ = [
    "Drawn",
    "GenerateSettings",
    "Setup",
    "check",
    "draw",
    "generate",
    "load",
    "parse_radius",
    "parse_size",
    "read_prompts",
]

EMBEDDED_DEFAULTS = {"num_inference_steps": 16, "max_sequence_length": 64}
"""Of the embedded pipeline, where FLUX.1's own defaults take longer and draw nothing better."""

RADIUS = 16
"""Of the window unless told otherwise."""

Say = Callable[[str], None]
OnStep = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Drawn:
    """One image or video on disk.

    Attributes:
        path: the file, or the folder of a video's frames.
        prompt, height, width, seed, steps: what it is.
        seconds: of the pipeline's call, from prompt to image; a first one holds what is compiled in it.
        step_seconds: of each denoising step but the first.
        peak_memory_bytes: of the CUDA device's allocator while this image was drawn; None on other devices.
        frames: of a video; None of an image.
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

    @property
    def median_step_seconds(self) -> float | None:
        """None where there is one step only."""
        return statistics.median(self.step_seconds) if self.step_seconds else None

    def as_json(self) -> str:
        """All of it on one line."""
        told = {
            **asdict(self),
            "path": str(self.path),
            "seconds_per_step": self.seconds / self.steps,
            "median_step_seconds": self.median_step_seconds,
        }
        return json.dumps(told)


def load(settings: GenerateSettings, setup: Setup, say: Say = lambda text: None) -> Any:
    """The pipeline, ready to draw: loaded, moved, transformed, with its weights, quantised, compiled.

    Raises:
        OSError: it cannot be loaded.
        TypeError, ValueError: the parts do not fit each other.
    """
    with loading(settings.model):
        if settings.model == EMBEDDED:
            from flexclear.embedded import pipeline

            pipe: Any = pipeline(setup.dtype)
        else:
            from diffusers import DiffusionPipeline

            pipe = from_pretrained(DiffusionPipeline, setup.folder, setup.dtype)
    check_sizes(pipe, settings)
    if draws_videos(type(pipe)):
        # Wan 2.2's may have either transformer alone.
        model = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
        check_clip(pipe, getattr(model, "config", {}), settings)
    pipe.set_progress_bar_config(disable=True)
    if settings.r != DENSE:
        _window(pipe, settings, setup, say)
    if setup.recipe is not None:
        from flexclear.compile import quantize
        from flexclear.families.target import models_of

        try:
            # Before the pipeline is moved: the original weights need not fit the device.
            reports = [
                quantize(model, setup.recipe, min_features=_min_features(settings), device=setup.device)
                for model in models_of(pipe)
            ]
        except ValueError as error:
            hint = f". --min-features (now {_min_features(settings)}) says what is tiny" if "tiny" in str(error) else ""
            raise ValueError(f"{error}{hint}") from error
        for report in reports:
            say(str(report))
    pipe.to(setup.device)
    if settings.parallel:
        from flexclear import parallel

        if settings.r == DENSE:
            parallel.enable_dense(pipe)
        else:
            parallel.enable(pipe, text=settings.text, exchange=settings.exchange)
    if settings.compile:
        from flexclear.optimization import optimize

        optimize(pipe, progress=False)
    return pipe


def _min_features(settings: GenerateSettings) -> int:
    from flexclear.compile.quantize import MIN_FEATURES

    return MIN_FEATURES if settings.min_features is None else settings.min_features


def _window(pipe: Any, settings: GenerateSettings, setup: Setup, say: Say) -> None:
    from flexclear.convert import transform
    from flexclear.weights import load_weights

    r, down_factor, frame_radius = settings.r, settings.down_factor, settings.frame_radius
    asked = setup.weights is None or r is not None
    options: dict[str, Any] = {"backend": settings.backend, "frame_radius": frame_radius}
    if asked:
        transform(pipe, RADIUS if r is None else r, down_factor=down_factor, **options)  # type: ignore[arg-type]
    if setup.weights is None:
        return
    with warnings.catch_warnings():
        if asked:
            warnings.filterwarnings("ignore", message=".*was trained for another window than the model has")
        loaded = load_weights(pipe, setup.weights)
    say(f"weights {setup.weights.name}: {loaded.tensors} tensors for {_window_names(pipe)}")
    if asked:
        # The file's window came with it; this one was asked for. Pooling weights stay where the factor is the same.
        factor = loaded.down_factor if down_factor is None else down_factor
        transform(pipe, r, down_factor=factor, **options)  # type: ignore[arg-type]
        if loaded.radius is not None and loaded.radius != r:
            say(f"these weights were trained for r = {loaded.radius} and run with r = {r}, as asked")
    elif settings.backend != "auto":
        transform(pipe, _windows(pipe), backend=settings.backend)


def _windows(pipe: Any) -> dict[Any, Any]:
    from flexclear.families.target import models_of
    from flexclear.runtime.hooks import entry_hook_of

    # A second transformer has those of the first.
    entry = entry_hook_of(models_of(pipe)[0]) if hasattr(pipe, "transformer") else None
    return {} if entry is None else dict(entry.settings.windows)


def _window_names(pipe: Any) -> str:
    names = dict.fromkeys("dense" if window is None else window.name for window in _windows(pipe).values())
    return ", ".join(names) or DENSE


def draw(
    pipe: Any,
    settings: GenerateSettings,
    setup: Setup,
    on_step: OnStep = lambda picture, step, steps: None,
    on_kept: Callable[[Path], None] = lambda path: None,
) -> Iterator[Drawn]:
    """Draw and write one image after the other; what was yielded is on disk. Of several processes that share images
    (``parallel``), the first one writes and yields.

    Args:
        pipe: of ``load``.
        settings: what to draw.
        setup: of ``check``.
        on_step: called after each denoising step with the image's number from 1, the step's number from 1, and all
            steps of the image.
        on_kept: called with the path of each image of the set that is finished already (``resume``), before the first
            one is drawn.

    Raises:
        ValueError: the pipeline has no such option, or cannot draw this; or ``resume``, and the images there are of
            other sets.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    video = draws_videos(type(pipe))
    if settings.model == EMBEDDED:
        defaults |= EMBEDDED_DEFAULTS
    fixed = _call_arguments(type(pipe).__name__, settings, defaults)
    common = _metadata(pipe, settings, setup, {**defaults, **fixed})
    synchronize = torch.cuda.synchronize if setup.device.type == "cuda" else lambda device: None
    combinations = list(itertools.product(settings.prompts, settings.sizes or (None,), settings.seeds))
    target = setup.target
    kept: dict[int, Path] = {}
    if settings.resume:
        wanted = [
            {
                "prompt": prompt,
                **({} if size is None else {"height": size[0], "width": size[1]}),
                "seed": seed,
                **common,
            }
            for prompt, size, seed in combinations
        ]
        kept, target = find_finished(target, wanted, versions())
        for path in kept.values():
            on_kept(path)
    for number, (prompt, size, seed) in enumerate(combinations, 1):
        if number in kept:
            continue
        ends: list[float] = []

        def ended(step: int, steps: int, ends: list[float] = ends, number: int = number) -> None:
            synchronize(setup.device)
            ends.append(time.perf_counter())
            on_step(number, step, steps)

        def step_end(pipe: Any, step: int, timestep: Any, tensors: dict, ended: Callable = ended) -> dict:
            ended(step + 1, fixed["num_inference_steps"])
            return tensors

        if setup.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(setup.device)
        synchronize(setup.device)
        begin = time.perf_counter()
        stages: dict[str, Any] = {}
        if settings.highres:
            picture, stages = _cascade(pipe, settings, prompt, seed, fixed.get("max_sequence_length"), ended)
            pictures = [picture]
        else:
            made = pipe(
                prompt=prompt,
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=step_end,
                **({} if size is None else {"height": size[0], "width": size[1]}),
                **({"output_type": "pil"} if video else {}),
                **fixed,
            )
            pictures = made.frames[0] if video else made.images[:1]
        synchronize(setup.device)
        seconds = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated(setup.device) if setup.device.type == "cuda" else None
        if settings.parallel and torch.distributed.get_rank() != 0:
            continue
        width, height = pictures[0].size
        told = {"prompt": prompt, "height": height, "width": width, "seed": seed, **common, **stages}
        if video:
            content = video_content(format_of(settings), pictures, common["fps"], told, versions())
        else:
            content = png_bytes(pictures[0], told, versions())
        yield Drawn(
            path=target.write(number, prompt, content),
            prompt=prompt,
            height=height,
            width=width,
            seed=seed,
            steps=max(1, len(ends)) if settings.highres else fixed["num_inference_steps"],
            seconds=seconds,
            step_seconds=tuple(b - a for a, b in itertools.pairwise(ends)),
            peak_memory_bytes=peak,
            frames=len(pictures) if video else None,
        )


def _cascade(
    pipe: Any,
    settings: GenerateSettings,
    prompt: str,
    seed: int,
    text_len: int | None,
    ended: Callable[[int, int], None],
) -> tuple[Any, dict[str, Any]]:
    """An image of ``--highres`` and what its file tells of its stages."""
    from flexclear.highres import upscale_cascade

    done = upscale_cascade(
        pipe,
        prompt,
        settings.highres,
        method=settings.highres_method,
        steps=settings.steps,
        strength=settings.strength,
        guidance=settings.guidance,
        shift=settings.shift,
        seed=seed,
        max_sequence_length=text_len,
        folder=None if settings.stages is None else settings.stages / f"{slug(prompt)}_{seed}",
        on_step=lambda stage, step, steps: ended(step, steps),
    )
    stages = [{name: value for name, value in stage.as_json().items() if name != "windows"} for stage in done.stages]
    return done.image, {"stages": stages}


def _call_arguments(kind: str, settings: GenerateSettings, defaults: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's call that all images share.

    Raises:
        ValueError: the pipeline has no such argument.
    """
    asked: dict[str, Any] = {"num_inference_steps": settings.steps, "max_sequence_length": settings.text_len}
    asked |= {"num_frames": settings.num_frames}
    if "frame_rate" in defaults:  # LTX, whose positions in time depend on it
        asked |= {"frame_rate": settings.fps}
    if settings.guidance is not None:
        if defaults.get("guidance_scale", 0) is None and "true_cfg_scale" in defaults:
            # Qwen-Image: guidance is between a prompt and another one, of which there must be some.
            asked |= {"true_cfg_scale": settings.guidance, "negative_prompt": " "}
        else:
            asked["guidance_scale"] = settings.guidance
    given = {name: value for name, value in asked.items() if value is not None}
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise ValueError(f"{kind} has no {', '.join(unknown)}; leave the option out")
    return {name: defaults[name] for name in asked if name in defaults} | given


def _metadata(pipe: Any, settings: GenerateSettings, setup: Setup, arguments: dict[str, Any]) -> dict[str, Any]:
    """The settings that all images share, as they are kept in each file."""
    distinct = set(_windows(pipe).values())
    window = distinct.pop() if len(distinct) == 1 else None
    inner = window.window if isinstance(window, Downsampled) else window
    guidance = "true_cfg_scale" if arguments.get("negative_prompt") else "guidance_scale"
    return {
        "steps": arguments["num_inference_steps"],
        "guidance": arguments.get(guidance),
        **(_highres(settings) if settings.highres else {}),
        "model": settings.model,
        "pipeline": type(pipe).__name__,
        "r": DENSE if settings.r == DENSE else inner.radius if isinstance(inner, Disc) else _asked_radius(settings),
        "down_factor": window.factor if isinstance(window, Downsampled) else None,
        "window": _window_names(pipe),
        "weights": settings.weights,
        "fingerprints": list(setup.fingerprints),
        "recipe": setup.recipe,
        "min_features": _min_features(settings) if setup.recipe else None,
        "text_len": arguments.get("max_sequence_length"),
        "dtype": str(setup.dtype).removeprefix("torch."),
        "device": str(setup.device),
        "backend": None if settings.r == DENSE else settings.backend,
        "compile": settings.compile,
        **(_clip(settings, arguments) if draws_videos(type(pipe)) else {}),
        **(_ranks(settings) if settings.parallel else {}),
    }


def _asked_radius(settings: GenerateSettings) -> int | str | None:
    """The radius of a video's window, which has others in further frames; None where the weights file says it."""
    return RADIUS if settings.r is None and settings.weights is None else settings.r


def _clip(settings: GenerateSettings, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_frames": arguments.get("num_frames"),
        "frame_radius": settings.frame_radius,
        "fps": float(arguments.get("frame_rate") or fps_of(settings)),
        "format": format_of(settings),
    }


def _highres(settings: GenerateSettings) -> dict[str, Any]:
    """What was asked of all stages; None is each stage's own."""
    asked = {
        "sizes": settings.highres,
        "method": settings.highres_method,
        "strength": settings.strength,
        "shift": settings.shift,
    }
    return {"steps": settings.steps, "guidance": settings.guidance, "highres": asked}


def _ranks(settings: GenerateSettings) -> dict[str, Any]:
    return {"ranks": torch.distributed.get_world_size(), "text": settings.text, "exchange": settings.exchange}


def generate(
    settings: GenerateSettings,
    *,
    say: Say = lambda text: None,
    on_step: OnStep = lambda picture, step, steps: None,
) -> Iterator[Drawn]:
    """Check, load, draw; see there. Nothing happens before the first image is asked for.

    Args:
        settings: what to draw.
        say: called with lines for people.
        on_step: see ``draw``.
    """
    setup = check(settings, videos=True)
    yield from draw(load(settings, setup, say), settings, setup, on_step)
