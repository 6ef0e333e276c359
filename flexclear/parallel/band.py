"""One call on one rank: attention of its band, and the exchange with other ranks that it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexclear.masks import Layout
from flexclear.parallel.masks import BandPlan
from flexclear.parallel.planning import Bands
from flexclear.parallel.softmax import merged, partial_attention, weighted
from flexclear.parallel.transfers import Pending
from flexclear.runtime.attention import windowed_attention

if TYPE_CHECKING:
    from flexclear.parallel.session import Session


@dataclass
class BandCall:
    """One call on one rank.

    Attributes:
        session: the session that the call belongs to.
        bands: where the image is cut.
        layout: layout of the image tokens.
        step: denoising step from 0; None if it is not known.
        branch: number of the call within the step: guidance may call the model several times.
        text_first: whether text precedes the image in the sequence.
        plans, masks, keep: for each slot: the rank's plan, the mask of its image queries, and which text is not padding.
        layer: number of attention layers that have run.
    """

    session: Session
    bands: Bands
    layout: Layout
    step: int | None
    branch: int
    text_first: bool
    plans: tuple[BandPlan, ...] = ()
    masks: tuple[Any, ...] = ()
    keep: tuple[Tensor | None, ...] = ()
    layer: int = field(default=0)

    @property
    def ticket(self) -> Tensor:
        """Identifies the session in ``flexclear::band_attend``."""
        return self.session.ticket

    def attend(
        self,
        mask: Any,
        slot: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of one layer on this rank, ``[B, heads, T + n, head_dim]`` in sequence order, for n image tokens.

        Borders are transferred during attention of the text, and sums for the text during attention of the image.

        Args:
            mask: mask of the image queries; see ``BandPlan``.
            slot: number of the layer's plan.
            query, key, value: after norms and rotary embedding.
            weight: pooling weights, or None.
            scale: factor on the scores.
        """
        plan = self.plans[slot]
        query, key = query.to(value.dtype), key.to(value.dtype)
        image_len = len(plan.part.own)
        text_len = query.shape[2] - image_len
        lengths = [text_len, image_len] if self.text_first else [image_len, text_len]

        def split(tensor: Tensor) -> tuple[Tensor, Tensor]:
            first, second = tensor.split(lengths, dim=2)
            return (first, second) if self.text_first else (second, first)

        (text_query, image_query), (text_key, image_key), (text_value, image_value) = map(split, (query, key, value))
        borders = self._send_borders(plan, image_key, image_value)
        finish = None
        if text_len:
            text = (text_query, text_key, text_value)
            finish = self._begin_text(text, image_key, image_value, self.keep[slot], scale)
        keys, values = [image_key, text_key], [image_value, text_value]
        pooled = None
        if plan.pooling is not None and weight is not None:
            pooled = self._pooled(plan, image_key, image_value, weight)
        for received in borders.wait().values():
            key_part, value_part = received.split([key.shape[-1], value.shape[-1]], dim=-1)
            keys.append(key_part)
            values.append(value_part)
        if pooled is not None:
            keys.append(pooled[0])
            values.append(pooled[1])
        if image_len == 0:
            image_out = image_query.new_empty((*image_query.shape[:3], value.shape[3]))
        else:
            image_out = windowed_attention(image_query, torch.cat(keys, 2), torch.cat(values, 2), mask, scale)
        if finish is None:
            return image_out
        text_out = finish().to(image_out.dtype)
        return torch.cat([text_out, image_out] if self.text_first else [image_out, text_out], dim=2)

    def _send_borders(self, plan: BandPlan, key: Tensor, value: Tensor) -> Pending:
        number, self.layer = self.layer, self.layer + 1
        sends = {
            other: torch.cat([key.index_select(2, places), value.index_select(2, places)], dim=-1)
            for other, places in plan.sends.items()
        }
        batch, heads, _, dim = key.shape
        width = dim + value.shape[-1]
        receives = {other: (batch, heads, count, width) for other, count in plan.part.receives.items()}
        # The key includes the batch size, because guidance may end within a run; every rank decides alike.
        return self.session.borders((self.branch, number, batch), self.step, sends, receives, key)

    def _begin_text(
        self,
        text: tuple[Tensor, Tensor, Tensor],
        image_key: Tensor,
        image_value: Tensor,
        keep: Tensor | None,
        scale: float | None,
    ) -> Any:
        """Begin attention of the text queries, and return a function that finishes it."""
        links = self.session.links
        query, key, value = (tensor.contiguous() for tensor in text)
        among_text = partial_attention(query, key, value, scale, keep)
        own = partial_attention(query, image_key, image_value, scale)
        if self.session.options.text == "average":
            # Paper Eq. 7: on each rank, text attends to the text and the rank's own patch; the results are averaged.
            out, _ = merged([among_text, own])
            share = out / self.bands.busy if image_key.shape[2] else torch.zeros_like(out)
            pending = links.start_sum(share, "text")
            return lambda: pending.wait()[links.rank]
        top = torch.maximum(own[1], among_text[1])
        links.start_sum(top, "text", greatest=True).wait()
        total = weighted(*own, top)
        summing = links.start_sum(total, "text")

        def finish() -> Tensor:
            both = summing.wait()[links.rank] + weighted(*among_text, top)
            return both[..., :-1] / both[..., -1:]

        return finish

    def _pooled(self, plan: BandPlan, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        """Pooled keys and values of the whole image, ``[2, B, heads, cells, head_dim]``."""
        assert plan.pooling is not None
        mine = torch.stack([plan.pooling.pool(key, weight), plan.pooling.pool(value, weight)])
        counts = [len(numbers) for numbers in plan.cell_numbers]
        parts = self.session.links.gather(mine, counts, 3, "pooled")
        rows, columns = plan.part.window.pooled_grid(plan.layout)  # type: ignore[union-attr]
        whole = mine.new_zeros(*mine.shape[:3], rows * columns, mine.shape[4])
        for numbers, part in zip(plan.cell_numbers, parts, strict=True):
            whole.index_add_(3, numbers, part)
        return whole

    def gather(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Gather the image tokens of all ranks into those of the whole image, in raster order."""
        plan = self.plans[0]
        parts = self.session.links.gather(tokens, plan.sizes, dim, "output")
        return torch.cat(parts, dim).index_select(dim, plan.gathered)
