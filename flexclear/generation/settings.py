"""Settings of ``flexclear generate``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flexclear.common.choices import (
    BACKENDS,
    DTYPES,
    EMBEDDED,
    EXCHANGES,
    HUB_ID,
    METHODS,
    OFFLOADS,
    RECIPES,
    TEXTS,
    VIDEO_FORMATS,
    check_choice,
    check_finite,
    check_seeds,
)
from flexclear.common.reading import check_unicode
from flexclear.common.shipped import controlnet_directory, model_directory

DENSE = "dense"
BEST = "best"


@dataclass(frozen=True)
class GenerateSettings:
    """What to draw and how. Images are all combinations of prompts, sizes and seeds, in this order.

    Attributes:
        model: a local pipeline folder, a hub id, or ``"embedded"``.
        prompts: one or more.
        out: a folder, or a ``.png`` file for one image.
        sizes: (height, width) in pixels; empty: the pipeline's own size.
        seeds: seeds of the noise, which is made on the CPU and so is the same on every device.
        r: window radius in tokens; ``"dense"``: the original model; None: the weights' radius, or else 16.
        down_factor: side of the pooled cells in tokens, or None.
        weights: for ``flexclear.load_weights``: a file, ``PLACE:FILE`` in a folder or hub repository, or one of those that ship
            with the embedded model: ``embedded:clear_local_8.safetensors``.
        recipe: a name of ``flexclear.compile.RECIPES``, ``"best"`` for the best FP8 one here, or None.
        min_features: linear layers smaller than this are not quantized; None: the default of ``flexclear.compile.quantize``.
        steps, guidance, text_len: None: the pipeline's own.
        dtype: a name of ``flexclear.common.choices.DTYPES``, or ``"auto"``: bfloat16 on CUDA, float32 elsewhere.
        device: a torch device, or ``"auto"``: CUDA if available.
        backend: as in ``flexclear.transform``.
        compile: compile the blocks (``flexclear.optimize``); the first image of each size takes longer.
        overwrite: see ``flexclear.images.files.Target``.
        resume: keep the finished images of this set in ``out`` and draw the missing ones under their own numbers.
        highres: sizes of the stages of ``flexclear.highres.upscale_cascade``, instead of ``sizes``; empty: none.
        highres_method, shift: arguments of ``upscale_cascade``.
        strength: fraction of the steps that run, with ``image`` or in SDEdit's stages.
        stages: folder that keeps the stages of each image, and from which they resume; or None.
        parallel: share each image among the processes that torchrun has started (``flexclear.parallel``); the first one
            writes it.
        text, exchange: as in ``flexclear.parallel.enable``.
        num_frames: number of frames of a video; None: the pipeline's own.
        frame_radius: as in ``flexclear.transform``, for a video model: latent frames on either side, or ``"all"``.
        fps: frames per second of the video file; None: 16.
        format: a name of ``flexclear.common.choices.VIDEO_FORMATS``; None: by the suffix of ``out``, or else a GIF.
        negative_prompt: what images should avoid, by classifier-free guidance.
        true_cfg_scale: scale of that guidance, for pipelines whose ``guidance`` is something else (FLUX.1, HunyuanVideo).
        image: file of an image to start from, for image-to-image and image-to-video pipelines.
        control_image: file of the image that a ControlNet follows.
        controlnet: a folder, a hub id, or ``"embedded"``; None: the pipeline's own.
        control_mode: mode of a ControlNet for several kinds of images: a number, or a name for the embedded one.
        control_scale: factor on the ControlNet's residuals; None: the pipeline's own.
        loras: (file, scale) of each LoRA to fuse into the weights.
        offload: a name of ``flexclear.common.choices.OFFLOADS``, or None.
        batch: number of images of one size per call.
        vae_tiling: encode and decode in tiles.
        memory: measure peak memory on every device, not only on CUDA.
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
    min_features: int | None = None
    steps: int | None = None
    guidance: float | None = None
    text_len: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    compile: bool = False
    overwrite: bool = False
    resume: bool = False
    highres: tuple[int | tuple[int, int], ...] = ()
    highres_method: str = "sdedit"
    strength: float | None = None
    shift: float | None = None
    stages: Path | None = None
    parallel: bool = False
    text: str = "exact"
    exchange: str = "sync"
    num_frames: int | None = None
    frame_radius: int | str | None = None
    fps: float | None = None
    format: str | None = None
    negative_prompt: str | None = None
    true_cfg_scale: float | None = None
    image: Path | None = None
    control_image: Path | None = None
    controlnet: str | None = None
    control_mode: str | None = None
    control_scale: float | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    offload: str | None = None
    batch: int = 1
    vae_tiling: bool = False
    memory: bool = False

    @property
    def pictures(self) -> int:
        return len(self.prompts) * max(1, len(self.sizes)) * len(self.seeds)

    def check(self) -> None:
        """Check everything that can be known without torch and without the model's files.

        Raises:
            FileNotFoundError: there is no such model.
            ValueError: a setting is invalid, or conflicts with another one.
        """
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError(f"a prompt is needed for every image, got {list(self.prompts)}")
        for prompt in self.prompts:
            check_unicode(prompt, "a prompt")
        for seed in self.seeds:
            check_seeds("--seed", seed)
        for option in ("guidance", "strength", "shift", "fps", "true_cfg_scale", "control_scale"):
            check_finite(f"--{option.replace('_', '-')}", getattr(self, option))
        check_choice("--backend", self.backend, BACKENDS)
        check_choice("--dtype", self.dtype, ("auto", *DTYPES))
        if self.recipe not in (None, BEST):
            check_choice("--recipe", self.recipe, RECIPES)
        if self.format is not None:
            check_choice("--format", self.format, VIDEO_FORMATS)
        windowed = {"weights": self.weights, "down-factor": self.down_factor, "frame-radius": self.frame_radius}
        for name, value in windowed.items():
            if self.r == DENSE and value is not None:
                raise ValueError(
                    f"--{name} {value} is for windowed attention, --r dense is the plain model; leave one out"
                )
        if self.weights is not None and self.down_factor is not None and self.r is None:
            raise ValueError("--weights brings its own window; give --r as well to choose --down-factor yourself")
        if self.weights is not None and self.frame_radius is not None and self.r is None:
            raise ValueError("--weights brings its own window; give --r as well to choose --frame-radius yourself")
        if self.resume and self.overwrite:
            raise ValueError("--resume keeps the finished images, --overwrite replaces them; leave one out")
        if self.resume and self.parallel:
            raise ValueError("--resume reads a folder that not every process need see; leave it out with --parallel")
        self._check_highres()
        self._check_parallel()
        self._check_inputs()
        self._check_memory()
        model_folder(self.model)

    def _check_highres(self) -> None:
        check_choice("--highres-method", self.highres_method, METHODS)
        if self.highres and self.sizes:
            raise ValueError("--highres names the sizes of all stages; leave --size, --height and --width out")
        options = {"--shift": self.shift, "--stages": self.stages}
        given = [name for name, value in options.items() if value is not None]
        if self.strength is not None and not self.highres and self.image is None:
            raise ValueError("--strength needs --image, or the stages of --highres, such as --highres 1024,2048,4096")
        if given and not self.highres:
            raise ValueError(f"{', '.join(given)} needs the stages of --highres, such as --highres 1024,2048,4096")
        if self.stages is not None and self.stages.exists() and not self.stages.is_dir():
            raise ValueError(f"--stages must be a folder, {self.stages} is a file")

    def _check_inputs(self) -> None:
        """Check the inputs other than the prompt."""
        if self.negative_prompt is not None:
            check_unicode(self.negative_prompt, "--negative-prompt")
        elif self.true_cfg_scale is not None:
            raise ValueError(
                "--true-cfg-scale weighs --negative-prompt against the prompt; give that too, it may be ''"
            )
        for option, file in (("--image", self.image), ("--control-image", self.control_image)):
            if file is not None and file.expanduser().is_dir():
                raise ValueError(f"{option} must be the file of an image, {file} is a folder")
            if file is not None and not file.expanduser().is_file():
                raise FileNotFoundError(f"{option}: no file {file}")
        if self.image is not None and not self.highres and self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"--strength of --image must be more than 0 and at most 1, got {self.strength}")
        if self.control_image is None:
            options = {
                "--controlnet": self.controlnet,
                "--control-mode": self.control_mode,
                "--control-scale": self.control_scale,
            }
            given = [f"{name} {value}" for name, value in options.items() if value is not None]
            if given:
                raise ValueError(f"{', '.join(given)} needs --control-image")
        elif self.highres:
            raise ValueError("--highres enlarges without a ControlNet; leave it or --control-image out")
        if self.controlnet is not None:
            controlnet_folder(self.controlnet, self.model)

    def _check_memory(self) -> None:
        if self.offload is not None:
            check_choice("--offload", self.offload, OFFLOADS)
        if self.offload == "sequential" and self.compile:
            raise ValueError(
                "--offload sequential has every layer moved by itself, inside the blocks that --compile compiles as a whole; "
                "give --offload group or model with --compile"
            )
        if self.batch < 1:
            raise ValueError(f"--batch must be 1 or more images, got {self.batch}")
        for option, given in (("--offload", self.offload is not None), ("--batch", self.batch > 1)):
            if given and self.parallel:
                raise ValueError(
                    f"--parallel shares one image among devices that hold the model; leave it or {option} out"
                )
        if self.highres and self.batch > 1:
            raise ValueError("--highres enlarges one image at a time; leave it or --batch out")
        if self.highres and self.negative_prompt is not None:
            raise ValueError("--highres has no negative prompt; leave it or --negative-prompt out")
        if self.highres and self.vae_tiling:
            raise ValueError("--highres encodes and decodes in tiles by itself; leave --vae-tiling out")

    def _check_parallel(self) -> None:
        """Check --parallel, as far as possible before there are other processes."""
        check_choice("--parallel-text", self.text, TEXTS)
        check_choice("--exchange", self.exchange, EXCHANGES)
        changed = (self.text, self.exchange) != ("exact", "sync")
        if not self.parallel:
            if changed:
                raise ValueError("--parallel-text and --exchange need --parallel")
            return
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise ValueError(
                "--parallel shares each image among several processes: start them with torchrun --nproc-per-node N "
                "-m flexclear generate ... --parallel"
            )
        if self.stages is not None:
            raise ValueError("--stages keeps files that several processes would write; leave it out with --parallel")
        if self.r == DENSE and changed:
            raise ValueError(
                "--parallel-text and --exchange apply to windows; --r dense runs diffusers' ring attention"
            )


def model_folder(model: str) -> str:
    """Where diffusers loads ``model`` from: a folder or a hub id.

    Raises:
        FileNotFoundError: it is neither, or the folder holds no pipeline.
        ValueError: it is a file.
    """
    if model == EMBEDDED:
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


def controlnet_folder(controlnet: str, model: str) -> str:
    """Where diffusers loads ``controlnet`` from: a folder or a hub id.

    Args:
        controlnet: a folder, a hub id, or ``"embedded"``.
        model: the pipeline's, which the embedded ControlNet is for.

    Raises:
        FileNotFoundError: it is neither, or the folder holds no model.
        ValueError: it is a file, or it is the embedded one but the model is not.
    """
    if controlnet == EMBEDDED:
        if model != EMBEDDED:
            raise ValueError(f"--controlnet {EMBEDDED!r} is for the embedded model, but MODEL is {model}")
        return str(controlnet_directory())
    place = Path(controlnet).expanduser()
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise FileNotFoundError(f"--controlnet: {place} holds no model: it has no config.json")
        return str(place)
    if place.exists():
        raise ValueError(f"--controlnet must be a folder, a hub id or {EMBEDDED!r}; {place} is a file")
    if HUB_ID.fullmatch(controlnet) is None or controlnet.startswith("."):
        raise FileNotFoundError(f"--controlnet: no folder {controlnet}, and it is no hub id such as 'owner/name'")
    return controlnet
