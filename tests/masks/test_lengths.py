"""The first mask of a process, the marks that Dynamo reads, and how the work of building grows."""

import subprocess
import sys

import pytest

from flexclear.masks import Disc, Layout, block_pairs
from flexclear.masks.apart import text_apart
from flexclear.masks.lengths import mark_static, mark_symbolic

FIRST = """
import sys, torch
from flexclear.masks import Disc, Layout, block_mask, with_text_mask
from flexclear.masks.apart import text_apart
from flexclear.masks.lengths import of_any_text_length
layout = Layout(16, 16, 40)
of_any_text_length(block_mask(layout, Disc(3), coordinates="packed"))
with_text_mask(block_mask(layout, Disc(3), text_padded=True), layout, torch.ones(2, 40, dtype=torch.bool))
text_apart(layout, Disc(3), block_size=64)
assert "torch._dynamo" not in sys.modules, "a mask imported Dynamo"
"""


def test_the_first_mask_of_a_process_does_not_import_dynamo():
    subprocess.run([sys.executable, "-c", FIRST], check=True)


def test_marks_are_those_of_dynamo():
    import torch

    theirs, ours = torch.zeros(4, 5, 6), torch.zeros(4, 5, 6)
    torch._dynamo.mark_static(theirs)
    torch._dynamo.maybe_mark_dynamic(theirs, [1])
    torch._dynamo.maybe_mark_dynamic(theirs, [0, 2])
    mark_static(ours)
    mark_symbolic(ours, [1])
    mark_symbolic(ours, (0, 2))
    assert vars(ours) == vars(theirs)


def test_inner_tensors_of_a_subclass_are_marked_too():
    import torch
    from torch.testing._internal.two_tensor import TwoTensor

    theirs, ours = (TwoTensor(torch.zeros(4, 5), torch.zeros(4, 5)) for _ in range(2))
    torch._dynamo.maybe_mark_dynamic(theirs, [1])
    mark_symbolic(ours, [1])
    assert vars(ours.a)["_dynamo_weak_dynamic_indices"] == vars(theirs.a)["_dynamo_weak_dynamic_indices"] == {1}
    torch._dynamo.mark_static(theirs)
    mark_static(ours)
    assert vars(ours.b)["_dynamo_static_indices"] == vars(theirs.b)["_dynamo_static_indices"] == {0, 1}


class Counting(Disc):
    """A disc that counts the pairs of boxes that it is asked about."""

    asked = 0

    def touches(self, layout, query, key):
        found = super().touches(layout, query, key)
        Counting.asked += found.numel()
        return found


@pytest.mark.parametrize("build", [lambda *a: block_pairs(*a), lambda *a: text_apart(a[0], a[1], block_size=a[2])])
def test_pairs_of_blocks_that_are_looked_at_grow_with_the_blocks(build):
    """2048 to 16,384 px: four times the blocks, about four times the pairs."""
    per_block = []
    for side in (128, 256, 512, 1024):
        Counting.asked, layout = 0, Layout(side, side)
        build(layout, Counting(16), 64)
        per_block.append(Counting.asked / (layout.seq_len / 64))
    # All pairs would be 16,384 for a block of the last; boxes around groups, and text, make some hundreds.
    assert per_block[-1] <= 1.5 * per_block[-2]
    assert per_block[-1] <= 1500
