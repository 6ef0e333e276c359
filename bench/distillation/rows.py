"""What bench/distillation/study.py compares, and in which order.

The embedded model draws 128 px: 16 x 16 image tokens and 32 text tokens, a quarter of the published 64 x 64 in each direction
and the same share of text. Every size is the published one over four, so that costs relative to dense attention are about the
published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import flexclear
from flexclear.alternatives import Formula, flops, named
from flexclear.families.target import model_of
from flexclear.masks import Disc, Downsampled, Layout

TEXT_LEN = 32
SIDE = 16
LAYOUT = Layout(SIDE, SIDE, TEXT_LEN)
BEFORE, FLOW, ALL, REAL, LONG = "before", "flow", "all", "real", "long"
STAGES = {
    BEFORE: "before",
    FLOW: "L_flow alone",
    ALL: "all losses",
    REAL: "all losses, real pictures",
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
    """

    name: str
    title: str
    options: dict[str, Any] = field(hash=False)

    @property
    def mechanism(self) -> Any:
        """The alternative, or None: CLEAR."""
        sizes = self.options.get("sizes", {})
        return named(self.options["attention"], **sizes) if "attention" in self.options else None

    @property
    def is_clear(self) -> bool:
        return self.mechanism is None

    def flops(self, config: Any) -> float:
        """Attention FLOPs of one layer of a model with this configuration, one picture, averaged over the layers."""
        heads, layers = config.num_attention_heads, config.num_layers + config.num_single_layers
        channels = heads * config.attention_head_dim
        what = self.mechanism
        if what is None:
            disc, factor = Disc(self.options["r"]), self.options.get("down_factor")
            what = disc if factor is None else Downsampled(disc, factor)
        return sum(flops(what, LAYOUT, channels, heads, layer) for layer in range(layers)) / layers

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


def dense_flops(config: Any) -> float:
    """Of ``Row.flops``, for dense attention."""
    return float(flops(None, LAYOUT, config.num_attention_heads * config.attention_head_dim))


ROWS = (
    Row("clear-r4", "CLEAR, r = 4", {"r": 4}),
    Row("clear-r8", "CLEAR, r = 8", {"r": 8}),
    Row("clear-r2", "CLEAR, r = 2", {"r": 2}),
    Row("clear-r2-down4", "CLEAR, r = 2, keys down-sampled 4 x 4", {"r": 2, "down_factor": 4}),
    Row("swin", "Swin, 4 x 4", {"attention": "swin", "sizes": {"size": 4}}),
    Row("neighborhood", "neighborhood, 4 x 4", {"attention": "neighborhood", "sizes": {"kernel": 4}}),
    Row("strided", "strided, 4", {"attention": "strided", "sizes": {"stride": 4}}),
    Row("pixart", "PixArt-Sigma, 4 x 4", {"attention": "pixart", "sizes": {"factor": 4}}),
    Row("agent", "agent, 16 agents", {"attention": "agent", "sizes": {"side": 4}}),
    Row("linear", "linear", {"attention": "linear"}),
    Row("sigmoid", "sigmoid", {"attention": "sigmoid"}),
)
LONG_ROWS = tuple(row for row in ROWS if row.name in ("clear-r4", "clear-r2-down4"))
NAMES = (*(row.name for row in ROWS), REAL_ROW, LONG_ROW, FEW)


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


def jobs(names: Sequence[str] = ()) -> list[Job]:
    """What is to be done for these rows (all by default), what says most first.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"--rows: unknown {', '.join(unknown)}; known are {', '.join(NAMES)}")
    wanted = set(names) or set(NAMES)
    clear = [row for row in ROWS if row.is_clear and row.name in wanted]
    others = [row for row in ROWS if not row.is_clear and row.name in wanted]
    found = [Job(row, stage) for row in (*clear, *others) for stage in (BEFORE, ALL)]
    found += [Job(row, FLOW) for row in clear]
    found += [Job(ROWS[0], stage) for stage in (BEFORE, ALL, REAL) if REAL_ROW in wanted]
    found += [Job(row, stage) for row in LONG_ROWS for stage in (BEFORE, ALL, LONG) if LONG_ROW in wanted]
    found += [Job(None, FEW)] if FEW in wanted else []
    found += [Job(row, FLOW) for row in others]
    return list(dict.fromkeys(found))
