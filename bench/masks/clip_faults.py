"""Faults in masks of several frames, neighborhoods with steps, and what they are compared with; see ``faults.py``."""

from __future__ import annotations

from bench.masks.fault import Fault

CLIP_FAULTS = (
    Fault(
        "clip-tube-not-strict",
        "masks/tubes.py",
        "+ per_frame * (away * away) < first) & (away < frames)",
        "+ per_frame * (away * away) <= first) & (away < frames)",
        "a tube takes in keys at distance r",
    ),
    Fault(
        "clip-tube-one-frame-more",
        "masks/tubes.py",
        "& (away < frames)",
        "& (away <= frames)",
        "the frame after the last is seen",
    ),
    Fault(
        "clip-tube-time-not-squared",
        "masks/tubes.py",
        "per_frame * (away * away)",
        "per_frame * away",
        "a ball is a cone",
    ),
    Fault(
        "clip-tube-table-shifted",
        "masks/tubes.py",
        "limit = torch.where(away >= least, square, limit)",
        "limit = torch.where(away > least, square, limit)",
        "radii of tubes that follow no formula are one frame late",
    ),
    Fault(
        "clip-tube-past-alone",
        "masks/tubes.py",
        "away = (query[0] - key[0]).abs()\n            return",
        "away = (query[0] - key[0]).clamp(min=0)\n            return",
        "all later frames are seen as the own",
    ),
    Fault(
        "clip-tube-touches-by-span",
        "masks/tubes.py",
        "dt, dy, dx = (gap(of_query, of_key) for of_query, of_key in zip(query, key, strict=True))",
        "dt, dy, dx = (span(query[0], key[0]), gap(query[1], key[1]), gap(query[2], key[2]))",
        "blocks are missed whose farthest frames do not see each other",
    ),
    Fault(
        "clip-tube-covers-by-gap",
        "masks/tubes.py",
        "dt, dy, dx = (span(of_query, of_key) for of_query, of_key in zip(query, key, strict=True))",
        "dt, dy, dx = (gap(query[0], key[0]), span(query[1], key[1]), span(query[2], key[2]))",
        "blocks are called full whose farthest frames do not see each other",
    ),
    Fault(
        "clip-tube-counted-once",
        "masks/tubes.py",
        "* (2 if away else 1)",
        "",
        "pairs of other frames are counted in one direction",
    ),
    Fault(
        "clip-last-forgotten-beyond",
        "masks/tubes.py",
        "beyond = self.squared_radii[-1] if self.repeat_last else 0",
        "beyond = 0",
        "frames beyond the radii are not seen though the last is to be repeated",
    ),
    Fault(
        "clip-rows-not-from-below",
        "masks/orders.py",
        "some = grid[front:back].flip(1) if number % 2 else grid[front:back]",
        "some = grid[front:back].flip(0) if number % 2 else grid[front:back]",
        "arithmetic and the walk part in every other stretch of frames",
    ),
    Fault(
        "clip-band-backwards-by-stretch",
        "masks/coordinates.py",
        "odd(stretch * count + band), odd(stretch)",
        "odd(band), odd(stretch)",
        "computed columns are mirrored where a stretch of frames has an odd number of bands",
    ),
    Fault(
        "clip-last-stretch-as-tall",
        "masks/coordinates.py",
        "depth, per_depth = many + is_last * more, per_many + is_last * per_more",
        "depth, per_depth = many, per_many",
        "the last frames, where fewer or more are walked at once, are elsewhere",
    ),
    Fault(
        "clip-frame-bits-overlap",
        "masks/places.py",
        "return frame << 20 | row << 10 | column",
        "return frame << 13 | row << 10 | column",
        "a frame's bits lie over those of row 8",
    ),
    Fault(
        "clip-box-without-frames",
        "masks/boxes.py",
        "    return frames, rows, columns\n\n\ndef near_pairs",
        "    return (frames[0] * 0, frames[1] * 0), rows, columns\n\n\ndef near_pairs",
        "boxes of chosen blocks forget their frames",
    ),
    Fault(
        "clip-stride-leader-first",
        "masks/neighborhoods.py",
        "query = torch.minimum(query // stride * stride + middle, side - one)",
        "query = torch.minimum(query // stride * stride, side - one)",
        "with a stride, runs of queries have the window of their first one",
    ),
    Fault(
        "clip-dilation-ragged",
        "masks/neighborhoods.py",
        "side = (whole - phase + phases_less) // phases",
        "side = whole // phases",
        "with dilation, windows at the border are shifted too far where it does not divide the side",
    ),
    Fault(
        "clip-tiles-not-shifted",
        "masks/tiles.py",
        "centre = torch.minimum(torch.maximum(query[axis] // tile, half), last)",
        "centre = query[axis] // tile",
        "sliding tiles are clipped at the border",
    ),
    Fault(
        "clip-anchors-of-the-query",
        "masks/tiles.py",
        "table[key[0].to(torch.int32)]",
        "table[query[0].to(torch.int32)]",
        "queries in anchor frames see everything, in place of being seen",
    ),
)
