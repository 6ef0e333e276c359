"""The oracle is independent of what it judges, and the checks around a mask notice what is wrong."""

from __future__ import annotations

import pytest
import torch

from flexclear.masks import (
    Both,
    Disc,
    Downsampled,
    Either,
    Full,
    Layout,
    Neighborhood,
    Square,
    Strided,
    Swin,
    cost,
    dense_mask,
)
from flexclear.masks.windows import Window
from flexclear.parallel.planning import part_of
from flexclear.runtime import plan
from flexclear.testing import assert_matches_dense, oracle, sequence

WINDOWS = [
    Disc(4), Square(3), Neighborhood(5), Neighborhood(4), Swin(5, 2), Strided(3), Full(),
    Both(Disc(5), Strided(2)), Either(Disc(2), Swin(4)), Downsampled(Either(Disc(2), Disc(3)), 4),
]  # fmt: skip


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
def test_the_oracle_runs_no_code_of_the_masks(window, monkeypatch):
    layout = Layout(9, 14, 5, text_first=False)
    order, expected = layout.permutation(), dense_mask(layout, window)

    def refuse(*_, **__):
        raise AssertionError("this is what the oracle judges")

    for kind in (Window, *Window.__subclasses__()):
        for name in (
            "rule",
            "touches",
            "covers",
            "pooled_grid",
            "key_len",
            "key_coordinates",
            "mask_mod",
            "image_pairs",
        ):
            monkeypatch.setattr(kind, name, refuse)
    for name in ("grids", "image_len", "seq_len", "image_start"):
        monkeypatch.setattr(Layout, name, property(refuse))
    for name in ("coordinates", "packed_coordinates", "inverse_permutation"):
        monkeypatch.setattr(Layout, name, refuse)
    monkeypatch.setattr(Layout, "permutation", lambda self: order)
    assert torch.equal(oracle.expected_rows(layout, window), expected)
    assert torch.equal(oracle.expected_rows(layout, window, torch.tensor([3, 130])), expected[[3, 130]])


class Mine(Disc):
    """A window of somebody's own."""


@pytest.mark.parametrize(
    "window", [Mine(3), Both(Disc(3), Mine(3)), Downsampled(Mine(3), 2)], ids=["one", "part", "inner"]
)
def test_a_subclass_is_not_taken_for_the_window_that_it_extends(window):
    assert not oracle.knows(window)
    assert_matches_dense(Layout(9, 14, 5), window, block_size=32, attention=False)


def test_a_window_without_a_definition_is_named():
    zero = torch.zeros(1, dtype=torch.int64).numpy()
    with pytest.raises(TypeError, match=r"the definition of .*object"):
        oracle.sees(object(), Layout(4, 4), (zero,) * 3, (zero,) * 3)


def test_samples_of_text_are_padded_on_either_side():
    right, left, scattered = sequence.text_masks(Layout(4, 4, 9)).tolist()
    assert right == [True] * 6 + [False] * 3
    assert left == [False] * 4 + [True] * 5
    assert len(set(scattered)) == 2


WRONG = {
    "inverse": (Layout, "inverse_permutation", Layout.permutation, "the inverse order is wrong"),
    "cells": (Downsampled, "pooled_grid", lambda self, layout: (4, 3), "over 9 x 14 has 3 x 5 cells, not"),
    "padding": (sequence, "with_text_mask", lambda mask, layout, keep: mask, "padding of sample 0 is wrong in the mask_mod"),
    "cost": (sequence, "cost", lambda *_, **__: cost(Layout(1, 1), Disc(1)), "the cost counts .* pairs of"),
    "dense": (plan, "dense_mask", lambda layout, *_, **__: dense_mask(layout, Full()), "the dense mask of a plan is wrong"),
    "ranks": (sequence, "part_of", lambda layout, window, *cut: part_of(layout, Disc(1), *cut), "lacks keys that its queries"),
    "warning": (sequence, "warn_of_unreached", lambda *_: None, "0 reference images are said .*, and 1 are"),
}  # fmt: skip


@pytest.mark.parametrize(("place", "name", "wrong", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_around_a_mask_is_named(place, name, wrong, message, monkeypatch):
    references = ((2, 2),) if name == "warn_of_unreached" else ()
    layout = Layout(9, 14, 5, references=references) if name != "part_of" else Layout(32, 9, 5)
    assert_matches_dense(layout, Disc(4), block_size=32, attention=False)
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises(AssertionError, match=message):
        assert_matches_dense(layout, Disc(4), block_size=32, attention=False)
