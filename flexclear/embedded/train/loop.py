"""The loop around training steps: progress bar, log, checkpoints and contact sheets at their intervals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flexclear.embedded.train.schedule import Schedule


@dataclass(frozen=True)
class Intervals:
    """Steps between lines of the log, checkpoints, and contact sheets."""

    log: int
    save: int
    sheet: int


def run_steps(
    name: str,
    folder: Path,
    schedule: Schedule,
    done: int,
    every: Intervals,
    train: Callable[[int, float], float],
    save: Callable[[int], None],
    draw: Callable[[int], None],
    stop: Callable[[], bool],
) -> int:
    """Train until the schedule ends or ``stop`` says so; return the steps done. The last step is always saved and drawn.

    Args:
        name: name of what is trained; the log is ``folder/NAME.jsonl``, which is continued.
        folder: output folder, made if missing.
        schedule: learning-rate schedule; with ``total`` None only ``stop`` ends the run.
        done: steps before this run.
        every: see ``Intervals``.
        train: does step number n, from 0, at this factor of the learning rate, and returns the loss.
        save: saves everything after this many steps.
        draw: draws a contact sheet after this many steps.
        stop: called once after each step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started, losses, last = time.monotonic(), [], schedule.finished(done)
    with Progress(*columns) as progress, (folder / f"{name}.jsonl").open("a", encoding="utf-8") as log:
        task = progress.add_task(name, total=schedule.total, completed=done)
        while not last:
            factor = schedule.factor(done)
            losses.append(train(done, factor))
            done += 1
            progress.update(task, advance=1, description=f"{name} loss {losses[-1]:.4f}")
            last = schedule.finished(done) or stop()
            if done % every.log == 0 or last:
                mean, seconds = sum(losses) / len(losses), round(time.monotonic() - started, 1)
                entry = {"step": done, "loss": mean, "rate_factor": factor, "seconds": seconds}
                log.write(json.dumps(entry) + "\n")
                log.flush()
                progress.console.print(f"step {done}: loss {mean:.4f}, {seconds} s", highlight=False)
                losses.clear()
            if done % every.save == 0 or last:
                save(done)
            if done % every.sheet == 0 or last:
                draw(done)
    return done
