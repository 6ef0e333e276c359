"""Distil the students that ship: each starts from its own weights, or from the teacher's where there is none yet.

Run ``python -m bench.distillation.students`` after ``python -m flexclear.embedded.train export``; it distils the students,
writes them and their index, and ``bench/results/students.json`` and ``students.md``: each student's images against the
teacher's, with its earlier weights under the new teacher, and with those that it has now. Killed at any moment, the same command
resumes where it stopped. Once the images are drawn (``--draw-only``), several processes may work in one folder, each with
students of its own (``--only``); the last one that is done writes the results.

``bench/distillation/study.py`` is what distilled them in the first place, and compares them with everything else.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from rich.console import Console

import flexclear
from flexclear import embedded
from flexclear.common.choices import EMBEDDED
from flexclear.common.foreign import without_bars, without_diffusers_warnings
from flexclear.common.shipped import students_directory
from flexclear.compile.files import whole_file
from flexclear.distill import DistillConfig, OptimizerConfig, distill
from flexclear.distill.config import CheckpointConfig, HeldOutConfig
from flexclear.distill.records import WEIGHTS
from flexclear.embedded.fingerprint import teacher_fingerprint
from flexclear.embedded.students import Student, as_student, file_name, read_students, write_index
from flexclear.embedded.vocabulary import read_vocabulary

from bench.distillation import data as distillation_data
from bench.distillation.data import Joined
from bench.distillation.measure import Examiner
from bench.distillation.report import NONE
from bench.distillation.rows import Comparison
from bench.machine import RESULTS, facts
from bench.resume import check_settings

DENOISING = 16
TEXT = 32
"""Text tokens, at every size: as many as the demonstration has."""
SMALL = 16
"""Image tokens along either direction of the smaller images, which are mixed in so that students serve both."""


class Shipped(Comparison):
    """A size with the text that students ship for."""

    @property
    def text_len(self) -> int:
        return TEXT


def window_of(text: str) -> tuple[int, int | None]:
    """Radius and side of the pooled cells of ``8`` or ``4/4``.

    Raises:
        typer.BadParameter: it is neither.
    """
    parts = text.split("/")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"a window is a radius such as 8, or a radius and pooled cells such as 4/4; got {text!r}"
        )
    return int(parts[0]), int(parts[1]) if len(parts) == 2 else None


def wanted(windows: list[str] | None, students: tuple[Student, ...], place: Path) -> tuple[Student, ...]:
    """The students to be distilled, those that are there by default."""
    if not windows:
        return students
    return tuple(Student(place / file_name(*window), *window) for window in map(window_of, windows))


def goes_on(
    student: Student, samples: Joined, folder: Path, steps: int, batch_size: int, rate: float, device: str
) -> Path:
    """Distil one student from its weights, or the teacher's, or resume that; the new weights, or KeyboardInterrupt."""
    run = folder / student.path.stem
    if (run / WEIGHTS).is_file():
        return run / WEIGHTS
    config = DistillConfig(
        output=run,
        model=EMBEDDED,
        r=student.radius,
        down_factor=student.down_factor,
        initial_weights=student.path if student.path.is_file() else None,
        backend="sdpa",
        steps=steps,
        batch_size=batch_size,
        gradient_accumulation=1,
        mixed_precision="no",
        seed=1,
        device="cpu" if device == "cpu" else None,
        optimizer=OptimizerConfig("adamw", learning_rate=rate, schedule="cosine", warmup_steps=max(1, steps // 20)),
        checkpoints=CheckpointConfig(every=max(1, min(50, steps // 4)), keep=1),
        held_out=HeldOutConfig(min(32, len(samples) // 4), every=max(1, steps // 10), batch_size=16),
    )
    say = Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print

    def on_step(record: dict[str, Any]) -> None:
        if int(record["step"]) % 50 == 0:
            say(f"{student.label}: step {record['step']} of {steps}, loss {record['loss']:.4f}")

    if distill(config=config, data=samples, on_step=on_step, say=say).interrupted:
        raise KeyboardInterrupt
    return run / WEIGHTS


def measured(examiner: Examiner, student: Student, reference: torch.Tensor) -> dict[str, Any]:
    """The student's images against the teacher's; without a file, those of the teacher's weights under its window."""
    pipe = examiner.pipeline()
    if student.path.is_file():
        with as_student(pipe, student):
            pictures = examiner.draw(pipe)
    else:
        flexclear.transform(pipe, r=student.radius, down_factor=student.down_factor)
        pictures = examiner.draw(pipe)
    return asdict(examiner.compare(pictures, reference))


def export(new: dict[str, Path], students: tuple[Student, ...], target: Path, teacher: str) -> None:
    """Write the new weights in bfloat16 over the students' files, and the index that names the teacher."""
    written = []
    for student in students:
        pipe = embedded.pipeline()
        flexclear.transform(pipe, r=student.radius, down_factor=student.down_factor, backend="sdpa")
        flexclear.load_weights(pipe, new[student.path.name])
        pipe.transformer.to(torch.bfloat16)
        path = target / student.path.name
        flexclear.save_weights(pipe, path, base="flexclear.embedded")
        written.append(Student(path, student.radius, student.down_factor))
    write_index(target, written, teacher)


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    environment, settings, size = report["facts"], report["settings"], Shipped(report["settings"]["side"])
    smaller = f", {settings['small']} more at {Shipped(SMALL).pixels} px" if settings["small"] else ""
    lines = [
        "# The students that ship",
        "",
        f"{environment['hardware']}; torch {environment['torch']}, diffusers {environment['diffusers']}. "
        f"{settings['steps']} steps of {settings['batch_size']} from each student's earlier weights (the teacher's where it had "
        f"none), out of {settings['pictures']} images of {size.pixels} px by the teacher {settings['teacher']}{smaller}; all "
        f"losses, AdamW at {settings['learning_rate']} with warm-up and cosine decay. Measured on {settings['measured']} images "
        f"of {size.pixels} px of pairs that neither has seen, {DENOISING} steps: the earlier weights under this teacher / the "
        "weights that ship.",
        "",
        "| student | PSNR, dB | SSIM | ST-LPIPS (AlexNet) | FD (EfficientNet-Lite0) | retrieval, % |",
        "|---|---:|---:|---:|---:|---:|",
        f"| the teacher, dense | | 1 | 0 | 0 | {100 * report['teacher']['both']:.1f} |",
    ]
    for label, row in report["students"].items():
        first, last = row["before"], row["after"]
        cells = [
            " / ".join(NONE if one is None else text.format(factor * one[name]) for one in (first, last))
            for name, text, factor in (
                ("psnr", "{:.1f}", 1),
                ("ssim", "{:.3f}", 1),
                ("stlpips_alex", "{:.3f}", 1),
                ("fd_lite0", "{:.2f}", 1),
                ("both", "{:.1f}", 100),
            )
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "What the columns mean: `distillation.md`."]
    return "\n".join(lines) + "\n"


@without_bars
@without_diffusers_warnings()
def main(
    only: Annotated[list[str] | None, typer.Option("--only", help="File names; repeat. Default: all of them.")] = None,
    windows: Annotated[
        list[str] | None,
        typer.Option(
            "--window", help="Radius, or radius/cells where keys are pooled; repeat. Default: the students there are."
        ),
    ] = None,
    side: Annotated[int, typer.Option(help="Image tokens along either direction: 16, 32 or 64.")] = 32,
    small: Annotated[int, typer.Option(min=0, help="Images of 16 x 16 tokens that are mixed in.")] = 0,
    draw_only: Annotated[bool, typer.Option(help="Draw and encode the images, then stop.")] = False,
    steps: Annotated[int, typer.Option(min=2, help="Training steps of each student.")] = 600,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per training step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="AdamW's.")] = 1e-3,
    pictures: Annotated[int, typer.Option(min=4, help="Images that the teacher draws.")] = 1200,
    measure: Annotated[int, typer.Option(min=2, help="Images that each student is measured on.")] = 102,
    earlier: Annotated[
        bool, typer.Option(help="Measure each student's earlier weights under this teacher, too.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    folder: Annotated[Path, typer.Option(help="Where it lives between runs.")] = Path(".distillation/again"),
    source: Annotated[Path | None, typer.Option(help="The students' folder. Default: the package's.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Distil the students again, measure them, and write them, their index, JSON and Markdown."""
    torch.set_num_threads(threads)
    place = students_directory() if source is None else source
    students = wanted(windows, read_students(place, of_any_teacher=True), place)
    size = Shipped(side)
    names = [student.path.name for student in students]
    if unknown := [name for name in only or () if name not in names]:
        raise typer.BadParameter(f"--only: unknown {', '.join(unknown)}; in {place} are {', '.join(names) or 'none'}")
    teacher = teacher_fingerprint()
    home = folder / teacher  # What was made for another teacher does not mix in.
    settings = {
        "teacher": teacher, "side": side, "text_len": TEXT, "small": small, "steps": steps, "batch_size": batch_size,
        "learning_rate": learning_rate, "pictures": pictures, "measured": measure,
    }  # fmt: skip
    check_settings(home / "settings.json", settings)
    vocabulary = read_vocabulary(embedded.model_directory())
    sets = [("self-generated", size, pictures)] + ([("small", Shipped(SMALL), small)] if small else [])
    samples = Joined(
        *(
            distillation_data.self_generated(
                home / name, vocabulary, of, count, DENOISING, 0, device, lambda *done: None
            )
            for name, of, count in sets
        )
    )
    if draw_only:
        return
    examiner = Examiner(vocabulary, size, measure, DENOISING, device)
    reference = examiner.kept(home / "teacher.safetensors", lambda: examiner.draw(examiner.pipeline()))
    for student in students:
        result = home / "results" / f"{student.path.stem}.json"
        if (only and student.path.name not in only) or result.is_file():
            continue
        before = measured(examiner, student, reference) if earlier else None
        weights = goes_on(student, samples, home, steps, batch_size, learning_rate, device)
        after = measured(examiner, Student(weights, student.radius, student.down_factor), reference)
        with whole_file(result) as beside:
            beside.write_text(json.dumps({"before": before, "after": after}, indent=1), encoding="utf-8")
    results = {student: home / "results" / f"{student.path.stem}.json" for student in students}
    if missing := [student.path.name for student, file in results.items() if not file.is_file()]:
        typer.echo(f"missing: {', '.join(missing)}; nothing is written yet")
        return
    new = {student.path.name: home / student.path.stem / WEIGHTS for student in students}
    export(new, students, place, teacher)
    report = {
        "facts": facts(torch.device(device), diffusers=diffusers.__version__),
        "settings": settings,
        "teacher": asdict(examiner.compare(reference, None)),
        "students": {student.label: json.loads(file.read_text(encoding="utf-8")) for student, file in results.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    with whole_file(output / "students.json") as beside:
        beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with whole_file(output / "students.md") as beside:
        beside.write_text(markdown(report), encoding="utf-8")
    typer.echo(markdown(report))


if __name__ == "__main__":
    typer.run(main)
