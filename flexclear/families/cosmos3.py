"""Cosmos 3: text that attends causally to itself, followed by video, sound and actions that attend to everything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexclear.families.latents import LatentsFamily
from flexclear.runtime.call_plan import CallPlan
from flexclear.runtime.carrying import CarrierHook, carrying, here
from flexclear.runtime.facts import JOINT, Call, Layer
from flexclear.runtime.family import InnerHooks
from flexclear.runtime.grid import GridReader
from flexclear.runtime.mechanism import Formula
from flexclear.runtime.processors import WindowProcessor

CLIPS, SHAPES, ROWS = "vision_tokens", "vision_token_shapes", "vision_sequence_indexes"


class Sliced:
    """A table of the rotary embedding that the model cuts into parts for its layers. Each slice carries the plan."""

    def __init__(self, table: Tensor, plan: CallPlan) -> None:
        self.table, self.plan = table, plan

    def squeeze(self, dim: int) -> Sliced:
        return Sliced(self.table.squeeze(dim), self.plan)

    def __getitem__(self, part: slice) -> Tensor:
        return carrying(self.table[part], self.plan)


class SlicedCarrierHook(CarrierHook):
    """Forward hook of the module that makes the rotary embedding, whose tables the model cuts in two."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        plan: CallPlan | None = getattr(here, "entering", None)
        if plan is None:
            return output
        if not torch.compiler.is_compiling():
            here.entering = None
        return tuple(Sliced(table, plan) for table in output)


@dataclass(frozen=True)
class Cosmos3Family(LatentsFamily):
    """``Cosmos3OmniTransformer``. The window is over the video, including given frames; text, sound and actions see all of the
    video and are seen by it. The text's attention over itself is unchanged.
    """

    def processor(
        self, layer: Layer, original: Any, slot: int, down_factor: int | None, formula: Formula | None
    ) -> WindowProcessor:
        processor = super().processor(layer, original, slot, down_factor, formula)
        processor.in_parts, processor.before = True, 1
        return processor

    def read(self, model: Any, kwargs: dict[str, Any], grids: GridReader) -> Call:
        name = type(model).__name__
        clips, shapes, rows = (kwargs.get(each) for each in (CLIPS, SHAPES, ROWS))
        if not isinstance(clips, list | tuple) or not clips or not isinstance(clips[0], Tensor) or not shapes:
            raise ValueError(f"a transformed {name} needs {CLIPS} as a list of latents, and {SHAPES}")
        if len(clips) != 1 or len(shapes) != 1:
            raise ValueError(
                f"a transformed {name} takes one clip, got {len(clips)} in {CLIPS}: the window is over one grid. "
                "flexclear.restore(model) first"
            )
        if model._cp_shard_fn is not None:
            raise ValueError(
                f"this {name} splits its sequence among several processes (_cp_shard_fn), and windows are made for whole "
                "videos. Call it without, or flexclear.restore(model) first"
            )
        frames, height, width = (int(side) for side in shapes[0])
        text_len, seq_len = int(kwargs["und_len"]), int(kwargs["sequence_length"])
        count = frames * height * width
        if not isinstance(rows, Tensor) or rows.shape != (count,):
            given = tuple(rows.shape) if isinstance(rows, Tensor) else rows
            raise ValueError(
                f"{ROWS} must name the {frames} x {height} x {width} = {count} places that {SHAPES} say the clip has, got {given}"
            )
        start = grids.once(rows, _start)
        if not text_len <= start <= seq_len - count:
            raise ValueError(
                f"{ROWS} {start} to {start + count - 1} are not in the sequence of {seq_len} tokens behind the {text_len} of "
                "text (und_len), which attend to themselves alone"
            )
        return Call(clips[0], ((height, width),), {JOINT: seq_len - count}, frames=frames, start=start)

    def hooks(self, model: nn.Module, names: Iterable[str]) -> InnerHooks:
        carriers: InnerHooks = [(self.embedder_of(model), SlicedCarrierHook())]
        return [*carriers, *[(module, hook) for module, hook in super().hooks(model, names) if hook.after is False]]


def _start(rows: Tensor) -> int:
    """The first of consecutive places.

    Raises:
        ValueError: they are not consecutive.
    """
    if bool((rows[1:] - rows[:-1] != 1).any()):
        raise ValueError(f"{ROWS} are not consecutive places; windows need a clip's tokens side by side")
    return int(rows[0])


COSMOS3 = Cosmos3Family(
    model_class="Cosmos3OmniTransformer",
    processors=("Cosmos3AttnProcessor",),
    stacks={"layers": "self_attn"},
    carriers=("rotary_emb",),
    tokens=CLIPS,
    rope=False,
    no_ntk="has one rotary embedding for the video and for its language model, whose base must stay",
    video=True,
    px_per_token=32,
    pipelines=("Cosmos3OmniPipeline",),
    notes=(
        "text, image and video to video, with sound or actions, which see all and are seen by all; grouped heads run natively in "
        "FlexAttention; one clip per sequence"
    ),
)
