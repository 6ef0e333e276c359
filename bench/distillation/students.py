"""Distil the students that ship: each starts from its own weights, or from the teacher's where there is none yet.

Run ``python -m bench.distillation.students`` after ``python -m flexclear.embedded.train export``; it distils the students,
writes them and their index, and ``bench/results/students.json`` and ``students.md``: each student's images against the
teacher's, with its earlier weights under the new teacher, and after each round of training. ``--steps`` may be repeated: every
one is a round from the weights of the last, with a warm-up and decay of its own, so that the table shows what longer training
gains. Killed at any moment, the same command resumes where it stopped. Once the images are drawn (``--draw-only``), several
processes may work in one folder, each with students of its own (``--only``); the last one that is done writes the results.

``bench/distillation/study.py`` is what distilled them in the first place, and compares them with everything else.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from functools import cache
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
from flexclear.distill.samples import CachedSamples
from flexclear.embedded.fingerprint import students_fingerprint, teacher_fingerprint
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
STEPS = 600
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


def train(student: Student, samples: Joined, run: Path, steps: int, batch_size: int, rate: float, device: str) -> None:
    """Distil one student from its weights, or the teacher's, into the folder ``run``, or resume that.

    Raises:
        KeyboardInterrupt: it was interrupted; a checkpoint is kept.
    """
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


class Sizes:
    """Measures students at every size that they serve, against the teacher's images of the same prompts and seeds.

    Args:
        home: keeps the teacher's images.
        side, count: image tokens along either direction and number of the images; with ``small``, half as many of ``SMALL`` too.
    """

    def __init__(self, home: Path, side: int, count: int, small: bool, device: str) -> None:
        vocabulary = read_vocabulary(embedded.model_directory())
        counts = {side: count, **({SMALL: max(2, count // 2)} if small and side != SMALL else {})}
        self._parts = {
            Shipped(of).pixels: (Examiner(vocabulary, Shipped(of), number, DENOISING, device), home / f"teacher-{of}.safetensors")
            for of, number in counts.items()
        }  # fmt: skip

    def _reference(self, pixels: int) -> torch.Tensor:
        examiner, file = self._parts[pixels]
        return examiner.kept(file, lambda: examiner.draw(examiner.pipeline()))

    def teacher(self) -> dict[str, Any]:
        """By pixels, what the teacher's own images show."""
        return {
            str(pixels): asdict(examiner.compare(self._reference(pixels), None))
            for pixels, (examiner, _) in self._parts.items()
        }

    def measured(self, student: Student) -> dict[str, Any]:
        """By pixels, the student's images; without a file, those of the teacher's weights under its window."""
        found = {}
        for pixels, (examiner, _) in self._parts.items():
            pipe = examiner.pipeline()
            if student.path.is_file():
                with as_student(pipe, student):
                    pictures = examiner.draw(pipe)
            else:
                flexclear.transform(pipe, r=student.radius, down_factor=student.down_factor)
                pictures = examiner.draw(pipe)
            found[str(pixels)] = asdict(examiner.compare(pictures, self._reference(pixels)))
        return found


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
    machines = sorted({one["machine"] for row in report["students"].values() for one in row["rounds"]})
    lines = [
        "# The students that ship",
        "",
        f"Trained and measured on: {'; '.join(machines)}. diffusers {environment['diffusers']}. Each student was trained from "
        f"its earlier weights (the teacher's where it had none), out of {settings['pictures']} images of {size.pixels} px by the "
        f"teacher {settings['teacher']}{smaller}; all losses, AdamW with a warm-up and cosine decay in every round. A round "
        f"begins with the weights of the last. Measured on {settings['measured']} images of pairs that neither has seen (half as "
        f"many of the smaller size), {DENOISING} steps. The last round's weights ship.",
    ]
    columns = (
        ("psnr", "{:.1f}", 1),
        ("ssim", "{:.3f}", 1),
        ("stlpips_alex", "{:.3f}", 1),
        ("fd_lite0", "{:.2f}", 1),
        ("both", "{:.1f}", 100),
    )

    def line(name: str, steps: str, one: dict[str, Any] | None) -> str:
        values = [
            NONE if one is None else "" if one[key] is None else text.format(factor * one[key])
            for key, text, factor in columns
        ]
        return f"| {name} | {steps} | {' | '.join(values)} |"

    for pixels, teacher in report["teacher"].items():
        lines += [
            "",
            f"## {pixels} px",
            "",
            "| student | training | PSNR, dB | SSIM | ST-LPIPS (AlexNet) | FD (EfficientNet-Lite0) | retrieval, % |",
            "|---|---|---:|---:|---:|---:|---:|",
            line("the teacher, dense", "", teacher),
        ]
        for label, row in report["students"].items():
            lines.append(line(label, "earlier weights", row["before"] and row["before"][pixels]))
            before = ""
            for one in row["rounds"]:
                steps = f"{before}{one['steps']:,} x {one['batch_size']}, {one['learning_rate']:g}"
                lines.append(line("", steps, one["measured"][pixels]))
                before = "+ "
    lines += [
        "",
        "Training: steps x images of a step, learning rate; + is a further round. What the columns mean: `distillation.md`.",
    ]
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
    steps: Annotated[
        list[int] | None,
        typer.Option(
            min=2, help="Training steps of each student; repeat for a further round from there. Default: 600, once."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per training step.")] = 8,
    learning_rates: Annotated[
        list[float] | None,
        typer.Option("--learning-rate", help="AdamW's; repeat, one for each round. Default: 0.001."),
    ] = None,
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
    rounds = steps or [STEPS]
    rates = learning_rates or [1e-3]
    if len(rates) not in (1, len(rounds)):
        raise typer.BadParameter(
            f"--learning-rate: one, or one for each round; got {len(rates)} for {len(rounds)} rounds"
        )
    rates = rates * len(rounds) if len(rates) == 1 else rates
    teacher = teacher_fingerprint()
    home = folder / teacher  # What was made for another teacher does not mix in.
    settings = {
        "teacher": teacher, "side": side, "text_len": TEXT, "small": small, "pictures": pictures, "measured": measure
    }  # fmt: skip
    check_settings(home / "settings.json", settings)
    vocabulary = read_vocabulary(embedded.model_directory())
    sets = [("self-generated", size, pictures)] + ([("small", Shipped(SMALL), small)] if small else [])

    @cache
    def samples() -> Joined:
        def drawn(name: str, of: Shipped, count: int) -> CachedSamples:
            return distillation_data.self_generated(
                home / name, vocabulary, of, count, DENOISING, 0, device, lambda *done: None
            )

        return Joined(*(drawn(*one) for one in sets))

    if draw_only:
        samples()
        return
    sizes = Sizes(home, side, measure, bool(small), device)
    about = facts(torch.device(device), diffusers=diffusers.__version__)
    results = {student: home / "results" / f"{student.path.stem}.json" for student in students}
    for student, result in results.items():
        if only and student.path.name not in only:
            continue
        found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {"before": None, "rounds": []}
        if earlier and not found["rounds"] and found["before"] is None:
            found["before"] = sizes.measured(student)
        last = student
        for number, (count, rate) in enumerate(zip(rounds, rates, strict=True)):
            run = home / student.path.stem / str(number + 1)
            how = {"steps": count, "batch_size": batch_size, "learning_rate": rate}
            check_settings(run.with_suffix(".json"), how)
            begin = time.perf_counter()
            weights = run / WEIGHTS
            if not weights.is_file():
                train(last, samples(), run, count, batch_size, rate, device)
            last = Student(weights, student.radius, student.down_factor)
            if number < len(found["rounds"]):
                continue
            seconds = round(time.perf_counter() - begin, 1)
            machine = f"{about['hardware']}, torch {about['torch']}"
            found["rounds"].append({**how, "seconds": seconds, "machine": machine, "measured": sizes.measured(last)})
            with whole_file(result) as beside:
                beside.write_text(json.dumps(found, indent=1), encoding="utf-8")
    kept = {
        student: json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        for student, file in results.items()
    }
    if missing := [
        student.path.name for student, found in kept.items() if found is None or len(found["rounds"]) < len(rounds)
    ]:
        typer.echo(f"missing: {', '.join(missing)}; nothing is written yet")
        return
    new = {
        student.path.name: home / student.path.stem / str(len(found["rounds"])) / WEIGHTS
        for student, found in kept.items()
        if found
    }
    export(new, students, place, teacher)
    report = {
        "facts": about,
        "settings": settings,
        "fingerprint": students_fingerprint(place),
        "teacher": sizes.teacher(),
        "students": {student.label: found for student, found in kept.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    with whole_file(output / "students.json") as beside:
        beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with whole_file(output / "students.md") as beside:
        beside.write_text(markdown(report), encoding="utf-8")
    typer.echo(markdown(report))


if __name__ == "__main__":
    typer.run(main)
