"""What a window is: a rule on the coordinates of an image query and an image key. Text sees and is seen by everything.

"Image" includes the frames of a video: a token has a frame, a row and a column, and all tokens of an image are in frame 0.

A window is a hashable frozen dataclass that knows nothing about devices or token orders. ``window.mask_mod(layout,
device)`` binds it to a sequence and returns a plain FlexAttention ``mask_mod``. Its subclasses are in ``shapes.py``,
``neighborhoods.py``, ``tubes.py``, ``tiles.py`` and ``downsampled.py``; combinations of windows are here.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from flexclear.masks.coordinates import (
    Number,
    Place,
    Places,
    Reads,
    Source,
    can_compute,
    computed,
    default_source,
    float_number,
    int_number,
    least_convenient,
    looked_up,
)
from flexclear.masks.defaults import independent
from flexclear.masks.layout import Layout
from flexclear.masks.places import POOLED, Box, Coordinates

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention's signature: ``(batch, head, query position, key position) -> bool``, on 0-d or broadcast tensors."""

Rule = Callable[[Coordinates, Coordinates], Tensor]
"""Maps (frame, row, column) of queries and of keys to bool, on broadcast tensors."""


class Window(ABC):
    """The interface that masks, block classification and costs use.

    ``touches`` and ``covers`` classify blocks from bounding boxes. They must be safe: ``touches`` may be False only if
    no pair of the boxes is allowed, ``covers`` True only if every pair is. If both are exact, rectangular blocks get
    exactly the lists that evaluating every pair would give.
    """

    @property
    def reads(self) -> Reads:
        """What the rule reads, see ``flexclear.masks.coordinates``. Int32 coordinates by default."""
        return "integers"

    @property
    @abstractmethod
    def name(self) -> str:
        """Short label that includes the parameters, such as ``disc_r16``."""

    @property
    def knows_frames(self) -> bool:
        """Whether the rule says which frames a query sees."""
        return False

    def check(self, layout: Layout) -> None:
        """Raise if the window does not fit ``layout``.

        Raises:
            ValueError: it does not; the message says which windows would.
        """
        if layout.frames > 1 and not self.knows_frames:
            raise ValueError(
                f"the window {self.name} is for images and does not say which of {layout.frames} frames a query sees. Use "
                "a Tube: cylinder(r, frame_radius), all_frames(r), ball(r, frame_scale) or radial(r)"
            )

    @abstractmethod
    def rule(self, layout: Layout, number: Number) -> Rule:
        """The window's inequality over ``layout``, which has passed ``check``.

        Args:
            layout: the sequence.
            number: turns each number in the rule into a 0-d tensor of the coordinates' type. FlexAttention would compile
                Python numbers in, so that every radius and size would need a new graph.
        """

    @abstractmethod
    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        """Whether any pair of a query in one box and a key in the other may be allowed: bool, broadcast."""

    @abstractmethod
    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        """Whether every such pair is allowed: bool, broadcast. Boxes are not empty."""

    def __and__(self, other: Window) -> Window:
        """A key is seen if both windows allow it."""
        return Both(self, other)

    def __or__(self, other: Window) -> Window:
        """A key is seen if either window allows it."""
        return Either(self, other)

    def image_pairs(self, layout: Layout) -> int | None:
        """Number of allowed image pairs if there is a formula, else None; they are then counted."""
        return None

    @property
    def pools(self) -> bool:
        """Whether pooled keys follow the sequence's own keys."""
        return False

    @property
    def reach(self) -> int | None:
        """One more than the largest offset along an axis at which a key is seen; None: unbounded. Block sizes depend on it."""
        return None

    def pooled_grid(self, layout: Layout) -> tuple[int, int]:
        """Rows and columns of the pooled keys that follow the sequence's own keys; none by default."""
        return 0, 0

    def key_len(self, layout: Layout) -> int:
        """Number of keys: those of the sequence and the pooled keys."""
        rows, columns = self.pooled_grid(layout)
        return layout.seq_len + rows * columns

    def key_coordinates(self, layout: Layout) -> Tensor:
        """``layout.packed_coordinates()`` with POOLED for each pooled key behind it: int32 ``[key_len]``."""
        packed = layout.packed_coordinates()
        return torch.cat([packed, packed.new_full((self.key_len(layout) - len(packed),), POOLED)])

    @independent
    def mask_mod(
        self,
        layout: Layout,
        device: torch.device | str = "cpu",
        coordinates: Source | None = None,
        queries_from: int | None = None,
    ) -> MaskMod:
        """The window over ``layout`` as a FlexAttention ``mask_mod``.

        The function carries its window (``mask_mod.window``) and is named after it.

        Args:
            layout: the sequence.
            device: where the numbers and tables that it captures are placed.
            coordinates: where coordinates come from, see ``flexclear.masks.coordinates.Source``; None: the best source for the
                device.
            queries_from: sequence position of query 0 if the queries are image tokens (``flexclear.masks.apart``), whose rows
                need fewer checks; for text among them the result is meaningless. None: queries are the whole sequence.
        """
        source = default_source(device) if coordinates is None else coordinates
        self.check(layout)
        if source != "computed" or not can_compute(layout, self.key_len(layout)):
            return self.mask_mod_over(layout, self.key_coordinates(layout), device, source, queries_from)
        number = int_number(device) if self.reads == "integers" else float_number(device)
        keys = computed(layout, self.reads, device)
        queries = keys if queries_from is None else computed(layout, self.reads, device, queries_from)
        pooled = self.key_len(layout) > layout.seq_len
        return self._mask_mod(self.rule(layout, number), queries, keys, pooled, queries_from is not None)

    @independent
    def mask_mod_over(
        self,
        layout: Layout,
        keys: Tensor,
        device: torch.device | str = "cpu",
        coordinates: Source | None = None,
        queries_from: int | None = None,
    ) -> MaskMod:
        """The same from a table: query ``i`` is the token of key ``i``, and further keys may follow the queries.

        Args:
            layout: the layout to which the window's rule is bound.
            keys: packed coordinates of the keys, including TEXT and POOLED, int32 ``[keys]``.
            device: see ``mask_mod``.
            coordinates: see ``mask_mod``.
            queries_from: see ``mask_mod``.
        """
        self.check(layout)
        place = queries = looked_up(keys, layout.packing, device, coordinates or "packed")
        if queries_from is not None:
            first = torch.tensor(queries_from, dtype=torch.int32, device=device)

            def queries(index: Tensor) -> Place:
                return place(index + first)

        rule = self.rule(layout, int_number(device))
        return self._mask_mod(rule, queries, place, bool((keys == POOLED).any()), queries_from is not None)

    def _mask_mod(self, inside: Rule, queries: Places, keys: Places, has_pooled: bool, image_queries: bool) -> MaskMod:
        def mask_mod(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            query, key = queries(q_idx), keys(kv_idx)
            allowed = inside(query.at, key.at)
            if image_queries:
                allowed = allowed | key.is_text
                return allowed | key.is_pooled if has_pooled else allowed
            allowed = allowed | query.is_text | key.is_text
            # Image queries see all pooled keys. Text queries see none: they already see every token.
            return torch.where(key.is_pooled, ~query.is_text, allowed) if has_pooled else allowed

        mask_mod.__name__ = self.name
        mask_mod.window = self  # type: ignore[attr-defined]
        return mask_mod


class _Composed(Window):
    """Several windows, whose results are combined pair by pair."""

    parts: tuple[Window, ...]

    @staticmethod
    @abstractmethod
    def _join(first: Tensor, second: Tensor) -> Tensor:
        """Two results combined, element by element."""

    def __init__(self, *parts: Window) -> None:
        verb = type(self).__name__
        if len(parts) < 2:
            raise ValueError(f"{verb} takes two windows or more, got {len(parts)}")
        for part in parts:
            if not isinstance(part, Window):
                raise TypeError(f"{verb} takes windows of flexclear.masks such as Disc(16), got {part!r}")
            if part.pools:
                raise TypeError(
                    f"{verb} takes windows without pooled keys; add them last: Downsampled({verb}(...), factor)"
                )
        object.__setattr__(self, "parts", parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.parts))})"

    @property
    def reads(self) -> Reads:
        return least_convenient(part.reads for part in self.parts)

    @property
    def knows_frames(self) -> bool:
        return all(part.knows_frames for part in self.parts)

    def check(self, layout: Layout) -> None:
        for part in self.parts:
            part.check(layout)

    def rule(self, layout: Layout, number: Number) -> Rule:
        rules = [part.rule(layout, number) for part in self.parts]
        return functools.reduce(functools.partial(_joined, self._join), rules)

    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        return functools.reduce(self._join, [part.touches(layout, query, key) for part in self.parts])

    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        return functools.reduce(self._join, [part.covers(layout, query, key) for part in self.parts])


@dataclass(frozen=True, init=False, repr=False)
class Both(_Composed):
    """A key is seen if every part allows it: the intersection of windows.

    Attributes:
        parts: two windows or more, without pooled keys.
    """

    parts: tuple[Window, ...]

    @staticmethod
    def _join(first: Tensor, second: Tensor) -> Tensor:
        return first & second

    @property
    def name(self) -> str:
        return "_and_".join(part.name for part in self.parts)

    @property
    def reach(self) -> int | None:
        return min((part.reach for part in self.parts if part.reach is not None), default=None)


@dataclass(frozen=True, init=False, repr=False)
class Either(_Composed):
    """A key is seen if any part allows it: the union of windows.

    Attributes:
        parts: two windows or more, without pooled keys.
    """

    parts: tuple[Window, ...]

    @staticmethod
    def _join(first: Tensor, second: Tensor) -> Tensor:
        return first | second

    @property
    def name(self) -> str:
        return "_or_".join(part.name for part in self.parts)

    @property
    def reach(self) -> int | None:
        reaches = [part.reach for part in self.parts if part.reach is not None]
        return max(reaches) if len(reaches) == len(self.parts) else None


def _joined(join: Callable[[Tensor, Tensor], Tensor], first: Rule, second: Rule) -> Rule:
    return lambda query, key: join(first(query, key), second(query, key))


def captured_tensors(captured: object) -> list[Tensor]:
    """Tensors that a ``mask_mod`` captures, also inside functions, tuples and lists, each once."""
    if isinstance(captured, Tensor):
        return [captured]
    inside = [cell.cell_contents for cell in getattr(captured, "__closure__", None) or ()]
    contents = captured if isinstance(captured, list | tuple) else inside
    return list({id(tensor): tensor for content in contents for tensor in captured_tensors(content)}.values())


def is_plain(window: Window | MaskMod) -> TypeGuard[MaskMod]:
    """Whether ``window`` is a custom ``mask_mod``, one that carries no window."""
    return callable(window) and not isinstance(window, Window) and not hasattr(window, "window")


def as_window(window: Window | MaskMod) -> Window:
    """The window itself, or the one that a ``mask_mod`` of this package carries.

    Raises:
        TypeError: ``window`` is neither.
    """
    found = window if isinstance(window, Window) else getattr(window, "window", None)
    if isinstance(found, Window):
        return found
    raise TypeError(
        "window must be a window of flexclear.masks such as Disc(16), or a FlexAttention mask_mod (batch, head, q_idx, "
        f"kv_idx) -> bool; got {window!r}"
    )
