"""The published FLOPs of every row, as far as the definitions allow."""

from __future__ import annotations

import pytest

from flexclear.alternatives import AgentAttention, PixArtAttention, flops
from flexclear.masks import Disc, Layout

PUBLISHED = Layout(64, 64)
CHANNELS = 3072


def printed(attention, **options):
    """GFLOPs per layer at 1024 px as the paper prints them."""
    return round(flops(attention, PUBLISHED, **options) / 1e9, 1)


@pytest.mark.parametrize(
    ("attention", "gflops"),
    [
        (None, 260.9),
        ("sigmoid", 260.9),
        ("pixart", 67.7),
        ("agent", 80.5),
        (Disc(8), 63.5),
        (Disc(16), 86.6),
        (Disc(32), 154.1),
    ],
)
def test_the_published_figure_comes_out(attention, gflops):
    assert printed(attention) == gflops


def test_linear_attention_s_figure_counts_one_head_of_all_channels():
    """174.0 has a state of 3072 x 3072; with the 24 heads that FLUX.1 has it is 24 times smaller."""
    assert printed("linear", heads=1) == 174.0
    assert printed("linear", heads=24) == 7.3
    n = PUBLISHED.seq_len
    assert flops("linear", PUBLISHED, heads=1) == 4 * n * CHANNELS**2 + 4 * n * CHANNELS
    assert flops("linear", PUBLISHED, heads=24) == 4 * n * CHANNELS * 128 + 4 * n * CHANNELS


@pytest.mark.parametrize("name", ["strided", "swin", "neighborhood"])
def test_256_keys_by_a_mask_are_67_646_where_the_paper_prints_67_7(name):
    """Its 67.7 is what PixArt-Sigma takes with its convolution; a mask has none."""
    pairs = 512 * 4608 + 4096 * (512 + 256)
    assert flops(name, PUBLISHED) == 4 * CHANNELS * pairs
    assert round(flops(name, PUBLISHED) / 1e9, 3) == 67.646
    assert flops("pixart", PUBLISHED) - flops(name, PUBLISHED) == 4 * CHANNELS * 4096


def test_swin_s_shifted_layers_have_fewer_pairs_because_squares_are_cut_off_at_the_border():
    side = 8**2 + 3 * 16**2 + 8**2
    assert flops("swin", PUBLISHED, layer=1) == 4 * CHANNELS * (512 * 4608 + 4096 * 512 + side**2)
    assert printed("swin", layer=1) == 64.6


def test_the_figures_tell_what_text_queries_and_agents_see():
    """Text queries that saw compressed keys, and agents that read text, would be other numbers than the published."""
    assert round(4 * CHANNELS * 4608 * (512 + 256) / 1e9, 1) == 43.5
    agents_read_text = flops("agent", PUBLISHED) + 4 * CHANNELS * 256 * 512
    assert round(agents_read_text / 1e9, 1) == 82.2


@pytest.mark.parametrize(("height", "width"), [(9, 13), (16, 4), (5, 7)])
def test_formulas_count_the_pairs_of_any_grid(height, width):
    layout, c = Layout(height, width, 6), 12
    image, n = height * width, height * width + 6
    cells = len(range(0, height, 4)) * len(range(0, width, 4))
    agents = min(height, 8) * min(width, 8)
    assert flops(PixArtAttention(4), layout, c) == 4 * c * (6 * n + image * (6 + cells)) + 4 * c * image
    assert flops(AgentAttention(8), layout, c) == 4 * c * (6 * n + agents * image + image * (6 + agents)) + c * image


def test_clear_needs_its_window():
    with pytest.raises(ValueError, match=r"FLOPs of 'clear' depend on its window; pass flexclear.masks.Disc\(r\)"):
        flops("clear", PUBLISHED)
