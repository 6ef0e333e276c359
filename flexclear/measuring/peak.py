"""Peak memory of a step on a CPU: resident memory of a separate process, above that before the step.

python -m flexclear.measuring.peak < job.json        # one variant; ``peaks`` starts it
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from flexclear.common.resident import forget_highest, highest


def peaks(
    model: str,
    dtype: str,
    text_len: int,
    blocks: int | None,
    compiled: bool,
    grids: list[tuple[int, int]],
    radius: int | None,
) -> list[int]:
    """Peak bytes of a step over each grid, above weights and other earlier memory. One process measures all grids.

    Raises:
        RuntimeError: the process failed, for example because memory ran out.
    """
    job = {
        "model": model,
        "dtype": dtype,
        "text_len": text_len,
        "blocks": blocks,
        "compiled": compiled,
        "grids": grids,
        "radius": radius,
    }
    done = subprocess.run(
        [sys.executable, "-m", "flexclear.measuring.peak"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise RuntimeError(f"the process that measures memory failed: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_of(run: Callable[[], Any]) -> int:
    """Peak resident bytes while ``run`` is called, above those before.

    On Linux with glibc, freed memory is returned at once, so that only memory in use is counted.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 16)
        libc.malloc_trim(0)
    forget_highest()
    before = highest()
    run()
    return highest() - before


_MMAP_THRESHOLD = -3
"""glibc's M_MMAP_THRESHOLD: larger allocations are returned to the system when they are freed."""


def measure(job: dict[str, Any]) -> list[int]:
    """Measure in this process what ``peaks`` returns."""
    import torch

    from flexclear.measuring.models import call_of, find_model
    from flexclear.measuring.step import build

    device, dtype = torch.device("cpu"), getattr(torch, job["dtype"])
    model = find_model(job["model"], dtype, job["text_len"])
    radius = job["radius"]
    variants = build(
        model,
        [] if radius is None else [radius],
        device,
        blocks=job["blocks"],
        compiled=job["compiled"],
        dense=radius is None,
    )
    found: list[int] = []
    with torch.no_grad():
        for height, width in job["grids"]:
            arguments = call_of(model, (height, width), device, dtype)
            step = variants.by_radius[radius]
            if job["compiled"] or not found:
                step(**arguments)
            found.append(peak_of(lambda: step(**arguments)))  # noqa: B023  (called at once)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
