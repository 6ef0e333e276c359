"""Triton's and ptxas's part: registers, spills, shared memory, and the loops of the machine code."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MATRIX_PRODUCT = re.compile(r"\b(?:HGMMA|IGMMA|QGMMA|UTC[A-Z]*MMA|[HIQD]MMA)\b")
"""SASS instructions of tensor cores: warp groups (Hopper), tensor memory (Blackwell), warps (the others)."""


PLAIN_PRODUCT = re.compile(r"\bFFMA2?\b")
"""Without tensor cores, as float32 is multiplied at full precision, hundreds of these make a matrix product."""


class NotCompiled(RuntimeError):
    """Triton or ptxas refuses."""


@dataclass(frozen=True)
class Loop:
    """A loop of the machine code, the innermost around its instructions.

    Attributes:
        instructions: SASS instructions from the loop's first to the branch back.
        products: those of them that are matrix products of tensor cores, or where there are none, multiply and add.
    """

    instructions: int
    products: int


@dataclass(frozen=True)
class Kernel:
    """What one Triton kernel is compiled to.

    Attributes:
        name: Inductor's.
        registers: per thread.
        spill_stores, spill_loads: bytes per thread that do not fit registers.
        shared: bytes of shared memory per block.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        constants: the template's constants, such as block sizes.
        loops: in the order of the machine code.
        wgmma, mma: PTX matrix products of warp groups and of warps; tcgen05: of Blackwell's tensor memory.
        tma: PTX copies by the tensor memory accelerator.
        seconds: of compilation.
    """

    name: str
    target: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    warps: int
    stages: int
    constants: dict[str, Any]
    loops: list[Loop] = field(default_factory=list)
    wgmma: int = 0
    mma: int = 0
    tcgen05: int = 0
    tma: int = 0
    seconds: float = 0.0

    @property
    def kind(self) -> str:
        """``forward``, ``lse`` (forward that keeps the log-sum-exp) or ``backward`` for attention, else ``other``."""
        if "flex_attention" not in self.name:
            return "other"
        if "backward" in self.name:
            return "backward"
        return "lse" if self.constants.get("OUTPUT_LOGSUMEXP") else "forward"

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


def kernel_sources(source: str) -> list[tuple[str, str]]:
    """Names and sources of the Triton kernels in a generated module."""
    return re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", source, re.S)


def attention_kernels(source: str) -> list[tuple[str, str]]:
    """Those of them that are FlexAttention's."""
    return [(name, text) for name, text in kernel_sources(source) if "flex_attention" in name and "tem" in name]


def cutedsl_kernels(source: str) -> list[tuple[str, str]]:
    """Names and sources of the kernels in CuTe DSL, FlashAttention's: to compile them takes the package flash-attn-4."""
    return re.findall(r"async_compile\.cutedsl\('(\w+)', r'''(.*?)'''", source, re.S)


def compile_kernel(name: str, text: str, machine_code: bool = True) -> Kernel:
    """Compile one kernel as Inductor would, for the GPU that ``device.install`` has described.

    Raises:
        NotCompiled: Triton or ptxas refuses.
        RuntimeError: this torch or triton is unlike those that this was written for.
    """
    import torch
    import triton

    autotuner = load_kernel(name, text)
    config = autotuner.configs[0]
    start, log = time.perf_counter(), io.StringIO()
    try:
        with contextlib.redirect_stdout(log), _printing_ptxas(), _compiled() as kernels:
            autotuner._precompile_config(config)
        kernel = kernels[0]
    except (AttributeError, IndexError) as error:
        raise RuntimeError(
            f"fakegpu does not fit torch {torch.__version__}, triton {triton.__version__}: {error}"
        ) from error
    except Exception as error:
        raise NotCompiled(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}") from error
    seconds = time.perf_counter() - start
    ptx = kernel.asm["ptx"]
    used, spilled = (
        re.search(r"Used (\d+) registers", log.getvalue()),
        re.findall(r"(\d+) bytes spill (\w+)", log.getvalue()),
    )
    if used is None:
        raise RuntimeError(f"triton {triton.__version__} does not hand on what ptxas says")
    spills = {kind: int(count) for count, kind in spilled}
    return Kernel(
        name=name,
        target=re.search(r"\.target (\w+)", ptx)[1],
        registers=int(used[1]),
        spill_stores=spills.get("stores", 0),
        spill_loads=spills.get("loads", 0),
        shared=kernel.metadata.shared,
        warps=config.num_warps,
        stages=config.num_stages,
        constants=constants(text),
        loops=loops(disassembled(kernel.asm["cubin"])) if machine_code else [],
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tcgen05=len(re.findall(r"tcgen05\.mma", ptx)),
        tma=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        seconds=round(seconds, 1),
    )


def constants(text: str) -> dict[str, Any]:
    """A template's constants by name."""
    values = {"True": True, "False": False}
    found = re.findall(r"^    ([A-Z]\w*) ?: tl\.constexpr = (\S+)$", text, re.M)
    return {
        name: values[value] if value in values else int(value) if value.isdigit() else value for name, value in found
    }


def disassembled(cubin: bytes) -> str:
    """SASS of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", "-ndf", file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm cannot read the kernel: {done.stderr[:300]}")
    return done.stdout


def loops(sass: str) -> list[Loop]:
    """The innermost loops that multiply matrices, in the order of the code."""
    places: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        label, instruction = re.match(r"^(\.L\w+):", line), re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if label:
            places[label[1]] = len(code)
        elif instruction:
            code.append(instruction[1])
    back = []
    for place, instruction in enumerate(code):
        target = re.search(r"\bBRA\b.*?(\.L\w+)", instruction)
        if target and places.get(target[1], len(code)) <= place:
            back.append((places[target[1]], place + 1))
    inner = [
        span
        for span in back
        if not any(span[0] <= other[0] and other[1] <= span[1] and other != span for other in back)
    ]
    product, least = (MATRIX_PRODUCT, 1) if any(map(MATRIX_PRODUCT.search, code)) else (PLAIN_PRODUCT, 100)
    found = [Loop(end - start, sum(bool(product.search(line)) for line in code[start:end])) for start, end in inner]
    return [loop for loop in found if loop.products >= least]


@contextlib.contextmanager
def _printing_ptxas():
    """Triton compiles anew and prints what ``ptxas -v`` says."""
    import triton

    wanted = ((triton.knobs.compilation, "always_compile"), (triton.knobs.nvidia, "dump_ptxas_log"))
    found = [getattr(owner, name) for owner, name in wanted]
    try:
        for owner, name in wanted:
            setattr(owner, name, True)
        yield
    finally:
        for (owner, name), value in zip(wanted, found, strict=True):
            setattr(owner, name, value)


@contextlib.contextmanager
def _compiled():
    """What Triton compiles meanwhile: of a kernel that Inductor will launch by itself it keeps no code."""
    import triton

    original, found = triton.compile, []

    def recording(*args: Any, **kwargs: Any) -> Any:
        found.append(original(*args, **kwargs))
        return found[-1]

    triton.compile = recording
    try:
        yield found
    finally:
        triton.compile = original


def load_kernel(name: str, text: str) -> Any:
    """The autotuner that a kernel's source defines; Triton reads sources from files."""
    folder = Path(tempfile.mkdtemp(prefix="fakegpu_"))
    path = folder / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return getattr(module, name)
