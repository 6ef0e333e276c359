"""Each window against its definition, transcribed for single tokens in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexclear import masks
from flexclear.masks import (
    Anchors,
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
    TileWindow,
    Tube,
    cost,
    dense_mask,
)
from flexclear.testing import oracle
from flexclear.testing.strategies import layouts, simple_windows, windows

small = layouts(side=st.integers(1, 9))


def neighborhood_start(place, side, kernel):
    return min(max(place - kernel // 2, 0), side - kernel)


def swin_cell(place, window, shift):
    """Swin's own words: roll by the shift, cut into windows, and keep apart what was rolled around."""
    return 0 if shift and place < shift else 1 + (place - shift) // window


def seen_along(place, side, keys, step, phases, shifted):
    """Places of an axis that one of them sees, by NATTEN's definition."""
    own = range(place % phases, side, phases)
    number = own.index(place)
    first = min(number - number % step + step // 2, len(own) - 1) - keys // 2
    if shifted:
        first = min(max(first, 0), len(own) - keys)
    return own[max(first, 0) : max(first + keys, 0)]


def allowed(window, layout, query, key):
    """Whether an image query sees an image key, by the definition of each window."""
    (yq, xq), (yk, xk) = query, key
    match window:
        case Disc(radius):
            return (yq - yk) ** 2 + (xq - xk) ** 2 < radius**2
        case Square(int(radius), 1, 1):
            return max(abs(yq - yk), abs(xq - xk)) < radius
        case Neighborhood(int(kernel), 1, 1):
            from_y = yk - neighborhood_start(yq, layout.height, kernel)
            from_x = xk - neighborhood_start(xq, layout.width, kernel)
            return 0 <= from_y < kernel and 0 <= from_x < kernel
        case Swin(side, shift):
            rows = swin_cell(yq, side, shift) == swin_cell(yk, side, shift)
            return rows and swin_cell(xq, side, shift) == swin_cell(xk, side, shift)
        case Strided(stride):
            return yq % stride == yk % stride and xq % stride == xk % stride
        case Full() | Anchors():
            return True
        case Tube((first, *_), _):
            return (yq - yk) ** 2 + (xq - xk) ** 2 < first
        case Square(size, stride, dilation) | Neighborhood(size, stride, dilation):
            numbers = [(n, n) if isinstance(n, int) else n for n in (size, stride, dilation)]
            sides, shifted = (layout.height, layout.width), isinstance(window, Neighborhood)
            return all(
                key in seen_along(place, side, keys if shifted else 2 * keys - 1, step, phases, shifted)
                for place, key, side, keys, step, phases in zip((yq, xq), (yk, xk), sides, *numbers, strict=True)
            )
        case TileWindow(tile, tiles):
            numbers = [(n, n) if isinstance(n, int) else n for n in (tile, tiles)]
            sides = (layout.height, layout.width)
            return all(
                key // size in seen_along(place // size, max(-(-side // size), count), count, 1, 1, True)
                for place, key, side, size, count in zip((yq, xq), (yk, xk), sides, *numbers, strict=True)
            )
        case Both():
            return all(allowed(part, layout, query, key) for part in window.parts)
        case Either():
            return any(allowed(part, layout, query, key) for part in window.parts)
        case Downsampled(inner, _):
            return allowed(inner, layout, query, key)
    raise AssertionError(window)


@given(small.flatmap(lambda layout: st.tuples(st.just(layout), windows(layout))))
def test_the_dense_reference_equals_the_definition_in_a_double_loop(drawn):
    layout, window = drawn
    place = ["text"] * layout.seq_len
    start = layout.text_len if layout.text_first else 0
    for index, raster in enumerate(layout.permutation().tolist()):
        place[start + index] = divmod(raster, layout.width)
    factor = window.factor if isinstance(window, Downsampled) else None
    pooled = -(-layout.height // factor) * -(-layout.width // factor) if factor else 0
    mask = dense_mask(layout, window).tolist()
    assert oracle.expected_rows(layout, window).tolist() == mask
    for i, query in enumerate(place):
        assert len(mask[i]) == len(place) + pooled
        for j, key in enumerate(place + ["pooled"] * pooled):
            expected = (
                query != "text" if key == "pooled" else "text" in (query, key) or allowed(window, layout, query, key)
            )
            assert mask[i][j] == expected, (i, j)


@given(layouts().flatmap(lambda layout: st.tuples(st.just(layout), simple_windows(layout))))
def test_every_simple_window_sees_itself(drawn):
    layout, window = drawn
    assert dense_mask(layout, window).diagonal().all()


@given(layouts(side=st.integers(5, 30)), st.integers(1, 5))
def test_a_neighborhood_gives_every_query_equally_many_keys(layout, kernel):
    assert set(dense_mask(layout, Neighborhood(kernel)).sum(1).tolist()) <= {
        layout.seq_len,
        kernel**2 + layout.text_len,
    }


def test_windows_of_the_published_comparison_cost_what_was_published():
    # The paper's comparison at 1024 px: 256 image keys per query and 512 of text. It prints 67.7 GFLOPs for 67.646.
    layout = Layout(64, 64)
    for window in (Swin(16), Strided(4), Neighborhood(16)):
        assert f"{cost(layout, window).flops / 1e9:.3f}" == "67.646"
    assert f"{cost(layout, Full()).flops / 1e9:.1f}" == "260.9"


@pytest.mark.parametrize(
    ("window", "name"),
    [
        (Disc(16), "disc_r16"),
        (Square(3), "square_r3"),
        (Neighborhood(7), "neighborhood_k7"),
        (Swin(8, 4), "swin_w8_s4"),
        (Strided(4), "strided_d4"),
        (Downsampled(Both(Disc(8), Strided(2)), 4), "disc_r8_and_strided_d2_down4"),
        (Either(Disc(8), Full()), "disc_r8_or_full"),
    ],
)
def test_windows_are_hashable_facts_that_carry_their_parameters_in_their_name(window, name):
    assert window.name == name
    assert window.mask_mod(Layout(8, 8)).__name__ == name
    assert (
        len({window, type(window)(*(window.parts if isinstance(window, (Both, Either)) else vars(window).values()))})
        == 1
    )


FACTORIES = {
    "disc": (masks.disc, (3,), Disc(3)),
    "square": (masks.square, (3,), Square(3)),
    "neighborhood": (masks.neighborhood, (5,), Neighborhood(5)),
    "swin": (masks.swin, (4, 2), Swin(4, 2)),
    "strided": (masks.strided, (3,), Strided(3)),
    "full": (masks.full, (), Full()),
}


@pytest.mark.parametrize(("factory", "arguments", "window"), FACTORIES.values(), ids=FACTORIES)
def test_factories_give_the_mask_mod_of_their_window(factory, arguments, window):
    layout = Layout(7, 9, 5)
    mask_mod = factory(layout, *arguments)
    assert mask_mod.window == window
    place = torch.arange(layout.seq_len)
    assert torch.equal(mask_mod(None, None, place[:, None], place[None, :]), dense_mask(layout, window))


def test_windows_compose_with_and_and_or_and_take_pooled_keys():
    assert Disc(3) & Strided(2) == Both(Disc(3), Strided(2))
    assert Disc(3) | Strided(2) == Either(Disc(3), Strided(2))
    layout = Layout(6, 8)
    assert masks.with_downsampled(masks.disc(layout, 3), 4) == Downsampled(Disc(3), 4)
    with pytest.raises(TypeError, match="Both takes windows"):
        Disc(3) & 4
