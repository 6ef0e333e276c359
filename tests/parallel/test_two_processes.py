"""Two gloo processes against one: the same images, the bytes that the formula says, and ranks that differ are named."""

from __future__ import annotations

import re

import pytest
import torch

from flexclear.compile import why_not_compiled

from contract.oracle import MATTERS, TOLERANCE
from contract.shapes import Shape
from contract.table import cases
from helpers.parallel_group import Group

CPU = torch.device("cpu")

EXACT = 1e-5


@pytest.fixture(scope="module")
def two():
    group = Group(2)
    group.results("awake")
    yield group
    group.close()


def largest(found, name):
    return max(result[name] for result in found)


@pytest.mark.parametrize(
    ("size", "r", "options"),
    [
        ((16, 16, 32), 3, {}),
        ((24, 9, 20), 5, {"batch": 2}),
        ((9, 33, 7), 20, {}),  # columns; thinner than the radius
        ((19, 16, 8), 3, {"order": "raster", "shares": (2.0, 1.0)}),
        ((20, 16, 8), 3, {"down_factor": 4}),
        ((19, 16, 8), 2, {"down_factor": 3, "batch": 2}),
        ((16, 16, 16), (2, 9, None, 4), {}),
    ],
    ids=str,
)
def test_a_shared_flux_is_the_whole_one(two, size, r, options):
    found = two.results("flux_against_one", *size, r, **options)
    assert largest(found, "error") <= EXACT
    assert min(result["window"] for result in found) > 1e-3
    assert largest(found, "again") == largest(found, "after") == 0
    assert len({result["sum"] for result in found}) == 1, "every rank has the same bits"


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
@pytest.mark.parametrize(("size", "options"), [((16, 16, 32), {}), ((24, 9, 20), {"batch": 2})], ids=str)
def test_a_dense_flux_that_diffusers_shares_is_the_whole_one_until_disabled(two, kind, size, options):
    found = two.results("dense_against_one", kind, *size, **options)
    assert largest(found, "error") <= EXACT
    assert all(result["enabled"] and result["left"] is None for result in found)
    assert largest(found, "after") == 0


def test_a_dense_model_that_diffusers_refuses_is_as_it_was(two):
    for result in two.results("dense_with_an_attention_that_diffusers_cannot_share"):
        assert "'flex' which does not support context parallelism" in result["said"]
        assert result["left"] is None
        assert result["error"] == 0


@pytest.mark.parametrize("kind", ["flux", "flux2", "qwen"])
@pytest.mark.parametrize("transform_first", [True, False])
def test_heads_that_diffusers_shares_out_are_windowed_alike(two, kind, transform_first):
    found = two.results("tensor_parallel", kind, transform_first)
    assert largest(found, "error") <= EXACT
    assert min(result["window"] for result in found) > 1e-3


def bands(row):
    """Rows and columns of the image, references, every kind of padded text."""
    references = ((26, 11),) if "references" in row.abilities else ()
    return [*row.texts(height=20, width=13, references=references), Shape(9, 22, 7)]


# The contract of all families (tests/contract), here because processes are costly to start.
@pytest.mark.costly("flux", "sd35", "qwen", "zimage")
@cases(bands, "ranks")
def test_a_shared_model_equals_the_plain_one_under_the_dense_mask(two, row, shape):
    residuals = "residuals" in row.abilities and shape.batch == 1
    found = two.results("contract_against_the_dense_mask", row.name, shape, residuals)
    assert largest(found, "error") <= TOLERANCE
    assert min(result["window"] for result in found) > MATTERS
    assert largest(found, "after") == 0


CLIPS = [
    # Rows, columns, frames: where the window lets the least pass.
    (("wan", (5, 9, 6), 7, 2), {"frame_radius": 2}, 1),
    (("wan", (3, 5, 11), 7, 3), {"frame_radius": "all", "batch": 2}, 2),
    (("wan", (12, 4, 5), 7, 3), {"frame_radius": 1, "enable_options": {"shares": (2.0, 1.0)}}, 0),
    (("skyreels", (4, 9, 6), 7, 2), {"frame_radius": 1}, 1),
    (("hunyuan video", (5, 8, 6), 7, 2), {"frame_radius": 2, "batch": 2}, 1),
]


@pytest.mark.parametrize(("arguments", "options", "axis"), CLIPS, ids=str)
def test_a_shared_video_is_the_whole_one_and_sends_what_is_planned(two, arguments, options, axis):
    found = two.results("clip_against_one", *arguments, **options)
    assert largest(found, "error") <= EXACT
    assert min(result["window"] for result in found) > 1e-3
    assert largest(found, "after") == 0
    assert len({result["sum"] for result in found}) == 1
    for result in found:
        assert result["axis"] == axis
        assert result["border"] == result["planned border"] > 0
        assert result["output"] == result["planned output"]


def test_a_time_for_each_token_is_not_shared(two):
    for kind, message in two.errors(
        "clip_against_one", "wan", (4, 6, 5), 7, 2, frame_radius=1, call_options={"times": "tokens"}
    ):
        assert kind == "AgreedError"
        assert "a time for each token" in message


@pytest.mark.parametrize("kind", ["no pads", "no refiner", "as large as positions go"])
def test_a_shared_z_image_is_the_whole_one_whatever_its_pads(two, kind):
    found = two.results("family_against_one", f"zimage, {kind}", {"r": 3})
    assert largest(found, "error") <= EXACT
    assert min(result["window"] for result in found) > 1e-3
    assert largest(found, "after") == 0


@pytest.mark.parametrize("attention", ["neighborhood", "swin", "strided"])
def test_the_alternatives_that_are_masks_can_be_shared(two, attention):
    from flexclear import alternatives

    sizes = {
        "neighborhood": alternatives.NeighborhoodAttention(5),
        "swin": alternatives.SwinAttention(5),
        "strided": alternatives.StridedAttention(3),
    }
    found = two.results("family_against_one", "flux", {"attention": sizes[attention]})
    assert largest(found, "error") <= EXACT
    assert min(result["window"] for result in found) > 1e-3


@pytest.mark.parametrize("switch", [{"ntk_factor": 10.0}, {"proportional_attention": True}])
def test_per_call_switches_hold_for_all_ranks(two, switch):
    found = two.results("switched", **switch)
    assert largest(found, "error") <= EXACT
    assert min(result["switch"] for result in found) > 1e-4


def test_a_lora_and_another_transform_after_enable_stay_shared(two):
    found = two.results("lora_and_another_transform")
    assert max(largest(found, "lora"), largest(found, "wider")) <= EXACT
    assert min(result["matters"] for result in found) > 1e-3


def test_eight_bit_weights_are_shared_like_others(two):
    found = two.results("quantized")
    assert largest(found, "error") <= EXACT
    assert min(result["bits"] for result in found) > 1e-3


@pytest.mark.parametrize(("size", "r", "edges", "options"), [
    ((16, 12, 9), 3, (0, 8, 16), {}), ((32, 9, 7), 6, (0, 24, 32), {"shares": (3.0, 1.0)}),
])  # fmt: skip
def test_averaged_text_is_the_paper_s_equation_7(two, size, r, edges, options):
    found = two.results("average_against_eq_7", *size, r, edges, **options)
    assert largest(found, "error") <= EXACT
    assert min(result["exact"] for result in found) > 1e-4


@pytest.mark.parametrize(
    ("kind", "transform", "call"),
    [
        ("embedded", {"r": 4}, {"true_cfg_scale": 2.0, "negative_prompt": "a green field"}),
        (
            "embedded",
            {"r": {"transformer_blocks": 6, "single_transformer_blocks": 3}, "dense_steps": (1, 0)},
            {"width": 168},
        ),
        ("sd3", {"r": 3}, {"height": 128, "width": 80, "steps": 2, "skip_guidance_layers": [1]}),
        ("zimage", {"r": 3}, {"height": 136, "width": 72, "steps": 2}),
    ],
    ids=str,
)
def test_a_shared_pipeline_draws_the_picture_of_the_whole_one(two, kind, transform, call):
    found = two.results("pipeline_against_one", kind, transform, {}, **call)
    assert largest(found, "error") <= EXACT
    assert largest(found, "after") == 0


def test_tiles_of_the_vae_are_decoded_by_both_into_the_same_picture(two):
    found = two.results("tiled_decoding")
    assert largest(found, "error") <= EXACT
    assert min(result["sent"] for result in found) > 0
    assert not any(result["left"] for result in found)


@pytest.mark.parametrize("method", ["sdedit", "imax"])
def test_a_cascade_of_stages_is_shared_and_its_tiles_too(two, method, tmp_path):
    found = two.results("cascade", method, tmp_path / "stages")
    for result in found:
        assert max(result["differences"]) <= 1, "rounding to whole colours"
        assert result["stages"] > 1
        assert result["sent"]["vae"] > 0
        assert "which would all write there. Leave folder out" in result["refused"]
    assert len({result["sum"] for result in found}) == 1
    assert not list(tmp_path.iterdir())


def test_stale_borders_are_those_of_now_where_the_input_does_not_change(two):
    found = two.results("stale_with_the_same_input")
    assert largest(found, "error") <= EXACT
    assert min(result["saved"] for result in found) > 0.1, "the last step has nothing to send"


def test_stale_borders_draw_nearly_the_same_picture_and_the_same_one_again(two):
    found = two.results("stale_picture")
    assert 20 < min(result["psnr"] for result in found) < 119
    assert largest(found, "again") == 0


def test_stale_borders_of_another_batch_are_not_used(two):
    found = two.results("stale_where_guidance_ends")
    assert found[0]["batches"] == 4 * [2, 2, 2, 2, 1, 1]
    assert largest(found, "sync") <= EXACT
    assert EXACT < largest(found, "stale") < 0.2
    assert largest(found, "stale") == largest(found, "again")


def formula(height, text_len, r, itemsize=4, width=16, heads=2, dim=16, layers=4, channels=8):
    """Bytes that rank 0 of 2 sends in one call."""
    border = 2 * (r - 1) * width * heads * dim
    text = text_len * heads * (dim + 1) + text_len * heads
    return {
        "border": layers * border * itemsize,
        "text": layers * text * 4,
        "output": height // 2 * width * channels * 4,
    }


@pytest.mark.parametrize(("height", "r"), [(16, 3), (32, 3), (32, 5)])
def test_bytes_grow_with_the_border_and_not_with_the_picture(two, height, r):
    found = two.results("flux_against_one", height, 16, 12, r)
    for result in found:
        calls = {name: sent / 2 for name, sent in result["sent"].items() if name != "control"}
        assert calls == formula(height, 12, r)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("seed", r"rank 1 differs from rank 0 in the latents \(another seed\?\)"),
        ("prompt", r"rank 1 differs from rank 0 in the text \(another prompt\?\)"),
        (
            "size",
            r"rank 1 differs from rank 0 in the sizes \(height, width\) in tokens: .*\[\[24, 16\]\] against \[\[16, 16\]\]",
        ),
        ("radius", r"rank 1 differs from rank 0 in the windows \(r\): .*disc_r4"),
        ("weights", r"rank 1 differs from rank 0 in the weight \S+"),
        ("settings", r"rank 1 differs from rank 0 in the settings of parallel.enable: .*average"),
    ],
)
def test_ranks_that_do_different_things_are_named_at_the_first_step(two, what, words):
    for kind, message in two.errors("disagreeing", what):
        assert kind == "AgreedError"
        assert re.search(words, message), message
        assert "call 1" in message


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("too small", "8 x 8 tokens has 1 bands of 8 lines .*too few for 2 ranks"),
        ("gradients", "needs gradients"),
        ("skipped", "skips the first block"),
        ("dense cache", "enable_cache"),
    ],
)
def test_what_cannot_be_shared_is_said_before_any_work(two, what, words):
    for kind, message in two.errors("refused", what):
        assert kind in ("ValueError", "AgreedError")
        assert re.search(words, message), message


def test_a_picture_that_is_too_small_may_leave_a_rank_idle(two):
    assert max(two.results("refused", "fewer")) <= EXACT


@pytest.mark.parametrize("kind", ["flux", "zimage"])
def test_compiled_blocks_are_shared_like_others(two, kind):
    found = two.results("compiled", kind, timeout=1800)
    assert largest(found, "error") <= EXACT
    assert [(result["graphs"] > 0, result["new"]) for result in found] == [(True, 0)] * 2


@pytest.mark.kept
@pytest.mark.skipif(why_not_compiled(CPU) is not None, reason=str(why_not_compiled(CPU)))
def test_compiled_flex_attention_over_a_band_s_block_mask_is_the_whole_one(two):
    found = two.results("flux_against_one", 24, 17, 20, 4, batch=2, backend="flex", timeout=1800)
    assert largest(found, "error") <= EXACT
    assert min(result["window"] for result in found) > 1e-3
