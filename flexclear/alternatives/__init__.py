"""Mechanisms that CLEAR is compared with (method, section 6): other cheaper attention, through the same ``transform``.

>>> flexclear.transform(model, attention="swin")                                        # doctest: +SKIP
>>> flexclear.transform(model, attention=alternatives.SwinAttention(size=4))          # doctest: +SKIP

Strided, Swin and neighborhood attention are masks: they become one window per layer. Sigmoid, linear, PixArt-Sigma and
agent attention have their own formulas.
"""

from flexclear.alternatives.agent import AgentAttention
from flexclear.alternatives.flops import flops
from flexclear.alternatives.linear import LinearAttention
from flexclear.alternatives.names import CLEAR, NAMES, named
from flexclear.alternatives.pixart import PixArtAttention
from flexclear.alternatives.sigmoid import SigmoidAttention
from flexclear.alternatives.windows import NeighborhoodAttention, StridedAttention, SwinAttention
from flexclear.runtime.mechanism import Formula, Mechanism, WindowMechanism

__all__ = [
    "AgentAttention",
    "CLEAR",
    "Formula",
    "LinearAttention",
    "Mechanism",
    "NAMES",
    "NeighborhoodAttention",
    "PixArtAttention",
    "SigmoidAttention",
    "StridedAttention",
    "SwinAttention",
    "WindowMechanism",
    "flops",
    "named",
]
