"""``flexclear generate``: pictures from a pipeline, windowed and quantised as asked, each with its settings and times.

Everything that can be wrong is looked for before a weight is read: ``check``. Then ``load``, then ``draw``;
``generate`` is all three.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flexclear.attention import BACKENDS
from flexclear.compile.quantize import MIN_FEATURES
from flexclear.families import FAMILIES
from flexclear.masks import Disc, Downsampled
from flexclear.picture_files import Target, png_bytes
from flexclear.versions import versions

EMBEDDED = "embedded"
DENSE = "dense"
BEST = "best"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

EMBEDDED_DEFAULTS = {"num_inference_steps": 16, "max_sequence_length": 64}
"""Of the embedded pipeline, where FLUX.1's own defaults take longer and draw nothing better."""

Say = Callable[[str], None]
OnStep = Callable[[int, int, int], None]


@dataclass(frozen=True)
class GenerateSettings:
    """What to draw and how. Pictures are all combinations of prompts, sizes and seeds, in this order.

    Attributes:
        model: a local pipeline folder, a hub id, or ``"embedded"``.
        prompts: one or more.
        out: a folder, or a ``.png`` file for one picture.
        sizes: (height, width) in pixels; empty: the pipeline's own size.
        seeds: of the noise, which is made on the CPU: the same on every device.
        r: window radius in tokens; ``"dense"``: the plain model; None: what the weights say, or else 16.
        down_factor: side of the pooled cells in tokens, or None.
        weights: for ``flexclear.load_weights``: a file, or ``PLACE:FILE`` in a folder or hub repository.
        recipe: a name of ``flexclear.compile.RECIPES``, ``"best"`` for the best FP8 one here, or None.
        min_features: linears smaller than this are not quantised.
        steps, guidance, text_len: None: the pipeline's own.
        dtype: a name of ``DTYPES``, or ``"auto"``: bfloat16 on CUDA, float32 elsewhere.
        device: as torch names it, or ``"auto"``: CUDA where there is one.
        backend: of ``flexclear.transform``.
        compile: compile the blocks (``flexclear.optimize``); the first picture of each size takes longer.
        overwrite: see ``flexclear.picture_files.Target``.
    """

    model: str
    prompts: tuple[str, ...]
    out: Path
    sizes: tuple[tuple[int, int], ...] = ()
    seeds: tuple[int, ...] = (0,)
    r: int | str | None = None
    down_factor: int | None = None
    weights: str | None = None
    recipe: str | None = None
    min_features: int = MIN_FEATURES
    steps: int | None = None
    guidance: float | None = None
    text_len: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    compile: bool = False
    overwrite: bool = False

    @property
    def pictures(self) -> int:
        return len(self.prompts) * max(1, len(self.sizes)) * len(self.seeds)


@dataclass(frozen=True)
class Setup:
    """What ``check`` has found out: settings with nothing left to choose."""

    folder: str
    device: torch.device
    dtype: torch.dtype
    recipe: str | None
    weights: Path | None
    target: Target


@dataclass(frozen=True)
class Drawn:
    """One picture on disk.

    Attributes:
        path: the file.
        prompt, height, width, seed, steps: what it is.
        seconds: of the pipeline's call, from prompt to picture; a first one holds what is compiled in it.
        step_seconds: of each denoising step but the first.
        peak_memory_bytes: of the CUDA device's allocator while this picture was drawn; None on other devices.
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


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of ``"HxW"``.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"(\d+)\s*[xX×]\s*(\d+)", text.strip())  # noqa: RUF001
    if match is None or 0 in (size := (int(match[1]), int(match[2]))):
        raise ValueError(f"a size is HEIGHTxWIDTH in pixels, such as 1024x768; got {text!r}")
    return size


def parse_radius(text: str) -> int | str:
    """The radius, or ``"dense"``.

    Raises:
        ValueError: it is neither.
    """
    if text == DENSE:
        return text
    try:
        Disc(radius := int(text))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"--r is a window radius of 1 or more tokens, or {DENSE!r} for the plain model; got {text!r}"
        ) from error
    return radius


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt per line of a UTF-8 file; blank lines and lines that begin with ``#`` are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, no UTF-8 text, or holds no prompt.
    """
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(f"--prompts must be a text file, {path} is a folder")
    if not path.exists():
        raise FileNotFoundError(f"--prompts: no file {path}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts must be a UTF-8 text file, {path} is not: {error}") from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise ValueError(f"--prompts {path} holds no prompt, only blank lines and # comments")
    return prompts


def check(settings: GenerateSettings) -> Setup:
    """Everything that can be known before weights are read; makes the folder for the pictures.

    Raises:
        FileNotFoundError: there is no such model or weights file.
        TypeError, ValueError: a setting makes no sense, or does not go with another, the model or the device.
    """
    if not settings.prompts or not all(prompt.strip() for prompt in settings.prompts):
        raise ValueError(f"a prompt is needed for every picture, got {list(settings.prompts)}")
    if settings.backend not in BACKENDS:
        raise ValueError(f"--backend must be one of {list(BACKENDS)}, got {settings.backend!r}")
    dense = settings.r == DENSE
    for name, value in (("weights", settings.weights), ("down-factor", settings.down_factor)):
        if dense and value is not None:
            raise ValueError(f"--{name} {value} is for windowed attention, --r dense is the plain model; leave one out")
    if settings.weights is not None and settings.down_factor is not None and settings.r is None:
        raise ValueError("--weights brings its own window; give --r as well to choose --down-factor yourself")
    if settings.down_factor is not None:
        Downsampled(Disc(1), settings.down_factor)
    device = choose_device(settings.device)
    dtype = _dtype(settings.dtype, device)
    recipe = _recipe(settings.recipe, device, dtype)
    folder = _folder(settings.model)
    _check_model(folder, settings, dense)
    weights = None if settings.weights is None else _weights(settings.weights)
    target = Target.of(settings.out, settings.pictures, settings.overwrite)
    return Setup(folder, device, dtype, recipe, weights, target)


def choose_device(name: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        ValueError: there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ValueError("--device 'meta' holds no numbers, so nothing can be drawn on it")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {['auto', *DTYPES]}, got {name!r}")
    return DTYPES[name]


def _recipe(name: str | None, device: torch.device, dtype: torch.dtype) -> str | None:
    """The recipe's name. ``"best"``: the first FP8 one that runs; ``RECIPES`` has the fastest first."""
    if name is None:
        return None
    from flexclear.compile import RECIPES, runnable_recipes, why_not_recipe

    able = [runs for runs in runnable_recipes(device) if dtype in RECIPES[runs].dtypes]
    if name == BEST:
        eight_bit_floats = [runs for runs in able if runs != "int8"]
        if not eight_bit_floats:
            raise ValueError(f"--fp8: no recipe runs here: {why_not_recipe('weight_only', device)}")
        return eight_bit_floats[0]
    obstacle = why_not_recipe(name, device)
    if obstacle is None and dtype not in RECIPES[name].dtypes:
        wanted = " or ".join(key for key, value in DTYPES.items() if value in RECIPES[name].dtypes)
        obstacle = f"it takes weights of {wanted}, --dtype is {str(dtype).removeprefix('torch.')}"
    if obstacle is not None:
        raise ValueError(f"--recipe {name!r} cannot run here: {obstacle}. With these settings run: {able}")
    return name


def _folder(model: str) -> str:
    """What diffusers loads from: a folder or a hub id."""
    from flexclear.weights.files import HUB_ID

    if model == EMBEDDED:
        from flexclear.embedded import model_directory

        return str(model_directory())
    place = Path(model).expanduser()
    if place.is_dir():
        if not (place / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{place} is no pipeline folder: it has no model_index.json (what pipe.save_pretrained writes)"
            )
        return str(place)
    if place.exists():
        raise ValueError(f"MODEL must be a pipeline folder, a hub id or {EMBEDDED!r}; {place} is a file")
    if HUB_ID.fullmatch(model) is None or model.startswith("."):
        raise FileNotFoundError(
            f"no folder {model}, and it is no hub id such as 'owner/name'; {EMBEDDED!r} is the model inside the package"
        )
    return model


def _check_model(folder: str, settings: GenerateSettings, dense: bool) -> None:
    """What the configuration files say, before the weights are read: a few kilobytes, on the hub too."""
    from diffusers import DiffusionPipeline

    with _loading(settings.model):
        config = DiffusionPipeline.load_config(folder)
    if not dense:
        library, name = (config.get("transformer") or (None, None))[:2]
        known = [family.model_class for family in FAMILIES]
        if name not in known and (library == "diffusers" or name is None):
            has = "has no transformer" if name is None else f"has a {name}"
            raise TypeError(
                f"{settings.model} {has}, which flexclear cannot transform; --r dense draws with the plain model. "
                f"Supported: {', '.join(known)}"
            )
    if settings.sizes:
        with _loading(settings.model):
            skeleton = _skeleton(folder, config)
        if skeleton is not None:
            _check_sizes(skeleton, settings)


def _skeleton(folder: str, config: dict[str, Any]) -> Any:
    """The pipeline without weights, which knows which sizes it draws; None for one that needs more to be made."""
    import diffusers

    kind, (library, vae_kind) = getattr(diffusers, config["_class_name"], None), config.get("vae", (None, None))[:2]
    if kind is None or library != "diffusers":
        return None
    vae_class = getattr(diffusers, vae_kind)
    with torch.device("meta"):
        vae = vae_class.from_config(vae_class.load_config(folder, subfolder="vae"))
    needed = [
        name
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name != "self" and parameter.default is inspect.Parameter.empty
    ]
    try:
        return kind(**{**dict.fromkeys(needed), "vae": vae})
    except (AttributeError, TypeError, ValueError):
        return None  # It looks into a part that is not there yet; sizes are checked again after loading.


def _check_sizes(pipe: Any, settings: GenerateSettings) -> None:
    factor = getattr(pipe, "vae_scale_factor", None)
    if factor is None:
        return
    multiple = factor * getattr(pipe, "patch_size", 2)
    for height, width in settings.sizes:
        if height % multiple or width % multiple:
            near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
            raise ValueError(
                f"{type(pipe).__name__} draws sizes that are multiples of {multiple} pixels, got {height}x{width}; "
                f"near it: {near[0]}x{near[1]}"
            )


def _weights(text: str) -> Path:
    """The weights file; from the hub it is downloaded. Raises for what is no whole safetensors file."""
    from flexclear.weights.files import locate, read_header

    place, _, name = text.rpartition(":")
    is_file = Path(text).expanduser().exists() or not place
    try:
        path = locate(text, None) if is_file else locate(place, name)
    except IsADirectoryError as error:
        raise ValueError(f"--weights: {error} (here: {text}:FILE)") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--weights {text}: {error}".replace("filename=...", "OWNER/NAME:FILE")) from error
    read_header(path, path.name)
    return path


@contextlib.contextmanager
def _loading(model: str) -> Iterator[None]:
    """What goes wrong with files or the network names the model."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot load {model}: {error}") from error


def load(settings: GenerateSettings, setup: Setup, say: Say = lambda text: None) -> Any:
    """The pipeline, ready to draw: loaded, moved, transformed, with its weights, quantised, compiled.

    Raises:
        OSError: it cannot be loaded.
        TypeError, ValueError: the parts do not fit each other.
    """
    with _loading(settings.model):
        if settings.model == EMBEDDED:
            from flexclear.embedded import pipeline

            pipe: Any = pipeline(setup.dtype)
        else:
            from diffusers import DiffusionPipeline

            pipe = DiffusionPipeline.from_pretrained(setup.folder, torch_dtype=setup.dtype)
    _check_sizes(pipe, settings)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(setup.device)
    if settings.r != DENSE:
        _window(pipe, settings, setup, say)
    if setup.recipe is not None:
        from flexclear.compile import quantize

        try:
            report = quantize(pipe.transformer, setup.recipe, min_features=settings.min_features)
        except ValueError as error:
            hint = f". --min-features (now {settings.min_features}) says what is tiny" if "tiny" in str(error) else ""
            raise ValueError(f"{error}{hint}") from error
        say(str(report))
    if settings.compile:
        from flexclear.optimization import optimize

        optimize(pipe, progress=False)
    return pipe


def _window(pipe: Any, settings: GenerateSettings, setup: Setup, say: Say) -> None:
    from flexclear.convert import transform
    from flexclear.weights import load_weights

    r, down_factor = settings.r, settings.down_factor
    asked = setup.weights is None or r is not None
    if asked:
        transform(pipe, 16 if r is None else r, down_factor=down_factor, backend=settings.backend)  # type: ignore[arg-type]
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
        transform(pipe, r, down_factor=factor, backend=settings.backend)  # type: ignore[arg-type]
        if loaded.radius is not None and loaded.radius != r:
            say(f"these weights were trained for r = {loaded.radius} and run with r = {r}, as asked")
    elif settings.backend != "auto":
        transform(pipe, _windows(pipe), backend=settings.backend)


def _windows(pipe: Any) -> dict[Any, Any]:
    from flexclear.hooks import entry_hook_of

    entry = entry_hook_of(pipe.transformer) if hasattr(pipe, "transformer") else None
    return {} if entry is None else dict(entry.settings.windows)


def _window_names(pipe: Any) -> str:
    names = dict.fromkeys("dense" if window is None else window.name for window in _windows(pipe).values())
    return ", ".join(names) or DENSE


def draw(
    pipe: Any, settings: GenerateSettings, setup: Setup, on_step: OnStep = lambda picture, step, steps: None
) -> Iterator[Drawn]:
    """Draw and write one picture after the other; what was yielded is on disk.

    Args:
        pipe: of ``load``.
        settings: what to draw.
        setup: of ``check``.
        on_step: called after each denoising step with the picture's number from 1, the step's number from 1, and all
            steps of the picture.

    Raises:
        ValueError: the pipeline has no such option, or cannot draw this.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    if settings.model == EMBEDDED:
        defaults |= EMBEDDED_DEFAULTS
    fixed = _call_arguments(type(pipe).__name__, settings, defaults)
    common = _metadata(pipe, settings, setup, {**defaults, **fixed})
    synchronize = torch.cuda.synchronize if setup.device.type == "cuda" else lambda device: None
    combinations = itertools.product(settings.prompts, settings.sizes or (None,), settings.seeds)
    for number, (prompt, size, seed) in enumerate(combinations, 1):
        ends: list[float] = []

        def step_end(
            pipe: Any, step: int, timestep: Any, tensors: dict, ends: list[float] = ends, number: int = number
        ) -> dict:
            synchronize(setup.device)
            ends.append(time.perf_counter())
            on_step(number, len(ends), fixed["num_inference_steps"])
            return tensors

        if setup.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(setup.device)
        synchronize(setup.device)
        begin = time.perf_counter()
        picture = pipe(
            prompt=prompt,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=step_end,
            **({} if size is None else {"height": size[0], "width": size[1]}),
            **fixed,
        ).images[0]
        synchronize(setup.device)
        seconds = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated(setup.device) if setup.device.type == "cuda" else None
        told = {"prompt": prompt, "height": picture.height, "width": picture.width, "seed": seed, **common}
        path = setup.target.write(number, prompt, png_bytes(picture, told, versions()))
        yield Drawn(
            path=path,
            prompt=prompt,
            height=picture.height,
            width=picture.width,
            seed=seed,
            steps=fixed["num_inference_steps"],
            seconds=seconds,
            step_seconds=tuple(b - a for a, b in itertools.pairwise(ends)),
            peak_memory_bytes=peak,
        )


def _call_arguments(kind: str, settings: GenerateSettings, defaults: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's call that all pictures share.

    Raises:
        ValueError: the pipeline has no such argument.
    """
    asked: dict[str, Any] = {"num_inference_steps": settings.steps, "max_sequence_length": settings.text_len}
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
    """The settings that all pictures share, as they are kept in each file."""
    distinct = set(_windows(pipe).values())
    window = distinct.pop() if len(distinct) == 1 else None
    inner = window.window if isinstance(window, Downsampled) else window
    guidance = "true_cfg_scale" if arguments.get("negative_prompt") else "guidance_scale"
    return {
        "steps": arguments["num_inference_steps"],
        "guidance": arguments.get(guidance),
        "model": settings.model,
        "pipeline": type(pipe).__name__,
        "r": DENSE if settings.r == DENSE else inner.radius if isinstance(inner, Disc) else None,
        "down_factor": window.factor if isinstance(window, Downsampled) else None,
        "window": _window_names(pipe),
        "weights": settings.weights,
        "recipe": setup.recipe,
        "min_features": settings.min_features if setup.recipe else None,
        "text_len": arguments.get("max_sequence_length"),
        "dtype": str(setup.dtype).removeprefix("torch."),
        "device": str(setup.device),
        "backend": None if settings.r == DENSE else settings.backend,
        "compile": settings.compile,
    }


def generate(
    settings: GenerateSettings,
    *,
    say: Say = lambda text: None,
    on_step: OnStep = lambda picture, step, steps: None,
) -> Iterator[Drawn]:
    """Check, load, draw; see there. Nothing happens before the first picture is asked for.

    Args:
        settings: what to draw.
        say: called with lines for people.
        on_step: see ``draw``.
    """
    setup = check(settings)
    yield from draw(load(settings, setup, say), settings, setup, on_step)
