"""What the approximations of ``flexclear.parallel`` do to images of the embedded model: averaged text, stale borders.

    torchrun --nproc-per-node 2 -m bench.parallel.pictures          # writes results/parallel_pictures.*

Each row draws the held-out prompts with the same seeds, shared, and is compared with one process's images of the same
student. Text that is exact with borders that are current has to give those images; else the run ends.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist

from flexclear import embedded, parallel
from flexclear.embedded.fingerprint import students_fingerprint, teacher_fingerprint
from flexclear.embedded.students import as_student, read_students
from flexclear.embedded.vocabulary import read_vocabulary

from bench.distillation.measure import Examiner
from bench.distillation.rows import Comparison
from bench.machine import RESULTS, facts, write_results

VARIANTS: tuple[dict[str, Any], ...] = (
    {"text": "exact", "exchange": "sync"},
    {"text": "average", "exchange": "sync"},
    {"text": "exact", "exchange": "stale", "warmup_steps": 4},
    {"text": "exact", "exchange": "stale", "warmup_steps": 2},
    {"text": "exact", "exchange": "stale", "warmup_steps": 1},
)
ROUNDING_PSNR = 60.0
"""dB; an image that is equal but for the order of sums is above it."""


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each variant and student, on every rank."""
    vocabulary = read_vocabulary(embedded.model_directory())
    examiner = Examiner(vocabulary, Comparison(16), arguments.pictures, arguments.steps, "cpu")
    rows = []
    for student in read_students():
        if student.radius not in arguments.radius or student.down_factor is not None:
            continue
        pipe = examiner.pipeline()
        with as_student(pipe, student):
            alone = examiner.draw(pipe)
            whole = examiner.compare(alone, None)
            for variant in VARIANTS:
                parallel.enable(pipe, **variant)
                pictures = examiner.draw(pipe)
                parallel.disable(pipe)
                found = examiner.compare(pictures, alone)
                if variant == VARIANTS[0] and found.psnr < ROUNDING_PSNR:
                    raise SystemExit(f"wrong: shared images are {found.psnr:.1f} dB from one process's")
                rows.append(
                    {
                        "student": student.label, **variant, "psnr": found.psnr, "ssim": found.ssim,
                        "stlpips_alex": found.stlpips_alex, "fd_lite0": found.fd_lite0,
                        "retrieved": found.both, "retrieved_alone": whole.both, "pictures": found.pictures,
                    }
                )  # fmt: skip
                if dist.get_rank() == 0:
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows in Markdown."""
    lines = [
        "| model | text | borders | PSNR to one process, dB | SSIM | ST-LPIPS (AlexNet) | FD (EfficientNet-Lite0) | prompted "
        "pair retrieved | by one process |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        borders = row["exchange"] + (f", first {row['warmup_steps']} sync" if "warmup_steps" in row else "")
        lines.append(
            f"| {row['student']} | {row['text']} | {borders} | {row['psnr']:.1f} | {row['ssim']:.3f} | {row['stlpips_alex']:.3f} "
            f"| {row['fd_lite0']:.2f} | {row['retrieved']:.1%} | {row['retrieved_alone']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--radius", type=int, nargs="+", default=[4, 8], help="windows of the students, in tokens")
    parser.add_argument("--pictures", type=int, default=51)
    parser.add_argument("--steps", type=int, default=16, help="denoising steps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit("start with torchrun --nproc-per-node N -m bench.parallel.pictures")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = measure(arguments)
    if dist.get_rank() == 0:
        about = facts(
            torch.device("cpu"), diffusers=diffusers.__version__, processes=dist.get_world_size(),
            pictures=arguments.pictures, steps=arguments.steps,
            teacher=teacher_fingerprint(), students=students_fingerprint(),
        )  # fmt: skip
        write_results("parallel_pictures", about, rows, table(rows), arguments.out)
    parallel.leave()


if __name__ == "__main__":
    main()
