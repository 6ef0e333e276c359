"""Generated code run on real values: Inductor's wrapper as it is, its kernels in Triton's interpreter, on the CPU.

A fake tensor on ``cuda:0`` stands for a real one on the CPU, which has its values. Autograd runs on the fakes. Needs
``TRITON_INTERPRET=1`` in the environment before triton is imported.
"""

from __future__ import annotations

import functools
import math
import os
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.utils._python_dispatch import _disable_current_modes

from flexclear.compile import compiled_flex_attention
from flexclear.masks.carried import KERNEL_OPTIONS

from fakegpu.assemble import load_kernel
from fakegpu.cases import Case
from fakegpu.generate import Call, fake, graphs_to


class Pairs:
    """Fakes on ``cuda:0`` and the real tensors that they stand for, by storage."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._real: dict[int, Tensor] = {}
        self._fakes: list[Tensor] = []  # a storage's address is its key for as long as it lives

    def fake(self, real: Tensor, requires_grad: bool = False) -> Tensor:
        """A new fake of the same shape, strides and type."""
        made = fake(self.mode, real)
        self._fakes.append(made)
        self._real[_storage(made)] = real
        return made.requires_grad_(requires_grad)

    def real(self, fake: Tensor) -> Tensor:
        """What a fake, or a view of one, stands for."""
        base = self._real[_storage(fake)]
        return base.as_strided(fake.shape, fake.stride(), base.storage_offset() + int(fake.storage_offset()))

    def run(self, call: Call, args: list[Any]) -> Any:
        """A generated wrapper on the real counterparts of fakes, its results as fakes."""
        with _disable_current_modes(), torch.no_grad():
            given = [self.real(arg) if isinstance(arg, Tensor) else arg for arg in args]
            args.clear()
            results = call(given)
        return [self.fake(result) if isinstance(result, Tensor) else result for result in results]


def interpret(case: Case) -> dict[str, Any]:
    """Run a case's forward pass, log-sum-exp and, if it has them, gradients; errors against masked SDPA in float32.

    Returns:
        ``errors``: greatest absolute difference of ``output``, ``lse``, ``query``, ``key``, ``value`` (gradients);
        ``unmasked``: of the output from attention without a mask, which the errors must stay far below.
    """
    pairs, graphs = Pairs(), 0
    generator = torch.Generator().manual_seed(0)
    mask, dense = case.block_mask(pairs.fake), case.dense_mask()
    queries, keys = mask.seq_lengths

    def noise(length: int, heads: int = case.heads) -> Tensor:
        return torch.randn(case.batch, heads, length, case.head_dim, generator=generator).to(case.torch_dtype)

    def handle(source: str) -> Call:
        nonlocal graphs
        graphs += 1
        return functools.partial(pairs.run, load(source))

    key_heads = case.key_heads or case.heads
    query, key, value, grad = noise(queries), noise(keys, key_heads), noise(keys, key_heads), noise(queries)
    inputs = [pairs.fake(tensor, case.backward) for tensor in (query, key, value)]
    grad_output = pairs.fake(grad)
    ours: dict[str, Tensor] = {}
    with graphs_to(handle), pairs.mode:
        with torch.set_grad_enabled(case.backward):
            output = compiled_flex_attention(*inputs, mask)
            if case.backward:
                ours = dict(
                    zip(("query", "key", "value"), torch.autograd.grad(output, inputs, grad_output), strict=True)
                )
        with torch.no_grad():
            ours |= {"output": output.detach(), "lse": _log_sum_exp(inputs, mask)}
    expected = _expected(query.float(), key.float(), value.float(), grad.float(), dense)
    errors = {name: (pairs.real(found).float() - expected[name]).abs().max().item() for name, found in ours.items()}
    unmasked = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), enable_gqa=True)
    facts = {
        "graphs": graphs,
        "tokens": [queries, keys],
        "unmasked": (unmasked - expected["output"]).abs().max().item(),
    }
    return {"status": "ok", "errors": errors, **facts}


def _expected(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, dense: Tensor) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients of masked SDPA."""
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    output = F.scaled_dot_product_attention(*inputs, attn_mask=dense, enable_gqa=True)
    gradients = torch.autograd.grad(output, inputs, grad)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~dense, -torch.inf)
    found = {"output": output.detach(), "lse": scores.logsumexp(-1)}
    return {**found, **dict(zip(("query", "key", "value"), gradients, strict=True))}


def _log_sum_exp(fakes: list[Tensor], mask: Any) -> Tensor:
    options = dict(getattr(mask, KERNEL_OPTIONS))

    def with_log_sum_exp(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Any:
        wanted, grouped = AuxRequest(lse=True), query.shape[1] != key.shape[1]
        return flex_attention(
            query, key, value, block_mask=mask, enable_gqa=grouped, return_aux=wanted, kernel_options=options
        )

    return torch.compile(with_log_sum_exp, fullgraph=True, dynamic=True)(*fakes, mask)[1].lse


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def load(source: str) -> Call:
    """The ``call`` of a generated module, on CPU tensors.

    Raises:
        RuntimeError: the module is unlike those that this was written for.
    """
    _interpret_kernels()
    found = source
    for pattern, replacement in REPLACED.items():
        found, count = re.subn(pattern, replacement, found)
        if not count:
            raise RuntimeError(f"fakegpu does not fit torch {torch.__version__}: generated code has no {pattern}")
    names: dict[str, Any] = {"__name__": "generated"}
    exec(compile(re.sub(r"(?<=device=)'cuda:0'", "'cpu'", found), "<generated>", "exec"), names)
    return names["call"]


REPLACED = {
    r"from torch\._inductor\.async_compile import AsyncCompile": "from fakegpu.interpret import Kernels as AsyncCompile",
    r"torch\._C\._dynamo\.guards\._empty_strided_cuda": "__import__('fakegpu.interpret').interpret.unwritten",
}
"""What a generated module takes from torch, and what it is given instead."""


class Kernels:
    """Stands for Inductor's ``AsyncCompile``."""

    def triton(self, name: str, text: str, device_str: str = "cuda", **_: Any) -> Any:
        # The interpreter runs no functions of CUDA's libdevice; Triton has this one of its own as well.
        return load_kernel(name, text.replace("libdevice.floor(", "tl.floor("))

    def wait(self, scope: dict[str, Any]) -> None:
        pass


def unwritten(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor on the CPU that betrays what nobody writes."""
    made = torch.empty_strided(size, stride, dtype=dtype)
    return made.fill_(torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max)


class Launch:
    """Stands for Inductor's autotuner around one kernel: launches it in the interpreter, with blocks of its own choice."""

    POINTWISE_BLOCK = 128

    def __init__(self, kernel: Any, triton_meta: dict[str, Any], inductor_meta: dict[str, Any]) -> None:
        self.kernel, self.grid_type = kernel, inductor_meta["grid_type"]
        self.names = [name for name, kind in triton_meta["signature"].items() if kind != "constexpr"]
        self.blocks = [name for name, kind in triton_meta["signature"].items() if kind == "constexpr"]

    def run(self, *args: Any, stream: int = 0) -> None:
        if self.grid_type == "FixedGrid":
            self.kernel[tuple(map(int, args[len(self.names) :]))](*args[: len(self.names)])
            return
        sizes = dict(zip(self.names, args, strict=True))
        blocks = {name: self._block(name, sizes) for name in self.blocks}
        grid = tuple(
            math.ceil(sizes.get(f"{axis}numel", 1) / blocks.get(f"{axis.upper()}BLOCK", 1)) for axis in ("x", "y", "z")
        )
        self.kernel[grid](*args, **blocks)

    def _block(self, name: str, sizes: dict[str, Any]) -> int:
        reduced = re.fullmatch(r"(R\d+_)BLOCK", name)
        if reduced is None:
            return self.POINTWISE_BLOCK
        return 1 << (sizes[f"{reduced[1].lower()}numel"] - 1).bit_length()


@functools.cache
def _interpret_kernels() -> None:
    """From now on, kernels that are defined in this process are launched in the interpreter."""
    from torch._inductor.runtime import triton_heuristics

    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")

    def heuristic(*args: Any, triton_meta: dict[str, Any], inductor_meta: dict[str, Any], **_: Any) -> Any:
        return functools.partial(Launch, triton_meta=triton_meta, inductor_meta=inductor_meta)

    for name in ("template", "pointwise", "reduction", "persistent_reduction"):
        if not hasattr(triton_heuristics, name):
            raise RuntimeError(f"fakegpu does not fit torch {torch.__version__}: triton_heuristics has no {name}")
        setattr(triton_heuristics, name, heuristic)
