"""``upscale_cascade``: draw one image in stages, each larger than the one before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flexclear.common.choices import METHODS
from flexclear.highres.folder import Folder, picture_digest
from flexclear.highres.identity import identity, weights_digest
from flexclear.highres.imax import check_level, low_band, projected_scheduler
from flexclear.highres.kinds import Kind, kind_of
from flexclear.highres.planner import Planner
from flexclear.highres.sizes import Size, stage_sizes
from flexclear.highres.stages import BASE, KEEP, Stage, check_radii, per_stage
from flexclear.highres.state import scheduled, shifted, windowed, windows_of
from flexclear.highres.tiling import tile_size, tiled
from flexclear.images.fitting import on_white
from flexclear.masks import Window
from flexclear.runtime.schedule import Radii
from flexclear.runtime.switches import override

OnStep = Callable[[Stage, int, int], None]

PerStage = Any
"""One value for all stages, or a sequence with one per stage, in which None means the default."""


@dataclass(frozen=True)
class Cascade:
    """The result of a cascade.

    Attributes:
        images: the image of every stage.
        stages: the settings of each stage.
        files: paths of the images if there is a folder; else empty.
        resumed: number of stages that were already finished.
    """

    images: tuple[Image.Image, ...]
    stages: tuple[Stage, ...]
    files: tuple[Path, ...]
    resumed: int

    @property
    def image(self) -> Image.Image:
        """The largest one."""
        return self.images[-1]


def upscale_cascade(
    pipe: Any,
    prompt: str,
    sizes: Sequence[Size] = (1024, 2048, 4096),
    *,
    method: str = "sdedit",
    image: Image.Image | None = None,
    r: Radii | str | Sequence[Radii | str] = KEEP,
    steps: PerStage = None,
    strength: PerStage = None,
    guidance: PerStage = None,
    shift: PerStage = None,
    ntk_factor: PerStage = None,
    proportional_attention: PerStage = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    max_sequence_length: int | None = None,
    native: int | None = None,
    tile: int | None = None,
    wavelet_level: int = 1,
    folder: str | Path | None = None,
    progress: bool | None = None,
    on_step: OnStep | None = None,
) -> Cascade:
    """Draw an image at the first size, then enlarge it to each of the others (method, section 7).

    Each stage enlarges the previous stage's image with PIL's bicubic filter and runs the pipeline again:

    - ``"sdedit"`` (SDEdit, arXiv 2108.01073, section 3; the cascade is CLEAR's): noises and denoises the image with diffusers'
      image-to-image pipeline. Released settings: 20 steps, strength 0.7, guidance 7.5, shift 3, NTK factor 10, proportional
      attention. (The released notebook also sets a ``time_shift`` of 10, which nothing reads: it runs at 3.)
        As in diffusers, ``strength`` is the fraction of the *steps* that are run: the noise level at the start follows from the
        shift (0.7 and shift 3: level 0.875).
    - ``"imax"`` (I-Max, arXiv 2410.07536, sections 3.2 and 4): starts from noise; the velocity's low frequencies are those of
      the straight flow towards the image, with a weight that decays as a half cosine. Released settings: 30 steps, guidance 7,
      shift 6, NTK factor 10 clipped at linear interpolation, proportional attention; first stage 30 steps, guidance 3.5, shift
      3. Two parts of the released code are left out, since they are for dense models: its text duplication (another copy of the
      prompt for every 64 x 64 tokens, each with its own position ids), and its shifted latents (a border of one latent, added
      before every other step and removed before the next, which moves tokens by half a token).

    The windows are those of an earlier ``flexclear.transform``, or those set with ``r``; a plain pipeline runs dense. Text is
    encoded once, and the VAE runs in tiles. Stages pass on 8-bit images, and each has its own noise: the same arguments give
    the same image, resumed or not. Everything that a stage changes on the pipeline (windows, scheduler, VAE tiling) is
    restored, also after errors. Nothing else may use the pipeline in the meantime.

    >>> done = upscale_cascade(pipe, "a small blue plane", sizes=[1024, 2048, 4096], r=[16, 16, 8])  # doctest: +SKIP
    >>> upscale_cascade(pipe, "a photo of a plane", sizes=[4096], image=photo, strength=0.5)         # doctest: +SKIP

    Args:
        pipe: a FLUX.1 or SD3 / SD3.5 pipeline, text to image or image to image.
        prompt: one prompt.
        sizes: the longer side in pixels, or (height, width), one per stage.
        method: how images are enlarged.
        image: an image to start from, on white, which every stage enlarges. Without it, the first size is drawn from the prompt.
        r: a radius as in ``transform``, ``"keep"`` for the current windows, or a sequence with one per stage (radii per layer:
            as a mapping).
        steps: one value for all stages, or a sequence with one per stage; None is the released setting, or the pipeline's own.
            The same holds for the next five.
        strength: fraction of the steps that are run. A first stage that draws from the prompt has none.
        guidance: guidance scale.
        shift: a constant time shift, or ``"own"`` for the scheduler as it is. FLUX.1's dynamic shift is an extrapolation above
            2048 px, and leaves nothing but noise there.
        ntk_factor: see ``transform``. The first stage from a prompt is drawn with the pipeline's own switches.
        proportional_attention: likewise.
        negative_prompt: for classifier-free guidance: SD3, and FLUX.1 models without a guidance input.
        seed: seed of the noise, which is made on the CPU; stage n uses ``seed + n - 1``.
        max_sequence_length: number of T5 text tokens; by default the pipeline's.
        native: side in pixels of the images that the model was trained on, used as the reference for NTK's clipping and
            proportional attention; by default the pipeline's default size.
        tile: side of the VAE's tiles in pixels; see ``flexclear.highres.tiled``.
        wavelet_level: level of the Haar transform whose approximation is I-Max's low band.
        folder: keep every stage's image there, and resume after the last finished one, whose settings must be the same.
        progress: a progress bar per stage; None: as the pipeline is configured.
        on_step: called with the stage, the step's number from 1, and the stage's total steps.

    Raises:
        TypeError: an unsupported pipeline or an argument of the wrong type.
        ValueError: a setting is invalid, or not supported by this model; ``folder`` holds another cascade. Raised before any
            work.
    """
    kind = kind_of(pipe)
    _check(pipe, prompt, method, image, negative_prompt, seed)
    if method == "imax":
        check_level(wavelet_level)
    start = None if image is None else on_white(image)
    length = kind.default("max_sequence_length") if max_sequence_length is None else max_sequence_length
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"max_sequence_length must be a whole number of 1 or more, got {max_sequence_length!r}")
    pairs = stage_sizes(sizes, kind.px_per_token(pipe), None if start is None else (start.height, start.width))
    asked = {
        "steps": steps,
        "strength": strength,
        "guidance": guidance,
        "shift": shift,
        "ntk_factor": ntk_factor,
        "proportional_attention": proportional_attention,
    }
    columns = {name: per_stage(name, value, len(pairs), start is None) for name, value in asked.items()}
    rows = [{name: column[i] for name, column in columns.items()} for i in range(len(pairs))]
    radii = check_radii(r, len(pairs))
    # None leaves what the model has, which may be a formula.
    windows = [None if isinstance(radius, str) else windows_of(pipe, radius) for radius in radii]
    plan = Planner(pipe, kind, method, negative_prompt, length, native, seed)
    stages = [
        plan.stage(number, size, row, start is None and number == 1, names)
        for number, (size, row, names) in enumerate(zip(pairs, rows, windows, strict=True), 1)
    ]
    side = tile_size(pipe.vae, tile)
    common = {
        "method": method,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "image": None if start is None else picture_digest(start),
        "max_sequence_length": length,
        "tile": side,
        "wavelet_level": wavelet_level if method == "imax" else None,
        **identity(pipe),
        "weights": None if folder is None else weights_digest(pipe),
    }
    if folder is not None and plan.entry is not None and plan.entry.parallel is not None:
        raise ValueError(
            f"folder={str(folder)!r}: this model shares each image among several ranks, which would all write there. "
            "Leave folder out, and save Cascade.image on one rank"
        )
    kept = None if folder is None else Folder(folder, common, stages)
    run = _Run(pipe, kind, prompt, negative_prompt, length, wavelet_level, progress, on_step)
    images: list[Image.Image] = []
    resumed = 0
    with tiled(pipe.vae, side):
        for stage, names in zip(stages, windows, strict=True):
            drawn = None if kept is None else kept.load(stage)
            if drawn is not None:
                resumed += 1
            else:
                drawn = run.draw(stage, stages, names, images[-1] if images else start)
                if kept is not None:
                    kept.save(stage, drawn)
            images.append(drawn)
    pipe.maybe_free_model_hooks()
    files = () if kept is None else tuple(kept.file(stage) for stage in stages)
    return Cascade(tuple(images), tuple(stages), files, resumed)


def _check(pipe: Any, prompt: Any, method: Any, image: Any, negative_prompt: Any, seed: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be one text, got {prompt!r}; call upscale_cascade once per image")
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        raise TypeError(f"negative_prompt must be one text, got {negative_prompt!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
    if image is not None and not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL image, got a {type(image).__name__}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be a whole number, got {seed!r}")
    if type(pipe.scheduler) is not FlowMatchEulerDiscreteScheduler:
        raise ValueError(
            f"upscale_cascade needs a FlowMatchEulerDiscreteScheduler, which FLUX.1 and SD3 come with; this pipeline has a "
            f"{type(pipe.scheduler).__name__}"
        )


class _Run:
    """Draws stages. Encodes the text once, when the first stage needs it."""

    def __init__(
        self,
        pipe: Any,
        kind: Kind,
        prompt: str,
        negative_prompt: str | None,
        text_length: int,
        wavelet_level: int,
        progress: bool | None,
        on_step: OnStep | None,
    ) -> None:
        self.pipe, self.kind, self.wavelet_level, self.on_step = pipe, kind, wavelet_level, on_step
        self.prompts, self.text_length, self.progress = (prompt, negative_prompt), text_length, progress
        self._text: dict[str, Any] | None = None

    def text(self, stages: list[Stage]) -> dict[str, Any]:
        if self._text is None:
            guided = any(stage.guidance is not None and stage.guidance > 1 for stage in stages)
            self._text = self.kind.encode(self.pipe, *self.prompts, guided, self.text_length)
        return self._text

    def draw(
        self, stage: Stage, stages: list[Stage], windows: dict[str, Window | None] | None, before: Image.Image | None
    ) -> Image.Image:
        """One stage's image."""
        from flexclear.runtime.hooks import entry_hook_of

        text = self.text(stages)
        generator = torch.Generator().manual_seed(stage.seed)
        arguments = {
            **text,
            **self.kind.guidance(self.pipe, stage.guidance, text),
            "height": stage.height,
            "width": stage.width,
            "num_inference_steps": stage.steps,
            "generator": generator,
            "callback_on_step_end": self._callback(stage),
        }
        scheduler = shifted(self.pipe.scheduler, stage.shift)
        enlarged = None
        if before is not None:
            enlarged = before.resize((stage.width, stage.height), Image.Resampling.BICUBIC)
        with contextlib.ExitStack() as stack:
            switched = stage.method != BASE
            if switched:
                stack.enter_context(override(**stage.switches))
            plain = stage.ntk_factor == 1 and not stage.proportional_attention
            stack.enter_context(windowed(self.pipe, windows, hooks=switched and not plain))
            if stage.method == "imax":
                scheduler = self._projected(stage, scheduler, enlarged, generator)
            stack.enter_context(scheduled(self.pipe, scheduler))
            name = self.kind.image_to_image if stage.method == "sdedit" else self.kind.text_to_image
            if stage.method == "sdedit":
                arguments |= {"image": enlarged, "strength": stage.strength}
            drawing = self.kind.pipeline(self.pipe, name)
            entry = entry_hook_of(self.pipe.transformer)
            if entry is not None and entry.parallel is not None:
                entry.parallel.watch(drawing)
            drawing.set_progress_bar_config(**self._bar(stage, len(stages)))
            return drawing(**arguments).images[0]

    def _projected(self, stage: Stage, scheduler: Any, enlarged: Image.Image | None, generator: torch.Generator) -> Any:
        assert enlarged is not None
        guide = self.kind.encode_picture(self.pipe, enlarged, generator)
        return projected_scheduler(
            scheduler,
            guide,
            to_picture=lambda t: self.kind.to_picture(t, stage.height, stage.width, self.pipe),
            to_tokens=self.kind.to_tokens,
            band=lambda t: low_band(t, self.wavelet_level),
        )

    def _callback(self, stage: Stage) -> Any:
        count = 0
        total = stage.steps - int(stage.steps - stage.steps * (stage.strength or 1.0))  # as diffusers rounds

        def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal count
            count += 1
            if self.on_step is not None:
                self.on_step(stage, count, total)
            return tensors

        return step_end

    def _bar(self, stage: Stage, stages: int) -> dict[str, Any]:
        own = dict(getattr(self.pipe, "_progress_bar_config", {}))
        own["desc"] = f"{stage.number}/{stages} {stage.height} x {stage.width} {stage.method}"
        if self.progress is not None:
            own["disable"] = not self.progress
        return own
