"""Exact reading of token grids from position ids, even if their dtype has rounded them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

Grids = tuple[tuple[int, int], ...]
"""(height, width) in tokens of the image, then of each reference image."""

Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Axes:
    """The meaning of the columns of a model's position ids. Column 1 holds the image's rows, column 2 its columns.

    Attributes:
        picture: the column that distinguishes the image from its reference images.
        image: value of that column for the image itself; None if the ids are only those of reference images.
        step: difference between neighbouring rows or columns.
        anywhere: whether rows and columns may begin at numbers other than 0, the same for all grids.
    """

    picture: int = 0
    image: int | None = 0
    step: float = 1.0
    anywhere: bool = False

    def __str__(self) -> str:
        return "(index, y, x)" if self.picture == 0 else f"({', '.join(['t', 'y', 'x', 'index'][: self.picture + 1])})"


AXES = Axes()
"""The axes of FLUX.1: (index, y, x); the index is 0 for the image and another number for each reference image."""


def exact_ids(ids: Tensor, rows: Tensor, columns: Tensor, axes: Axes = AXES, origin: Tensor | None = None) -> Tensor:
    """Position ids with exact rows and columns: ``[N, axes]``, float32; the other axes are unchanged.

    Args:
        ids: ids in the same token order, ``[N, axes]``.
        rows, columns: coordinates of the tokens, ``[N]``.
        axes: meaning of the ids' columns.
        origin: ids of the first token in raster order, ``[axes]``, if rows and columns may begin anywhere.
    """
    exact = ids.to(torch.float32, copy=True)
    for axis, places in ((1, rows), (2, columns)):
        places = places if axes.step == 1 else places * axes.step
        exact[:, axis] = places + origin[axis] if axes.anywhere and origin is not None else places
    return exact


def read_grids(ids: Tensor, axes: Axes = AXES, start: int = 0) -> Grids:
    """Grids, in tokens, of raster-ordered ids ``[N, axes]`` or ``[B, N, axes]``, by default with columns (index, y, x,
    zeros ...).

    A new grid begins where the index changes. Low-precision ids are read exactly: bfloat16 rounds whole numbers above 256,
    so that only 385 of 512 rows have distinct values, but row 1 still differs from row 0. The first change of y gives the
    width and the count gives the height; then every id must equal the grid's id rounded to the same dtype.

    Args:
        ids: the ids.
        axes: meaning of the ids' columns.
        start: index of the first id that belongs to an image.

    Raises:
        ValueError: the ids are not full raster grids that start at row and column 0 (or where the image does), are not finite,
            are too large for their dtype, or have other axes.
    """
    given = f"image ids of shape {tuple(ids.shape)}, {ids.dtype}"
    finite = torch.isfinite(ids)
    if not bool(finite.all()):
        place = tuple(torch.nonzero(~finite)[0].tolist())
        raise ValueError(f"{given} hold {ids[place].item()} at {list(place)}; positions must be finite")
    if ids.ndim == 3 and len(ids) and bool((ids == ids[:1]).all()):
        ids = ids[0]
    if ids.ndim != 2 or ids.shape[1] < max(3, axes.picture + 1) or len(ids) <= start:
        behind = f" behind {start} of text" if start else ""
        raise ValueError(
            f"image ids must have shape [tokens, {max(3, axes.picture + 1)}] with columns {axes}, the same for the whole "
            f"batch, got {given}{behind}"
        )
    ids = ids[start:]
    index = ids[:, axes.picture]
    if axes.image is not None and float(index[0]) != axes.image:
        raise ValueError(
            f"{given} begin with an image of index {index[0].item():g}; the image itself has index {axes.image}"
        )
    _check_precision(ids, axes, given)
    changes = torch.nonzero(index[1:] != index[:-1])[:, 0] + 1
    edges = [0, *changes.tolist(), len(ids)]
    origin = ids[0] if axes.anywhere else torch.zeros_like(ids[0])
    grids = tuple(
        _read_one(
            ids[first:last],
            axes,
            origin,
            f"grid {number} of {len(edges) - 1} in {given}" if len(edges) > 2 else given,
        )
        for number, (first, last) in enumerate(itertools.pairwise(edges))
    )
    _check_axes(index, edges[:-1], grids, axes, given)
    return grids


def _check_precision(ids: Tensor, axes: Axes, given: str) -> None:
    """Raise if ids do not begin at 0 and their dtype cannot tell neighbours apart. If they begin at 0, the first row and column
    are exact, and the others follow from them.

    Raises:
        ValueError: it cannot.
    """
    if not axes.anywhere or not ids.is_floating_point():
        return
    start, largest = float(ids[0, 1:3].abs().max()), float(ids[:, 1:3].abs().max())
    if start and largest * torch.finfo(ids.dtype).eps > 2 * axes.step:
        raise ValueError(
            f"{given} begin at row {ids[0, 1].item():g} and column {ids[0, 2].item():g} and go on to {largest:g}, where "
            f"{ids.dtype} does not tell neighbouring tokens apart. Pass them in float32"
        )


def _check_axes(index: Tensor, starts: Sequence[int], grids: Grids, axes: Axes, given: str) -> None:
    """Raise if these "grids" are the rows of one image, whose axes are (y, x, index) or (y, index, x).

    Raises:
        ValueError: they are.
    """
    lines = len(grids) > 1 and len(set(grids)) == 1 and 1 in grids[0]
    if lines and axes.image is not None and index[list(starts)].tolist() == [axes.image + n for n in range(len(grids))]:
        raise ValueError(
            f"{given} read as {axes} are {len(grids)} images of {grids[0][0]} x {grids[0][1]} tokens, numbered one "
            f"after the other: rows of one image of {len(grids)} x {max(grids[0])} whose axes are in another order? The "
            f"columns must be {axes}, with the same index for all tokens of an image"
        )


def _read_one(ids: Tensor, axes: Axes, origin: Tensor, given: str) -> tuple[int, int]:
    rows = ids[:, 1]
    new_row = rows != rows[0]
    width = int(new_row.to(torch.uint8).argmax()) if bool(new_row.any()) else len(ids)
    height = len(ids) // width
    if height * width == len(ids):
        place = torch.arange(len(ids), device=ids.device)
        rows, columns = (axis.to(torch.float32) * axes.step for axis in (place // width, place % width))
        expected = torch.zeros(len(ids), ids.shape[1], dtype=torch.float32, device=ids.device)
        expected[:, 1], expected[:, 2] = origin[1].float() + rows, origin[2].float() + columns
        expected[:, axes.picture] = ids[0, axes.picture].float()
        if torch.equal(ids, expected.to(ids.dtype)):
            return height, width
    begin = (
        f"row {origin[1].item():g} and column {origin[2].item():g}, where the image does"
        if axes.anywhere
        else "row 0 and column 0"
    )
    steps = "" if axes.step == 1 else f" in steps of {axes.step:g}"
    raise ValueError(
        f"{given} are not full grids of height x width tokens in raster order that start at {begin}{steps}: they start "
        f"at row {ids[0, 1].item():g} and column {ids[0, 2].item():g}, and the first row has {width} of {len(ids)} tokens. "
        "Windows need whole images"
    )


@functools.lru_cache(maxsize=64)
def reading(axes: Axes, start: int = 0) -> Callable[[Tensor], Grids]:
    """``read_grids`` with these arguments. Equal arguments give the same function, by which ``GridReader`` remembers results."""
    return functools.partial(read_grids, axes=axes, start=start)


def _all(mask: Tensor) -> bool:
    return bool(mask.all())


class _Memory(Generic[Fact]):
    """What was read from a tensor, and a check that it was not written to since, without reading it from its device again.

    Tensors have a version that every in-place write increments, except those made under ``torch.inference_mode``. On CPU the
    contents of these are compared. On a GPU that would mean waiting for the device, so the device itself compares them with a
    copy, and ``GridReader.guarded`` makes the call's output depend on the result.
    """

    def __init__(self, tensor: Tensor, read: Callable[[Tensor], Fact]) -> None:
        self.read, self.fact = read, read(tensor)
        self.version = self.written = None
        if not tensor.is_inference():
            self.version = tensor._version
            return
        with torch.inference_mode(False):  # these tensors outlive the call and are written to
            self.copy = tensor.clone()
            if not _is_in_host_memory(tensor):
                self.written = torch.zeros((), dtype=torch.bool, device=tensor.device)
                self.arrived = torch.zeros((), dtype=torch.bool, pin_memory=tensor.is_cuda)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the fact still holds, as far as the host knows.

        Raises:
            RuntimeError: the device has reported that the fact did not hold in an earlier call.
        """
        if self.version is not None:
            return not tensor.is_inference() and tensor._version == self.version
        if self.written is None:
            return np.array_equal(_bytes(tensor), _bytes(self.copy))
        if self.arrived.numpy():
            raise RuntimeError(
                f"the position ids or text mask of shape {tuple(tensor.shape)}, {tensor.dtype}, were written to in place "
                "after an earlier call of this model, which torch.inference_mode leaves no trace of; the output of the calls "
                "since is NaN. Pass a new tensor for other positions, or make this one outside inference mode"
            )
        self.written.logical_or_((tensor != self.copy).any())
        self.arrived.copy_(self.written, non_blocking=True)
        return True


def _is_in_host_memory(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _bytes(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor on CPU, not copied unless it is strided."""
    return tensor.contiguous().view(torch.uint8).numpy()


class GridReader:
    """``read_grids`` once per tensor: on a GPU each reading synchronizes, and ids live for a whole generation."""

    def __init__(self) -> None:
        self._seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __call__(self, ids: Tensor, axes: Axes = AXES, start: int = 0) -> Grids:
        """The grids of ``ids``, see ``read_grids``; read again if the tensor was written to since."""
        return self.once(ids, reading(axes, start))

    def all_true(self, mask: Tensor) -> bool:
        """Whether every element of a bool tensor is True, also read once per tensor."""
        return self.once(mask, _all)

    def once(self, tensor: Tensor, read: Callable[[Tensor], Fact]) -> Fact:
        """``read(tensor)``, remembered until the tensor is written to. ``read`` must be a persistent function: one of a module,
        or from ``reading``.

        Raises:
            RuntimeError: a tensor made in inference mode, on a GPU, was written to in place after it had been read.
        """
        known = self._seen.get(tensor)
        if known is not None and known.read is read:
            try:
                if known.holds(tensor):
                    return known.fact
            except RuntimeError:
                del self._seen[tensor]
                raise
        self._seen[tensor] = known = _Memory(tensor, read)
        return known.fact

    def guarded(self, kwargs: dict[str, Any], name: str = "hidden_states") -> dict[str, Any]:
        """A call's arguments, in which the tensor ``name``, or each in that list, is NaN if the device finds that a remembered
        tensor was written to in place: without a synchronization no error can be raised in time, and a window over another
        grid would be silently wrong."""
        for tensor in [value for value in tree_leaves(kwargs) if isinstance(value, Tensor)]:
            known = self._seen.get(tensor)
            if known is not None and known.written is not None:
                given = kwargs[name]
                tokens = [given] if isinstance(given, Tensor) else given
                written = known.written.to(tokens[0].device, non_blocking=True)
                tokens = [each.masked_fill(written, float("nan")) for each in tokens]
                kwargs = {**kwargs, name: tokens[0] if isinstance(given, Tensor) else tokens}
        return kwargs

    def __deepcopy__(self, memo: dict[int, object]) -> GridReader:
        return GridReader()

    def __reduce__(self) -> tuple[type[GridReader], tuple[()]]:
        return GridReader, ()
