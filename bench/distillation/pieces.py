"""The pieces of bench/distillation/study.py: each is trained and measured once, and kept in the study's folder."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file

import flexclear
from flexclear import embedded
from flexclear.common.choices import EMBEDDED
from flexclear.compile.files import whole_file
from flexclear.distill import DistillConfig, LossConfig, OptimizerConfig, distill
from flexclear.distill.config import CheckpointConfig, HeldOutConfig
from flexclear.distill.records import LOSSES, WEIGHTS
from flexclear.distill.samples import CachedSamples
from flexclear.embedded.fingerprint import teacher_fingerprint
from flexclear.embedded.students import Student, file_name, write_index
from flexclear.embedded.vocabulary import read_vocabulary

from bench.distillation import data as distillation_data
from bench.distillation.few_steps import reflow
from bench.distillation.measure import Examiner
from bench.distillation.rows import ALL, BEFORE, FEW, FLOW, LONG, LONGER, REAL, Comparison, Job, Row
from bench.machine import facts
from bench.resume import check_settings

LOSS_WEIGHTS = {
    FLOW: LossConfig(prediction=0, attention=0), ALL: LossConfig(), REAL: LossConfig(), LONG: LossConfig()
}  # fmt: skip
POINTS = 60


class Interrupted(Exception):
    """The study was asked to stop; everything so far is kept."""


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on; a study resumes only with the same ones.

    Attributes:
        side: image tokens along either direction.
        steps, batch_size, learning_rate: of every training run; the longer ones take ``LONGER`` times as many steps.
        few_rate: learning rate of the few-step model.
        pictures: in each set, self-generated and real.
        held_out: of them, kept out of training for its curves.
        measured: images of held-out pairs that decide.
        denoising, few_steps: denoising steps, of the teacher and of the few-step model.
        seed: of data, order and noise.
    """

    side: int
    steps: int
    batch_size: int
    learning_rate: float
    few_rate: float
    pictures: int
    held_out: int
    measured: int
    denoising: int
    few_steps: int
    seed: int


class Study:
    """The state of a study in a folder; every finished piece has a file, and is not done again.

    Args:
        folder: for images, caches, runs and results.
        settings: see ``Settings``.
        device: ``"cpu"`` or ``"cuda"``.
        students: folder for the exported students.
        drawings: folder of the real images' drawings, see ``data.foreign_drawings``; None leaves out what trains on them.
        on_item: called with what is being done, how much of it is done, and how much there is.
        say: called with lines for people.

    Raises:
        ValueError: the folder holds a study with other settings or of another teacher.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        device: str,
        students: Path,
        on_item: Any,
        say: Any,
        drawings: Path | None = None,
    ) -> None:
        self.folder, self.settings, self.device, self.students = folder, settings, device, students
        self.drawings = drawings
        self._on_item, self._say = on_item, say
        self.comparison = Comparison(settings.side)
        self.teacher = teacher_fingerprint()
        check_settings(self.folder / "study.json", {**asdict(self.settings), "teacher": self.teacher})
        self.vocabulary = read_vocabulary(embedded.model_directory())
        self._examiner: Examiner | None = None
        self._samples: dict[str, CachedSamples] = {}
        self._exported: tuple[list[Any], list[dict[str, Any]]] = ([], [])

    @property
    def machine(self) -> str:
        """What a result says that it was made on: one folder's pieces may come from several machines."""
        about = facts(torch.device(self.device))
        return f"{about['hardware']}, torch {about['torch']}"

    @property
    def examiner(self) -> Examiner:
        if self._examiner is None:
            self._examiner = Examiner(
                self.vocabulary, self.comparison, self.settings.measured, self.settings.denoising, self.device
            )
        return self._examiner

    def run(self, job: Job) -> None:
        """Do one piece, unless it is done.

        Raises:
            Interrupted: a signal came; a checkpoint is kept.
        """
        if self.done(job):
            return
        begin = time.perf_counter()
        before = self._result(job).get("seconds", 0.0)
        try:
            found = self._few_steps(job) if job.row is None else self._row(job, job.row)
        except FloatingPointError as error:
            self._say(f"{job.title}: {error}")
            found = {"failed": str(error)}
        found["seconds"] = round(before + time.perf_counter() - begin, 1)
        found["machine"] = self.machine
        self._write(job, found)

    def done(self, job: Job) -> bool:
        """Whether there is nothing left of it; the few-step model is measured with every student that there is."""
        found = self._result(job)
        if job.row is None and "rows" in found:
            return all(row.name in found["rows"] for row in self._trained())
        return bool(found)

    def _result(self, job: Job) -> dict[str, Any]:
        file = self.folder / "results" / f"{job.name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def _write(self, job: Job, found: dict[str, Any]) -> None:
        with whole_file(self.folder / "results" / f"{job.name}.json") as beside:
            beside.write_text(json.dumps(found, indent=1), encoding="utf-8")

    def samples(self, kind: str) -> CachedSamples:
        """One of the two sets, made where it is missing."""
        if kind not in self._samples:
            chosen = self.settings
            common = (chosen.seed, self.device, self._on_item)
            if kind == distillation_data.REAL:
                assert self.drawings is not None
                made = distillation_data.real(
                    self.folder / kind, self.vocabulary, self.comparison, chosen.pictures, *common, self.drawings
                )
            else:
                made = distillation_data.self_generated(
                    self.folder / kind, self.vocabulary, self.comparison, chosen.pictures, chosen.denoising, *common
                )
            self._samples[kind] = made
        return self._samples[kind]

    def _draw(self, pipe: Any, what: str, steps: int | None = None) -> torch.Tensor:
        total, done = len(self.examiner.requests), 0

        def on_done(count: int) -> None:
            nonlocal done
            done += count
            self._on_item(what, done, total)

        return self.examiner.draw(pipe, on_done, steps)

    def reference(self) -> torch.Tensor:
        """The teacher's images."""
        return self.examiner.kept(
            self.folder / "teacher.safetensors", lambda: self._draw(self.examiner.pipeline(), "the teacher draws")
        )

    def _teacher(self) -> dict[str, Any]:
        """How often the teacher's own images show what was asked for."""
        file = self.folder / "results" / "teacher.json"
        if not file.is_file():
            found = asdict(self.examiner.compare(self.reference(), None))
            with whole_file(file) as beside:
                beside.write_text(json.dumps(found, indent=1), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    def weights(self, row: Row, stage: str) -> Path:
        return self.folder / "runs" / Job(row, stage).name / WEIGHTS

    def _trained(self) -> list[Row]:
        return [row for row in self.comparison.rows if row.is_clear and "measured" in self._result(Job(row, ALL))]

    def _row(self, job: Job, row: Row) -> dict[str, Any]:
        found: dict[str, Any] = {}
        weights = None
        if job.stage != BEFORE:
            weights = self.weights(row, job.stage)
            if not weights.is_file():
                self._train(job, row)
            found = self._curves(weights.parent)
        pipe = self.examiner.pipeline()
        row.apply(pipe, weights)
        pictures = self._draw(pipe, f"{job.title}: drawing")
        found["measured"] = asdict(self.examiner.compare(pictures, self.reference()))
        if weights is not None:
            shutil.rmtree(weights.parent / "checkpoints", ignore_errors=True)
        return found

    def _train(self, job: Job, row: Row) -> None:
        chosen = self.settings
        samples = self.samples(distillation_data.REAL if job.stage == REAL else distillation_data.SELF)
        steps = chosen.steps * (LONGER if job.stage == LONG else 1)
        config = DistillConfig(
            output=self.folder / "runs" / job.name,
            model=EMBEDDED,
            data=samples.folder,
            backend="sdpa",
            steps=steps,
            batch_size=chosen.batch_size,
            gradient_accumulation=1,
            mixed_precision="no",
            seed=chosen.seed,
            device="cpu" if self.device == "cpu" else None,
            losses=LOSS_WEIGHTS[job.stage],
            optimizer=OptimizerConfig(
                "adamw", learning_rate=chosen.learning_rate, schedule="cosine", warmup_steps=max(1, steps // 20)
            ),
            checkpoints=CheckpointConfig(every=max(1, min(50, steps // 4)), keep=1),
            held_out=HeldOutConfig(chosen.held_out, every=max(1, steps // 10), batch_size=16),
            **row.options,
        )
        title = f"{job.title}: training"
        done = distill(
            config=config,
            data=samples,
            on_step=lambda record: self._on_item(title, int(record["step"]), steps),
            say=self._say,
        )
        if done.interrupted:
            raise Interrupted

    def _curves(self, run: Path) -> dict[str, Any]:
        """Losses of a run: means over at most ``POINTS`` stretches of its steps, and those on the held-out images.

        Nothing, where only the weights were kept.
        """
        if not (run / LOSSES).is_file():
            return {}
        records = [json.loads(line) for line in (run / LOSSES).read_text(encoding="utf-8").splitlines()]
        held_out = [json.loads(line) for line in (run / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
        length = -(-len(records) // POINTS)
        parts = [records[at : at + length] for at in range(0, len(records), length)]
        names = [name for name in ("step", "loss", "flow", "prediction", "attention") if name in records[0]]
        curve = {name: [round(sum(record[name] for record in p) / len(p), 6) for p in parts] for name in names}
        return {"curve": curve, "held_out": held_out}

    def _few_steps(self, job: Job) -> dict[str, Any]:
        examiner, chosen = self.examiner, self.settings
        place = self.folder / FEW
        file = place / "transformer.safetensors"
        found = self._result(job)

        def model() -> Any:
            pipe = examiner.pipeline()
            pipe.transformer.load_state_dict(load_file(file))
            return pipe

        if not file.is_file():
            pipe = examiner.pipeline()
            reflow(
                pipe.transformer,
                self.samples(distillation_data.SELF),
                place / "checkpoint.pt",
                chosen.steps,
                chosen.batch_size,
                chosen.few_rate,
                chosen.seed,
                lambda step, loss: self._on_item("few-step model: training", step, chosen.steps),
            )
            tensors = {name: value.cpu().contiguous() for name, value in pipe.transformer.state_dict().items()}
            with whole_file(file) as beside:
                save_file(tensors, beside)
            (place / "checkpoint.pt").unlink(missing_ok=True)
        reference = self.reference()
        few = chosen.few_steps
        what = "few-step model: drawing"
        own = examiner.kept(place / "pictures.safetensors", lambda: self._draw(model(), what, few))
        if "model" not in found:
            pipe = examiner.pipeline()
            found["teacher"] = asdict(examiner.compare(self._draw(pipe, what, few), reference))
            found["model"] = asdict(examiner.compare(own, reference))
            found["rows"] = {}
        for row in self._trained():
            if row.name in found["rows"]:
                continue
            measured = {}
            for stage, weights in ((BEFORE, None), (ALL, self.weights(row, ALL))):
                pipe = model()
                row.apply(pipe, weights)
                measured[stage] = asdict(examiner.compare(self._draw(pipe, what, few), own))
            found["rows"][row.name] = measured
        return found

    def export(self) -> list[dict[str, Any]]:
        """Write the best student of each CLEAR window, in bfloat16, and the index that names their teacher."""
        best = []
        for row in self.comparison.rows:
            runs = [(stage, self._result(Job(row, stage))) for stage in (FLOW, ALL, LONG)] if row.is_clear else []
            finished = [(run["measured"]["psnr"], stage) for stage, run in runs if "measured" in run]
            best += [(row, *max(finished))] if finished else []
        if best == self._exported[0]:
            return self._exported[1]
        listed, students = [], []
        for row, psnr, stage in best:
            radius, factor = row.options["r"], row.options.get("down_factor")
            pipe = embedded.pipeline()
            row.apply(pipe, self.weights(row, stage))
            pipe.transformer.to(torch.bfloat16)
            path = self.students / file_name(radius, factor)
            flexclear.save_weights(pipe, path, base="flexclear.embedded")
            students.append(Student(path, radius, factor))
            listed.append({"file": path.name, "stage": stage, "psnr": psnr, "bytes": path.stat().st_size})
        write_index(self.students, students, self.teacher)
        self._exported = best, listed
        return listed

    def report(self) -> dict[str, Any]:
        """Everything that has come out so far."""
        config = embedded.pipeline().transformer.config
        everything = self.comparison.jobs()
        results = {job: self._result(job) for job in everything}
        rows: dict[str, Any] = {}
        for job, found in results.items():
            if job.row is not None and found:
                rows.setdefault(job.row.name, {})[job.stage] = found
        few = results[Job(None, FEW)]
        return {
            "facts": facts(torch.device(self.device), diffusers=diffusers.__version__),
            "settings": {**asdict(self.settings), "teacher": self.teacher},
            "machines": list(dict.fromkeys(found["machine"] for found in results.values() if "machine" in found)),
            "seconds": round(sum(found.get("seconds", 0.0) for found in results.values()), 1),
            "dense_flops": self.comparison.dense_flops(config),
            "flops": {row.name: row.flops(config) for row in self.comparison.rows},
            "teacher": self._teacher(),
            "rows": rows,
            **({"few_steps": few} if few else {}),
            "missing": [job.title for job in everything if not self.done(job)],
            "students": self.export(),
        }
