"""``flexclear analyze attention``, ``perturb`` and ``cost``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flexclear.commands.common import Commands, must_exist, out_folder
from flexclear.common.choices import EMBEDDED, LARGEST_SEED, parse_size
from flexclear.common.extras import require
from flexclear.generation.parsing import parse_radius
from flexclear.generation.settings import DENSE, GenerateSettings

analyze = Commands("What a model's attention does, needs and costs.")

Model = Annotated[str, typer.Argument(help="Pipeline folder, hub id, or 'embedded'.")]
Prompt = Annotated[str, typer.Option(help="What to draw.")]
Size = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels. Default: the model's.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the noise.")]
TextLen = Annotated[int | None, typer.Option(min=1, help="Text tokens. Default: the pipeline's.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Device = Annotated[str, typer.Option(help="Where to run; auto: CUDA if available.")]


def _settings(
    model: str,
    prompt: str,
    size: str | None,
    steps: int | None,
    text_len: int | None,
    dtype: str,
    device: str,
    out: Path,
) -> GenerateSettings:
    """Settings of the image, checked as far as possible without torch."""
    settings = GenerateSettings(
        model,
        (prompt,),
        out,
        sizes=() if size is None else (parse_size(size),),
        r=DENSE,
        steps=steps,
        text_len=text_len,
        dtype=dtype,
        device=device,
    )
    settings.check()
    out_folder(out)
    return settings


def _pipeline(settings: GenerateSettings) -> tuple[Any, dict[str, Any]]:
    """The dense pipeline and the arguments of its call."""
    from flexclear.generation.generate import EMBEDDED_DEFAULTS, check, load

    pipe = load(settings, check(settings))
    call: dict[str, Any] = dict(EMBEDDED_DEFAULTS) if settings.model == EMBEDDED else {}
    call |= {"prompt": settings.prompts[0]}
    given = {"num_inference_steps": settings.steps, "max_sequence_length": settings.text_len}
    call |= {name: value for name, value in given.items() if value is not None}
    for height, width in settings.sizes:
        call |= {"height": height, "width": width}
    return pipe, call


def _draw(pipe: Any, call: dict[str, Any], seed: int) -> Any:
    import torch

    return pipe(**call, generator=torch.Generator().manual_seed(seed)).images[0]


def _save(picture: Any, path: Path) -> None:
    from flexclear.compile.files import whole_file

    with whole_file(path) as beside:
        picture.save(beside, format="PNG")


def _place(text: str) -> tuple[int, int]:
    row, _, column = text.lower().partition("x")
    if not (row.isdigit() and column.isdigit()):
        raise ValueError(f"--query is ROWxCOLUMN in tokens, from 0x0 on, such as 8x8; got {text!r}")
    return int(row), int(column)


@analyze.command("attention")
def attention(
    model: Model,
    prompt: Prompt,
    query: Annotated[
        list[str] | None, typer.Option(help="ROWxCOLUMN of an image token whose maps are drawn; repeat.")
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="Path of an attention layer, or its number; repeat. Default: all.")
    ] = None,
    head: Annotated[list[int] | None, typer.Option(min=0, help="Head to draw; repeat. Default: the first 4.")] = None,
    at: Annotated[
        list[int] | None, typer.Option(min=0, help="Number of a denoising step; repeat. Default: the middle one.")
    ] = None,
    r: Annotated[str, typer.Option("--r", help="Window radius in tokens, or 'dense'.")] = "dense",
    size: Size = None,
    steps: Steps = None,
    seed: Seed = 0,
    text_len: TextLen = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Folder for images, curves and numbers.")] = Path("analysis"),
) -> None:
    """Draw one image and look at its attention: maps of queries over it, mass against distance for every layer.

    Writes picture.png, maps_*.png, mass.png, mass.md and mass.json. Only the scores of some queries are in memory at a time.
    """
    import inspect
    import json

    require("matplotlib", "flexclear analyze attention")
    radius = parse_radius(r)
    places = [_place(text) for text in query or ()]
    settings = _settings(model, prompt, size, steps, text_len, dtype, device, out)

    from flexclear.analysis.attention import attention_pictures, mass_table, observe
    from flexclear.analysis.plots import plot_mass
    from flexclear.compile.files import whole_file
    from flexclear.convert import transform
    from flexclear.families import family_of
    from flexclear.families.target import model_of

    pipe, call = _pipeline(settings)
    transform(pipe, None if radius == DENSE else int(radius), backend="sdpa")
    names = [known.name for known in family_of(model_of(pipe)).layers(model_of(pipe))]
    chosen = [names[int(text)] if text.isdigit() and int(text) < len(names) else text for text in layer or ()]
    total = (
        call.get("num_inference_steps")
        or inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    )
    wanted = list(at or [total // 2])
    if max(wanted) >= total:
        raise ValueError(f"--at {max(wanted)}: the run has steps 0 to {total - 1}")
    with observe(pipe, chosen or None, wanted, places) as found:
        picture = _draw(pipe, call, seed)
    _save(picture, out / "picture.png")
    written = [out / "picture.png"]
    for one in found:
        if places:
            heads = list(head) if head else list(range(min(4, len(one.mass))))
            name = f"maps_{one.layer.replace('.', '_')}_step_{one.step}.png"
            _save(attention_pictures(picture, one, heads), out / name)
            written.append(out / name)
    written.append(plot_mass(found, out / "mass.png"))
    told = [
        {
            "layer": one.layer,
            "step": one.step,
            "grid": one.grid,
            "mass": one.mass.tolist(),
            "uniform": one.uniform.tolist(),
            "text_share": one.text_share.tolist(),
        }
        for one in found
    ]
    for name, content in (("mass.json", json.dumps(told) + "\n"), ("mass.md", mass_table(found))):
        with whole_file(out / name) as beside:
            beside.write_text(content, encoding="utf-8")
        written.append(out / name)
    print(mass_table(found))
    print("\n".join(map(str, written)))


@analyze.command("perturb")
def perturb(
    model: Model,
    prompt: Prompt,
    remote: Annotated[
        list[int] | None, typer.Option(min=0, help="Relative distances are at most this, in tokens; repeat.")
    ] = None,
    local: Annotated[
        list[int] | None, typer.Option(min=0, help="Relative distances are at least this, in tokens; repeat.")
    ] = None,
    size: Size = None,
    steps: Steps = None,
    seed: Seed = 0,
    text_len: TextLen = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Folder for images and numbers.")] = Path("analysis"),
) -> None:
    """Draw one image as it is and with clipped relative distances in the rotary embedding, and compare.

    Each axis is clipped by itself: --remote 8 makes no row or column difference larger than 8, --local 8 none smaller (0
    becomes 8). Pairs with text are unchanged. Writes perturb.png, the images, perturb.md and perturb.json.
    """
    import json

    require("torchmetrics", "flexclear analyze perturb")
    settings = _settings(model, prompt, size, steps, text_len, dtype, device, out)

    import numpy as np
    import torch

    from flexclear.analysis.perturb import Clip, clipped_distances
    from flexclear.compile.files import whole_file
    from flexclear.convert import transform
    from flexclear.evaluation.formulas import psnr, ssim
    from flexclear.images.sheet import contact_sheet

    clips = [
        *(Clip("remote", distance) for distance in remote or ()),
        *(Clip("local", distance) for distance in local or ()),
    ]
    clips = clips or [Clip("remote", 8), Clip("local", 8)]
    pipe, call = _pipeline(settings)
    transform(pipe, None, backend="sdpa", order="raster")
    pictures = {"as it is": _draw(pipe, call, seed)}
    for clip in clips:
        with clipped_distances(pipe, clip):
            pictures[clip.title] = _draw(pipe, call, seed)
    as_tensor = {
        title: torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
        for title, picture in pictures.items()
    }
    rows = {}
    for title, tensor in as_tensor.items():
        name = title.replace(" ", "_") + ".png"
        _save(pictures[title], out / name)
        pair = (tensor, as_tensor["as it is"])
        rows[title] = {"psnr": float(psnr(*pair)), "ssim": float(ssim(*pair)), "file": name}
    lines = ["| relative distances | PSNR to as it is | SSIM |", "|---|---|---|"]
    lines += [f"| {title} | {row['psnr']:.2f} | {row['ssim']:.4f} |" for title, row in rows.items()]
    page = "\n".join(lines) + "\n"
    for name, content in (("perturb.json", json.dumps(rows, indent=1) + "\n"), ("perturb.md", page)):
        with whole_file(out / name) as beside:
            beside.write_text(content, encoding="utf-8")
    titles = [title.replace(" clipped", "\nclipped") for title in pictures]
    _save(contact_sheet([list(pictures.values())], [prompt], titles), out / "perturb.png")
    print(f"{page}\n{out / 'perturb.png'}")


@analyze.command("cost")
def cost(
    side: Annotated[list[int] | None, typer.Option(min=16, help="Side of a square image in pixels; repeat.")] = None,
    r: Annotated[list[int] | None, typer.Option("--r", min=1, help="Window radius in tokens; repeat.")] = None,
    channels: Annotated[int, typer.Option(min=1, help="Heads times head dimension.")] = 3072,
    text_len: Annotated[int, typer.Option(min=0, help="Text tokens.")] = 512,
    results: Annotated[
        Path | None, typer.Option(help="Folder with results of bench/attention/speed.py, for comparison.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for table, numbers and plots.")] = Path("analysis"),
) -> None:
    """FLOPs from the cost model, published times, and measured times. Writes cost.png, cost.md and cost.json."""
    import json
    from dataclasses import asdict

    require("matplotlib", "flexclear analyze cost")
    out_folder(out)
    if results is not None:
        must_exist(results)

    from flexclear.analysis.cost import cost_table, markdown, read_measured
    from flexclear.analysis.plots import plot_cost
    from flexclear.compile.files import whole_file

    measured = [] if results is None else read_measured(results.expanduser())
    rows = cost_table(side or [1024, 2048, 4096, 8192], r or [8, 16, 32], channels, text_len)
    page = markdown(rows, measured)
    told = {"channels": channels, "text_len": text_len, "rows": [asdict(row) for row in rows], "measured": measured}
    for name, content in (("cost.json", json.dumps(told, indent=1) + "\n"), ("cost.md", page)):
        with whole_file(out / name) as beside:
            beside.write_text(content, encoding="utf-8")
    plotted = plot_cost(rows, measured, out / "cost.png")
    print(f"{page}\n{plotted}")
