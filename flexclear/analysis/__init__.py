"""What a model's attention does in a real run, how it depends on positions, and what it costs: the paper's figures."""

from flexclear.analysis.attention import Observed, attention_pictures, observe
from flexclear.analysis.cost import CostRow, cost_table, published_seconds
from flexclear.analysis.perturb import Clip, clipped_attention, clipped_distances

__all__ = [
    "Clip",
    "CostRow",
    "Observed",
    "attention_pictures",
    "clipped_attention",
    "clipped_distances",
    "cost_table",
    "observe",
    "published_seconds",
]
