"""Checks of ``flexclear generate`` before any weights are read."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flexclear.common.choices import DTYPES
from flexclear.families import FAMILIES
from flexclear.families.target import px_per_token
from flexclear.generation.calls import call_arguments
from flexclear.generation.clips import check_clip, check_images, check_videos, draws_videos, suffix_of
from flexclear.generation.fingerprints import fingerprints_of
from flexclear.generation.inputs import Inputs, own_size
from flexclear.generation.kinds import check_cleaning, check_controlnet, drawing_kind, own_image
from flexclear.generation.loras import check_loras
from flexclear.generation.memory import check_offload
from flexclear.generation.settings import BEST, DENSE, GenerateSettings, controlnet_folder, model_folder
from flexclear.images.files import Target
from flexclear.masks import Disc, Downsampled


@dataclass(frozen=True)
class Setup:
    """What ``check`` found out: settings with nothing left to choose.

    ``fingerprints``: of the model's files, if it is a folder, and of other files that images depend on. ``sizes``: the
    requested ones, or else the size of the input image. ``kind``: the pipeline's class; None if diffusers has none of its name.
    ``controlnet``: folder or hub id; empty: none.
    """

    folder: str
    device: torch.device
    dtype: torch.dtype
    recipe: str | None
    weights: Path | None
    target: Target
    fingerprints: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    kind: Any = None
    controlnet: str = ""
    control_mode: int | None = None


def check(settings: GenerateSettings, videos: bool = False) -> Setup:
    """Check everything that can be known before weights are read; make the folder for the images.

    Args:
        settings: what to draw.
        videos: whether video models are accepted.

    Raises:
        FileNotFoundError: there is no such model or weights file.
        TypeError, ValueError: a setting is invalid, or conflicts with another one, the model or the device.
    """
    settings.check()
    if settings.down_factor is not None:
        Downsampled(Disc(1), settings.down_factor)
    device = choose_device(settings.device)
    if settings.parallel and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dtype = choose_dtype(settings.dtype, device)
    recipe = _recipe(settings.recipe, device, dtype)
    folder = model_folder(settings.model)
    config, kind = _check_model(folder, settings, videos)
    video = kind is not None and draws_videos(kind)
    check_offload(config, settings, device)
    check_loras(kind, config, settings.loras)
    controlnet = "" if settings.controlnet is None else controlnet_folder(settings.controlnet, settings.model)
    with loading(settings.controlnet or settings.model):
        mode = None if kind is None else check_controlnet(kind, controlnet, settings)
    settings = _check_inputs(folder, config, kind, settings)
    weights = None if settings.weights is None else weights_file(settings.weights)
    suffix = suffix_of(settings) if video else ".png"
    target = Target.of(settings.out, settings.pictures, settings.overwrite, settings.resume, suffix)
    fingerprints = fingerprints_of(settings, folder, weights, controlnet)
    return Setup(folder, device, dtype, recipe, weights, target, fingerprints, settings.sizes, kind, controlnet, mode)


def choose_device(name: str) -> torch.device:
    """Return the device that ``--device`` names.

    Raises:
        ValueError: there is no such device.
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


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the data type that ``--dtype`` names; ``"auto"``: bfloat16 on CUDA, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def _recipe(name: str | None, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the recipe's name. ``"best"``: the first FP8 recipe that runs; ``RECIPES`` lists the fastest first."""
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
        wanted = " or ".join(key for key in DTYPES if getattr(torch, key) in RECIPES[name].dtypes)
        obstacle = f"it takes weights of {wanted}, --dtype is {str(dtype).removeprefix('torch.')}"
    if obstacle is not None:
        raise ValueError(f"--recipe {name!r} cannot run here: {obstacle}. With these settings run: {able}")
    return name


def _check_model(folder: str, settings: GenerateSettings, videos: bool) -> tuple[dict[str, Any], Any]:
    """Check what the configuration files say, before the weights are read: a few kilobytes, also from the hub. Return the
    pipeline's configuration and the class that draws."""
    import diffusers

    with loading(settings.model):
        config = diffusers.DiffusionPipeline.load_config(folder)
    name = str(config.get("_class_name"))
    own = getattr(diffusers, name, None)
    video = own is not None and draws_videos(own)
    if video and not videos:
        raise TypeError(f"{settings.model} draws videos ({name}), and this command is for images")
    if settings.r != DENSE:
        library, model = (config.get("transformer") or (None, None))[:2]
        known = [family.model_class for family in FAMILIES]
        if model not in known and (library == "diffusers" or model is None):
            has = "has no transformer" if model is None else f"has a {model}"
            raise TypeError(
                f"{settings.model} {has}, which flexclear cannot transform; --r dense draws with the plain model. "
                f"Supported: {', '.join(known)}"
            )
    (check_videos if video else check_images)(name, settings)
    kind = drawing_kind(name, settings)
    if kind is not None:
        check_cleaning(kind)
        call_arguments(kind, settings)
    return config, kind


def _check_inputs(folder: str, config: dict[str, Any], kind: Any, settings: GenerateSettings) -> GenerateSettings:
    """Check images, sizes and numbers of tokens and frames; return the settings with the input image's size."""
    if kind is not None:
        Inputs(kind, settings, None)
        size = own_size(kind, settings)
        settings = settings if size is None else replace(settings, sizes=(size,))
        one_image = settings.control_image is not None or own_image(kind) or draws_videos(kind)
        if settings.batch > 1 and settings.image is not None and one_image:
            raise ValueError(f"--batch: {kind.__name__} draws from the image of one at a time; leave it or --image out")
    video = kind is not None and draws_videos(kind)
    if settings.sizes or settings.highres or settings.text_len is not None or settings.vae_tiling or video:
        with loading(settings.model):
            skeleton = skeleton_of(folder, config, kind)
        if skeleton is not None:
            check_sizes(skeleton, settings)
            if video:
                check_clip(skeleton, _transformer_config(folder, config), settings)
            if settings.text_len is not None:
                check_text_len(skeleton, settings.text_len)
        vae = getattr(skeleton, "vae", None)
        if settings.vae_tiling and skeleton is not None and not hasattr(vae, "use_tiling"):
            raise ValueError(f"--vae-tiling: the {type(vae).__name__} of {settings.model} has no tiles; leave it out")
    return settings


def _transformer_config(folder: str, config: dict[str, Any]) -> Any:
    """The configuration of a pipeline's transformer; empty if diffusers does not know the class."""
    import diffusers

    library, name = (config.get("transformer") or (None, None))[:2]
    kind = getattr(diffusers, str(name), None) if library == "diffusers" else None
    return {} if kind is None else kind.load_config(folder, subfolder="transformer")


def skeleton_of(folder: str, config: dict[str, Any], kind: Any = None) -> Any:
    """Make the pipeline without weights, which suffices for checking sizes. None if the pipeline needs more.

    Args:
        folder: the pipeline's folder or hub id.
        config: the pipeline's configuration.
        kind: class to make instead of the one in the configuration.
    """
    import diffusers

    kind = kind or getattr(diffusers, config["_class_name"], None)
    library, vae_kind = config.get("vae", (None, None))[:2]
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
        return None  # It uses a component that is not loaded yet; sizes are checked again after loading.


def check_sizes(pipe: Any, settings: GenerateSettings) -> None:
    """Raise for a size that the pipeline would refuse or round.

    Raises:
        TypeError: the pipeline does not support --highres.
        ValueError: there is such a size.
    """
    if settings.highres:
        from flexclear.highres.kinds import kind_of
        from flexclear.highres.sizes import stage_sizes

        stage_sizes(settings.highres, kind_of(pipe).px_per_token(pipe), None)
    if getattr(pipe, "vae_scale_factor", None) is None:
        return
    multiple = px_per_token(pipe)
    for height, width in settings.sizes:
        if height % multiple or width % multiple:
            near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
            raise ValueError(
                f"{type(pipe).__name__} draws sizes that are multiples of {multiple} pixels, got {height}x{width}; "
                f"near it: {near[0]}x{near[1]}"
            )


def check_text_len(pipe: Any, text_len: int) -> None:
    """Raise for more text tokens than the pipeline takes, by the rule in its own ``check_inputs``.

    Raises:
        ValueError: there are too many.
    """
    check = getattr(pipe, "check_inputs", None)
    parameters = {} if check is None else inspect.signature(check).parameters
    if "max_sequence_length" not in parameters:
        return
    side = px_per_token(pipe)
    known = {"prompt": "text", "height": side, "width": side, "max_sequence_length": text_len}
    arguments = {
        name: known.get(name)
        for name, one in parameters.items()
        if name in known or one.default is inspect.Parameter.empty
    }
    with contextlib.suppress(AttributeError, TypeError):  # It uses components that are not loaded yet.
        try:
            check(**arguments)  # type: ignore[misc]
        except ValueError as error:
            if "max_sequence_length" in str(error):
                raise ValueError(f"--text-len {text_len}: {error}") from error


def weights_file(text: str) -> Path:
    """Return the weights file, downloaded if it is on the hub. Raises if it is not a complete safetensors file."""
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
def loading(model: str) -> Iterator[None]:
    """Name the model in errors about files or the network."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot load {model}: {error}") from error
