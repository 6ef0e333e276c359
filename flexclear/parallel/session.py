"""One model's run over several ranks: what is checked before a call, and how its attention layers exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexclear.attention import windowed_attention
from flexclear.masks import Layout, Window
from flexclear.parallel.compiled import ticket_of
from flexclear.parallel.errors import AgreedError, ParallelError
from flexclear.parallel.facts import differences, facts_of_call, facts_of_model
from flexclear.parallel.links import Links, Pending
from flexclear.parallel.masks import BandPlan, get_band_plan
from flexclear.parallel.planning import Bands, cut
from flexclear.parallel.softmax import merged, partial_attention, weighted
from flexclear.schedule import Slot
from flexclear.steps import StepCounter

if TYPE_CHECKING:
    from flexclear.families.base import Call, Family
    from flexclear.hooks import Settings

TEXTS = ("exact", "average")
EXCHANGES = ("sync", "stale")


@dataclass(frozen=True)
class Options:
    """How a model runs over its ranks; see ``flexclear.parallel.enable``."""

    text: str = "exact"
    exchange: str = "sync"
    warmup_steps: int = 4
    shares: tuple[float, ...] | None = None
    too_small: str = "raise"
    timeout: float = 300.0


@dataclass
class _Borders:
    """What one layer has sent and is to receive, and in which step."""

    step: int
    pending: Pending


class Session:
    """Holds what a run over several ranks needs from one call to the next; one call at a time.

    Args:
        links: the ways between the ranks.
        options: see there.
        steps: tells the denoising step of a pipeline's call.
    """

    def __init__(self, links: Links, options: Options, steps: StepCounter) -> None:
        self.links = links
        self.options = options
        self.steps = steps
        self.current: BandCall | None = None
        self.ticket = ticket_of(self)
        self._calls = 0
        self._place: tuple[int | None, int] = (None, 0)
        self._total: int | None = None
        self._shape: Any = None
        self._stale: dict[Any, _Borders] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Session:
        return self

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _no_session, ()

    def bands(self, call: Call, text_first: bool) -> Bands:
        """Where the picture of a call is cut.

        Raises:
            ValueError: it is too small for the ranks.
        """
        (height, width), *references = call.grids
        layout = Layout(height, width, 0, text_first, "raster", tuple(references))
        return cut(layout, self.links.size, self.options.shares, self.options.too_small)

    # One call, from entry to exit

    def begin(
        self, model: nn.Module, kwargs: Mapping[str, Any], call: Call, family: Family, settings: Settings
    ) -> None:
        """Before a call: count the step, meet the other ranks, and compare with them.

        Raises:
            ValueError: the call cannot run on several ranks, or ranks differ; the message names them.
            ParallelError: a rank is late, gone, or has stopped.
        """
        step = self._step()
        known, branch = self._place
        new_run = step is None or known is None or step < known or self._total == 1
        branch = branch + 1 if step is not None and step == known and not new_run else 0
        self._place = (step, branch)
        self._calls += 1
        where = f"call {self._calls}" if step is None else f"step {step + 1}"
        self.links.where = where
        if self.links.open(resume=not new_run):
            self._stale.clear()
        shape = (call.grids, tuple(sorted(call.text_lens.items())), tuple(call.tokens.shape))
        if new_run or shape != self._shape:
            self._forget()
        self._shape = shape
        mine: dict[str, Any] = {"denoising step": step, **facts_of_call(kwargs, call, thorough=new_run)}
        if new_run and (step is not None or self._calls == 1):
            mine |= facts_of_model(model, settings, self.options)
        said = self.links.tell(mine)
        found = differences(said, self.links.ranks)
        if found:
            self._place = (None, 0)
            raise AgreedError(
                f"{where}: {found}. All ranks must work on the same picture with the same model and settings"
            )
        refused = family.why_not_parallel_call(model, dict(kwargs)) or why_not_cached(model)
        if refused is not None:
            raise AgreedError(f"this call of {type(model).__name__} cannot be shared by several ranks: {refused}")
        try:
            bands = self.bands(call, family.text_first)
        except ValueError as error:
            raise AgreedError(str(error)) from None
        if bands.busy < bands.ranks and not family.idles:
            raise AgreedError(
                f"a picture of {call.grids[0][0]} x {call.grids[0][1]} tokens leaves {bands.ranks - bands.busy} of "
                f"{bands.ranks} ranks idle (too_small='fewer'), and {type(model).__name__} cannot run without image tokens. "
                f"Use {bands.busy} ranks, or a larger picture"
            )
        layout = Layout(*call.grids[0], 0, family.text_first, "raster", call.grids[1:])
        self.current = BandCall(self, bands, layout, step, branch, family.text_first)

    def _step(self) -> int | None:
        try:
            step, self._total = self.steps.evaluation()
        except ValueError:
            return None
        return step

    def part(
        self,
        layout: Layout,
        window: Window | None,
        backend: str,
        block_size: tuple[int, int],
        device: torch.device,
        text_padded: bool,
    ) -> BandPlan:
        """This rank's plan of the current call."""
        assert self.current is not None
        bands = self.current.bands
        return get_band_plan(layout, window, bands, self.links.rank, backend, block_size, device, text_padded)

    def band(
        self, plans: Sequence[Any], masks: Sequence[Any], slots: Sequence[Slot], keep: Mapping[str, Tensor]
    ) -> BandCall:
        """The current call with its plans and masks, one per slot."""
        assert self.current is not None
        self.current.plans = tuple(plans)
        self.current.keep = tuple(keep.get(scope) for scope, _ in slots)
        self.current.masks = tuple(masks)
        return self.current

    def end(self) -> None:
        """After a call that has gone well."""
        self.current = None

    def failed(self, error: BaseException | None) -> None:
        """After one that has not: tell the others.

        Raises:
            ParallelError: another rank is the cause.
        """
        self.current = None
        self._place = (None, 0)
        self._stale.clear()
        if isinstance(error, ParallelError | AgreedError):
            return
        if error is not None:
            self.links.fail(error)

    def _forget(self) -> None:
        """Drop borders that nobody will use; their transfers have to end first."""
        for borders in self._stale.values():
            borders.pending.wait()
        self._stale.clear()

    def close(self) -> None:
        """Give everything back."""
        self._stale.clear()
        self.current = None
        self.links.close()

    # Borders

    def borders(self, key: Any, step: int | None, sends: dict[int, Tensor], receives: Any, like: Tensor) -> Pending:
        """A layer's borders: those of this step, or of the step before while these travel."""
        if self.options.exchange == "sync" or step is None:
            return self.links.exchange(sends, receives, like)
        before = self._stale.pop(key, None)
        usable = before is not None and before.step == step - 1 and step >= self.options.warmup_steps
        last = self._total is not None and step >= self._total - 1
        if usable and last:
            assert before is not None
            return before.pending
        now = self.links.exchange(sends, receives, like)
        if not last:
            self._stale[key] = _Borders(step, now)
        if usable:
            assert before is not None
            return before.pending
        if before is not None:
            before.pending.wait()
        return now


def why_not_cached(model: nn.Module) -> str | None:
    """Why a model with one of diffusers' caches cannot be shared by several ranks; None where it has none."""
    if not getattr(model, "is_cache_enabled", False):
        return None
    return (
        "it has a cache (enable_cache), which decides from the tokens that it sees which blocks to skip, and each rank sees "
        "others. model.disable_cache() first"
    )


def _no_session() -> None:
    return None


@dataclass
class BandCall:
    """One call on one rank.

    Attributes:
        session: whose.
        bands: where the picture is cut.
        layout: of the image tokens.
        step: denoising step from 0, None where nobody knows it.
        branch: number of the call within the step: guidance may call the model several times.
        text_first: whether text precedes the image in the sequence.
        plans, masks, keep: of each slot: what the rank has, what its image queries see, and which text is no padding.
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
        """Names the session to ``flexclear::band_attend``."""
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
        """Attention of one layer on this rank, ``[B, heads, T + n, head_dim]`` in sequence order, n its image tokens.

        Borders travel while text attends, and text's sums while the image does.

        Args:
            mask: of the image's queries; see ``BandPlan``.
            slot: which plan is the layer's.
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
        # By batch, because guidance may end within a run; every rank decides alike.
        return self.session.borders((self.branch, number, batch), self.step, sends, receives, key)

    def _begin_text(
        self,
        text: tuple[Tensor, Tensor, Tensor],
        image_key: Tensor,
        image_value: Tensor,
        keep: Tensor | None,
        scale: float | None,
    ) -> Any:
        """Begin attention of the text's queries; what is returned ends it."""
        links = self.session.links
        query, key, value = (tensor.contiguous() for tensor in text)
        among_text = partial_attention(query, key, value, scale, keep)
        own = partial_attention(query, image_key, image_value, scale)
        if self.session.options.text == "average":
            # Paper Eq. 7: each rank's text attends to the text and the rank's own patch; the ranks' results are averaged.
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
        """Pooled keys and values of the whole picture, ``[2, B, heads, cells, head_dim]``."""
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
        """This rank's image tokens into those of the whole picture, in raster order."""
        plan = self.plans[0]
        parts = self.session.links.gather(tokens, plan.sizes, dim, "output")
        return torch.cat(parts, dim).index_select(dim, plan.gathered)
