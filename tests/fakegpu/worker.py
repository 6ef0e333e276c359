"""The process of one compute capability: cases as JSON lines in, results as JSON lines out.

    echo '{"case": {"head_dim": 64}}' | PYTHONPATH=tests python -m fakegpu.worker 9.0 compile

A line ``{"case": ..., "status": "ok", "kernels": [...]}`` each; ``"refused"`` and a ``"reason"`` where flexclear, Inductor,
Triton or ptxas refuses; ``"known"`` where the earlier result that was given as ``"known"`` holds: its ``"fingerprint"``, or
the ``"sources"`` that are generated, are what they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Capability = tuple[int, int]


def run(
    capability: Capability,
    cases: Sequence[Any],
    how: str = "compile",
    known: Sequence[dict[str, Any] | None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Results of cases, one by one, from a process of their own.

    Args:
        capability: of the GPU that is not there, such as ``(9, 0)``.
        cases: of ``fakegpu.cases``, or their JSON.
        how: ``"compile"``: registers, spills, shared memory, loops; ``"interpret"``: errors against masked SDPA.
        known: an earlier result of each case, which is not made anew if it holds.

    Raises:
        RuntimeError: the process ended early; the message has the end of what it wrote.
    """
    facts = [case if isinstance(case, dict) else case.to_json() for case in cases]
    pairs = zip(facts, known or [None] * len(facts), strict=True)
    marks = [{name: (earlier or {}).get(name) for name in ("fingerprint", "sources")} for _, earlier in pairs]
    lines = [json.dumps({"case": case, "known": mark}) for case, mark in zip(facts, marks, strict=True)]
    command = [sys.executable, "-m", "fakegpu.worker", f"{capability[0]}.{capability[1]}", how]
    with (
        tempfile.TemporaryDirectory(prefix="fakegpu_") as folder,
        tempfile.TemporaryFile("w+") as requests,
        tempfile.TemporaryFile("w+") as errors,
    ):
        requests.write("\n".join(lines))
        requests.seek(0)
        process = subprocess.Popen(
            command,
            stdin=requests,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(capability, how, folder),
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


def _environment(capability: Capability, how: str, folder: str) -> dict[str, str]:
    """This process's, without a GPU, with a folder for all that compilers leave behind, and what CuTe DSL compiles for."""
    tests = str(Path(__file__).parents[1])
    found = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1" if how == "interpret" else "0"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
    major, minor = capability
    found["FLASH_ATTENTION_ARCH"] = f"sm_{major}{minor}"
    found["CUTE_DSL_ARCH"] = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
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
        from fakegpu.interpret import interpret
    for line in sys.stdin:
        request, start = json.loads(line), time.perf_counter()
        case = Case.from_json(request["case"])
        mark, known = fingerprint(case, how), request.get("known") or {}
        if mark == known.get("fingerprint"):
            result = {"status": "known"}
        else:
            result = interpret(case) if how == "interpret" else compile_case(case, known.get("sources"))
        facts = {"case": request["case"], "capability": [major, minor], "fingerprint": mark}
        results.write(json.dumps({**facts, **result, "seconds": round(time.perf_counter() - start, 1)}) + "\n")
        results.flush()


def fingerprint(case: Any, how: str) -> str:
    """What a result depends on: the case, what flexclear chooses for it, its masks, torch and Triton."""
    import torch
    import triton

    import flexclear.masks

    from fakegpu.generate import believe_in_flash

    if case.options.get("BACKEND") == "FLASH":
        believe_in_flash()  # or what is chosen would depend on the package
    try:
        kernel = repr(case.kernel())
    except ValueError as error:
        kernel = str(error)
    masks = [file.read_text() for file in sorted(Path(flexclear.masks.__file__).parent.glob("*.py"))]
    facts = [how, case, kernel, torch.__version__, triton.__version__, masks]
    return _digest(facts)


def compile_case(case: Any, known: str | None = None) -> dict[str, Any]:
    """Attention's kernels of a case, compiled; not if their ``"sources"`` are ``known``."""
    from fakegpu.assemble import NotCompiled, attention_kernels, compile_kernel, cutedsl_kernels
    from fakegpu.generate import NotGenerated, attention_sources

    try:
        generated = attention_sources(case)
    except NotGenerated as error:
        return {"status": "refused", "reason": str(error), "kernels": []}
    flash = [kernel for source in generated for kernel in cutedsl_kernels(source)]
    found = [kernel for source in generated for kernel in attention_kernels(source)]
    tools = _versions("torch", "flash-attn-4", "nvidia-cutlass-dsl") if flash else _versions("torch", "triton")
    marks = {"sources": _digest((found or flash, tools))}
    if marks["sources"] == known:
        return {"status": "known", **marks}
    kernels: list[dict[str, Any]] = []
    try:
        if flash:
            return {"status": "ok", "kernels": [], **marks, **_flash_compiled(case, flash)}
        for name, text in found:
            kernels.append(compile_kernel(name, text).to_json())
    except NotCompiled as error:
        return {"status": "refused", "reason": str(error), "kernels": kernels, **marks}
    return {"status": "ok", "kernels": kernels, **marks}


def _flash_compiled(case: Any, kernels: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """That FlashAttention 4's kernels of a case compile; where the package or, for Blackwell, a driver is missing, that they
    were generated, of what CuTe DSL has.

    Raises:
        NotCompiled: they do not.
    """
    from fakegpu.assemble import NotCompiled
    from fakegpu.launch import compile_flash

    names = ", ".join(name for name, _ in kernels)
    if any(re.search(r"\(tmp\d+ (<<|>>) ", text) for _, text in kernels):
        raise NotCompiled("tensors of CuTe DSL have no shifts")
    packages = ("flash-attn-4", "nvidia-cutlass-dsl")
    if None in _versions(*packages):
        return {"generated": names}
    try:
        compile_flash(case)
    except NotCompiled as error:
        if "DynamicLibNotFoundError" in str(error):
            return {"generated": names}
        raise
    return {"compiled": names, "by": ", ".join(map(" ".join, zip(packages, _versions(*packages), strict=True)))}


def _versions(*names: str) -> list[str | None]:
    """Of installed packages; None: not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: list[str | None] = []
    for name in names:
        try:
            found.append(version(name))
        except PackageNotFoundError:
            found.append(None)
    return found


def _digest(facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main(*sys.argv[1:])
