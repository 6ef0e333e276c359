"""What a model's attention layers will do, layer by layer, before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from flexclear.compile import tuned
from flexclear.explanation.work import linear_flops
from flexclear.masks import Cost, Full, Layout, Window, cost, suited
from flexclear.masks.checks import check_int
from flexclear.rates.kept import rates_for
from flexclear.rates.rates import Rates, Seconds
from flexclear.runtime.facts import JOINT, REFERENCES
from flexclear.runtime.hooks import EntryHook
from flexclear.runtime.mechanism import Formula


@dataclass(frozen=True)
class LayerExplanation:
    """One attention layer.

    Attributes:
        name: path of the attention module.
        scope: which tokens it attends over (``"joint"``: text and image).
        window: its window; None: dense.
        processor: class of its attention processor.
        cost: cost of the window at the requested size; None without a size, and for attention over reference images only.
        formula: the formula that replaces softmax over a mask (``flexclear.alternatives``), or None.
        flops: FLOPs of its attention at that size; 0 without one.
    """

    name: str
    scope: str
    window: Window | None
    processor: str
    cost: Cost | None
    formula: Formula | None = None
    flops: int = 0

    def _key(self) -> tuple[object, ...]:
        stack, _, name = _parts(self.name)
        return stack, name, self.scope, self.window, self.formula, self.processor


@dataclass(frozen=True)
class ModelExplanation:
    """What every attention layer of a model does. ``print`` it.

    Attributes:
        model: the model's class.
        settings: lines about what applies to all layers; empty for a model that is not transformed.
        layers: in the order of the forward pass.
        size: the image that costs are for, as text; empty without one.
        seconds: predicted times of a step at that size; None without a size, or if a layer attends by a formula.
        rates: what the prediction is based on; None without one.
        others: the same for the pipeline's second transformer, which runs in the other steps; empty if there is none.
    """

    model: str
    settings: tuple[str, ...]
    layers: tuple[LayerExplanation, ...]
    size: str
    seconds: Seconds | None = None
    rates: Rates | None = None
    others: tuple[ModelExplanation, ...] = ()

    @property
    def flops(self) -> int:
        """Attention FLOPs of one forward pass of one sample; 0 without a size."""
        return sum(layer.flops for layer in self.layers)

    @property
    def dense_flops(self) -> int:
        """The same if every layer were dense."""
        return sum(layer.cost.dense_flops for layer in self.layers if layer.cost is not None)

    def __str__(self) -> str:
        head = f"{self.model}, {len(self.layers)} attention layers"
        lines = [head + ("" if self.settings else ", not transformed: dense attention everywhere"), *self.settings]
        if self.size:
            lines.append(self.size)
        runs: list[list[LayerExplanation]] = []
        for layer in self.layers:
            if runs and runs[-1][-1]._key() == layer._key():
                runs[-1].append(layer)
            else:
                runs.append([layer])
        titles = [_title(run) for run in runs]
        wide = max(map(len, titles))
        for title, run in zip(titles, runs, strict=True):
            layer, spent = run[0], run[0].cost
            window = "dense" if layer.window is None else layer.window.name
            work = "" if spent is None else f"  {spent.density:7.2%} of pairs, {spent.flops / 1e9:8.1f} GFLOPs each"
            if spent is not None and layer.window is not None:
                work += f", executed {spent.amplification:.2f} times that"
            if layer.formula is not None:
                window = f"{layer.formula.name} attention"
                work = "" if spent is None else f"  {layer.flops / 1e9:8.1f} GFLOPs each"
            scope = "" if layer.scope == JOINT else f" ({layer.scope} only)"
            lines.append(f"  {title:{wide}}  {len(run):3d} x {window}{scope}{work}")
        if self.flops:
            lines.append(
                f"attention of one step: {self.flops / 1e12:.2f} TFLOPs, {self.flops / self.dense_flops:.1%} of dense "
                f"attention's {self.dense_flops / 1e12:.2f}"
            )
        if self.seconds is not None:
            lines += [f"one step, predicted: {self.seconds}", f"rates: {self.rates}"]
        lines += [f"\nsecond transformer: {other}" for other in self.others]
        return "\n".join(lines)


def _title(run: list[LayerExplanation]) -> str:
    if len(run) == 1:
        return run[0].name
    stack, first, name = _parts(run[0].name)
    return f"{stack}.{first}-{_parts(run[-1].name)[1]}.{name}"


def _parts(path: str) -> tuple[str, str, str]:
    """Split an attention layer's path into stack, block number and module name."""
    stack, number, name = path.rsplit(".", 2)
    return stack, number, name


def explain_model(
    model: Any,
    family: Any,
    entry: EntryHook | None,
    height: int | None,
    width: int | None,
    text_len: int,
    px: int,
    num_frames: int | None = None,
    frames: int | None = None,
) -> ModelExplanation:
    """Explain ``model``. ``height`` and ``width`` are in pixels, both or neither, with ``px`` per token and side. For a video,
    ``num_frames`` are ``frames`` in tokens.

    Raises:
        TypeError, ValueError: a size is invalid, or only one is given.
    """
    if (height is None) != (width is None):
        raise ValueError(f"pass height and width in pixels, or neither; got height={height!r} and width={width!r}")
    check_int("text_len", text_len, 0, None, "in tokens")
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            check_int(name, side, px, None, "in pixels")
    if family.video and (height is None) != (num_frames is None):
        raise ValueError(
            f"give height, width and num_frames of a video, or none of them; got height={height!r} and num_frames={num_frames!r}"
        )
    depth = frames or 1
    grid = None if height is None or width is None else (height // px, width // px)
    windows = {} if entry is None else entry.settings.windows
    order = "tiled" if entry is None else entry.settings.order
    formula = None if entry is None else entry.settings.formula
    costs: dict[tuple[str, Window | None, int], Cost] = {}
    layers = []
    for number, layer in enumerate(family.layers(model)):
        window, spent, flops = windows.get(layer.name), None, 0
        channels = layer.heads * layer.head_dim
        if grid is not None and layer.scope != REFERENCES:
            key = (layer.scope, window, channels)
            if key not in costs:
                own_text = text_len if layer.scope == JOINT and family.joins else 0
                layout = Layout(*grid, own_text, family.text_first, order, frames=depth)
                if depth > 1 and order == "tiled":
                    layout = layout.with_order("raster") if window is None else suited(layout, window)
                size = None if entry is None else _block_size(model, entry, layout)
                costs[key] = cost(layout, Full() if window is None else window, channels=channels, block_size=size)
            spent = costs[key]
            flops = spent.flops
            if formula is not None:
                flops = formula.flops(Layout(*grid, text_len), channels, layer.heads, number)
        processor = type(layer.module.processor).__name__
        layers.append(LayerExplanation(layer.name, layer.scope, window, processor, spent, formula, flops))
    seconds, rates = (
        (None, None) if grid is None else _predict(model, family, layers, depth * math.prod(grid), text_len)
    )
    return ModelExplanation(
        model=type(model).__name__,
        settings=() if entry is None else _settings(model, entry),
        layers=tuple(layers),
        size="" if grid is None else _size((num_frames, height, width), (depth, *grid), text_len, family.joins),
        seconds=seconds,
        rates=rates,
    )


def _size(pixels: tuple[int | None, ...], tokens: tuple[int, ...], text_len: int, joins: bool) -> str:
    """Describe the size that costs are for: frames of a video, height and width."""
    beside = f"{text_len} of text" + ("" if joins else " by cross-attention")
    frames, height, width = pixels
    if frames is None:
        return f"at {height} x {width} px: {tokens[1]} x {tokens[2]} image tokens, {beside}"
    sides = " x ".join(map(str, tokens))
    return f"{frames} frames of {height} x {width} px: {sides} = {math.prod(tokens)} video tokens, {beside}"


def _predict(
    model: nn.Module, family: Any, layers: list[LayerExplanation], image_len: int, text_len: int
) -> tuple[Seconds | None, Rates | None]:
    """Predict a step of one sample from the rates of the model's device; None if a formula attends, which has no rates."""
    spent = [layer for layer in layers if layer.cost is not None]
    if any(layer.formula is not None for layer in layers) or not spent:
        return None, None
    parameter = next(model.parameters())
    rates = rates_for(parameter.device, parameter.dtype, next(iter(family.layers(model))).head_dim)
    dense = [rates.dense_s(layer.cost) for layer in spent if layer.cost is not None]
    own = [
        taken if layer.window is None or layer.cost is None else rates.windowed_s(layer.cost)
        for layer, taken in zip(spent, dense, strict=True)
    ]
    values = sum(math.isqrt(layer.cost.dense_pairs) * layer.cost.channels for layer in spent if layer.cost is not None)
    linears = linear_flops(model, family, image_len, text_len)
    return Seconds(sum(own), sum(dense), rates.rest_s(linears, values)), rates


def _block_size(model: nn.Module, entry: EntryHook, layout: Layout) -> tuple[int, int]:
    """Block size of attention without gradients on the model's device."""
    parameter = next(model.parameters())
    kernel = entry.settings.kernel("flex", parameter.device, parameter.dtype, layout.seq_len, backward=False)
    return kernel.block_size


def _settings(model: nn.Module, entry: EntryHook) -> tuple[str, ...]:
    own = entry.settings
    lines = [
        f"backend {own.backend}, {own.order} token order, blocks "
        + ("by size" if own.block_size is None else f"{own.block_size[0]} x {own.block_size[1]}")
        + (", exact position ids" if own.exact_position_ids else ", the caller's position ids")
    ]
    if own.kernel_options:
        lines.append("kernel options " + ", ".join(f"{name}={value}" for name, value in own.kernel_options))
    elif own.block_size is None:
        parameter = next(model.parameters())
        found = tuned.find(parameter.device, parameter.dtype, own.head_dim, own.reach, backward=False)
        if found is not None:
            lines.append(f"tuned by flexclear bench --tune: {found}")
    switches = own.switches
    if switches.dense_steps != (0, 0):
        lines.append(
            f"dense in the first {switches.dense_steps[0]} and the last {switches.dense_steps[1]} denoising steps"
        )
    if switches.ntk_factor != 1:
        lines.append(f"rotary base times {switches.ntk_factor:g}")
    if switches.proportional_attention:
        lines.append("attention scale sqrt(log_4608(keys) / head_dim)")
    return tuple(lines)
