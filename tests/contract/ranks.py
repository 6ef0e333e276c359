"""What each of several processes runs of the contract; see ``helpers.parallel_group.Group``."""

from __future__ import annotations

import flexclear
from flexclear import parallel

from .oracle import RADIUS, differ, expected, run
from .shapes import Shape
from .table import ROWS


def contract_against_the_dense_mask(name: str, shape: Shape, residuals: bool) -> dict[str, float]:
    """How far a shared model is from the plain one under the dense mask, that from the dense one, and a restored one."""
    row = next(row for row in ROWS if row.name == name)
    model = row.build()
    call = row.call(shape) | (row.residuals(shape) if residuals else {})
    reference, dense = expected(row, model, shape, call), run(model, call)
    parallel.enable(flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa"))
    shared = run(model, call)
    flexclear.restore(model)
    return {
        "error": differ(shared, reference),
        "window": differ(dense, reference),
        "after": (run(model, call) - dense).abs().max().item(),
    }
