"""``check_family``: checks a model family's declaration against the plain model under the dense mask."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexclear.convert import restore, transform
from flexclear.families import family_of
from flexclear.masks import Disc, Layout, Window, cylinder
from flexclear.runtime.facts import Call
from flexclear.runtime.family import Family, block_of
from flexclear.runtime.grid import GridReader
from flexclear.runtime.hooks import entry_hook_of
from flexclear.testing import oracle

TOLERANCE = 2.0**-16
"""Relative to the largest output or gradient. Both sides are float32 and sum in different orders: some sixteen operations a
block, each rounding to 2^-24 of its largest value, in eight blocks, are 2^-17."""

MATTERS = 2.0**-12
"""Relative to the largest output: smaller differences cannot be told from rounding."""


@dataclass(frozen=True)
class FamilyReport:
    """What ``check_family`` found.

    Attributes:
        family: the model's family.
        errors: greatest difference of each comparison, relative to the largest value.
        left_out: what could not be compared, and why.
    """

    family: Family
    errors: Mapping[str, float]
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.family.model_class}: right"]
        lines += [f"  {name}: {error:.1e}" for name, error in self.errors.items()]
        return "\n".join([*lines, *(f"  {name}: left out, {why}" for name, why in self.left_out.items())])


def check_family(
    model: nn.Module, call: Mapping[str, Any], *, grid: tuple[int, ...] | Sequence[tuple[int, int]], r: int = 3
) -> FamilyReport:
    """Assert that ``transform`` does to a model what its family declares.

    The plain model runs with scaled-dot-product attention replaced by the same under the dense mask of the window, in raster
    order, wherever its sequence is as long as the family says. Projections, positions and padding masks remain the model's own,
    and none of flexclear's attention code is used. The transformed model must give the same output in both token orders, and
    the same gradients, also with gradient checkpointing. Blocks must compile to whole graphs, a window one token wider must
    make a difference, and ``restore`` must bring the plain model back bit by bit.

    >>> flexclear.testing.check_family(model, call, grid=(9, 13))      # doctest: +SKIP

    Args:
        model: small, with random weights, in float32; not transformed. A model whose last layer is initialized with zeros
            shows nothing: use other weights.
        call: arguments of one call by name. Preferably with a grid that is not square, two samples, and padded text if the
            model supports it.
        grid: the correct height and width in tokens of that call's image, or of the image and each reference image; for a
            video model, frames, height and width in tokens. The family has to read the same from the call.
        r: radius of the window; the grid must be larger. In a video, the previous and the next frame are also seen.

    Returns:
        The differences found.

    Raises:
        AssertionError: one is larger than rounding explains; the message says which and where to look.
        ValueError, TypeError: the model or the call cannot be transformed, or is not as described here.
    """
    family = family_of(model)
    if entry_hook_of(model) is not None:
        raise ValueError("check_family needs the plain model: call flexclear.restore(model) first")
    if any(parameter.dtype != torch.float32 for parameter in model.parameters() if parameter.is_floating_point()):
        raise ValueError("check_family needs a model in float32: lower precision hides faults behind rounding")
    facts = family.read(model, dict(call), GridReader())
    grids: Any = tuple(grid) if not isinstance(grid[0], int) else (grid[-2:],)
    frames = grid[0] if family.video else 1
    assert facts.grids == grids, f"the family reads the grids {facts.grids} off this call, and they are {grids}"
    assert facts.frames == frames, f"the family reads {facts.frames} frames off this call, and there are {frames}"
    checks = _Checks(family, model, call, facts, r)
    checks.outputs()
    checks.gradients()
    checks.graphs()
    return FamilyReport(family, checks.errors, checks.left_out)


class _Checks:
    def __init__(self, family: Family, model: nn.Module, call: Mapping[str, Any], facts: Call, radius: int) -> None:
        self.family, self.model, self.call, self.facts = family, model, call, facts
        self.window, self.wider = (cylinder(r, 1) if family.video else Disc(r) for r in (radius, radius + 1))
        self.errors: dict[str, float] = {}
        self.left_out: dict[str, str] = {}

    def outputs(self) -> None:
        """Check the window's output in both orders, that the window matters, and ``restore``."""
        processors = _processors(self.model)
        dense = _run(self.model, self.call)
        with _under(self.family, self.facts, self.window):
            right = _run(self.model, self.call)
        with _under(self.family, self.facts, self.wider):
            wider = _run(self.model, self.call)
        for name, other in (("the window", dense), ("one token more of radius", wider)):
            least = min(_differ(mine, theirs) for mine, theirs in zip(other, right, strict=True))
            assert least > MATTERS, (
                f"{name} makes no difference to the output of one sample ({least:.1e} of its largest value): such weights, or "
                "such a call, show nothing"
            )
        for order in ("tiled", "raster"):
            with self._transformed(order):
                self._same(f"output, {order} order", _run(self.model, self.call), right, OUTPUT)
        assert torch.equal(_run(self.model, self.call), dense), (
            "the restored model computes something different from before"
        )
        assert _processors(self.model) == processors, "restore has not brought every attention processor back"

    def gradients(self) -> None:
        """Check gradients of all parameters, with and without checkpointing."""
        training, checkpointing = self.model.training, getattr(self.model, "is_gradient_checkpointing", False)
        try:
            with _under(self.family, self.facts, self.window):
                right = _gradients(self.model, self.call)
            with self._transformed():
                self._same("gradients", _gradients(self.model, self.call), right, GRADIENTS)
            name = "gradients, checkpointing"
            if not getattr(self.model, "_supports_gradient_checkpointing", False):
                self.left_out[name] = "the model has none"
                return
            self.model.enable_gradient_checkpointing()  # type: ignore[operator]
            if self._plain_does(name, lambda: _gradients(self.model, self.call)):
                with self._transformed():
                    self._same(name, _gradients(self.model, self.call), right, CHECKPOINTING)
        finally:
            self.model.zero_grad()
            self.model.train(training)
            if not checkpointing and getattr(self.model, "is_gradient_checkpointing", False):
                self.model.disable_gradient_checkpointing()  # type: ignore[operator]

    def graphs(self) -> None:
        """Check that blocks are whole graphs: traced by Dynamo, and run as traced."""
        with _under(self.family, self.facts, self.window):
            right = _run(self.model, self.call)
        names = [layer.name for layer in self.family.layers(self.model)]
        blocks = [self.model.get_submodule(path) for path in dict.fromkeys(map(block_of, names))]

        def compiled() -> Tensor:
            torch.compiler.reset()
            try:
                for block in blocks:
                    block.compile(fullgraph=True, backend="eager")
                return _run(self.model, self.call)
            finally:
                for block in blocks:
                    block._compiled_call_impl = None
                torch.compiler.reset()

        if self._plain_does("output, compiled blocks", compiled):
            with self._transformed():
                self._same("output, compiled blocks", compiled(), right, OUTPUT)

    @contextlib.contextmanager
    def _transformed(self, order: str = "tiled") -> Iterator[None]:
        transform(self.model, self.window, backend="sdpa", order=order)
        try:
            yield
        finally:
            restore(self.model)

    def _plain_does(self, name: str, what: Callable[[], Any]) -> bool:
        """Whether the plain model can do something. If it cannot, there is nothing to check windows against."""
        try:
            what()
        except Exception as error:
            self.left_out[name] = f"the plain model raises {type(error).__name__}: {str(error).splitlines()[0]}"
            return False
        return True

    def _same(self, name: str, found: Any, right: Any, hint: str) -> None:
        if isinstance(found, Tensor):
            found, right = [found], [right]
        assert len(found) == len(right), f"{name}: {len(found)} tensors, should be {len(right)}"
        largest = max((each.abs().max().item() for each in right if each is not None), default=0.0)
        error = 0.0
        for mine, theirs in zip(found, right, strict=True):
            assert (mine is None) == (theirs is None), (
                f"{name}: there is one where there should be none, or none for one"
            )
            if mine is not None:
                assert mine.shape == theirs.shape, f"{name}: shape {tuple(mine.shape)}, should be {tuple(theirs.shape)}"
                error = max(error, (mine - theirs).abs().max().item() / largest)
        self.errors[name] = error
        assert error <= TOLERANCE, (
            f"{name}: {error:.1e} of the largest value off the plain model under the dense mask, {TOLERANCE:.1e} is what "
            f"rounding explains. {hint}"
        )


OUTPUT = (
    "Look at text_first, at where the family says that the image begins (text_lens of read), at the order in which tokens, "
    "position ids and residuals enter and leave, and at padding masks (keep)"
)
GRADIENTS = "The output was right: look at what the entry detaches, or computes without gradients"
CHECKPOINTING = (
    "They were right without checkpointing: look at what carries the plan (carriers), and what a recomputed block gets"
)


@contextlib.contextmanager
def _under(family: Family, facts: Call, window: Window) -> Iterator[None]:
    """Put scaled-dot-product attention under the window's dense mask, for sequences of the family.

    Raises:
        AssertionError: the model did not attend over one of these sequences.
    """
    masks: dict[int, Tensor] = {}
    for scope, text_len in facts.text_lens.items():
        (height, width), *references = facts.grids_of(scope)
        apart = facts.text_adjoins and scope in facts.keep
        own = []
        for length in facts.keep[scope].sum(1).tolist() if apart else [text_len]:
            layout = Layout(height, width, length, family.text_first, "raster", tuple(references), frames=facts.frames)
            padding = text_len - length
            own.append(F.pad(oracle.expected_rows(layout, window), (0, padding, 0, padding), value=True))
        masks[own[0].shape[-1]] = torch.stack(own)[:, None] if apart else own[0]
    attend, used = F.scaled_dot_product_attention, set()

    def masked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any):
        mask = masks.get(key.shape[-2])
        # Attention from something else to the video, such as from sound, is not windowed.
        if mask is not None and (family.joins or query.shape[-2] == key.shape[-2]):
            used.add(key.shape[-2])
            mask = mask[..., -query.shape[-2] :, :].to(query.device)  # or only the last rows
            if attn_mask is None:
                attn_mask = mask
            else:
                attn_mask = (
                    attn_mask & mask if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~mask, -math.inf)
                )
        return attend(query, key, value, attn_mask, *args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", masked):
        yield
    missing = sorted(set(masks) - used)
    assert not missing, (
        f"the plain model attends over no sequence of {missing[0]} tokens, which the family says there is: look at text_lens"
    )


def _run(model: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """The output, ``[B, ...]``, without gradients."""
    with torch.no_grad():
        return _stacked(model(**call))


def _stacked(output: Any) -> Tensor:
    sample = output[0] if isinstance(output, tuple) else output.sample
    return torch.stack(list(sample)) if isinstance(sample, list | tuple) else sample


def _gradients(model: nn.Module, call: Mapping[str, Any]) -> list[Tensor | None]:
    model.train()
    model.zero_grad()
    _stacked(model(**call)).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def _processors(model: nn.Module) -> dict[str, Any]:
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


def _differ(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()
