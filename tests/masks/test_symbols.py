"""What a compiled ``mask_mod`` is given: tensors alone. A Python number that it read from an object would be a symbol of the
kernel, which is an argument more and arithmetic that no compiler folds."""

from __future__ import annotations

import pytest
import torch

from flexclear.masks import (
    Anchors,
    Disc,
    Downsampled,
    Layout,
    Neighborhood,
    Square,
    Strided,
    Swin,
    TileWindow,
    Window,
    cylinder,
    radial,
)
from flexclear.masks.layout import MAX_SIDE

IMAGE, CLIP = Layout(12, 20, 5), Layout(12, 20, 5, False, frames=6)
WINDOWS = {
    IMAGE: [
        Disc(4),
        Neighborhood(4, 2, 3),
        TileWindow((4, 5), 3),
        Swin(4, 1) | Strided(3),
        Downsampled(Square(3), 4),
    ],
    CLIP: [
        cylinder(4, 2),
        radial(8),
        cylinder(MAX_SIDE, 2) | Anchors((0, 3)),
        Neighborhood((2, 4, 5), (2, 1, 2), (1, 3, 2)),
        TileWindow((2, 4, 4), (3, 1, 3)),
    ],
}
CASES = [(layout, window) for layout, windows in WINDOWS.items() for window in windows]


@pytest.mark.parametrize("source", ["computed", "packed"])
@pytest.mark.parametrize(("layout", "window"), CASES, ids=[window.name for _, window in CASES])
def test_no_number_of_a_window_or_a_layout_is_a_symbol(layout: Layout, window: Window, source):
    given = []

    def record(graph, example_inputs):
        given.extend(node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder")
        return graph.forward

    mask_mod = window.mask_mod(layout, coordinates=source)
    index = torch.tensor([3, 7, 40])
    torch._dynamo.mark_static(index)
    torch.compiler.reset()
    compiled = torch.compile(mask_mod, backend=record, dynamic=True, fullgraph=True)
    assert torch.equal(compiled(None, None, index, index), mask_mod(None, None, index, index))
    assert len(given) > 2
    assert [value for value in given if not isinstance(value, torch.Tensor)] == []
