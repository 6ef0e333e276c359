"""Every command of the wheel in an empty environment: what it does with runtime dependencies only, and what it refuses.

python -m bench.installed FOLDER            # builds the wheel, makes an environment in FOLDER, runs all commands there
python -m bench.installed FOLDER --keep     # with the environment that is there
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.machine import facts, write_results

ROOT = Path(__file__).parents[1]
TORCH = "torch==2.13.0"
ABOUT = (
    "Every command of the wheel in an environment with torch and what the wheel itself requires, no extra: it runs, or names "
    "the package that it lacks. Written by `python -m bench.installed FOLDER`."
)

FAST = "--steps 1 --text-len 16 --size 64x64 --device cpu --backend sdpa"
COMMANDS = (
    ("--version", None),
    ("doctor --quick --device cpu", None),
    ("explain --height 1024 --width 1024 --table", None),
    ("explain --height 64 --width 64 --png window.png", None),
    (f"generate embedded --prompt 'a red apple' {FAST} --out first.png", None),
    (f"generate embedded --prompt 'a red apple' {FAST} --image first.png --strength 0.9 --out drawn", None),
    (
        f"generate embedded --prompt 'a red apple' {FAST} --control-image first.png --controlnet embedded --control-mode blur "
        "--out drawn",
        None,
    ),
    (
        f"generate embedded --prompt 'a red apple' {FAST} --seed 1 --seed 2 --batch 2 --vae-tiling --memory --out drawn",
        None,
    ),
    (f"generate embedded --prompt 'a red apple' {FAST} --negative-prompt red --true-cfg-scale 2 --out drawn", None),
    ("generate --config first.png --out again.png", None),
    ("generate --config options.yaml --out yaml.png", None),
    ("settings first.png", None),
    (f"generate embedded --prompt 'a red apple' {FAST} --lora lora.safetensors --out drawn", "peft"),
    ("demo --prompt 'a red apple' --r 8 --steps 2 --out demo", None),
    ("data generate embedded --prompts prompts.txt --count 2 --out data --steps 1 --size 64x64 --device cpu", None),
    ("data cache data --model embedded --out cache --text-len 16 --device cpu", None),
    ("distill distill.yaml --estimate --pixels 128x128 --text-len 16", None),
    ("distill distill.yaml", None),
    ("distill prodigy.yaml", "prodigyopt"),
    ("eval data data --metrics rmse --out scores --device cpu", None),
    ("eval data data --metrics psnr --out scores --device cpu", "torchmetrics"),
    ("eval run eval.yaml", None),
    ("report scores", None),
    ("analyze attention embedded --prompt 'a red apple' --device cpu", "matplotlib"),
    ("analyze perturb embedded --prompt 'a red apple' --device cpu", "torchmetrics"),
    ("analyze cost", "matplotlib"),
    ("bench embedded --sizes 128 --r 8 --repeats 1 --seconds 1 --dtype float32 --device cpu", None),
    ("bench embedded --png times.png", "matplotlib"),
    ("soak --calls 30 --growth 1000 --sizes 1 --largest 64 --samples 0 --backend sdpa", None),
    ("fuzz --seconds 1", "hypothesis"),
    ("play", "gradio"),
)
"""A command line, and the package that it lacks without an extra; None: none."""

FILES = {
    "prompts.txt": "a red apple\n",
    "options.yaml": "model: embedded\nprompt: a red apple\nsize: 64x64\nsteps: 1\ntext-len: 16\ndevice: cpu\nbackend: sdpa\n",
    "distill.yaml": "model: embedded\ndata: cache\noutput: run\nr: 4\nsteps: 1\nbatch_size: 1\noptimizer: {name: adamw}\n",
    "prodigy.yaml": "model: embedded\ndata: cache\noutput: other\nr: 4\nsteps: 1\nbatch_size: 1\n",
    "eval.yaml": (
        "model: embedded\nprompts: prompts.txt\noutput: evaluated\nsizes: [64x64]\nsteps: 1\ntext_len: 16\nbackend: sdpa\n"
        "device: cpu\nvariants: [{name: dense}, {name: r8, r: 8}]\ncolumns: [rmse]\ntables: []\n"
    ),
}


def environment(folder: Path) -> Path:
    """An environment with torch and the wheel of this checkout. Returns its ``flexclear``."""
    wheels, place = folder / "wheel", folder / "environment"
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(wheels),
        str(ROOT),
    ]
    subprocess.run(build, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    for what in (TORCH, str(next(wheels.glob("flexclear-*.whl")))):
        subprocess.run([str(place / "bin/pip"), "install", "-q", what], check=True)
    return place / "bin/flexclear"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    program = folder / "environment/bin/flexclear" if asked.keep else environment(folder)
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name, content in FILES.items():
        (work / name).write_text(content)
    rows: list[dict[str, object]] = []
    for line, lacks in COMMANDS:
        if lacks == "peft":
            shutil.copy(ROOT / "flexclear/embedded/students/clear_local_8.safetensors", work / "lora.safetensors")
        begin = time.perf_counter()
        done = subprocess.run(
            f"{program} {line}",
            shell=True,
            cwd=work,
            capture_output=True,
            text=True,
            env={**os.environ, "FLEXCLEAR_CACHE": "kept"},
        )
        seconds = time.perf_counter() - begin
        last = (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1:]
        said = last[0].replace("|", "/").replace(str(work), ".")[:150] if last else ""
        refused = done.returncode == 2 and lacks is not None and f"needs {lacks}: pip install" in done.stderr
        good = refused if lacks else done.returncode == 0
        rows.append(
            {"command": f"flexclear {line}", "status": done.returncode, "seconds": seconds, "last": said, "good": good}
        )
        print(f"{'ok   ' if good else 'WRONG'} {line}: {said}", flush=True)
    listed = subprocess.run([program.parent / "pip", "list", "--format", "freeze"], capture_output=True, text=True)
    packages = ", ".join(listed.stdout.split())
    table = "| command | exit status | s | last line |\n|---|---|---|---|\n" + "".join(
        f"| `{row['command']}` | {row['status']} | {row['seconds']:.0f} | {'' if row['good'] else '**wrong** '}{row['last']} |\n"
        for row in rows
    )
    about = facts(torch.device("cpu"), installed=packages)
    write_results("installed", about, rows, f"{ABOUT}\n\n{table}")
    return int(not all(row["good"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
