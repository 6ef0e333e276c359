"""The process of one compute capability: cases as JSON lines in, results as JSON lines out.

    echo '{"case": {"head_dim": 64}}' | PYTHONPATH=tests python -m fakegpu.worker 9.0 compile

A line ``{"case": ..., "status": "ok", "kernels": [...]}`` each; ``"refused"`` and a ``"reason"`` where flexclear, Inductor,
Triton or ptxas refuses; ``"known"`` where the case's ``"fingerprint"`` is the one that was given as ``"known"``.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Capability = tuple[int, int]


def run(
    capability: Capability, cases: Sequence[Any], how: str = "compile", known: Sequence[str | None] | None = None
) -> Iterator[dict[str, Any]]:
    """Results of cases, one by one, from a process of their own.

    Args:
        capability: of the GPU that is not there, such as ``(9, 0)``.
        cases: of ``fakegpu.cases``, or their JSON.
        how: ``"compile"``: registers, spills, shared memory, loops; ``"interpret"``: errors against masked SDPA.
        known: the ``"fingerprint"`` of an earlier result of each case, which is not made anew then.

    Raises:
        RuntimeError: the process ended early; the message has the end of what it wrote.
    """
    facts = [case if isinstance(case, dict) else case.to_json() for case in cases]
    pairs = zip(facts, known or [None] * len(facts), strict=True)
    lines = [json.dumps({"case": case, "known": fingerprint}) for case, fingerprint in pairs]
    command = [sys.executable, "-m", "fakegpu.worker", f"{capability[0]}.{capability[1]}", how]
    with (
        tempfile.TemporaryDirectory(prefix="fakegpu_") as folder,
        tempfile.TemporaryFile("w+") as requests,
        tempfile.TemporaryFile("w+") as errors,
    ):
        requests.write("\n".join(lines))
        requests.seek(0)
        process = subprocess.Popen(
            command, stdin=requests, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment(how, folder)
        )
        try:
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


def _environment(how: str, folder: str) -> dict[str, str]:
    """This process's, without a GPU, and with a folder for all that compilers leave behind."""
    tests = str(Path(__file__).parents[1])
    found = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1" if how == "interpret" else "0"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
    return {**found, **dict.fromkeys(("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), folder)}


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
        request, start = json.loads(line), time.perf_counter()
        case = Case.from_json(request["case"])
        mark = fingerprint(case, how)
        result = {"status": "known"} if mark == request.get("known") else do(case)
        facts = {"case": request["case"], "capability": [major, minor], "fingerprint": mark}
        results.write(json.dumps({**facts, **result, "seconds": round(time.perf_counter() - start, 1)}) + "\n")
        results.flush()


def fingerprint(case: Any, how: str) -> str:
    """What a result depends on: the case, what flexclear chooses for it, its masks, torch and Triton."""
    import torch
    import triton

    import flexclear.masks

    try:
        kernel = repr(case.kernel())
    except ValueError as error:
        kernel = str(error)
    masks = [file.read_text() for file in sorted(Path(flexclear.masks.__file__).parent.glob("*.py"))]
    facts = [how, case, kernel, torch.__version__, triton.__version__, masks]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def compile_case(case: Any) -> dict[str, Any]:
    """Attention's kernels of a case, compiled."""
    from fakegpu.assemble import NotCompiled, attention_kernels, compile_kernel, cutedsl_kernels
    from fakegpu.generate import NotGenerated, attention_sources

    try:
        generated = attention_sources(case)
    except NotGenerated as error:
        return {"status": "refused", "reason": str(error), "kernels": []}
    found = [kernel for source in generated for kernel in attention_kernels(source)]
    flash = [name for source in generated for name in cutedsl_kernels(source)]
    if flash:
        return {"status": "ok", "kernels": [], "generated": ", ".join(flash)}
    kernels: list[dict[str, Any]] = []
    for name, text in found:
        try:
            kernels.append(compile_kernel(name, text).to_json())
        except NotCompiled as error:
            return {"status": "refused", "reason": f"{name}: {error}", "kernels": kernels}
    return {"status": "ok", "kernels": kernels}


if __name__ == "__main__":
    main(*sys.argv[1:])
