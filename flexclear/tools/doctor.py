"""``flexclear doctor``: what runs on this machine, what does not, and why. It tries things out instead of guessing."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flexclear.common.versions import installed, release, versions

TESTED_TORCH = ((2, 8), (2, 13))
"""Oldest and newest torch whose results were checked. Older ones compute wrong results on CPU."""

OPTIONAL = {
    "peft": "LoRA",
    "natten": "a comparison in benchmarks",
    "flash-attn": "a comparison in benchmarks",
}
"""Optional distributions, and what they are for."""


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found. ``print`` it. In every mapping, None means that something works; text says why it does not.

    Attributes:
        versions: versions of flexclear, Python and the main dependencies.
        device: kind, name, capability, memory and number of devices.
        torch_range: why this torch is outside the tested versions. A newer one is not a problem.
        compiler: which compiler torch.compile uses here, or that there is none.
        compile: state of ``torch.compile`` on the device.
        backends: attention backends, ``flex`` (compiled) and ``sdpa``.
        recipes: quantization recipes.
        optional: version of each optional package, or None.
        tuned: a line for each entry that ``flexclear bench --tune`` keeps for this device and these versions.
        tried: whether things were actually run, not only looked up.
        problem: why ``transform`` cannot run compiled here, or None.
    """

    versions: dict[str, str]
    device: dict[str, Any]
    torch_range: str | None
    compiler: str
    compile: str | None
    backends: dict[str, str | None]
    recipes: dict[str, str | None]
    optional: dict[str, str | None]
    tuned: list[str]
    tried: bool
    problem: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        def state(reason: str | None) -> str:
            return ("works" if self.tried else "should work") if reason is None else f"no: {reason}"

        device = ", ".join(f"{name} {value}" for name, value in self.device.items() if name != "type")
        oldest, newest = (".".join(map(str, end)) for end in TESTED_TORCH)
        lines = [
            *(f"{name:14}{value}" for name, value in self.versions.items()),
            "",
            f"{'device':14}{self.device['type']}: {device}",
            f"{'tested torch':14}{f'yes, within {oldest} to {newest}' if self.torch_range is None else self.torch_range}",
            f"{'compiler':14}{self.compiler}",
            f"{'torch.compile':14}{state(self.compile)}",
            "",
            "attention",
            *(f"  {name:12}{state(reason)}" for name, reason in self.backends.items()),
            "quantization",
            *(f"  {name:12}{state(reason)}" for name, reason in self.recipes.items()),
            "optional",
            *(f"  {name:12}{value or f'not installed; for {OPTIONAL[name]}'}" for name, value in self.optional.items()),
            "tuned by flexclear bench --tune",
            *(f"  {line}" for line in self.tuned or ["nothing: blocks and kernel options are the default ones"]),
            "",
            "transform runs compiled here"
            if self.problem is None
            else f"transform does not run compiled: {self.problem}",
        ]
        return "\n".join(lines)


def diagnose(device: str = "auto", *, quick: bool = False) -> Diagnosis:
    """Find out what works on ``device``.

    Args:
        device: a torch device, or ``"auto"``: CUDA if available.
        quick: only look things up; otherwise a small transformed model runs with each backend (compiling takes about ten
            seconds), and a small layer with each recipe.

    Raises:
        ValueError: there is no such device.
    """
    from flexclear.compile import RECIPES, why_not_compiled, why_not_recipe
    from flexclear.compile.tuned import usable
    from flexclear.generation.check import choose_device

    place = choose_device(device)
    torch_range, too_old = _torch_range(torch.__version__)
    flex = why_not_compiled(place) or _disabled()
    sdpa = None
    compiling = flex if place.type in ("cpu", "cuda") else None
    if not quick:
        sdpa = _attempt(lambda: _transformed(place, "sdpa"))
        if flex is None and sdpa is None:
            flex = compiling = _attempt(lambda: _agree(place))
        if flex is not None and _disabled() is None:
            compiling = _attempt(lambda: _compile(place))  # Is only FlexAttention broken?
    recipes = {name: why_not_recipe(name, place) for name in RECIPES}
    if not quick:
        recipes = {
            name: _attempt(lambda name=name: _quantize(name, place)) if reason is None else reason  # type: ignore[misc]
            for name, reason in recipes.items()
        }
    return Diagnosis(
        versions=versions(("torch", "diffusers", "transformers", "torchao", "triton")),
        device=_describe(place),
        torch_range=torch_range,
        compiler=_compiler(place),
        compile=compiling,
        backends={"flex": flex, "sdpa": sdpa},
        recipes=recipes,
        optional={name: installed(name) for name in OPTIONAL},
        tuned=[str(one) for one in usable(place)],
        tried=not quick,
        problem=(torch_range if too_old else None) or sdpa or flex,
    )


def _torch_range(version: str) -> tuple[str | None, bool]:
    """Why ``version`` is outside the tested range, and whether it is too old to be used."""
    found = release(version)
    oldest, newest = TESTED_TORCH
    between = f"tested with {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
    if found < oldest:
        return f"torch {version} is too old: it computes wrong results under some masks; {between}", True
    return (f"torch {version} is newer than what was tested; {between}", False) if found > newest else (None, False)


def _disabled() -> str | None:
    import os

    from torch import _dynamo

    if _dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "torch.compile is disabled: unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE"
    return None


def _describe(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_GiB": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "count": torch.cuda.device_count(),
        }
    if device.type == "cpu":
        return {
            "type": "cpu",
            "name": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    return {"type": device.type, "name": str(device), "capability": "unknown"}


def _compiler(device: torch.device) -> str:
    if device.type == "cuda":
        found = installed("triton") or installed("pytorch-triton")
        return "no triton: pip install triton" if found is None else f"triton {found}"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return f"C++ compiler {get_cpp_compiler()}"
    except InvalidCxxCompiler:
        return "no C++ compiler (Debian: apt-get install g++ python3-dev)"


def _attempt(run: Callable[[], object]) -> str | None:
    """None if ``run`` succeeds, else what went wrong, on one line."""
    try:
        run()
    except Exception as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        return f"{type(error).__name__}: {said}"
    return None


def _compile(device: torch.device) -> None:
    torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(8, device=device))


def _transformed(device: torch.device, backend: str) -> torch.Tensor:
    """The output of a tiny random FLUX model, transformed."""
    from diffusers import FluxTransformer2DModel

    from flexclear.convert import transform

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            axes_dims_rope=(4, 6, 6),
        ).eval()
        grid = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(20.0), indexing="ij"), -1).reshape(-1, 2)
        call = {
            "hidden_states": torch.randn(1, len(grid), 8),
            "encoder_hidden_states": torch.randn(1, 16, 12),
            "pooled_projections": torch.randn(1, 10),
            "timestep": torch.full((1,), 0.5),
            "img_ids": torch.cat([torch.zeros(len(grid), 1), grid], 1),
            "txt_ids": torch.zeros(16, 3),
        }
    transform(model.to(device), r=4, backend=backend)
    with torch.no_grad():
        return model(**{name: tensor.to(device) for name, tensor in call.items()}).sample


def _agree(device: torch.device) -> None:
    """Check that compiled attention agrees with masked SDPA."""
    flex, sdpa = _transformed(device, "flex"), _transformed(device, "sdpa")
    error = float((flex - sdpa).abs().max() / sdpa.abs().max())
    # Float32 products may be TF32 on CUDA.
    if not error <= 2e-2:
        raise ArithmeticError(f"it computes something other than masked SDPA: relative error {error:.1e}")


def _quantize(recipe: str, device: torch.device) -> None:
    """Check that a quantized linear layer gives roughly the same result as before."""
    from torchao.quantization import quantize_

    from flexclear.compile import RECIPES, sqnr

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False)).to(device, torch.bfloat16)
        tokens = torch.randn(32, 256).to(device, torch.bfloat16)
    with torch.no_grad():
        expected = layer(tokens)
        quantize_(layer, RECIPES[recipe].config())
        found = sqnr(expected, layer(tokens))
    if not found >= 20:
        raise ArithmeticError(f"it computes something else: {found:.0f} dB above the noise")
