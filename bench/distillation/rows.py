"""What bench/distillation/study.py compares, and in which order.

The published comparison draws 64 x 64 image tokens and 512 text tokens. This one draws ``side`` x ``side``, the same share of
text, and windows of the published size times ``side`` / 64, so that costs relative to dense attention are about the published
ones: at 32 x 32 tokens the rivals' queries see 64 keys of 1,024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import flexclear
from flexclear.alternatives import Formula, flops, named
from flexclear.families.target import model_of
from flexclear.masks import Disc, Downsampled, Layout

PUBLISHED_SIDE, PUBLISHED_TEXT = 64, 512
SIDES = (16, 32, 64)
TOKEN = 8
"""Side of the embedded model's image tokens, in pixels."""
BEFORE, FLOW, ALL, REAL, LONG = "before", "flow", "all", "real", "long"
STAGES = {
    BEFORE: "before",
    FLOW: "L_flow alone",
    ALL: "all losses",
    REAL: "all losses, real images",
    LONG: "all losses, longer",
}
LONGER = 4
"""How many times as many steps ``LONG`` trains."""
FEW = "few-steps"
LONG_ROW = "longer"
REAL_ROW = "real-pictures"


@dataclass(frozen=True)
class Row:
    """One mechanism.

    Attributes:
        name: for ``--rows`` and folders.
        title: for tables.
        options: of ``DistillConfig``.
        layout: of the image that costs are counted for.
    """

    name: str
    title: str
    options: dict[str, Any] = field(hash=False)
    layout: Layout

    @property
    def mechanism(self) -> Any:
        """The alternative, or None: CLEAR."""
        sizes = self.options.get("sizes", {})
        return named(self.options["attention"], **sizes) if "attention" in self.options else None

    @property
    def is_clear(self) -> bool:
        return self.mechanism is None

    def flops(self, config: Any) -> float:
        """Attention FLOPs of one layer of a model with this configuration, one image, averaged over the layers."""
        heads, layers = config.num_attention_heads, config.num_layers + config.num_single_layers
        channels = heads * config.attention_head_dim
        what = self.mechanism
        if what is None:
            disc, factor = Disc(self.options["r"]), self.options.get("down_factor")
            what = disc if factor is None else Downsampled(disc, factor)
        return sum(flops(what, self.layout, channels, heads, layer) for layer in range(layers)) / layers

    def apply(self, pipe: Any, weights: Path | None = None) -> None:
        """Transform the pipeline, and load what was trained for this row."""
        mechanism = self.mechanism
        if mechanism is None:
            radius, factor = self.options["r"], self.options.get("down_factor")
            flexclear.transform(pipe, r=radius, down_factor=factor, backend="sdpa")
        else:
            flexclear.transform(pipe, attention=mechanism, backend="sdpa")
        if weights is None:
            return
        if isinstance(mechanism, Formula):
            tensors = load_file(weights)
            model = model_of(pipe)
            unknown = tensors.keys() - model.state_dict().keys()
            if unknown:
                raise ValueError(f"{weights} does not fit {self.name}: {sorted(unknown)[:3]}")
            model.load_state_dict(tensors, strict=False)
        else:
            flexclear.load_weights(pipe, weights)


@dataclass(frozen=True)
class Job:
    """One piece of the study: a row in one stage, or (``row`` None) the few-step model.

    Attributes:
        row: what is measured, trained first unless the stage is ``BEFORE``.
        stage: one of ``STAGES``, or ``FEW``.
    """

    row: Row | None
    stage: str

    @property
    def name(self) -> str:
        return FEW if self.row is None else f"{self.row.name}-{self.stage}"

    @property
    def title(self) -> str:
        return "few-step model" if self.row is None else f"{self.row.title}: {STAGES[self.stage]}"


@dataclass(frozen=True)
class Comparison:
    """All rows at one size.

    Attributes:
        side: image tokens along either direction, one of ``SIDES``.

    Raises:
        ValueError: another side.
    """

    side: int

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise ValueError(f"--side must be one of {list(SIDES)} image tokens, got {self.side}")

    @property
    def pixels(self) -> int:
        return self.side * TOKEN

    @property
    def text_len(self) -> int:
        return PUBLISHED_TEXT * self.side**2 // PUBLISHED_SIDE**2

    @property
    def layout(self) -> Layout:
        return Layout(self.side, self.side, self.text_len)

    def dense_flops(self, config: Any) -> float:
        """Of ``Row.flops``, for dense attention."""
        return float(flops(None, self.layout, config.num_attention_heads * config.attention_head_dim))

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The mechanisms, what says most first."""

        def own(published: int) -> int:
            return published * self.side // PUBLISHED_SIDE

        def clear(published: int, factor: int | None = None) -> Row:
            r = own(published)
            if factor is None:
                return Row(f"clear-r{r}", f"CLEAR, r = {r}", {"r": r}, self.layout)
            title = f"CLEAR, r = {r}, keys down-sampled {factor} x {factor}"
            return Row(f"clear-r{r}-down{factor}", title, {"r": r, "down_factor": factor}, self.layout)

        def other(name: str, title: str, **sizes: int) -> Row:
            return Row(name, title, {"attention": name, **({"sizes": sizes} if sizes else {})}, self.layout)

        window = own(16)
        return (
            clear(16),
            clear(8),
            clear(8, 4),
            clear(32),
            other("pixart", "PixArt-Sigma, 4 x 4", factor=4),
            other("neighborhood", f"neighborhood, {window} x {window}", kernel=window),
            other("swin", f"Swin, {window} x {window}", size=window),
            other("strided", "strided, 4", stride=4),
            other("agent", f"agent, {window**2} agents", side=window),
            other("linear", "linear"),
            other("sigmoid", "sigmoid"),
        )

    @property
    def long_rows(self) -> tuple[Row, ...]:
        """Those that are trained longer, too."""
        return (self.rows[0], self.rows[2])

    @property
    def names(self) -> tuple[str, ...]:
        """What ``--rows`` may name."""
        return (*(row.name for row in self.rows), REAL_ROW, LONG_ROW, FEW)

    def jobs(self, names: Sequence[str] = ()) -> list[Job]:
        """What is to be done for these rows (all by default), what says most first.

        Raises:
            ValueError: an unknown name.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ValueError(f"--rows: unknown {', '.join(unknown)}; known are {', '.join(self.names)}")
        wanted = set(names) or set(self.names)
        clear = [row for row in self.rows if row.is_clear and row.name in wanted]
        others = [row for row in self.rows if not row.is_clear and row.name in wanted]
        first = self.rows[0]
        found = [Job(row, stage) for row in (*clear, *others) for stage in (BEFORE, ALL)]
        found += [Job(row, FLOW) for row in clear]
        found += [Job(first, stage) for stage in (BEFORE, ALL, REAL) if REAL_ROW in wanted]
        found += [Job(row, stage) for row in self.long_rows for stage in (BEFORE, ALL, LONG) if LONG_ROW in wanted]
        found += [Job(None, FEW)] if FEW in wanted else []
        found += [Job(row, FLOW) for row in others]
        return list(dict.fromkeys(found))
