"""The names that ``transform(attention=...)`` takes."""

from __future__ import annotations

from typing import Any

from flexclear.alternatives.agent import AgentAttention
from flexclear.alternatives.linear import LinearAttention
from flexclear.alternatives.pixart import PixArtAttention
from flexclear.alternatives.sigmoid import SigmoidAttention
from flexclear.alternatives.windows import NeighborhoodAttention, StridedAttention, SwinAttention
from flexclear.runtime.mechanism import Mechanism

CLEAR = "clear"
"""The windows that ``r`` names."""

_KINDS: dict[str, type[Mechanism]] = {
    kind.kind: kind
    for kind in (
        LinearAttention,
        SigmoidAttention,
        PixArtAttention,
        AgentAttention,
        StridedAttention,
        SwinAttention,
        NeighborhoodAttention,
    )
}

NAMES = (CLEAR, *_KINDS)
"""Every name, CLEAR's first."""


def named(attention: Any, **sizes: int) -> Mechanism | None:
    """The mechanism of that name, with its published or the given sizes. Mechanisms are returned as they are; None for CLEAR.

    >>> named("swin", size=8)
    SwinAttention(size=8)

    Raises:
        TypeError: neither a name nor a mechanism, or a size that it does not have.
        ValueError: an unknown name, or a size out of range.
    """
    if isinstance(attention, Mechanism) and not sizes:
        return attention
    if not isinstance(attention, str):
        raise TypeError(
            f"attention must be one of {list(NAMES)}, or a mechanism of flexclear.alternatives such as SwinAttention(8), "
            f"got {attention!r}"
        )
    if attention not in NAMES:
        raise ValueError(f"attention must be one of {list(NAMES)}, got {attention!r}")
    if attention == CLEAR:
        if sizes:
            raise TypeError(f"attention='clear' takes its size as r, got {', '.join(sizes)}")
        return None
    kind = _KINDS[attention]
    known = [name for name in getattr(kind, "__dataclass_fields__", {}) if name not in ("kind", "source")]
    wrong = [name for name in sizes if name not in known]
    if wrong:
        raise TypeError(f"attention={attention!r} has the sizes {known}, got {', '.join(wrong)}")
    return kind(**sizes)
