"""The embedded model's ControlNet, dense and with CLEAR windows that it never saw, as in the paper's Tables 5 and 9.

Run ``python -m bench.quality.controlnet`` (needs ``pip install -e '.[eval,metrics]'``); it writes ``controlnet.json``,
``controlnet.md`` and ``controlnet.png`` into ``bench/results``. The images, their conditions and a configuration for
``flexclear eval run`` per condition go below ``--pictures-in``; the tables are filled by those configurations.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import transformers
import typer
import yaml
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flexclear import embedded
from flexclear.common.metrics import require_for_metrics
from flexclear.common.shipped import controlnet_directory
from flexclear.embedded.captions import caption
from flexclear.embedded.control import FACTS_NAME, MODES
from flexclear.embedded.controlled import controlled_pipeline, generate_controlled, originals
from flexclear.embedded.evaluation import Request, evaluate, held_out_requests
from flexclear.embedded.fingerprint import students_fingerprint
from flexclear.embedded.reference import read_reference_sheet
from flexclear.embedded.retrieval import Retriever
from flexclear.embedded.students import read_students
from flexclear.embedded.vocabulary import Vocabulary, read_vocabulary
from flexclear.evaluation.conditions import CONDITIONS
from flexclear.evaluation.config import VariantConfig, read_eval_config
from flexclear.evaluation.run import Run, as_variant, run
from flexclear.evaluation.tables import COLUMNS, TABLES, cell
from flexclear.images.sheet import contact_sheet

from bench.machine import RESULTS, facts, write_results

TEXT = 32
DENSE, ALONE = "dense", "dense, without ControlNet"
TABLE = 5
"""Table 9, of tile and blurred images, has the same columns."""
MORE = ("stlpips_alex_orig", "stlpips_vgg_orig", "fd_lite0_orig")
"""Networks that need no download."""
SHOWN = (*TABLES[TABLE].columns, *MORE)


def variants_of(radii: Sequence[int], weights: Sequence[str] | None) -> list[VariantConfig]:
    """The rows below the dense ones; weights: those that ship, unless others are named.

    Raises:
        typer.BadParameter: weights are not given as NAME=FILE, or two rows have one name.
    """
    found = [VariantConfig(f"clear_r{radius}", r=str(radius)) for radius in radii]
    if weights is None:
        for student in read_students():
            found.append(VariantConfig(f"{student.path.stem}_distilled", weights=student.path))
    for text in weights or ():
        name, equals, file = text.partition("=")
        if not equals or not name or not file:
            raise typer.BadParameter(f"--weights is NAME=FILE, got {text!r}")
        found.append(VariantConfig(name, weights=Path(file)))
    names = [DENSE, "alone", *(variant.name for variant in found)]
    if len(set(names)) != len(names):
        raise typer.BadParameter(f"rows must have names of their own, got {names}")
    for variant in found:
        try:
            variant.check()
        except (ValueError, FileNotFoundError) as error:
            raise typer.BadParameter(str(error)) from error
    return found


def save(pictures: Sequence[Image.Image], folder: Path) -> None:
    """Write them as ``000.png`` and so on."""
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:03d}.png")


def scored(folder: Path, kind: str, prompts: Sequence[str], names: Sequence[str]) -> Run:
    """Write the configuration of ``flexclear eval run`` for the images in ``folder / kind``, and run it."""
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    config = {
        "output": f"results/{kind}",
        "prompts": "prompts.txt",
        "tables": [TABLE],
        "columns": list(MORE),
        "conditions": f"{kind}/conditions",
        "condition": kind,
        "variants": [{"name": name, "pictures": f"{kind}/{name}"} for name in names],
    }
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return run(read_eval_config(file))


def as_tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """``[images, 3, height, width]``, 0 to 1."""
    return torch.stack([torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1) / 255 for p in pictures])


def table(rows: Sequence[dict[str, Any]], found: dict[str, Run], pictures: int) -> str:
    """All of it in Markdown, in the layout of the paper's Tables 5 and 9."""
    lines = [
        f"Pairs that no training showed, {pictures} images a row. PSNR and SSIM to the dense image of the same seed and "
        "condition; RMSE of the image's own condition, values 0 to 1, to the one it was drawn from. Retrieval as in "
        "retrieval.md. Columns as in the paper's Tables 5 and 9, and those of networks whose weights need no download "
        "(docs/guide/evaluation.md). The ControlNet was trained with the dense model alone.",
        "",
        "| condition | drawn by | "
        + " | ".join(COLUMNS[name].title for name in SHOWN)
        + " | emoji | background | both |",
        "|---|---|" + "---:|" * (len(SHOWN) + 3),
    ]
    for row in rows:
        cells = [cell(name, row[name]) for name in SHOWN]
        cells += [f"{100 * row[name]:.0f} %" for name in ("emoji", "background", "both")]
        lines.append(f"| {row['condition']} | {row['row']} | {' | '.join(cells)} |")
    missing = {
        COLUMNS[column].title
        for result in found.values()
        for scores in result.scores.values()
        for column, score in scores.items()
        if score.reason is not None
    }
    if missing:
        lines += ["", f"Not computed, for want of their networks: {', '.join(sorted(missing))}."]
    return "\n".join(lines) + "\n"


def label(vocabulary: Vocabulary, request: Request) -> str:
    """The request's prompt."""
    return caption(vocabulary.emoji[request.emoji].name, list(vocabulary.backgrounds)[request.background])


def main(
    pictures: Annotated[int, typer.Option(min=1, help="Images per row and condition, at most.")] = 51,
    shown: Annotated[int, typer.Option(min=1, help="Prompts per condition on the contact sheet.")] = 2,
    radii: Annotated[str, typer.Option(help="Window radii in tokens of 8 px, without training.")] = "8,4",
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE of distilled weights, which bring their window; repeatable. Default: those that ship."
        ),
    ] = None,
    kinds: Annotated[str, typer.Option(help="Conditions.")] = ",".join(MODES),
    pixels: Annotated[int, typer.Option(help="Side of the images, a multiple of 128.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 16,
    scale: Annotated[float, typer.Option(help="Of the ControlNet's residuals.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of scenes and noise.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    backend: Annotated[str, typer.Option(help="Of the windows: auto, flex or sdpa.")] = "auto",
    model: Annotated[Path | None, typer.Option(help="Folder of a ControlNet; the package's by default.")] = None,
    pictures_in: Annotated[Path | None, typer.Option(help="Keep images and configurations in this new folder.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Draw, measure, and write JSON, Markdown and a contact sheet."""
    torch.set_num_threads(threads)
    asked = kinds.split(",")
    if unknown := [kind for kind in asked if kind not in MODES]:
        raise typer.BadParameter(f"--kinds are {', '.join(MODES)}; got {', '.join(unknown)}")
    require_for_metrics([metric for name in MORE if (metric := COLUMNS[name].metric)])
    variants = variants_of([int(radius) for radius in radii.split(",") if radius], weights)
    if pictures_in is not None and pictures_in.exists():
        raise typer.BadParameter(f"{pictures_in} is there already; name a new folder")
    work = Path(tempfile.mkdtemp()) if pictures_in is None else pictures_in
    vocabulary = read_vocabulary(embedded.model_directory())
    bitmaps = read_reference_sheet(embedded.model_directory(), len(vocabulary.emoji))
    retriever = Retriever(bitmaps, list(vocabulary.backgrounds.values()))
    repeats = -(-pictures // len(vocabulary.held_out_pairs))
    requests = held_out_requests(vocabulary, repeats, seed)[:pictures]
    clean = originals(requests, bitmaps, vocabulary, pixels)
    pipe = controlled_pipeline(embedded.pipeline(), embedded.controlnet(folder=model))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    found: dict[str, Run] = {}
    shown_rows, labels = [], []
    with Progress(*columns) as progress:
        task = progress.add_task("ControlNet", total=len(asked) * len(requests) * (2 + len(variants)))
        for kind in asked:
            conditions = [CONDITIONS[kind](picture) for picture in clean]
            drawn: dict[str, list[Image.Image]] = {}
            for variant in (VariantConfig(DENSE, r="dense"), VariantConfig("alone", r="dense"), *variants):
                progress.update(task, description=f"{kind}, {variant.name}")
                with as_variant(pipe, variant, backend):
                    drawn[variant.name] = generate_controlled(
                        pipe,
                        vocabulary,
                        requests,
                        conditions,
                        kind,
                        steps,
                        0.0 if variant.name == "alone" else scale,
                        max_sequence_length=TEXT,
                        on_done=lambda count: progress.advance(task, count),
                    )
            save(conditions, work / kind / "conditions")
            for name, images in drawn.items():
                save(images, work / kind / name)
            found[kind] = scored(work, kind, [label(vocabulary, item) for item in requests], list(drawn))
            for name, images in drawn.items():
                scores = {column: score.value for column, score in found[kind].scores[name].items()}
                retrieved = evaluate(retriever, requests, as_tensor(images))
                rows.append(
                    {
                        "condition": kind,
                        "row": ALONE if name == "alone" else name,
                        **{column: scores.get(column) for column in SHOWN},
                        "emoji": retrieved.emoji,
                        "background": retrieved.background,
                        "both": retrieved.both,
                    }
                )
            for number in range(min(shown, len(requests))):
                shown_rows.append([clean[number], conditions[number], *(images[number] for images in drawn.values())])
                labels.append(f"{kind}: {label(vocabulary, requests[number])}")
    about = facts(
        torch.device("cpu"),
        diffusers=diffusers.__version__,
        transformers=transformers.__version__,
        pictures=len(requests),
        pixels=pixels,
        steps=steps,
        scale=scale,
        seed=seed,
        teacher=json.loads(((model or controlnet_directory()) / FACTS_NAME).read_text(encoding="utf-8"))["teacher"],
        students=students_fingerprint(),
    )
    text = table(rows, found, len(requests))
    write_results("controlnet", about, rows, text, out)
    titles = ["original", "condition", DENSE, "dense,\nno ControlNet", *(variant.name for variant in variants)]
    contact_sheet(shown_rows, labels, titles).save(out / "controlnet.png")
    if pictures_in is None:
        shutil.rmtree(work)
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
