"""``explain`` of a video's size: frames after the VAE, tokens, exact costs; what does not go together is named."""

from __future__ import annotations

import pytest
from PIL import Image
from typer.testing import CliRunner

import flexclear
from flexclear import cli
from flexclear.masks import Layout, all_frames, cost, cylinder, suited

CLIP = {"height": 128, "width": 192, "num_frames": 17}
LAYOUT = Layout(8, 12, 0, frames=5)


def test_costs_are_those_of_the_frames_after_the_vae_in_the_order_that_suits_the_window():
    told = flexclear.explain(**CLIP, r=4, frame_radius=1)
    assert told.layout == suited(LAYOUT, cylinder(4, 1))
    assert told.cost == cost(told.layout, cylinder(4, 1), block_size=told.block_size)
    assert told.raster_cost == cost(LAYOUT.with_order("raster"), cylinder(4, 1), block_size=128)
    text = str(told)
    assert text.startswith(
        "17 frames, 5 after the VAE: 5 x 8 x 12 = 480 video tokens and no text in attention, window "
    )
    assert f"executed / useful {told.cost.amplification:8.2f}" in text


def test_all_frames_another_vae_and_text_in_the_sequence():
    told = flexclear.explain(**CLIP, r=3, frame_radius="all", frames_per_token=8, text_len=7, text_first=False)
    assert (told.layout.frames, told.layout.seq_len) == (3, 3 * 8 * 12 + 7)
    assert told.window == all_frames(3)
    assert "7 of text (text last)" in str(told)


def test_an_image_has_no_frames():
    assert flexclear.explain(128, 192, 4).layout == Layout(8, 12)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"num_frames": 16},
            r"num_frames must be 4 n \+ 1, which the VAE turns into n \+ 1, got 16; the nearest are 13 and 17",
        ),
        ({"num_frames": 0}, "num_frames must be an int >= 1 before the VAE, got 0"),
        ({"num_frames": None}, "frame_radius=1 is for videos; pass num_frames too"),
        ({"frame_radius": None}, "num_frames=17 needs a frame_radius"),
        ({"frame_radius": "some"}, "frame_radius must be a number of frames or 'all', got 'some'"),
        ({"frame_radius": -1}, "frame_radius must be an int >= 0"),
        ({"frame_radius": 5}, "17 frames are 5 after the VAE, so that a window would see all of them; 'all' says so"),
        ({"frames_per_token": 0}, "frames_per_token must be an int >= 1"),
    ],
)
def test_what_does_not_go_together_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        flexclear.explain(**{**CLIP, "r": 4, "frame_radius": 1, **changed})


def run(*arguments):
    return CliRunner().invoke(cli.app, ["explain", "--height", "128", "--width", "192", *arguments])


def test_the_command_prints_it_and_draws_a_strip_of_frames(tmp_path):
    done = run("--num-frames", "17", "--frame-radius", "1", "--r", "4", "--png", str(tmp_path / "w.png"))
    assert done.exit_code == 0, done.output
    assert "17 frames, 5 after the VAE" in done.stdout
    with Image.open(tmp_path / "w.png") as picture:
        assert picture.width > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-frames", "17", "--table"), "--table is over sizes of images"),
        (("--num-frames", "17", "--frame-radius", "x"), "0 or more, or 'all'; got 'x'"),
        (("--num-frames", "17"), "needs a frame_radius"),
    ],
)
def test_the_command_says_what_does_not_go_together(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        cli.main(["explain", "--height", "128", "--width", "192", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
