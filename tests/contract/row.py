"""What a row of the table of families says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .shapes import Shape

FRAME_RADIUS = 1
"""Frames on either side that a window of a video sees."""

ABILITIES = {
    "references": "reference images",
    "padding": "padded text in a batch",
    "residuals": "ControlNet residuals",
    "ntk": "NTK factor",
    "ids": "exact ids in bfloat16",
    "fuse": "fused projections",
    "ip-adapter": "IP-Adapter",
    "pooled keys": "down-sampled keys",
    "formulas": "attention by formula",
    "checkpointing": "gradient checkpointing",
    "ranks": "an image shared by two processes",
}
"""What a family may have or not, and what the support table calls it. What all must do is not in here."""


@dataclass(frozen=True)
class Refused:
    """An ability that raises at the door.

    Attributes:
        says: a regular expression that the message holds.
        transform: options of ``transform`` that ask for it, or
        prepare: what is done to the model before it is transformed, or
        afterwards: what is done to it then, or
        call: what a call is changed by, given the shape.
        error: type of what is raised.
    """

    says: str
    transform: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] | None = None
    afterwards: Callable[[Any], None] | None = None
    call: Callable[[Shape], dict[str, Any]] | None = None
    error: type[Exception] = ValueError


@dataclass(frozen=True)
class Row:
    """One family, or one variant of a family.

    Attributes:
        name: short name, for test ids.
        title: of its column in the support table.
        make: makes a small model, given changes of its config.
        call: arguments of a call of the given shape, with padded text where that says so.
        text_first: whether text precedes the image in the attention's sequence.
        head_64: config of a model with heads of 64.
        one_block: config of a model with one block of each kind.
        joint_block: and with one alone, which attends over text and image; None where another row has the same.
        no_block: and with none.
        graphs: how many graphs those blocks compile to, one size.
        one_graph: whether diffusers' own model compiles to one as a whole.
        text_lens: text tokens of each sequence that is windowed.
        parts: further sequences that are, of some of the grids and no text.
        other_lens: lengths of sequences that are not.
        image: what of a model's output is the image.
        fitted: the nearest shape that the model can have.
        ragged: whether padding is in no sample's sequence, each of which is attended over alone.
        adjoins: whether each sample's image follows its own text at once, and padding is at the end.
        paddings: kinds of padded text, and whether what is padded is hidden; a mask that is added to scores hides nothing.
        keep: which text of a padded call is no padding, bool ``[B, text_len]``; None: the first of each sample.
        ids: argument with the image's position ids.
        optional: arguments of its calls that may be missing.
        residuals: a call's ControlNet residuals.
        adapter: install an IP-Adapter in a stock model, and give what it adds to a call.
        stretch: multiply the base of a stock model's rotary frequencies.
        fuse: fuse a model's projections.
        fusing_replaces: whether diffusers puts other processors there when it fuses them.
        stacks: where the blocks are, and the name of the attention module in them.
        abilities: those of ``ABILITIES`` that it has.
        refuses: those that raise. An ability in neither is one that diffusers' model cannot be asked for: ``lacks``.
        lacks: why not.
        video: whether its calls have frames, and its windows therefore too.
        alone: whether attention of other queries is over as many keys, and stays as it is.
        brief: whether the suite runs only the tests marked so for it, and leaves the others to ``make contract``.
    """

    name: str
    title: str
    make: Callable[..., Any]
    call: Callable[[Shape], dict[str, Any]]
    text_first: bool
    head_64: Mapping[str, Any]
    one_block: Mapping[str, Any]
    joint_block: Mapping[str, Any] | None
    no_block: Mapping[str, Any]
    graphs: int
    stacks: Mapping[str, str]
    text_lens: Callable[[Shape], tuple[int, ...]] = lambda shape: (shape.text_len,)
    parts: Callable[[Shape], tuple[Shape, ...]] = lambda shape: ()
    other_lens: Callable[[Shape], tuple[int, ...]] = lambda shape: ()
    image: Callable[[Any, Shape], Any] = lambda output, shape: output
    fitted: Callable[[Shape], Shape] = lambda shape: shape
    ragged: bool = False
    adjoins: bool = False
    paddings: Mapping[str, bool] = field(default_factory=dict)
    keep: Callable[[Shape], Any] | None = None
    ids: str = "img_ids"
    optional: tuple[str, ...] = ()
    residuals: Callable[[Shape], dict[str, Any]] | None = None
    adapter: Callable[[Any, Shape], dict[str, Any]] | None = None
    stretch: Callable[[Any, float], None] | None = None
    fuse: Callable[[Any], None] | None = None
    fusing_replaces: bool = False
    refuses: Mapping[str, Refused] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    video: bool = False
    alone: bool = False
    brief: bool = False
    one_graph: bool = True

    @property
    def abilities(self) -> frozenset[str]:
        """What it supports."""
        return frozenset(ABILITIES) - self.refuses.keys() - self.lacks.keys()

    @property
    def frames(self) -> dict[str, int]:
        """What ``transform`` is told of frames."""
        return {"frame_radius": FRAME_RADIUS} if self.video else {}

    def build(self, head_64: bool = False, one_block: bool = False, **config) -> Any:
        """A small model with random weights, in eval mode."""
        return self.make(**(self.head_64 if head_64 else {}), **(self.one_block if one_block else {}), **config)

    def padded(self, kind: str, **sizes) -> Shape:
        """A shape with padded text of a kind: 47 and 24 tokens of 70, which Z-Image makes 64 and 32."""
        return Shape(**{"batch": 2, "text_len": 70, "padding": kind, **sizes})

    def texts(self, **sizes) -> list[Shape]:
        """Shapes with text that is all there, and with each kind of padded text."""
        return [Shape(**{"batch": 2, **sizes}), *(self.padded(kind, **sizes) for kind in self.paddings)]

    def blocks(self, model) -> list[tuple[str, Any]]:
        """The first windowed block of each stack, by name."""
        return [(stack, model.get_submodule(stack)[0]) for stack in self.stacks]
