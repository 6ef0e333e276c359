"""Where every token of a joint text-image sequence sits: sizes, order, coordinates.

A diffusion transformer attends over ``text_len`` text tokens and ``height * width`` image tokens, a video model over the image
tokens of several frames. ``Layout`` is the hashable description of that sequence; everything else in this package is a pure
function of it.

This package uses three numberings and names them consistently:

- *raster*: image tokens row by row, ``y * width + x``, frame after frame. Pipelines pass them in and expect them back this way.
- *image order*: image tokens in the layout's own order (``order=``).
- *sequence position*: image order with the text in front (``text_first=True``) or behind. This is what attention sees.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexclear.masks.checks import check_int
from flexclear.masks.defaults import independent
from flexclear.masks.orders import (
    BAND,
    ORDERS,
    Bands,
    ClipBands,
    Order,
    bands_of,
    clip_bands,
    place_in_walk,
    walk_of_clip,
)
from flexclear.masks.places import CLIPS, IMAGES, TEXT, Coordinates, Packing

MAX_SIDE = 16384
"""Largest height or width in tokens. Keeps a squared distance within 32 bits."""

MAX_CLIP_SIDE = 1024
"""Largest number of frames of a clip, and its largest height or width in tokens: a place then fits in 30 bits."""


@dataclass(frozen=True)
class Layout:
    """A joint sequence of text and image tokens.

    >>> layout = Layout(height=64, width=64)         # 1024 x 1024 px of FLUX.1: one token covers 16 x 16 px
    >>> layout.image_len, layout.seq_len
    (4096, 4608)
    >>> Layout(height=45, width=80, frames=21, text_len=0).seq_len       # 81 frames of 720 x 1280 px of Wan 2.1
    75600

    Args:
        height: rows of image tokens, 1 to 16384.
        width: columns of image tokens, 1 to 16384.
        text_len: text tokens, 0 or more.
        text_first: whether the text precedes the image (FLUX.1) or follows it (SD3).
        order: ``"tiled"`` (compact runs, see ``flexclear.masks.orders``), ``"raster"`` (row by row, frame after frame), or, with
            several frames, the size (frames, rows) of the bands in which they are walked.
        references: (height, width) of further grids whose tokens follow the image's, such as the input images of an
            editing model. Tokens of all grids share one plane, each at its own row and column, so a window
            around a place is the same window in each grid. Only with one frame.
        frames: frames of ``height * width`` tokens each, 1 to 1024, as the model sees them: after the autoencoder and the
            patches have merged several into one. An image is one frame. With several, height and width are 1 to 1024.

    >>> Layout(64, 64, references=((48, 85),)).grids
    ((64, 64), (48, 85))

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is out of range or the order is unknown.
    """

    height: int
    width: int
    text_len: int = 512
    text_first: bool = True
    order: Order = "tiled"
    references: tuple[tuple[int, int], ...] = ()
    frames: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.references, tuple) or any(
            not isinstance(grid, tuple) or len(grid) != 2 for grid in self.references
        ):
            raise TypeError(f"Layout references must be a tuple of (height, width) tuples, got {self.references!r}")
        check_int("Layout frames", self.frames, 1, MAX_CLIP_SIDE, "after the autoencoder and the patches")
        most = MAX_SIDE if self.frames == 1 else MAX_CLIP_SIDE
        unit = "in tokens" if self.frames == 1 else "in tokens, with several frames"
        for number, (height, width) in enumerate(self.grids):
            which = f"Layout reference {number} " if number else "Layout "
            check_int(f"{which}height", height, 1, most, unit)
            check_int(f"{which}width", width, 1, most, unit)
        if self.references and self.frames > 1:
            raise ValueError(
                f"Layout references are further grids beside an image, and this layout has {self.frames} frames. A "
                "reference that is a frame of its own counts among these"
            )
        check_int("Layout text_len", self.text_len, 0, None, "in tokens")
        if not isinstance(self.text_first, bool):
            raise TypeError(f"Layout text_first must be True or False, got {self.text_first!r}")
        if not isinstance(self.order, str):
            self._check_bands()
        elif self.order not in ORDERS:
            raise ValueError(f"Layout order must be one of {sorted(ORDERS)}, got {self.order!r}")

    def _check_bands(self) -> None:
        """Raise if ``order`` is not a pair (frames, rows)."""
        if not isinstance(self.order, tuple) or len(self.order) != 2:
            raise TypeError(
                f"Layout order must be one of {sorted(ORDERS)} or a pair (frames, rows), got {self.order!r}"
            )
        if self.frames == 1:
            raise ValueError(f"bands of (frames, rows) need several frames, got order={self.order!r} with one")
        for name, size in zip(("frames", "rows"), self.order, strict=True):
            check_int(f"{name} of a band", size, 1, MAX_CLIP_SIDE)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every grid, the image's own first."""
        return ((self.height, self.width), *self.references)

    @property
    def image_len(self) -> int:
        """Number of image tokens in all grids."""
        return self.frames * sum(height * width for height, width in self.grids)

    @property
    def seq_len(self) -> int:
        """Number of tokens, text and image."""
        return self.text_len + self.image_len

    @property
    def image_start(self) -> int:
        """Sequence position of the first image token."""
        return self.text_len if self.text_first else 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the image's own grid."""
        return self.frames, self.height, self.width

    @property
    def packing(self) -> Packing:
        """How the coordinates of a token in this layout are packed into one number."""
        return IMAGES if self.frames == 1 else CLIPS

    def bands(self) -> Bands:
        """How the tiled order walks the image's own grid."""
        return bands_of(self.height, self.width, self.image_start)

    def clip_bands(self) -> ClipBands:
        """How several frames are walked in bands."""
        return clip_bands(*self.shape, self.order)

    @property
    def is_full(self) -> bool:
        """Whether there is a token at every place of the grid."""
        return True

    @property
    def is_packed(self) -> bool:
        """Whether each token has its own position, see ``from_positions``."""
        return False

    @classmethod
    def from_positions(cls, positions: Tensor, local: Tensor) -> PackedLayout:
        """The layout of a packed sequence, in which each token comes with its own position.

        >>> positions = torch.tensor([[0, 0, 0], [0, 4, 7], [0, 4, 8], [0, 5, 7], [9, 9, 9]])
        >>> packed = Layout.from_positions(positions, torch.tensor([False, True, True, True, False]))
        >>> packed.shape, packed.image_len, packed.text_len, packed.is_full
        ((1, 2, 2), 3, 2, False)

        Args:
            positions: frame, row and column of every token, or row and column, of any integer type, ``[N, 3]`` or ``[N, 2]``.
                They may begin at any number.
            local: which tokens lie on the grid, bool ``[N]``. The others see and are seen by all tokens, and their positions
                are ignored.

        Raises:
            TypeError: ``positions`` are not integers, or ``local`` is not bool.
            ValueError: shapes do not match, no token is on the grid, two tokens are at the same place, or the grid is larger
                than a layout may be.
        """
        return _packed_layout(positions.detach().cpu(), local.detach().cpu())

    def with_order(self, order: Order) -> Layout:
        """The same tokens in another order."""
        return replace(self, order=order)

    @independent
    def permutation(self) -> Tensor:
        """Raster index of the image token at each place of the image order: int64 ``[image_len]``.

        ``tokens[:, layout.permutation()]`` brings raster tokens ``[B, image_len, C]`` into image order. Grids stay one
        after the other; each is ordered by itself.
        """
        return torch.cat([walk + start for walk, start in self._walks()])

    def _walks(self) -> Iterator[tuple[Tensor, int]]:
        """For each grid: its own raster indices in image order, and its start among the image tokens."""
        if self.frames > 1:
            yield walk_of_clip(*self.shape, self.order), 0
            return
        start = 0
        for height, width in self.grids:
            yield ORDERS[str(self.order)](height, width, self.image_start + start), start
            start += height * width

    @independent
    def inverse_permutation(self) -> Tensor:
        """Place in the image order of each raster token: int64 ``[image_len]``. The inverse of ``permutation``."""
        forward = self.permutation()
        inverse = torch.empty_like(forward)
        inverse[forward] = torch.arange(len(forward))
        return inverse

    @independent
    def coordinates(self) -> Coordinates:
        """Frame, row and column of the token at each place of the image order, in its own grid: three int64 tensors
        ``[image_len]``."""
        places = []
        for (walk, _), (height, width) in zip(self._walks(), self.grids, strict=True):
            places.append((walk // (height * width), walk // width % height, walk % width))
        frame, row, column = (torch.cat(axis) for axis in zip(*places, strict=True))
        return frame, row, column

    @independent
    def whole_permutation(self) -> Tensor:
        """Index of the token at each sequence position in a sequence whose image is in raster order: int64 ``[seq_len]``."""
        text, image = torch.arange(self.text_len), self.permutation()
        return torch.cat([text, image + self.text_len] if self.text_first else [image, text + self.image_len])

    def packed_coordinates(self) -> Tensor:
        """Coordinates at each sequence position as one int32 (``packing``), ``y << 16 | x`` for images; -1 marks text.
        ``[seq_len]``."""
        return _packed_coordinates(self)


@functools.lru_cache(maxsize=16)
@independent
def _packed_coordinates(layout: Layout) -> Tensor:
    places = layout.packing.pack(*layout.coordinates())
    packed = torch.full((layout.seq_len,), -1, dtype=torch.int32)
    packed[layout.image_start : layout.image_start + layout.image_len] = places.to(torch.int32)
    return packed


@dataclass(frozen=True)
class PackedLayout(Layout):
    """A sequence whose tokens come with their own positions (``Layout.from_positions``). In sequence order, tokens on the grid
    come first, walked in bands, and the others follow as ``text_len`` text tokens. "Raster" is the order in which the tokens
    were given.

    Attributes:
        places: packed coordinates of each token in the order given (``packing``), one int32 each; -1 for those off the grid.
    """

    places: bytes = b""

    def _given(self) -> Tensor:
        return torch.frombuffer(bytearray(self.places), dtype=torch.int32)

    @property
    def image_len(self) -> int:
        return len(self.places) // 4 - self.text_len

    @property
    def is_packed(self) -> bool:
        return True

    @property
    def is_full(self) -> bool:
        return self.image_len == self.frames * self.height * self.width

    @independent
    def permutation(self) -> Tensor:
        given = self._given()
        frame, row, column = (axis.long() for axis in self.packing.unpack(given[given >= 0]))
        if self.order == "raster":
            return torch.arange(len(frame))
        bands = clip_bands(*self.shape, (1, BAND) if self.frames == 1 else self.order)
        return torch.argsort(place_in_walk(bands, frame, row, column))

    @independent
    def whole_permutation(self) -> Tensor:
        given = self._given()
        local, others = (torch.nonzero(some)[:, 0] for some in (given >= 0, given < 0))
        return torch.cat([local[self.permutation()], others])

    @independent
    def coordinates(self) -> Coordinates:
        given = self._given()
        places = given[given >= 0][self.permutation()]
        frame, row, column = (axis.long() for axis in self.packing.unpack(places))
        return frame, row, column


@independent
def _packed_layout(positions: Tensor, local: Tensor) -> PackedLayout:
    shape = tuple(positions.shape)
    if positions.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
        raise TypeError(f"positions must be whole numbers, got {positions.dtype}; round them if they are")
    if local.dtype != torch.bool:
        raise TypeError(f"local must be bool, got {local.dtype}")
    if len(shape) != 2 or shape[1] not in (2, 3) or tuple(local.shape) != shape[:1]:
        raise ValueError(
            f"positions must be [N, 3] (frame, row, column) or [N, 2] (row, column) and local [N], got {list(shape)} and "
            f"{list(local.shape)}"
        )
    if not bool(local.any()):
        raise ValueError(f"none of {shape[0]} packed tokens lies on the grid: local is False everywhere")
    on_grid = positions[local].long()
    if shape[1] == 2:
        on_grid = torch.cat([torch.zeros_like(on_grid[:, :1]), on_grid], dim=1)
    least = on_grid.amin(0)
    frames, height, width = (on_grid.amax(0) - least + 1).tolist()
    layout = Layout(height, width, int((~local).sum()), False, frames=frames)  # checks the sides
    _, counts = (found := torch.unique(on_grid, dim=0, return_counts=True))
    if bool((counts > 1).any()):
        place = found[0][counts > 1][0].tolist()
        raise ValueError(
            f"packed positions repeat: {int(counts[counts > 1][0])} tokens are at {tuple(place[-shape[1] :])}. Tokens of several "
            "images or clips need frames of their own"
        )
    places = torch.full((shape[0],), TEXT, dtype=torch.int32)
    places[local] = layout.packing.pack(*(on_grid - least).to(torch.int32).unbind(1))
    return PackedLayout(
        height, width, layout.text_len, False, frames=frames, places=places.contiguous().numpy().tobytes()
    )
