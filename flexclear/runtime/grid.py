"""Reading the token grids off position ids, exactly, whatever their dtype has rounded away."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Grids = tuple[tuple[int, int], ...]
"""(height, width) in tokens of the image, then of each reference picture."""

Fact = TypeVar("Fact")


def exact_ids(ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Position ids with exact rows and columns: ``[N, axes]``, float32; the other axes as they were.

    Args:
        ids: ids in the same token order, ``[N, axes]`` with columns (index, y, x, ...).
        rows, columns: coordinates of the tokens, ``[N]``.
    """
    exact = ids.to(torch.float32, copy=True)
    exact[:, 1], exact[:, 2] = rows, columns
    return exact


def read_grids(ids: Tensor) -> Grids:
    """Grids, in tokens, of raster-ordered ids ``[N, axes]`` or ``[B, N, axes]`` with columns (index, y, x, zeros ...).

    A new grid begins where the index changes: 0 for the image, other numbers for reference pictures. Low-precision ids
    are read exactly: bfloat16 rounds whole numbers above 256, so that of 512 rows 385 distinct values remain, but row 1
    still differs from row 0. The first change of y gives the width and the count gives the height; then every id must
    equal the grid's id rounded to the same dtype.

    Raises:
        ValueError: the ids are no full raster grids that start at row and column 0, not finite, or their axes are others.
    """
    given = f"image ids of shape {tuple(ids.shape)}, {ids.dtype}"
    finite = torch.isfinite(ids)
    if not bool(finite.all()):
        place = tuple(torch.nonzero(~finite)[0].tolist())
        raise ValueError(f"{given} hold {ids[place].item()} at {list(place)}; positions must be finite")
    if ids.ndim == 3 and len(ids) and bool((ids == ids[:1]).all()):
        ids = ids[0]
    if ids.ndim != 2 or ids.shape[1] < 3 or len(ids) == 0:
        raise ValueError(
            f"image ids must have shape [tokens, 3] with columns (index, y, x), the same for the whole batch, got {given}"
        )
    if float(ids[0, 0]) != 0:
        raise ValueError(f"{given} begin with a picture of index {ids[0, 0].item():g}; the image itself has index 0")
    changes = torch.nonzero(ids[1:, 0] != ids[:-1, 0])[:, 0] + 1
    edges = [0, *changes.tolist(), len(ids)]
    grids = tuple(
        _read_one(ids[start:end], f"grid {number} of {len(edges) - 1} in {given}" if len(edges) > 2 else given)
        for number, (start, end) in enumerate(itertools.pairwise(edges))
    )
    _check_axes(ids, edges[:-1], grids, given)
    return grids


def _check_axes(ids: Tensor, starts: Sequence[int], grids: Grids, given: str) -> None:
    """Raise if these are the rows of one image, whose axes are (y, x, index) or (y, index, x).

    Raises:
        ValueError: they are.
    """
    lines = len(grids) > 1 and len(set(grids)) == 1 and 1 in grids[0]
    if lines and ids[list(starts), 0].tolist() == list(range(len(grids))):
        raise ValueError(
            f"{given} read as (index, y, x) are {len(grids)} pictures of {grids[0][0]} x {grids[0][1]} tokens, numbered one "
            f"after the other: rows of one image of {len(grids)} x {max(grids[0])} whose axes are in another order? The "
            "columns must be (index, y, x), with the same index for all tokens of a picture"
        )


def _read_one(ids: Tensor, given: str) -> tuple[int, int]:
    rows = ids[:, 1]
    new_row = rows != rows[0]
    width = int(new_row.to(torch.uint8).argmax()) if bool(new_row.any()) else len(ids)
    height = len(ids) // width
    if height * width == len(ids):
        place = torch.arange(len(ids), device=ids.device)
        expected = torch.zeros(len(ids), ids.shape[1], dtype=torch.float32, device=ids.device)
        expected[:, 0], expected[:, 1], expected[:, 2] = ids[0, 0].float(), place // width, place % width
        if torch.equal(ids, expected.to(ids.dtype)):
            return height, width
    raise ValueError(
        f"{given} are not full grids of height x width tokens in raster order that start at row 0 and column 0: they start "
        f"at row {ids[0, 1].item():g} and column {ids[0, 2].item():g}, and the first row has {width} of {len(ids)} tokens. "
        "Windows need whole pictures"
    )


def _all(mask: Tensor) -> bool:
    return bool(mask.all())


class _Memory(Generic[Fact]):
    """What was read off a tensor, and how to tell without a read on its device whether it has been written to since.

    Tensors have a version that every write in place raises; those made under ``torch.inference_mode`` have none. On CPU
    their contents are compared. On a GPU looking at them would wait for the device, so that the device compares them
    itself with a copy, into a flag that ``GridReader.guarded`` lets the call's output depend on.
    """

    def __init__(self, tensor: Tensor, read: Callable[[Tensor], Fact]) -> None:
        self.read, self.fact = read, read(tensor)
        self.version = self.written = None
        if not tensor.is_inference():
            self.version = tensor._version
            return
        with torch.inference_mode(False):  # these outlive the call and are written to
            self.copy = tensor.clone()
            if not _is_in_host_memory(tensor):
                self.written = torch.zeros((), dtype=torch.bool, device=tensor.device)
                self.arrived = torch.zeros((), dtype=torch.bool, pin_memory=tensor.is_cuda)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the fact still holds, as far as the host knows.

        Raises:
            RuntimeError: word has come from the device that it did not hold in an earlier call.
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
    """The memory of a tensor on CPU; not a copy, unless it is strided."""
    return tensor.contiguous().view(torch.uint8).numpy()


class GridReader:
    """``read_grids`` once per tensor: on a GPU each reading is a synchronisation, and ids live for a whole generation."""

    def __init__(self) -> None:
        self._seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __call__(self, ids: Tensor) -> Grids:
        """The grids of ``ids``; read again where the tensor was written to since."""
        return self.once(ids, read_grids)

    def all_true(self, mask: Tensor) -> bool:
        """Whether every element of a bool tensor is True, read once per tensor likewise."""
        return self.once(mask, _all)

    def once(self, tensor: Tensor, read: Callable[[Tensor], Fact]) -> Fact:
        """``read(tensor)``, from memory where the tensor was not written to since; ``read`` is a function of a module.

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

    def guarded(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments, with ``hidden_states`` NaN if the device finds that any of them was written to in place since
        it was read: without a synchronisation nobody can raise in time, and a window of another grid would be wrong
        without a word."""
        for tensor in [value for value in kwargs.values() if isinstance(value, Tensor)]:
            known = self._seen.get(tensor)
            if known is not None and known.written is not None:
                tokens = kwargs["hidden_states"]
                written = known.written.to(tokens.device, non_blocking=True)
                kwargs = {**kwargs, "hidden_states": tokens.masked_fill(written, float("nan"))}
        return kwargs

    def __deepcopy__(self, memo: dict[int, object]) -> GridReader:
        return GridReader()

    def __reduce__(self) -> tuple[type[GridReader], tuple[()]]:
        return GridReader, ()
