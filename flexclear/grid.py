"""Reading the token grid off position ids, exactly, whatever their dtype has rounded away."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def grid_ids(rows: Tensor, columns: Tensor) -> Tensor:
    """FLUX position ids ``(0, y, x)`` of tokens: ``[N] , [N] -> [N, 3]``, dtype of the rows."""
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1)


def read_grid(ids: Tensor) -> tuple[int, int]:
    """Height and width in tokens of raster-ordered FLUX ids ``[N, 3]`` or ``[1, N, 3]``, columns ``(index, y, x)``.

    Low-precision ids are read exactly: bfloat16 rounds whole numbers above 256, so that of 512 rows 385 distinct
    values remain, but row 1 still differs from row 0. The first change of y gives the width and the count gives the
    height; then every id must equal the grid's id rounded to the same dtype.

    Raises:
        ValueError: the ids are no full raster grid that starts at (0, 0, 0).
    """
    given = f"image ids of shape {tuple(ids.shape)}, {ids.dtype}"
    if ids.ndim == 3 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 2 or ids.shape[1] != 3 or len(ids) == 0:
        raise ValueError(f"image ids must have shape [tokens, 3] with columns (index, y, x), got {given}")
    rows = ids[:, 1]
    new_row = rows != rows[0]
    width = int(new_row.to(torch.uint8).argmax()) if bool(new_row.any()) else len(ids)
    height = len(ids) // width
    if height * width == len(ids):
        place = torch.arange(len(ids), device=ids.device)
        expected = grid_ids(place // width, place % width).to(ids.dtype)
        if torch.equal(ids, expected):
            return height, width
    raise ValueError(
        f"{given} are not one full grid of height x width tokens in raster order that starts at (0, 0, 0): the first "
        f"row has {width} of {len(ids)} tokens. Windows need one whole picture per sequence"
    )


class GridReader:
    """``read_grid`` once per tensor: on a GPU each reading is a synchronisation, and ids live for a whole generation."""

    def __init__(self) -> None:
        self._seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __call__(self, ids: Tensor) -> tuple[int, int]:
        # Inference tensors keep no version and cannot be changed outside inference mode.
        version = None if ids.is_inference() else ids._version
        known = self._seen.get(ids)
        if known is not None and known[0] == version and version is not None:
            return known[1]
        grid = read_grid(ids)
        self._seen[ids] = (version, grid)
        return grid

    def __deepcopy__(self, memo: dict[int, object]) -> GridReader:
        return GridReader()

    def __reduce__(self) -> tuple[type[GridReader], tuple[()]]:
        return GridReader, ()
