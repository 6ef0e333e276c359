"""Three, four and eight gloo processes: several neighbours, idle ranks, and unequal bands."""

from __future__ import annotations

import pytest

from helpers.parallel_group import Group

EXACT = 1e-5


@pytest.fixture
def group(request):
    made = Group(request.param)
    made.results("awake")
    yield made
    made.close()


@pytest.mark.kept
@pytest.mark.parametrize("group", [3], indirect=True)
def test_three_bands_are_the_whole_picture(group):
    for size, r, options in (
        ((24, 16, 12), 12, {}),  # the first and the last rank are neighbours, too
        ((40, 10, 7), 4, {"shares": (1.0, 3.0, 1.0), "batch": 2}),
        ((16, 13, 9), 3, {"too_small": "fewer"}),
        ((24, 8, 9), 3, {"down_factor": 5}),
    ):
        found = group.results("flux_against_one", *size, r, **options)
        assert max(result["error"] for result in found) <= EXACT, (size, r, options)
        assert min(result["window"] for result in found) > 1e-3
        assert len({result["sum"] for result in found}) == 1
    found = group.results("average_against_eq_7", 24, 9, 7, 3, (0, 8, 16, 24))
    assert max(result["error"] for result in found) <= EXACT
    for kind, shape, r, frames in (
        ("wan", (4, 10, 6), 3, 1),
        ("wan", (9, 5, 4), 4, 2),
        ("hunyuan video", (4, 10, 6), 3, 1),
    ):
        found = group.results("clip_against_one", kind, shape, 7, r, frame_radius=frames)
        assert max(result["error"] for result in found) <= EXACT
        assert all(result["border"] == result["planned border"] > 0 for result in found)
    found = group.results("family_against_one", "sd3.5 with residuals", {"r": 3}, too_small="fewer")
    assert max(result["error"] for result in found) <= EXACT
    for kind in ("zimage, pads, two captions", "zimage, no pads"):
        found = group.results("family_against_one", kind, {"r": 3}, too_small="fewer")
        assert max(result["error"] for result in found) <= EXACT
    for kind, message in group.errors("family_against_one", "qwen", {"r": 3}, too_small="fewer"):
        assert kind == "AgreedError"
        assert "leaves 1 of 3 ranks idle" in message
        assert "QwenImageTransformer2DModel cannot run without image tokens. Use 2 ranks" in message
    assert max(result["error"] for result in group.results("dense_against_one", "ring", 24, 8, 9)) <= EXACT
    for kind, message in group.errors("dense_against_one", "ulysses", 24, 8, 9):
        assert kind == "ValueError"
        assert "the 2 of this FluxTransformer2DModel are not divisible by 3 ranks" in message


@pytest.mark.kept
@pytest.mark.parametrize("group", [4], indirect=True)
def test_a_mesh_gives_each_group_a_picture_of_its_own(group):
    found = group.results("two_pictures_at_once")
    assert max(result["error"] for result in found) <= EXACT
    assert len({result["sum"] for result in found}) == 2
    assert all(
        "mesh must have one dimension" in result["refused"] and "mesh['bands']" in result["refused"] for result in found
    )


@pytest.mark.kept
@pytest.mark.parametrize("group", [4, 8], indirect=True)
def test_many_bands_are_the_whole_picture(group):
    height = 8 * group.size
    for r, options in ((3, {}), (21, {"down_factor": 4, "batch": 2})):
        found = group.results("flux_against_one", height, 10, 12, r, **options)
        assert max(result["error"] for result in found) <= EXACT
        assert min(result["window"] for result in found) > 1e-3
