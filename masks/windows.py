"""What a window is: a rule on the coordinates of an image query and an image key. Text sees and is seen by everything.

A window is a frozen dataclass, hashable, that knows nothing of devices or token orders. ``window.mask_mod(layout,
device)`` binds it to a sequence and returns a plain FlexAttention ``mask_mod``. The windows themselves are in
``shapes.py`` and ``compose.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor

from flexclear.masks.defaults import independent
from flexclear.masks.layout import Layout

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention's signature: ``(batch, head, query position, key position) -> bool``, on 0-d or broadcast tensors."""

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(query row, query column, key row, key column) -> bool`` on broadcast integer tensors."""

Box = tuple[Tensor, Tensor, Tensor, Tensor]
"""Top, bottom, left and right of many rectangles of tokens, inclusive, int32."""

FAR = 1 << 20
"""An empty box has top = left = FAR and bottom = right = -FAR."""

TEXT, POOLED, PADDING = -1, -2, -3
"""What a coordinate table holds in place of ``y << 16 | x`` for tokens that are no image tokens."""


class Window(ABC):
    """What masks, block classification and costs ask of a window.

    ``touches`` and ``covers`` decide blocks from bounding boxes. They must be safe: ``touches`` may be False only if
    no pair of the boxes is allowed, ``covers`` True only if every pair is. Where both are exact, blocks that are
    rectangles get exactly the lists that looking at every pair would give.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Short label, parameters included, such as ``disc_r16``."""

    @abstractmethod
    def rule(self, layout: Layout, number: Callable[[int], Tensor]) -> Rule:
        """The window's inequality over ``layout``.

        Args:
            layout: the sequence.
            number: turns each whole number of the rule into a 0-d tensor. FlexAttention compiles Python numbers in,
                and every radius and size would be a new graph.

        Raises:
            ValueError: the window makes no sense on this grid.
        """

    @abstractmethod
    def touches(self, layout: Layout, query: Box, key: Box) -> Tensor:
        """Whether any pair of a query of one box and a key of the other may be allowed: bool, broadcast."""

    @abstractmethod
    def covers(self, layout: Layout, query: Box, key: Box) -> Tensor:
        """Whether every such pair is allowed: bool, broadcast. Boxes are not empty."""

    def __and__(self, other: Window) -> Window:
        """A key is seen if both windows allow it."""
        from flexclear.masks.compose import Both

        return Both(self, other)

    def __or__(self, other: Window) -> Window:
        """A key is seen if either window allows it."""
        from flexclear.masks.compose import Either

        return Either(self, other)

    def image_pairs(self, layout: Layout) -> int | None:
        """Number of allowed image pairs where a formula gives it, else None; they are then counted."""
        return None

    def pooled_grid(self, layout: Layout) -> tuple[int, int]:
        """Rows and columns of pooled keys that follow the sequence's own keys; none by default."""
        return 0, 0

    def key_len(self, layout: Layout) -> int:
        """Number of keys: the sequence, and pooled keys behind it."""
        rows, columns = self.pooled_grid(layout)
        return layout.seq_len + rows * columns

    def key_coordinates(self, layout: Layout) -> Tensor:
        """``layout.packed_coordinates()`` with POOLED for each pooled key behind it: int32 ``[key_len]``."""
        packed = layout.packed_coordinates()
        return torch.cat([packed, packed.new_full((self.key_len(layout) - len(packed),), POOLED)])

    @independent
    def mask_mod(self, layout: Layout, device: torch.device | str = "cpu", packed: bool = True) -> MaskMod:
        """The window over ``layout`` as a FlexAttention ``mask_mod``; ``packed``: see ``mask_mod_over``.

        The function carries its window (``mask_mod.window``) and is named after it.
        """
        return self.mask_mod_over(layout, self.key_coordinates(layout), device, packed)

    @independent
    def mask_mod_over(
        self, layout: Layout, keys: Tensor, device: torch.device | str = "cpu", packed: bool = True
    ) -> MaskMod:
        """The same where query ``i`` is the token of key ``i``, and further keys may follow the queries.

        Args:
            layout: what the window's rule is bound to.
            keys: packed coordinates of the keys, TEXT and POOLED among them, int32 ``[keys]``.
            device: where.
            packed: look both coordinates up at once, and take them apart with a shift. False: in two tables, for
                kernels in a language without shifts (CuTe DSL: FlashAttention 4).
        """
        place = (_packed_places if packed else _separate_places)(keys, device)
        inside = self.rule(layout, lambda number: torch.tensor(number, dtype=torch.int32, device=device))
        has_pooled = bool((keys == POOLED).any())

        def mask_mod(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            (q, y_q, x_q), (kv, y_kv, x_kv) = place(q_idx), place(kv_idx)
            allowed = inside(y_q, x_q, y_kv, x_kv)
            if has_pooled:
                # Image queries see all pooled keys; text queries do not, they see every token already.
                return torch.where(kv == POOLED, q >= 0, allowed | (q < 0) | (kv < 0))
            return allowed | (q < 0) | (kv < 0)

        mask_mod.__name__ = self.name
        mask_mod.window = self  # type: ignore[attr-defined]
        return mask_mod


Places = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""What a position holds: negative (TEXT, POOLED) for other than image tokens, row, column."""


def _packed_places(keys: Tensor, device: torch.device | str) -> Places:
    table = coordinate_table(keys, device)

    def place(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = table[index]
        return found, found >> 16, found & 0xFFFF

    return place


def _separate_places(keys: Tensor, device: torch.device | str) -> Places:
    rows = coordinate_table(torch.where(keys < 0, keys, keys >> 16), device)
    columns = coordinate_table(keys & 0xFFFF, device)

    def place(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row = rows[index]
        return row, row, columns[index]

    return place


def coordinate_table(packed: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Packed coordinates padded to 2^16, 2^20 or 2^24 entries, int32, for a ``mask_mod`` to capture.

    Why a table: one gather per query and key is all that a partial block then pays for any token order. Why the fixed
    lengths, marked static: everything else about the sequence can be dynamic, so that one graph serves all resolutions
    of a bucket (65,536 tokens is 4096 x 4096 px); and a *dynamic* table does not even compile on CPU, where Inductor's
    C++ template replaces the name ``ks1`` inside ``ks19`` (torch 2.13).
    """
    bucket = next(1 << bits for bits in (16, 20, 24, 30) if len(packed) <= 1 << bits)
    table = torch.full((bucket,), TEXT, dtype=torch.int32, device=device)
    table[: len(packed)] = packed.to(device)
    torch._dynamo.mark_static(table)
    return table


def captured_tensors(mask_mod: object) -> list[Tensor]:
    """Tensors that a ``mask_mod`` captures, those of functions inside it included."""
    found: list[Tensor] = []
    for cell in getattr(mask_mod, "__closure__", None) or ():
        content = cell.cell_contents
        found += [content] if isinstance(content, Tensor) else captured_tensors(content)
    return found


def is_plain(window: Window | MaskMod) -> TypeGuard[MaskMod]:
    """Whether ``window`` is a ``mask_mod`` that carries no window: somebody's own function."""
    return callable(window) and not isinstance(window, Window) and not hasattr(window, "window")


def as_window(window: Window | MaskMod) -> Window:
    """The window itself, or the one that a ``mask_mod`` of this package carries.

    Raises:
        TypeError: neither.
    """
    found = window if isinstance(window, Window) else getattr(window, "window", None)
    if isinstance(found, Window):
        return found
    raise TypeError(
        "window must be a window of flexclear.masks such as Disc(16), or a FlexAttention mask_mod (batch, head, q_idx, "
        f"kv_idx) -> bool; got {window!r}"
    )
