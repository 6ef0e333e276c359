"""``flexclear eval`` and ``flexclear eval run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flexclear.commands.common import Commands, must_exist, out_folder
from flexclear.commands.terminal import console, progress_bars
from flexclear.common.metrics import METRICS, parse_metrics, require_for_metrics

IMAGES, PICTURES = "images", "pictures"
"""The command's name, and its earlier name, which still works."""


class _ImagesByDefault(TyperGroup):
    """``flexclear eval A B`` is ``flexclear eval images A B``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {option for parameter in self.get_params(ctx) for option in parameter.opts}
        first = next((number for number, text in enumerate(args) if text not in own), None)
        if first is not None and args[first] == PICTURES:
            args = [*args[:first], IMAGES, *args[first + 1 :]]
        if first is not None and args[first] not in self.commands:
            args = [*args[:first], IMAGES, *args[first:]]
        return super().parse_args(ctx, args)


evaluation = Commands(
    "Quality of images in numbers: of two folders (flexclear eval A_DIR B_DIR), or of variants of a model (run).",
    cls=_ImagesByDefault,
)


@evaluation.command(IMAGES)
def images(
    a_dir: Annotated[Path, typer.Argument(help="Folder of the images to score.")],
    b_dir: Annotated[Path, typer.Argument(help="Folder of the images to compare with; paired by file name.")],
    metrics: Annotated[str, typer.Option(help=f"Of {', '.join(METRICS)}; or all.")] = "all",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts of A's images, for clip-t: one per line in the order of names, or .json / .jsonl with names. "
            "Default: those stored in flexclear's PNGs."
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH that every image is scaled to first. Default: as they are.")
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH of inception, lpips, clip or dino; repeat. Default: the user's caches."),
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch CLIP and DINO from the hub if missing.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 16,
    device: Annotated[str, typer.Option(help="Where networks run; auto: CUDA if available.")] = "auto",
    common: Annotated[
        bool, typer.Option("--common", help="Ignore images without a partner, and measure the other pairs.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for scores.json, scores.md and intermediate results.")] = Path(
        "evaluation"
    ),
) -> None:
    """Score the images of A against those of B. The same command resumes where it was stopped.

    A metric whose network is missing is reported as not computed, with the reason; the others are computed.
    """
    from flexclear.common.choices import parse_size

    asked = parse_metrics(metrics)
    require_for_metrics(asked)
    sides = None if size is None else parse_size(size)
    for folder in (a_dir, b_dir):
        must_exist(folder)
    if prompts is not None:
        must_exist(prompts, "--prompts: no file")
    out_folder(out)

    from flexclear.evaluation.evaluate import evaluate

    places = _networks(network, device, download)
    with _Bars() as bars:
        try:
            found = evaluate(
                a_dir,
                b_dir,
                asked,
                prompts=prompts,
                size=sides,
                networks=places,
                batch=batch,
                out=out,
                common=common,
                on_progress=bars,
            )
        except KeyboardInterrupt:
            bars.console.print(f"interrupted: what is computed is kept in {out}; the same command resumes it")
            raise typer.Exit(130) from None
    print(f"{found.markdown()}\n{out / 'scores.json'}\n{out / 'scores.md'}")


@evaluation.command()
def run(
    config: Annotated[
        Path, typer.Argument(help="YAML file: model, prompts, variants, tables; see docs/guide/evaluation.md.")
    ],
) -> None:
    """Draw a prompt set with several variants of a model, score them, and fill the paper's tables.

    Writes results.json, results.md, sheet.png and the images. The same command resumes where it was stopped.
    """
    must_exist(config, "no file")

    from flexclear.evaluation.config import read_eval_config
    from flexclear.evaluation.run import run as job

    settings = read_eval_config(config)
    with _Bars() as bars:
        try:
            found = job(settings, say=bars.console.print, on_progress=bars)
        except KeyboardInterrupt:
            bars.console.print(
                f"interrupted: what is finished is kept in {settings.output}; the same command resumes it"
            )
            raise typer.Exit(130) from None
    print(f"{found.markdown()}\n{settings.output / 'results.json'}\n{settings.output / 'sheet.png'}")


def _networks(given: list[str] | None, device: str, download: bool) -> Any:
    from flexclear.evaluation import Networks
    from flexclear.generation.check import choose_device

    places = {}
    for text in given or ():
        name, equals, place = text.partition("=")
        if not equals or not place:
            raise ValueError(f"--network is NAME=PATH, such as clip=folder; got {text!r}")
        places[name.strip()] = place
    return Networks(places, choose_device(device), download)


class _Bars:
    """One progress bar per metric, on standard error."""

    def __enter__(self) -> _Bars:
        self.console = console()
        self._progress = progress_bars(self.console)
        self._tasks: dict[str, Any] = {}
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def __call__(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done, total=total)
