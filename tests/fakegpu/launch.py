"""Inductor's generated wrappers run on fakes: kernels do nothing, allocations and frees are the wrapper's own."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fakegpu.assemble import NotCompiled
from fakegpu.cases import Case
from fakegpu.generate import attention_call, graphs_to
from fakegpu.host import CUDA, MODE

REPLACED = {
    "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "get_raw_stream = lambda index: 0",
    "from torch._inductor.async_compile import AsyncCompile": "from fakegpu.launch import AsyncCompile",
    "torch._C._dynamo.guards._empty_strided_cuda": "launch.empty",
    "torch._C._dynamo.guards._reinterpret_tensor": "launch.view",
    "torch.ops.inductor._reinterpret_tensor": "launch.view",
    "from torch._C._dynamo.guards import copy_if_misaligned": "copy_if_misaligned = lambda tensor: tensor",
    "from torch._inductor.select_algorithm import extern_kernels": "extern_kernels = launch.Extern()",
    "with torch.cuda._DeviceGuard(0):": "if True:",
    "torch.cuda.set_device(0)": "pass",
}
"""What a wrapper asks of a device, and what answers it."""


class Launches:
    """What generated code has started since ``restart``.

    Attributes:
        sources: of every graph, since the beginning.
        triton: kernels of Triton by name.
        extern: products by cuBLAS and the like, by name.
    """

    def __init__(self) -> None:
        self.sources: list[str] = []
        self.restart()

    def restart(self) -> None:
        self.triton: Counter[str] = Counter()
        self.extern: Counter[str] = Counter()


LAUNCHES = Launches()


@contextlib.contextmanager
def launching() -> Iterator[None]:
    """Graphs that are compiled inside run on fakes."""
    with graphs_to(_runner):
        yield


def _runner(source: str) -> Any:
    LAUNCHES.sources.append(source)
    for text, answer in REPLACED.items():
        source = source.replace(text, answer)
    import fakegpu.launch as launch

    names: dict[str, Any] = {"__name__": "generated", "launch": launch}
    with _disable_current_modes():
        exec(compile(source, f"generated_{len(LAUNCHES.sources)}.py", "exec"), names)
    call = names["call"]

    def run(args: list[Any]) -> Any:
        with MODE, torch.no_grad():
            return call(args)

    return run


class _Kernel:
    def __init__(self, name: str) -> None:
        self._name = name

    def run(self, *args: Any, **kwargs: Any) -> None:
        LAUNCHES.triton[self._name] += 1


class _Flash:
    """A kernel of FlashAttention 4: called with fakes, the package compiles it and launches nothing."""

    def __init__(self, name: str, source: str) -> None:
        # Written to a file, since CuTe DSL reads the source of the functions that it compiles.
        file = Path(tempfile.mkdtemp(prefix="fakegpu_")) / f"{name}.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._main = getattr(module, f"{name}_main")

    def run(self, *args: Any, stream: Any = None, **kwargs: Any) -> None:
        self._main(*args, stream)


class AsyncCompile:
    """In the place of Inductor's."""

    def triton(self, name: str, source: str, device_str: str = "cuda") -> _Kernel:
        return _Kernel(name)

    def cutedsl(self, name: str, source: str, **kwargs: Any) -> _Flash:
        return _Flash(name, source)

    def wait(self, scope: dict[str, Any]) -> None:
        pass


class Extern:
    """``extern_kernels``: with ``out=`` there is nothing to do, since fakes have no values."""

    def __getattr__(self, name: str) -> Any:
        from torch._inductor.select_algorithm import extern_kernels

        function = getattr(extern_kernels, name)

        def call(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Any:
            LAUNCHES.extern[name] += 1
            return function(*args, **kwargs) if out is None else out

        return call


def compile_flash(case: Case) -> None:
    """Let FlashAttention 4 compile the kernels of a case.

    Raises:
        NotCompiled: it refuses.
    """
    try:
        with launching():
            attention_call(case, MODE)()
    except Exception as error:
        raise NotCompiled(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}") from error


def empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(tuple(map(int, size)), tuple(map(int, stride)), dtype=dtype, device=CUDA)


def view(tensor: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
    return torch.as_strided(
        tensor, tuple(map(int, size)), tuple(map(int, stride)), int(offset) + int(tensor.storage_offset())
    )


def fallbacks(source: str) -> dict[str, int]:
    """Operators that a graph runs one by one besides kernels and products, by name."""
    body = source.rpartition("def call")[2]
    return dict(Counter(re.findall(r"torch\.ops\.([\w.]+)\.\w+\(", body)))
