"""What NATTEN's own ``na2d`` and ``na3d`` let queries see, for ``tests/masks/test_natten.py``.

    pip install --no-deps --no-build-isolation natten==0.21.7
    python -m bench.peers.natten_masks                        # writes tests/masks/natten.json

Scores are all equal and the values are one-hot, so that a query's output is not zero at its keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

CASES: tuple[dict[str, Any], ...] = (
    {"shape": (7, 9), "kernel": (3, 5), "stride": (1, 1), "dilation": (1, 1)},
    {"shape": (8, 6), "kernel": (4, 2), "stride": (1, 1), "dilation": (1, 1)},
    {"shape": (9, 8), "kernel": (5, 4), "stride": (2, 4), "dilation": (1, 1)},
    {"shape": (9, 11), "kernel": (3, 4), "stride": (3, 2), "dilation": (2, 2)},
    {"shape": (10, 7), "kernel": (3, 2), "stride": (1, 1), "dilation": (3, 3)},
    {"shape": (4, 5, 6), "kernel": (2, 3, 5), "stride": (1, 1, 1), "dilation": (1, 1, 1)},
    {"shape": (5, 6, 7), "kernel": (3, 4, 5), "stride": (2, 3, 4), "dilation": (1, 1, 1)},
    {"shape": (5, 7, 8), "kernel": (2, 3, 2), "stride": (1, 2, 1), "dilation": (2, 2, 3)},
    {"shape": (4, 7, 5), "kernel": (4, 2, 3), "stride": (4, 1, 3), "dilation": (1, 3, 1)},
)

HEAD_DIM = 64


def seen(case: dict[str, Any]) -> torch.Tensor:
    """Which keys each query sees by NATTEN, bool ``[N, N]``, both in raster order."""
    from natten.functional import na2d, na3d

    shape = tuple(case["shape"])
    count = int(torch.tensor(shape).prod())
    query = torch.zeros(1, *shape, 1, HEAD_DIM)
    attend = na2d if len(shape) == 2 else na3d
    options = {name: tuple(case[name]) for name in ("stride", "dilation")}
    columns = []
    for first in range(0, count, HEAD_DIM):  # as many keys at a time as a head has channels
        value = torch.eye(count + HEAD_DIM)[:count, first : first + HEAD_DIM]
        out = attend(query, query, value.reshape(1, *shape, 1, HEAD_DIM), kernel_size=tuple(case["kernel"]), **options)
        columns.append(out.view(count, HEAD_DIM))
    return torch.cat(columns, 1)[:, :count] > 0


def main() -> None:
    """Ask and write; each row of a mask as a hexadecimal number, its first key the lowest bit."""
    cases = []
    for case in CASES:
        rows = ["".join("1" if one else "0" for one in reversed(row)) for row in seen(case).tolist()]
        cases.append({**case, "rows": [f"{int(row, 2):x}" for row in rows]})
    path = Path(__file__).parents[2] / "tests" / "masks" / "natten.json"
    path.write_text(json.dumps(cases, indent=0) + "\n")
    print(path)


if __name__ == "__main__":
    main()
