"""A model's whole call on a GPU that is not there: tensors on ``cuda:0`` are fake, those on the CPU real.

What a model makes once per size on the CPU (masks, plans) is thus really made, and becomes fake where it is put on the GPU.
Everything that a GPU would make the host wait for is written down: values that are read, and copies to and from it. Bytes
that are alive on ``cuda:0`` are counted. For a process of its own, after ``device.install``.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves

GRANULE = 512
"""Bytes that torch's caching allocator rounds each allocation up to."""

CUDA = torch.device("cuda", 0)
MODE = FakeTensorMode(allow_non_fake_inputs=True)
"""Of every fake in the process. Reading a fake's values raises under it."""

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.lift_fresh_copy.default)


class Log:
    """What would have made the host wait, in words."""

    def __init__(self) -> None:
        self.readings: list[str] = []
        self.transfers: list[str] = []

    def copied(self, function: Any, args: tuple[Any, ...], out: Any) -> None:
        """Note a copy between the CPU and ``cuda:0``: from pageable memory it waits for the device."""
        if function not in COPIES or not isinstance(out, Tensor):
            return
        source = args[1] if function is torch.ops.aten.copy_.default else args[0]
        if isinstance(source, Tensor) and source.device.type != out.device.type:
            shape = "x".join(map(str, out.shape))
            self.transfers.append(f"{source.device.type}->{out.device.type} {shape} {out.dtype} in {_place()}")


LOG = Log()
_known: dict[int, tuple[Tensor, Tensor]] = {}


def known(values: Tensor) -> Tensor:
    """A fake on ``cuda:0`` whose values flexclear may read, at the price of an entry in ``LOG.readings``."""
    with MODE:
        fake = torch.empty(values.shape, dtype=values.dtype, device=CUDA)
    _known[id(fake)] = fake, values
    return fake


def prepare() -> None:
    """Let flexclear run under fakes: it reads ``known`` tensors, and makes plans of real tensors.

    Raises:
        RuntimeError: flexclear is not built as this was written for.
    """
    from flexclear.runtime import grid, plan, switches

    if not all(hasattr(grid, name) for name in ("_Memory", "GridReader")):
        raise RuntimeError("fakegpu.host does not fit this flexclear: flexclear.runtime.grid has no _Memory")
    make = grid._Memory.__init__

    def reading(memory: Any, tensor: Tensor, read: Callable[[Tensor], Any]) -> None:
        if id(tensor) not in _known:
            make(memory, tensor, read)
            return

        def real(_: Tensor) -> Any:
            name = getattr(read, "func", read).__name__
            LOG.readings.append(f"{name} of {tuple(tensor.shape)} {tensor.dtype}")
            with _disable_current_modes():
                return read(_known[id(tensor)][1])

        make(memory, tensor, real)
        memory.read = read

    grid._Memory.__init__ = reading  # type: ignore[method-assign]
    plan.build_plan = _on_both(plan.build_plan)
    switches._gain = _on_both(switches._gain)  # type: ignore[assignment]


def _on_both(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with real tensors on the CPU and fakes on ``cuda:0``."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes(), _Both():
            before = torch._C._only_lift_cpu_tensors()
            # torch.tensor(n, device="cuda") would be made on the device, which is not there.
            torch._C._set_only_lift_cpu_tensors(True)
            try:
                return function(*args, **kwargs)
            finally:
                torch._C._set_only_lift_cpu_tensors(before)

    return called


class _Both(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(map(_of_cuda, tree_leaves((args, kwargs)))):
            return function(*args, **kwargs)
        with MODE:
            if function is torch.ops.aten._to_copy.default and not isinstance(args[0], FakeTensor):
                # Fake mode would run it, on the device.
                dtype = kwargs.get("dtype") or args[0].dtype
                out = torch.empty_strided(args[0].shape, args[0].stride(), dtype=dtype, device=CUDA)
            else:
                out = function(*args, **kwargs)
        LOG.copied(function, args, out)
        return out


def _of_cuda(leaf: Any) -> bool:
    return isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device | str) and str(leaf).startswith("cuda"))


class Copies(TorchDispatchMode):
    """Notes copies between the CPU and ``cuda:0`` in ``LOG``."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        LOG.copied(function, args, out)
        return out


class Memory(TorchDispatchMode):
    """Bytes of the storages that are alive on ``cuda:0``, each rounded up as the caching allocator does.

    Attributes:
        live: now.
        peak: most of them since the last ``restart``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            self._add(tensor)
        self.peak = self.live

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def restart(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        self.peak = self.live

    def settle(self, model: nn.Module) -> None:
        """Count what the model holds now, and what it has let go of no more."""
        gc.collect()
        for tensor in [*model.parameters(), *model.buffers()]:
            self._add(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, FakeTensor):
            # torchao's, which report a storage that they do not have.
            for name in tensor.__tensor_flatten__()[0]:
                self._add(getattr(tensor, name))
            return
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // GRANULE) * GRANULE
        if key in self._seen:
            return
        self._seen[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        if self._seen.pop(key, None) is not None:
            self.live -= size


@contextlib.contextmanager
def on_paper(memory: Memory | None = None) -> Iterator[None]:
    """Inference on fakes, with copies noted and memory counted."""
    with torch.no_grad(), MODE, Copies(), memory or contextlib.nullcontext():
        yield


def _place() -> str:
    frames = traceback.extract_stack()
    inside = [frame for frame in frames if "/flexclear/" in frame.filename or "/diffusers/" in frame.filename]
    frame = next(
        (frame for frame in reversed(inside) if "tests/fakegpu" not in frame.filename and "/_" not in frame.filename),
        None,
    )
    return "?" if frame is None else f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
