"""Agent attention: a few pooled queries read the image for all others."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flexclear.masks import Layout
from flexclear.masks.checks import check_int
from flexclear.masks.layout import MAX_SIDE
from flexclear.runtime.attention import windowed_attention
from flexclear.runtime.mechanism import Attend, Formula, one_grid

if TYPE_CHECKING:
    from flexclear.runtime.plan import Plan


@dataclass(frozen=True)
class AgentAttention(Formula):
    r"""Two softmax attentions through agents A, image queries pooled over the grid.

    .. math:: V_A = \mathrm{softmax}(A K_{img}^T / \sqrt d) V_{img}, \quad
        O_{img} = \mathrm{softmax}(Q_{img} [K_{txt}; A]^T / \sqrt d) [V_{txt}; V_A]

    Agents read image keys only, image queries see all text keys and the agents in one softmax, and text queries see everything.
    With 256 agents these pairs make the published 80.5 GFLOPs at 1024 px. Only the projections are trained; the source's biases
    and depth-wise convolution are left out.

    Adaptive average pooling cuts the grid into ``side`` x ``side`` cells, whatever its size: cell i of n over h rows holds rows
    floor(i h / n) to ceil((i + 1) h / n) - 1. If the grid has fewer rows or columns, there is one agent for each.

    Args:
        side: agents along each axis; published: 16.
    """

    kind: ClassVar[str] = "agent"
    source: ClassVar[str] = "Han et al. 2024, Agent Attention, arXiv 2312.08874"
    side: int = 16

    def __post_init__(self) -> None:
        check_int("agents along each axis", self.side, 1, MAX_SIDE)

    @property
    def name(self) -> str:
        return f"agent_{self.side}x{self.side}"

    def agents(self, layout: Layout) -> tuple[int, int]:
        """Rows and columns of agents over a layout."""
        return min(self.side, layout.height), min(self.side, layout.width)

    def bind(self, plan: Plan) -> Attend:
        one_grid(plan.layout, "agent attention")
        return functools.partial(agent_attention, plan=plan, agents=self.agents(plan.layout))

    def flops(self, layout: Layout, channels: int, heads: int, layer: int = 0) -> int:
        """Three softmax attentions (text queries, agents, image queries), and pooling."""
        rows, columns = self.agents(layout)
        agents, text, image = rows * columns, layout.text_len, layout.image_len
        pairs = text * layout.seq_len + agents * image + image * (text + agents)
        return 4 * channels * pairs + channels * image


def agent_attention(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None = None, *, plan: Plan, agents: tuple[int, int]
) -> Tensor:
    """The formula over ``[B, heads, N, head_dim]`` in sequence order, text first."""
    text_len, layout = plan.layout.image_start, plan.layout
    (text_query, image_query), (text_key, image_key), (text_value, image_value) = (
        t.tensor_split([text_len], dim=2) for t in (query, key, value)
    )
    # [B, heads, h * w, head_dim] -> [B, heads * head_dim, h, w], pooled, and back.
    raster = plan.to_raster(image_query, dim=2).transpose(2, 3).flatten(1, 2)
    pooled = F.adaptive_avg_pool2d(raster.unflatten(2, (layout.height, layout.width)), agents)
    agent = pooled.flatten(2).unflatten(1, (query.shape[1], query.shape[3])).transpose(2, 3)
    agent_value = windowed_attention(agent, image_key, image_value, None)
    image = windowed_attention(
        image_query, torch.cat([text_key, agent], dim=2), torch.cat([text_value, agent_value], dim=2), None
    )
    return torch.cat([windowed_attention(text_query, key, value, None), image], dim=2)
