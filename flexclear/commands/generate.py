"""``flexclear generate``."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from flexclear.commands.common import Ray, RayActors, check_ray, finite, out_folder
from flexclear.commands.config import IMAGES, configurable
from flexclear.commands.terminal import console, output, progress_bars
from flexclear.common.choices import EMBEDDED, LARGEST_SEED
from flexclear.common.extras import require


def _replaced(line: set[str], values: dict[str, Any]) -> set[str]:
    """Options of ``--config`` that those on the command line replace."""
    stages = {"highres", "highres_method", "shift", "stages"}
    found: set[str] = set()
    for either, other in (
        ({"prompt"}, {"prompts"}),
        ({"size"}, {"height", "width", *stages}),
        ({"height", "width"}, {"size", *stages}),
        ({"highres"}, {"size", "height", "width"}),
        ({"fp8"}, {"recipe"}),
        ({"resume"}, {"overwrite"}),
    ):
        found |= other if either & line else set()
        found |= either if other & line else set()
    if "r" in line and values["r"] == "dense":
        found |= {"weights", "down_factor", "frame_radius"}
    if "highres" in found and values["image"] is None:
        found.add("strength")
    return found


@configurable(_replaced)
def generate(
    model: Annotated[str, typer.Argument(help="Pipeline folder, hub id, or 'embedded': the small one in the package.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; repeat for more.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line; blank lines and # comments are skipped.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="HEIGHTxWIDTH in pixels; repeat. Default: the model's.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Height in pixels, with --width, for one size.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Width in pixels, with --height.")] = None,
    highres: Annotated[
        str | None,
        typer.Option(
            help="Sizes of the stages, each enlarged to the next: 1024,2048,4096, or HEIGHTxWIDTH,HEIGHTxWIDTH."
        ),
    ] = None,
    highres_method: Annotated[str, typer.Option(help="How stages enlarge: sdedit or imax.")] = "sdedit",
    strength: Annotated[
        float | None,
        typer.Option(
            callback=finite,
            help="Fraction of the steps that run: with --image (above 0, up to 1; default: the pipeline's), or of SDEdit (0.7).",
        ),
    ] = None,
    shift: Annotated[
        float | None, typer.Option(callback=finite, help="Constant time shift of all stages. Default: the method's.")
    ] = None,
    stages: Annotated[
        Path | None,
        typer.Option(help="Keep each stage's image in this folder, and resume from it after an interruption."),
    ] = None,
    r: Annotated[
        str | None,
        typer.Option(
            "--r",
            "--radius",  # torchrun takes --r as an abbreviation of its own options
            help="Window radius in tokens, or 'dense': the plain model. Default: the weights', or 16.",
        ),
    ] = None,
    down_factor: Annotated[
        int | None, typer.Option(min=1, help="Side in tokens of the cells that are pooled into extra keys.")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video. Default: the pipeline's.")] = None,
    frame_radius: Annotated[
        str | None,
        typer.Option(help="Latent frames on either side that a video's window sees: a number, or 'all'."),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(callback=finite, help="Frames per second of the video file. Default: 16.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="For videos: gif, png (a folder of frames), or mp4 (extra video). Default: the suffix of --out, or gif."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Weights for local attention: a file, FOLDER_OR_HUB_ID:FILE, or embedded:FILE.")
    ] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Quantize with the best FP8 recipe that runs here.")] = False,
    recipe: Annotated[
        str | None, typer.Option(help="Quantize with this recipe: rowwise, tensorwise, weight_only, int8.")
    ] = None,
    min_features: Annotated[
        int | None, typer.Option(min=16, help="Linear layers smaller than this are not quantized. Default: 256.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's.")] = None,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the noise; repeat. Default: 0.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(callback=finite, help="Guidance scale. Default: the pipeline's.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to avoid; FLUX.1 and HunyuanVideo also need --true-cfg-scale.")
    ] = None,
    true_cfg_scale: Annotated[
        float | None,
        typer.Option(
            callback=finite, help="Weight of --negative-prompt if --guidance means something else. Doubles the work."
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            help="Draw from this image, scaled and cropped to --size. Default size: its own; for editing, the pipeline's."
        ),
    ] = None,
    control_image: Annotated[
        Path | None, typer.Option(help="Follow this image, with --controlnet or a pipeline that does so by itself.")
    ] = None,
    controlnet: Annotated[
        str | None, typer.Option(help="Folder or hub id of a ControlNet, or 'embedded' for the embedded model.")
    ] = None,
    control_mode: Annotated[
        str | None,
        typer.Option(
            help="Kind of --control-image, for a ControlNet with several: its number; embedded: grey, blur or tile."
        ),
    ] = None,
    control_scale: Annotated[
        float | None, typer.Option(callback=finite, help="Weight of the ControlNet. Default: the pipeline's.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="FILE or FILE:SCALE of a LoRA, fused into the weights; repeat. Needs peft (extra train)."),
    ] = None,
    text_len: Annotated[int | None, typer.Option(min=1, help="Text tokens. Default: the pipeline's.")] = None,
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            help="Images per call, of one size and in order. Each is the same as when drawn alone, up to rounding; seconds "
            "and memory are the call's.",
        ),
    ] = 1,
    offload: Annotated[
        str | None,
        typer.Option(
            help="Keep weights in main memory except for one model (model), one layer (sequential) or one block (group). Slower "
            "in this order: model, group, sequential."
        ),
    ] = None,
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Encode and decode in tiles: less memory, slightly different images.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Report peak memory, of the CUDA device or else of the process.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; auto: bfloat16 on CUDA, else float32.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where to run; auto: CUDA if available.")] = "auto",
    backend: Annotated[str, typer.Option(help="Attention: auto, flex or sdpa.")] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks; pays off from a few dozen steps on.")
    ] = False,
    parallel: Annotated[
        bool,
        typer.Option(
            "--parallel", help="One image on several GPUs: torchrun --nproc-per-node N -m flexclear generate."
        ),
    ] = False,
    parallel_text: Annotated[
        str, typer.Option(help="With --parallel: text sees the whole image (exact), or averages (average).")
    ] = "exact",
    exchange: Annotated[
        str,
        typer.Option(help="With --parallel: sync, or stale (use borders of the previous step while new ones travel)."),
    ] = "sync",
    ray: Ray = None,
    ray_actors: RayActors = None,
    out: Annotated[
        Path, typer.Option(help="Folder, or a .png file for one image, a .gif or .mp4 file for one video.")
    ] = Path("images"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Number from 1 and replace. Otherwise numbers in a folder continue.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep this set's finished images in the folder, and draw the missing ones."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON per image on standard output.")] = False,
    *,
    config: Path | None = None,
    from_line: set[str],
) -> None:
    """Draw every prompt at every size with every seed. Each file carries its settings. Equal seeds give equal images or videos.

    Existing files are only replaced with --overwrite: in a folder, numbers continue after the highest one; for a single file,
    it is an error. Ctrl-C keeps what is finished; the same command with --resume completes the set.
    """
    from flexclear.common.choices import parse_frame_radius, parse_sizes
    from flexclear.generation.parsing import parse_lora, parse_radius
    from flexclear.generation.settings import GenerateSettings

    if lora:
        require("peft", "flexclear generate --lora")
    settings = GenerateSettings(
        model=model,
        prompts=_prompts(prompt, prompts),
        out=out,
        sizes=_sizes(size, height, width),
        seeds=tuple(seed or (0,)),
        r=None if r is None else parse_radius(r),
        down_factor=down_factor,
        weights=weights,
        recipe=_recipe(fp8, recipe),
        min_features=min_features,
        steps=steps,
        guidance=guidance,
        text_len=text_len,
        dtype=dtype,
        device=device,
        backend=backend,
        compile=compile,
        overwrite=overwrite,
        resume=resume,
        highres=() if highres is None else parse_sizes(highres),
        highres_method=highres_method,
        strength=strength,
        shift=shift,
        stages=None if stages is None else stages.expanduser(),
        parallel=parallel,
        text=parallel_text,
        exchange=exchange,
        num_frames=num_frames,
        frame_radius=None if frame_radius is None else parse_frame_radius(frame_radius),
        fps=fps,
        format=format,
        negative_prompt=negative_prompt,
        true_cfg_scale=true_cfg_scale,
        image=image,
        control_image=control_image,
        controlnet=controlnet,
        control_mode=control_mode,
        control_scale=control_scale,
        loras=tuple(parse_lora(text) for text in lora or ()),
        offload=offload,
        batch=batch,
        vae_tiling=vae_tiling,
        memory=memory,
    )
    settings.check()
    if stages is not None:
        out_folder(stages, "--stages")
    check_ray(ray, ray_actors)

    from flexclear.cluster import drawing
    from flexclear.common.versions import versions
    from flexclear.generation import generate as job
    from flexclear.generation.given_back import FILES, changed_since
    from flexclear.parallel import ParallelError, leave

    silent = parallel and int(os.environ.get("RANK", "0")) != 0  # the first process speaks for all
    setup = job.check(settings, videos=True) if ray is None else drawing.check_here(settings)
    lines = console(quiet=silent)
    if config is not None and (config.is_dir() or config.suffix.lower() in IMAGES) and not from_line & set(FILES):
        for cause in changed_since(config.expanduser(), setup.fingerprints, versions()):
            lines.print(f"the image may come out differently: {cause}")
    if model == EMBEDDED:
        from flexclear.embedded import unknown_words

        for text in dict.fromkeys(settings.prompts):
            if strangers := unknown_words(text):
                lines.print(
                    f"The embedded model was not trained on: {', '.join(strangers)} (in {text!r}). It draws all the same."
                )
    if setup.recipe is not None:
        lines.print(f"quantizing with recipe {setup.recipe}")
    done = 0
    try:
        with progress_bars(lines) as progress:
            pictures = progress.add_task("loading", total=settings.pictures)

            def on_step(picture: int, step: int, total: int) -> None:
                progress.update(inner, completed=step, total=total)

            def on_kept(path: Path) -> None:
                nonlocal done
                done += 1
                progress.update(pictures, completed=done)
                lines.print(f"{path}: finished already")

            images: Any
            if ray is None:
                inner = progress.add_task("steps", total=steps)
                pipe = job.load(settings, setup, lines.print)
                progress.update(pictures, description="images")
                images = job.draw(pipe, settings, setup, on_step, on_kept)
            else:
                images = drawing.draw(settings, setup, ray, ray_actors, lines.print, on_kept)
            with contextlib.closing(images):
                for drawn in images:
                    done += 1
                    progress.update(pictures, completed=done, description="images")
                    line = _line(drawn, memory)
                    if json:
                        lines.print(line)
                    print(drawn.as_json() if json else line, flush=True)
    except KeyboardInterrupt:
        lines.print(f"interrupted: {done} of {settings.pictures} images are finished and kept in {out}")
        raise typer.Exit(130) from None
    except ParallelError as error:
        output.say(str(error))
        raise typer.Exit(1) from None
    finally:
        if parallel:
            leave()


def _line(drawn: Any, memory: bool) -> str:
    """The line printed for an image, with its memory if requested."""
    pace = drawn.median_step_seconds
    frames = "" if drawn.frames is None else f"{drawn.frames} frames of "
    told = (
        f"{drawn.path}: {frames}{drawn.height} x {drawn.width}, seed {drawn.seed}, {drawn.steps} steps in "
        f"{drawn.seconds:.2f} s"
    )
    told += "" if pace is None else f", {pace:.3f} s each (median)"
    told += "" if drawn.batch == 1 else f", {drawn.batch} images at once"
    if memory and drawn.peak_memory_bytes is not None:
        told += f", peak {drawn.peak_memory_bytes / 2**30:.2f} GiB of the {drawn.peak_memory_of}"
    return told


def _prompts(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    from flexclear.generation.parsing import read_prompts

    if given and file is not None:
        raise ValueError(f"give --prompt or --prompts, not both; got {len(given)} x --prompt and --prompts {file}")
    if file is not None:
        return read_prompts(file)
    if not given:
        raise ValueError("no prompt: give --prompt TEXT, which may be repeated, or --prompts FILE")
    return tuple(given)


def _sizes(given: list[str] | None, height: int | None, width: int | None) -> tuple[tuple[int, int], ...]:
    from flexclear.common.choices import parse_size

    if (height is None) != (width is None):
        raise ValueError(f"--height and --width go together; got --height {height} and --width {width}")
    if height is not None and width is not None:
        if given:
            raise ValueError(f"give --size or --height and --width, not both; got --size {' --size '.join(given)}")
        return ((height, width),)
    return tuple(parse_size(text) for text in given or ())


def _recipe(fp8: bool, recipe: str | None) -> str | None:
    from flexclear.generation.settings import BEST

    if fp8 and recipe is not None:
        raise ValueError(f"give --fp8 or --recipe, not both; got --recipe {recipe}")
    if recipe == BEST:
        raise ValueError("--recipe insists on one recipe; --fp8 chooses the best")
    return BEST if fp8 else recipe
