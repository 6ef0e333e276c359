"""A mask of your own, checked against its definition, first as a FlexAttention ``mask_mod`` and then as a window.

    python examples/own_mask.py                  # needs the extra testing: pip install 'flexclear[testing]'

The mask is a cross: an image query sees the image keys whose row or whose column is closer than ``reach``, and all text.
A plain ``mask_mod`` is enough for your own FlexAttention. ``flexclear.transform`` takes a ``Window``, which also answers for
whole boxes of tokens, so that block masks are built in time linear in the number of blocks.
"""

import argparse
from dataclasses import dataclass

import flexclear
import torch
from flexclear.masks import Layout, Window, cost
from flexclear.masks.places import gap, span
from flexclear.testing import assert_matches_dense
from torch import Tensor


def cross_mask_mod(layout: Layout, reach: int):
    """The cross as a ``mask_mod`` over the positions of ``layout``'s sequence."""
    _, rows, columns = layout.coordinates()  # of each image token, in the order of the sequence
    positions = torch.arange(layout.seq_len)
    is_image = (positions >= layout.image_start) & (positions < layout.image_start + layout.image_len)
    row, column = torch.zeros(2, layout.seq_len, dtype=torch.int64)
    row[is_image], column[is_image] = rows, columns

    def mask_mod(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        near = ((row[q_idx] - row[kv_idx]).abs() < reach) | ((column[q_idx] - column[kv_idx]).abs() < reach)
        return near | ~is_image[q_idx] | ~is_image[kv_idx]

    return mask_mod


@dataclass(frozen=True)
class Cross(Window):
    """The cross as a window."""

    size: int

    @property
    def name(self) -> str:
        return f"cross_{self.size}"

    @property
    def reads(self) -> str:
        return "integers"  # what the rule computes with; "offsets" would allow floats, but only differences

    def rule(self, layout: Layout, number):
        size = number(self.size)  # a tensor, so that another size needs no new graph

        def inside(query, key):
            return ((query[1] - key[1]).abs() < size) | ((query[2] - key[2]).abs() < size)

        return inside

    def touches(self, layout: Layout, query, key) -> Tensor:
        return (gap(query[1], key[1]) < self.size) | (gap(query[2], key[2]) < self.size)

    def covers(self, layout: Layout, query, key) -> Tensor:
        return (span(query[1], key[1]) < self.size) | (span(query[2], key[2]) < self.size)


def cross_by_definition(layout: Layout, reach: int) -> Tensor:
    """The dense mask, written in raster order independently of the above, then permuted into the layout's order."""
    y, x = torch.meshgrid(torch.arange(layout.height), torch.arange(layout.width), indexing="ij")
    y, x = y.flatten(), x.flatten()
    allowed = torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool)
    image = slice(layout.image_start, layout.image_start + layout.image_len)
    allowed[image, image] = ((y[:, None] - y).abs() < reach) | ((x[:, None] - x).abs() < reach)
    order = layout.whole_permutation()
    return allowed[order][:, order]


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a mask of your own against its definition.")
    parser.add_argument("--size", default="24x40", help="HEIGHTxWIDTH in tokens")
    parser.add_argument("--reach", type=int, default=3, help="in tokens")
    parser.add_argument("--text", type=int, default=77, help="text tokens")
    parser.add_argument("--no-attention", action="store_true", help="skip compiled attention, which needs a compiler")
    args = parser.parse_args()
    height, width = map(int, args.size.split("x"))

    for order in ("raster", "tiled"):
        layout = Layout(height, width, text_len=args.text, order=order)
        reference = cross_by_definition(layout, args.reach)
        for mask in (cross_mask_mod(layout, args.reach), Cross(args.reach)):
            assert_matches_dense(layout, mask, reference=reference, attention=not args.no_attention)

    found = cost(layout, Cross(args.reach))
    print(f"right in both orders; allowed: {found.pairs / found.dense_pairs:.1%} of all pairs,", end=" ")
    print(f"executed in blocks of 128 x 64 in tiled order: {found.executed_pairs / found.dense_pairs:.1%}")

    pipe = flexclear.embedded.pipeline()
    flexclear.transform(pipe, r=Cross(args.reach))
    print(flexclear.explain(pipe))


if __name__ == "__main__":
    main()
