"""The process of one compute capability: cases as JSON lines in, results as JSON lines out.

    echo '{"head_dim": 64}' | PYTHONPATH=tests python -m fakegpu.worker 9.0 compile
    echo '{"head_dim": 64, "height": 9, "width": 9, "dtype": "float32", "backward": true}' |
        PYTHONPATH=tests python -m fakegpu.worker 9.0 interpret

A line ``{"case": ..., "status": "ok", "kernels": [...]}`` each; ``"refused"`` and a ``"reason"`` where Inductor, Triton or
ptxas refuses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Capability = tuple[int, int]


def run(capability: Capability, cases: Iterable[Any], how: str = "compile") -> Iterator[dict[str, Any]]:
    """Results of cases, one by one, from a process of their own.

    Args:
        capability: of the GPU that is not there, such as ``(9, 0)``.
        cases: of ``fakegpu.cases``, or their JSON.
        how: ``"compile"``: registers, spills, shared memory, loops; ``"interpret"``: errors against masked SDPA.

    Raises:
        RuntimeError: the process ended early; the message has the end of what it wrote.
    """
    lines = [json.dumps(case if isinstance(case, dict) else case.to_json()) for case in cases]
    environment = {**os.environ, "PYTHONPATH": _search_path(), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    if how == "interpret":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "fakegpu.worker", f"{capability[0]}.{capability[1]}", how]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment)
        try:
            process.stdin.write("\n".join(lines) + "\n")
            process.stdin.close()
            count = 0
            for line in process.stdout:
                count += 1
                yield json.loads(line)
            if process.wait() or count < len(lines):
                errors.seek(0)
                raise RuntimeError(f"fakegpu worker ended with {process.returncode}: {errors.read()[-3000:]}")
        finally:
            process.kill()
            process.wait()


def _search_path() -> str:
    here = str(Path(__file__).parents[1])
    return os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))


def main(capability: str, how: str) -> None:
    """Read cases from standard input, write results to standard output."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no result
    from fakegpu import device

    device.load_guard()
    major, minor = map(int, capability.split("."))
    device.install((major, minor))
    from fakegpu.cases import Case

    if how == "interpret":
        from fakegpu.interpret import interpret as do
    else:
        do = compile_case
    for line in sys.stdin:
        if line.strip():
            case, start = json.loads(line), time.perf_counter()
            result = do(Case.from_json(case))
            result = {"case": case, "capability": [major, minor], **result}
            results.write(json.dumps({**result, "seconds": round(time.perf_counter() - start, 1)}) + "\n")
            results.flush()


def compile_case(case: Any) -> dict[str, Any]:
    """Attention's kernels of a case, compiled."""
    from fakegpu.assemble import NotCompiled, attention_kernels, compile_kernel
    from fakegpu.generate import NotGenerated, attention_sources

    try:
        found = [kernel for source in attention_sources(case) for kernel in attention_kernels(source)]
    except NotGenerated as error:
        return {"status": "refused", "reason": str(error), "kernels": []}
    kernels: list[dict[str, Any]] = []
    for name, text in found:
        try:
            kernels.append(compile_kernel(name, text).to_json())
        except NotCompiled as error:
            return {"status": "refused", "reason": f"{name}: {error}", "kernels": kernels}
    return {"status": "ok", "kernels": kernels}


if __name__ == "__main__":
    main(*sys.argv[1:])
