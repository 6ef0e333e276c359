"""Time and peak memory of building block masks: from bounding boxes, and by create_block_mask where it can finish.

    python -m bench.masks.blocks

Each build runs in a process of its own, so that its peak memory is its own. Where both finish, the lists are compared
in the same run. Writes bench/results/blockmask-cpu.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flexclear.compile.kernels import Kernel
from flexclear.masks import Disc, Layout, block_mask, disc
from flexclear.masks.blocks import default_block_size
from flexclear.runtime.plan import get_plan

from bench.machine import RESULTS, facts, write_results

SIDES = (64, 128, 256, 512, 1024)
CREATE_UP_TO = 64
REPEATS = 5


def peak_megabytes() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def build(kind: str, side: int, r: int) -> dict[str, Any]:
    """Build one mask in this process; the first build of "ours" is separate, because it also makes the token order."""
    from torch.nn.attention.flex_attention import create_block_mask

    layout = Layout(side, side)
    block_size = default_block_size(layout.seq_len)  # A GPU's on the CPU, too, whose own blocks are smaller.
    block_mask(Layout(16, 16), Disc(r))
    before = peak_megabytes()
    times, mask = [], None
    for _ in range(REPEATS if kind == "boxes" else 1):
        mask = None  # Two masks alive at once would count twice.
        start = time.perf_counter()
        if kind == "boxes":
            mask = block_mask(layout, Disc(r), block_size=block_size)
        else:
            mask = create_block_mask(
                disc(layout, r),
                None,
                None,
                layout.seq_len,
                layout.seq_len,
                device="cpu",
                BLOCK_SIZE=block_size,
            )
        times.append(time.perf_counter() - start)
    assert mask is not None
    tensors = [t for t in mask.as_tuple(flatten=True) if isinstance(t, torch.Tensor)]
    found = {
        "kind": kind,
        "side": side,
        "tokens": layout.seq_len,
        "ms": 1e3 * statistics.median(times),
        "first_ms": 1e3 * times[0],
        "peak_mb": peak_megabytes() - before,
        "mask_mb": sum(t.numel() * t.element_size() for t in tensors) / 2**20,
    }
    if side <= CREATE_UP_TO:
        found["partial"] = int(mask.kv_num_blocks.sum())
        found["full"] = int(mask.full_kv_num_blocks.sum()) if mask.full_kv_num_blocks is not None else 0
    return found


def cache_hit_us(side: int, r: int) -> float:
    """Microseconds to find the plan of an image that was drawn before, its layout read anew from the call; median."""

    def find() -> object:
        return get_plan(Layout(side, side), Disc(r), "flex", Kernel((128, 64)), torch.device("cpu"))

    find()
    times = []
    for _ in range(2000):
        start = time.perf_counter()
        find()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    """Measure every size in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="of square grids, in image tokens")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--build", nargs=3, metavar=("KIND", "SIDE", "R"), help="one build in this process")
    arguments = parser.parse_args()
    if arguments.build is not None:
        kind, side, r = arguments.build
        print(json.dumps(build(kind, int(side), int(r))))
        return
    rows = []
    for side in arguments.sides:
        for kind in ("boxes", "create_block_mask"):
            if kind == "create_block_mask" and side > CREATE_UP_TO:
                continue
            done = subprocess.run(
                [sys.executable, "-m", "bench.masks.blocks", "--build", kind, str(side), "16"],
                capture_output=True,
                text=True,
                check=True,
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    for ours, theirs in ((a, b) for a in rows for b in rows if a["side"] == b["side"] and a["kind"] < b["kind"]):
        if (ours["partial"], ours["full"]) != (theirs["partial"], theirs["full"]):
            raise AssertionError(f"the lists differ: {ours} and {theirs}")
    lines = [
        "| image tokens + text | built by | ms, median | ms, first | peak memory, MB | mask, MB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['side']} x {row['side']} + 512 | {row['kind']} | {row['ms']:.0f} | {row['first_ms']:.0f} | "
        f"{row['peak_mb']:.0f} | {row['mask_mb']:.0f} |"
        for row in rows
    ]
    table = "\n".join(lines) + "\n"
    about = facts(torch.device("cpu"), r=16, median_of=REPEATS, cache_hit_us=round(cache_hit_us(64, 16), 1))
    write_results("blockmask-cpu", about, rows, table, arguments.out)
    print(table)


if __name__ == "__main__":
    main()
