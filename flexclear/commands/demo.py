"""``flexclear demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexclear.commands.common import out_folder
from flexclear.commands.terminal import console, progress_bars
from flexclear.common.choices import LARGEST_SEED, check_seeds

DEMO_PROMPTS = (
    "a red apple on a blue background",
    "a sunflower on a white background",
    "a rocket on a yellow background",
    "an octopus on a green background",
)


def demo(
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; repeat for more. Default: four prompts.")
    ] = None,
    r: Annotated[
        list[int] | None,
        typer.Option(
            "--r", min=1, help="Window radius in tokens; repeat. Default: the shipped students', or 3, 4, 6, 8."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the contact sheet and the table.")] = Path("demo"),
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the first prompt's noise; later ones count up.")
    ] = 0,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 16,
    size: Annotated[int, typer.Option(min=64, help="Image side in pixels, a multiple of 8.")] = 256,
) -> None:
    """Draw prompts with the embedded pipeline, dense and under several windows, side by side.

    If weights distilled for a window ship with the package, that window is drawn with them, too.
    """
    from flexclear import embedded

    prompts, radii = list(prompt or DEMO_PROMPTS), list(r or ())
    check_seeds("--seed", seed, len(prompts))
    if size % 8:
        raise ValueError(f"--size must be a multiple of 8 pixels, got {size}")
    out_folder(out)
    lines = console()
    for text in prompts:
        strangers = embedded.unknown_words(text)
        if strangers:
            lines.print(
                f"The embedded model was not trained on: {', '.join(strangers)} (in {text!r}). It draws all the same."
            )
    from flexclear.embedded.students import Student, read_students
    from flexclear.tools.demo import markdown_table, run_variants, write

    students: tuple[Student, ...] = ()
    try:
        students = read_students()
    except (ValueError, FileNotFoundError) as error:
        lines.print(f"Without distilled weights: {error}.")
    radii = radii or sorted({student.radius for student in students}) or [3, 4, 6, 8]
    students = tuple(student for student in students if student.radius in radii)
    with progress_bars(lines) as progress:
        task = progress.add_task("loading", total=(1 + len(radii) + len(students)) * len(prompts) * steps)
        pipe = embedded.pipeline()
        pipe.set_progress_bar_config(disable=True)
        variants = run_variants(
            pipe,
            prompts,
            radii,
            seed=seed,
            steps=steps,
            side=size,
            students=students,
            on_step=lambda label: progress.update(task, advance=1, description=label),
        )
    picture, table = write(variants, prompts, out)
    print(f"{markdown_table(variants)}\nimages:  {picture}\ntable:    {table}")
