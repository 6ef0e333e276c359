"""Make torch and Inductor believe in a CUDA GPU, far enough to trace, generate and compile for it.

Needs Linux, Triton with its NVIDIA backend, and with the CPU build of torch a C++ compiler. No GPU, no CUDA build. Patches
the process for good: one compute capability per process, and nothing real may run on ``cuda`` in it. Nothing here imports
torch before ``load_guard`` has run, which must come first in the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

Capability = tuple[int, int]

GPUS: dict[Capability, tuple[str, int, int, int]] = {
    (8, 0): ("NVIDIA A100-SXM4-80GB", 108, 166_912, 2048),
    (8, 9): ("NVIDIA GeForce RTX 4090", 128, 101_376, 1536),
    (9, 0): ("NVIDIA H100 80GB HBM3", 132, 232_448, 2048),
    (10, 0): ("NVIDIA B200", 148, 232_448, 2048),
    (12, 0): ("NVIDIA GeForce RTX 5090", 170, 101_376, 1536),
}
"""Name, multiprocessors, bytes of shared memory that a block may have (opt-in), threads per multiprocessor (CUDA C++
Programming Guide, "Compute capabilities")."""

RESERVED_SHARED = 1024
"""Bytes of each block's shared memory that the system takes; a multiprocessor has as much more."""

OLDEST_TORCH = (2, 8)


def why_not() -> str | None:
    """Why no kernels can be generated and compiled here for a GPU that is not there, or None if they can.

    Imports neither torch nor triton. A reason says what is not checked because of it.
    """
    reason = _obstacle()
    return None if reason is None else f"CUDA kernels are neither generated nor compiled nor interpreted here: {reason}"


def _obstacle() -> str | None:
    if sys.platform != "linux":
        return f"that needs Linux, this is {sys.platform}"
    build, version = _torch_build()
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        return f"that needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or later, this is {version}"
    if build not in ("cpu", "cuda"):
        return f"torch {version} is built for {build}, whose kernels are others"
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "triton is not installed (pip install triton)"
    if not (Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas").is_file():
        return f"triton {_version('triton')} has no backend for NVIDIA GPUs"
    if build == "cpu" and _compiler() is None:
        return "this torch has no CUDA device guard, and no C++ compiler was found to build one (apt-get install g++)"
    return None


def load_guard() -> None:
    """Give the CPU build of torch a CUDA device guard. A CUDA build has its own.

    Raises:
        RuntimeError: torch is imported already, or the guard does not compile against its headers.
    """
    if "torch" in sys.modules:
        raise RuntimeError("fakegpu.device.load_guard must run before torch is imported in this process")
    if _torch_build()[0] == "cpu":
        ctypes.CDLL(str(_guard()), mode=ctypes.RTLD_GLOBAL)


def install(capability: Capability) -> types.SimpleNamespace:
    """Patch torch, Inductor and Triton in this process: ``cuda:0`` is a GPU of ``capability``.

    Returns:
        Its properties, named as torch names them.

    Raises:
        ValueError: no such GPU is described in ``GPUS``.
        RuntimeError: this torch or triton has not what is to be patched; names it and the version.
    """
    if capability not in GPUS:
        raise ValueError(f"no GPU of capability {capability} is described, only {', '.join(map(str, sorted(GPUS)))}")
    import torch

    properties = gpu_properties(capability)
    with _explained(f"torch {torch.__version__}"):
        if torch.backends.cuda.is_built():
            torch._C._ensureCUDADeviceGuardSet()
        _patch_torch(properties, capability)
        _patch_inductor(properties, capability)
    with _explained(f"triton {_version('triton')}"):
        _patch_triton(properties, capability)
    return properties


def gpu_properties(capability: Capability) -> types.SimpleNamespace:
    """What ``torch.cuda.get_device_properties`` says of a GPU, of a model with 80 GB of memory."""
    name, multiprocessors, shared, threads = GPUS[capability]
    return types.SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=multiprocessors,
        total_memory=80 << 30,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=threads,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared + RESERVED_SHARED,
        L2_cache_size=50 << 20,
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
        gcnArchName="",
        is_integrated=0,
        is_multi_gpu_board=0,
    )


def _patch_torch(properties: types.SimpleNamespace, capability: Capability) -> None:
    import torch

    cuda: Any = torch.cuda
    random_state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: types.SimpleNamespace(cuda_stream=0),
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: properties.name,
        "get_arch_list": lambda: [f"sm_{major}{minor}" for major, minor in sorted(GPUS)],
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_rng_state": lambda *args, **kwargs: random_state.clone(),
        "set_rng_state": lambda *args, **kwargs: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    _replace(cuda, answers)
    _replace(cuda.random, {name: answers[name] for name in ("get_rng_state", "set_rng_state")})
    _replace(torch.accelerator, {"is_available": lambda: False})
    if torch.version.cuda is None:
        torch.version.cuda = "13.0"
    # Absent from the CPU build, and called by generated code.
    _add(torch._C, {"_cuda_getDevice": lambda: 0, "_cuda_getCurrentRawStream": lambda index: 0})
    _add(torch._C, dict.fromkeys(("_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"), lambda device: 0))
    # Fake tensors make a context where CUDA is available.
    import torch._subclasses.fake_tensor as fake_tensor

    found = [name for name in ("init_gpu_context", "init_cuda_context") if hasattr(fake_tensor, name)]
    for name in found:
        setattr(fake_tensor, name, lambda *args, **kwargs: None)


def _patch_inductor(properties: types.SimpleNamespace, capability: Capability) -> None:
    import torch._dynamo.device_interface as device_interface
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.post_grad as post_grad
    import torch._inductor.runtime.triton_helpers as triton_helpers

    # Tables of patterns that are made of real tensors on the device.
    for module in (joint_graph, post_grad):
        _replace(module, {"lazy_init": lambda *args, **kwargs: None})
    # Looks for a driver that answers; ``_patch_triton`` has set one.
    _replace(triton_helpers, {"set_driver_to_gpu": lambda: None})
    interface: Any = device_interface.CudaInterface
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_compute_capability": lambda device=None: capability[0] * 10 + capability[1],
        "get_raw_stream": lambda index: 0,
    }
    for name, answer in answers.items():
        _replace(interface, {name: staticmethod(answer)})
    for name in ("get_device_properties", "current_device"):
        _replace(interface.Worker, {name: staticmethod(answers[name])})
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, interface)


def _patch_triton(properties: types.SimpleNamespace, capability: Capability) -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability[0] * 10 + capability[1], properties.warp_size)
    limits = {
        "max_shared_mem": properties.shared_memory_per_block_optin,
        "multiprocessor_count": properties.multi_processor_count,
        "warpSize": properties.warp_size,
        "max_num_regs": properties.regs_per_multiprocessor,
        "sm_clock_rate": properties.clock_rate,
        "mem_clock_rate": properties.memory_clock_rate,
        "mem_bus_width": properties.memory_bus_width,
    }

    class Driver:
        utils = types.SimpleNamespace(get_device_properties=lambda device: limits)

        def get_current_target(self) -> GPUTarget:
            return target

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_device_interface(self) -> Any:
            return torch.cuda

        def is_active(self) -> bool:
            return True

    triton.runtime.driver.set_active(Driver())


def _replace(owner: Any, answers: dict[str, Any]) -> None:
    """Set attributes that must be there: one that is not would be a patch of nothing."""
    missing = [name for name in answers if not hasattr(owner, name)]
    if missing:
        raise AttributeError(f"{getattr(owner, '__name__', owner)} has no {', '.join(missing)}")
    for name, answer in answers.items():
        setattr(owner, name, answer)


def _add(owner: Any, answers: dict[str, Any]) -> None:
    for name, answer in answers.items():
        setattr(owner, name, answer)


@contextlib.contextmanager
def _explained(version: str):
    try:
        yield
    except (AttributeError, ImportError) as error:
        raise RuntimeError(f"fakegpu does not fit {version}, and nothing is checked: {error}") from error


def _torch_build() -> tuple[str, str]:
    """What torch is built for (``cpu``, ``cuda``, ``hip``, ``xpu``) and its version, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed")
    text = (Path(spec.origin).parent / "version.py").read_text()
    found = {name: re.search(rf"^{name}(?:: [^=]+)? = '([^']+)'", text, re.M) for name in ("cuda", "hip", "xpu")}
    version = re.search(r"^__version__ = '([^']+)'", text, re.M)
    return next((name for name, value in found.items() if value), "cpu"), version[1] if version else _version("torch")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "c++", "clang++"))), None)


def _guard() -> Path:
    """The compiled guard, built on first use (about 10 s) and kept in the user's cache."""
    source, torch_folder = Path(__file__).parent / "guard.cpp", Path(importlib.util.find_spec("torch").origin).parent
    facts = [source.read_text(), str(torch_folder), _torch_build()[1], str(_compiler())]
    library = _cache_folder() / f"cuda_guard_{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    if library.is_file():
        return library
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler was found (apt-get install g++)")
    beside = library.with_suffix(f".{os.getpid()}")
    include = torch_folder / "include"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{include}"]
    command += [f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", str(source), "-o", str(beside)]
    command += [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:500])
        raise RuntimeError(f"fakegpu's device guard does not compile against torch {_torch_build()[1]}: {first}")
    os.replace(beside, library)
    return library


def _cache_folder() -> Path:
    """A folder of the user's own, or where there is none a temporary one of this process."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexclear" / "fakegpu"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="fakegpu_"))
