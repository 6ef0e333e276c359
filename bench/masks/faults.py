"""Faults for ``planted_faults.py``: each one edit that makes a mask, or what feeds one, wrong without an error.

``old`` must be in its file exactly once (``tests/masks/test_planted_faults.py``), so that no fault is lost when the code
moves. Names begin with the gap that they stand for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One edit.

    Attributes:
        name: short label.
        file: path from the root of the project.
        old, new: what is replaced by what.
        effect: what is wrong then.
    """

    name: str
    file: str
    old: str
    new: str
    effect: str


FAULTS = (
    # Rules: every mask, the dense one too, is made from them.
    Fault(
        "rule-disc-not-strict",
        "masks/shapes.py",
        "            return dy * dy + dx * dx < square",
        "            return dy * dy + dx * dx <= square",
        "the disc takes in keys at distance r",
    ),
    Fault(
        "rule-square-not-strict-in-y",
        "masks/shapes.py",
        "((y_q - y_k).abs() < radius) & ",
        "((y_q - y_k).abs() <= radius) & ",
        "the square is two rows taller than wide",
    ),
    Fault(
        "rule-neighborhood-even-kernel",
        "masks/shapes.py",
        "number(self.kernel), number(self.kernel // 2), number(0)",
        "number(self.kernel), number((self.kernel - 1) // 2), number(0)",
        "neighborhoods of even kernels lie one token too far down and right",
    ),
    Fault(
        "rule-neighborhood-sides-swapped",
        "masks/shapes.py",
        "last_y, last_x = number(layout.height - self.kernel)",
        "last_x, last_y = number(layout.height - self.kernel)",
        "on rectangles neighborhoods are shifted by the other side's border",
    ),
    Fault(
        "rule-swin-shifted-the-other-way",
        "masks/shapes.py",
        "number(self.window), number(self.window - self.shift)",
        "number(self.window), number(self.shift)",
        "shifted windows begin at w - s instead of s",
    ),
    Fault(
        "rule-strided-phase",
        "masks/shapes.py",
        "(y_q % stride == y_k % stride) & (x_q % stride == x_k % stride)",
        "(y_q % stride == y_k % stride) & (x_q // stride == x_k // stride)",
        "along x a query sees its own cell instead of its own phase",
    ),
    Fault(
        "rule-either-is-both",
        "masks/windows.py",
        "a(y_q, x_q, y_k, x_k) | b(y_q, x_q, y_k, x_k)",
        "a(y_q, x_q, y_k, x_k) & b(y_q, x_q, y_k, x_k)",
        "a union is an intersection",
    ),
    # Boxes: which blocks are needed, and which are full.
    Fault(
        "block-disc-full-off-by-one",
        "masks/shapes.py",
        "_span(*query[:2], *key[:2]), _span(*query[2:], *key[2:])\n        return dy * dy + dx * dx < self._square()",
        "_span(*query[:2], *key[:2]), _span(*query[2:], *key[2:])\n        return dy * dy + dx * dx <= self._square()",
        "a block whose farthest pair is at distance r is called full",
    ),
    Fault(
        "block-disc-axes-swapped",
        "masks/shapes.py",
        "_gap(*query[:2], *key[:2]), _gap(*query[2:], *key[2:])",
        "_gap(*query[:2], *key[2:]), _gap(*query[2:], *key[:2])",
        "needed blocks are missed: rows are compared with columns",
    ),
    Fault(
        "block-neighborhood-axes-swapped",
        "masks/boxes.py",
        "y, x = tokens >> 16, tokens & 0xFFFF",
        "x, y = tokens >> 16, tokens & 0xFFFF",
        "boxes are transposed, which only windows notice that treat the axes differently",
    ),
    Fault(
        "block-swin-edge",
        "masks/shapes.py",
        "return (qt <= kb) & (kt <= qb)",
        "return (qt < kb) & (kt <= qb)",
        "a block that lies in one row of Swin's windows is missed",
    ),
    Fault(
        "block-strided-first-multiple",
        "masks/shapes.py",
        "(multiple >= least)",
        "(multiple > least)",
        "a block is missed where only its least offset is a multiple of the stride",
    ),
    Fault(
        "block-both-full-where-either-is",
        "masks/windows.py",
        "found = found & part.covers(layout, query, key)",
        "found = found | part.covers(layout, query, key)",
        "a block of an intersection is called full where one part covers it",
    ),
    Fault(
        "block-either-needed-where-both-are",
        "masks/windows.py",
        "found = found | part.touches(layout, query, key)",
        "found = found & part.touches(layout, query, key)",
        "a block of a union is missed where one part alone needs it",
    ),
    Fault(
        "block-end-of-sequence-full",
        "masks/boxes.py",
        "whole=(tokens != PADDING).all(1)",
        "whole=(tokens != PADDING).any(1)",
        "the last block is called full although the sequence ends inside it",
    ),
    Fault(
        "block-text-rows-miss-image",
        "masks/blocks.py",
        "(queries.text[q] & (keys.text[kv] | keys.image[kv]))",
        "(queries.text[q] & keys.text[kv])",
        "text queries lose blocks of image keys alone",
    ),
    Fault(
        "block-scan-forgets-the-end",
        "masks/scan.py",
        "kv_idx.clamp_max(kv_len - 1)[None, :]) & inside",
        "kv_idx.clamp_max(kv_len - 1)[None, :])",
        "under a mask_mod of one's own the last block is called full although the sequence ends inside it",
    ),
    # Text.
    Fault(
        "text-on-the-wrong-side",
        "masks/layout.py",
        "return self.text_len if self.text_first else 0",
        "return 0 if self.text_first else self.text_len",
        "text is taken for image and image for text",
    ),
    Fault(
        "text-sees-pooled-keys",
        "masks/windows.py",
        "torch.where(key.is_pooled, ~query.is_text, allowed)",
        "(allowed | key.is_pooled)",
        "text queries see pooled keys, so every image token twice",
    ),
    Fault(
        "text-dense-sees-pooled-keys",
        "masks/dense.py",
        "mask[is_text] = keys != POOLED",
        "mask[is_text] = True",
        "the same in the dense mask that masked SDPA runs with",
    ),
    # Sides above 40.
    Fault(
        "side-columns-wrap-at-64",
        "masks/coordinates.py",
        "Place(found >> 16, found & 0xFFFF, found < 0",
        "Place(found >> 16, found & 0x3F, found < 0",
        "column 64 is taken for column 0",
    ),
    Fault(
        "side-span-clamped",
        "masks/shapes.py",
        "torch.maximum(high_a - low_b, high_b - low_a).clamp_(0, MAX_SIDE)",
        "torch.maximum(high_a - low_b, high_b - low_a).clamp_(0, 40)",
        "blocks more than 40 tokens apart are called full",
    ),
    Fault(
        "side-distance-in-16-bits",
        "masks/shapes.py",
        "            dy, dx = y_q - y_k, x_q - x_k",
        "            dy, dx = (y_q - y_k).to(torch.int16), (x_q - x_k).to(torch.int16)",
        "squares overflow beyond 181 tokens, and far keys are seen",
    ),
    Fault(
        "side-list-in-8-bits",
        "masks/blocks.py",
        "indices[rows, place] = columns.to(torch.int32)",
        "indices[rows, place] = columns.to(torch.uint8).to(torch.int32)",
        "block 256 is listed as block 0",
    ),
    Fault(
        "side-box-columns-in-8-bits",
        "masks/boxes.py",
        "tokens >> 16, tokens & 0xFFFF",
        "tokens >> 16, tokens & 0xFF",
        "blocks right of column 255 are looked for at the left border",
    ),
    # Reference grids.
    Fault(
        "reference-starts-after-its-neighbour-alone",
        "masks/layout.py",
        "            start += height * width\n\n    @independent",
        "            start = height * width\n\n    @independent",
        "the third grid's tokens are taken from the wrong place",
    ),
    Fault(
        "reference-rows-not-from-0",
        "masks/layout.py",
        "walks = [(walk, width) for (walk, _), (_, width)",
        "walks = [(walk + start, width) for (walk, start), (_, width)",
        "a reference's rows go on where the image's end",
    ),
    Fault(
        "reference-has-the-image-width",
        "masks/layout.py",
        "walks = [(walk, width) for (walk, _), (_, width)",
        "walks = [(walk, self.width) for (walk, _), (_, _)",
        "a reference's coordinates are computed with the image's width",
    ),
    Fault(
        "reference-warning-transposed",
        "flexclear/runtime/reach.py",
        "box(0, rows - 1, 0, columns - 1)",
        "box(0, columns - 1, 0, rows - 1)",
        "a reference that the window hides is not warned of, one that it reaches is",
    ),
    # Padded text.
    Fault(
        "padding-negated",
        "masks/padding.py",
        "(kept | (place < 0) | (place >= count))",
        "(~kept | (place < 0) | (place >= count))",
        "padding is seen and the prompt is not",
    ),
    Fault(
        "padding-first-token-kept",
        "masks/padding.py",
        "(kept | (place < 0) | (place >= count))",
        "(kept | (place <= 0) | (place >= count))",
        "the first text token is seen even where it is padding (padding on the left)",
    ),
    Fault(
        "padding-of-the-first-sample",
        "masks/padding.py",
        "table[batch * count + ",
        "table[head * count + ",
        "heads are taken for samples",
    ),
    Fault(
        "padding-dense-of-the-first-sample",
        "masks/padding.py",
        "mask & seen[:, None, None, :]",
        "mask & seen[:1, None, None, :]",
        "with masked SDPA every sample has the first one's padding",
    ),
    Fault(
        "padding-before-the-references",
        "masks/padding.py",
        "0 if layout.text_first else layout.image_len",
        "0 if layout.text_first else layout.height * layout.width",
        "padding is looked for in the reference pictures where text comes last",
    ),
    Fault(
        "padding-in-full-blocks",
        "masks/blocks.py",
        "        & ~(keys.text[kv] & text_padded)\n",
        "",
        "blocks of text are called full, and their padding is seen",
    ),
    # Grouped search, beyond 2^20 pairs of blocks.
    Fault(
        "grouped-box-too-small",
        "masks/boxes.py",
        "return rows[0].amin(1), rows[1].amax(1), rows[2]",
        "return rows[0].amin(1), rows[1].amin(1), rows[2]",
        "boxes around groups are too low, and needed blocks are missed",
    ),
    Fault(
        "grouped-first-piece-alone",
        "masks/boxes.py",
        "return torch.cat(found_q), torch.cat(found_kv)",
        "return found_q[0], found_kv[0]",
        "only the first piece of the pairs of groups is searched",
    ),
    Fault(
        "grouped-columns-of-the-first-block",
        "masks/boxes.py",
        "kv_some[pair] * _GROUP + kv\n",
        "kv_some[pair] * (_GROUP - 1) + kv\n",
        "later groups are taken for earlier blocks",
    ),
    # Lists by key block.
    Fault(
        "backward-full-not-turned",
        "masks/blocks.py",
        "pairs.kv[turned], full[turned]",
        "pairs.kv[turned], full",
        "gradients take partial blocks for full ones",
    ),
    Fault(
        "backward-partial-and-full-swapped",
        "masks/blocks.py",
        '"q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"',
        '"full_q_num_blocks", "full_q_indices", "q_num_blocks", "q_indices"',
        "gradients take every partial block for a full one",
    ),
    # The way back to raster order.
    Fault(
        "inverse-is-the-permutation",
        "masks/layout.py",
        "inverse[forward] = torch.arange(len(forward))",
        "inverse[torch.arange(len(forward))] = forward",
        "tokens come back in another order than they came",
    ),
    Fault(
        "inverse-of-a-plan-is-its-order",
        "flexclear/runtime/plan.py",
        "layout.inverse_permutation().to(device)",
        "layout.permutation().to(device)",
        "a model's output is shuffled",
    ),
    Fault(
        "inverse-of-a-call-is-its-order",
        "flexclear/runtime/call_plan.py",
        "return self.base.to_raster(tokens, dim)",
        "return self.base.to_image_order(tokens, dim)",
        "a model's output is shuffled twice",
    ),
    Fault(
        "plan-coordinates-swapped",
        "flexclear/runtime/plan.py",
        "rows=y.to(device, torch.float32),\n        columns=x.to",
        "rows=x.to(device, torch.float32),\n        columns=y.to",
        "the rotary embedding gets columns as rows",
    ),
    # Pooled keys.
    Fault(
        "pooled-grid-rounded-down",
        "masks/downsampled.py",
        "-(-layout.height // self.factor), -(-layout.width // self.factor)",
        "layout.height // self.factor, layout.width // self.factor",
        "cut-off cells have no key",
    ),
    Fault(
        "pooled-grid-transposed",
        "masks/downsampled.py",
        "-(-layout.height // self.factor), -(-layout.width // self.factor)",
        "-(-layout.width // self.factor), -(-layout.height // self.factor)",
        "cells are numbered along the wrong side",
    ),
    Fault(
        "pooled-share-of-cut-off-cells",
        "flexclear/runtime/pooling.py",
        "((y < height) & (x < width))",
        "((y <= height) & (x < width))",
        "the last row of cells counts its lowest tokens twice",
    ),
    Fault(
        "pooled-members-in-raster-order",
        "flexclear/runtime/pooling.py",
        "layout.inverse_permutation().view(height, width)",
        "layout.permutation().view(height, width)",
        "cells pool tokens from elsewhere",
    ),
    # Coordinates by arithmetic.
    Fault(
        "computed-last-band-as-tall",
        "masks/coordinates.py",
        "number(height - last)",
        "number(0)",
        "rows of a last band of another height are counted as if it had 8",
    ),
    Fault(
        "computed-bands-all-forwards",
        "masks/coordinates.py",
        "(column - pair * two - turn).abs()",
        "column - band * (two * half)",
        "every band is taken to be walked in one direction",
    ),
    Fault(
        "computed-end-of-the-walk-not-first",
        "masks/coordinates.py",
        "torch.where(place < least, place + image_len, place)",
        "place",
        "the tokens that fill the text's last block are taken for ones above the image",
    ),
    Fault(
        "computed-text-last-sees-by-place",
        "masks/coordinates.py",
        "position < start if text_first else position >= stop",
        "position < start",
        "text behind the image is taken for image tokens below it",
    ),
    # Text apart.
    Fault(
        "apart-text-of-the-shared-block-counts",
        "masks/apart.py",
        "first = layout.text_len // q_size * q_size if layout.text_first else 0",
        "first = 0",
        "image queries are taken for those at the beginning of the sequence",
    ),
    # Beyond 65,536 tokens.
    Fault(
        "long-table-filled-to-65536",
        "masks/coordinates.py",
        "table[: len(packed)] = packed.to(device)",
        "table[: min(len(packed), 1 << 16)] = packed[: 1 << 16].to(device)",
        "tokens beyond 65,536 are taken for text and see everything",
    ),
    Fault(
        "long-rows-wrap",
        "masks/layout.py",
        "torch.cat([walk // width for walk, width in walks])",
        "torch.cat([(walk & 0xFFFF) // width for walk, width in walks])",
        "rows begin again at token 65,536",
    ),
    Fault(
        "long-permutation-wraps",
        "masks/layout.py",
        "return torch.cat([walk + start for walk, start in self._walks()])",
        "return torch.cat([(walk + start) & 0xFFFF for walk, start in self._walks()])",
        "tokens beyond 65,536 are copies of the first",
    ),
    Fault(
        "long-block-pairs-wrap",
        "masks/blocks.py",
        "    ).unique()\n    q, kv =",
        "    ).bitwise_and(0xFFFF).unique()\n    q, kv =",
        "pairs of blocks beyond 65,536 are taken for earlier ones, and rows are left without blocks",
    ),
    Fault(
        "long-padding-start-wraps",
        "masks/padding.py",
        "for n in (start, length, length - 1, 0)",
        "for n in (start & 0xFFFF, length, length - 1, 0)",
        "text behind 65,536 tokens or more keeps its padding",
    ),
    Fault(
        "long-pooled-members-wrap",
        "flexclear/runtime/pooling.py",
        "x.clamp(max=width - 1)].flatten()",
        "x.clamp(max=width - 1)].flatten() & 0xFFFF",
        "cells whose tokens lie beyond 65,536 pool others",
    ),
    # The last band of the token order.
    Fault(
        "band-remainder-dropped",
        "masks/layout.py",
        "for index, (top, bottom) in enumerate(itertools.pairwise(band_edges(len(grid)))):",
        "for index, (top, bottom) in enumerate(itertools.pairwise(range(0, len(grid) + 1, BAND))):",
        "rows below the last whole band are lost",
    ),
    Fault(
        "band-remainder-overlaps",
        "masks/layout.py",
        "columns = grid[top:bottom].T",
        "columns = grid[len(grid) - (bottom - top) if bottom > len(grid) - BAND else top :][: bottom - top].T",
        "bands that end less than 8 rows from the border are walked at the border, so that rows come twice",
    ),
    # A band of the picture per rank.
    Fault(
        "ranks-packed-by-height",
        "flexclear/parallel/planning.py",
        "(place // width) << 16 | place % width",
        "(place // height) << 16 | place % height",
        "on rectangles a rank's keys are elsewhere",
    ),
    Fault(
        "ranks-padding-from-the-start",
        "flexclear/parallel/masks.py",
        "with_text_mask_at(mask, len(self.part.own), keep)",
        "with_text_mask_at(mask, 0, keep)",
        "a rank hides image keys in place of padding",
    ),
)
