"""The command line, the explanation and the contact sheet; the demo as a user runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

import flexclear
from flexclear.images.sheet import contact_sheet
from flexclear.masks import Disc, Layout, block_pairs, cost


def flexclear_command(*arguments, cwd=None):
    command = [sys.executable, "-m", "flexclear", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_an_explanation_holds_the_exact_costs_of_both_orders():
    told = flexclear.explain(2048, 1040, r=8)
    layout = Layout(128, 65)
    assert told.cost == cost(layout, Disc(8))
    assert told.raster_cost == cost(layout.with_order("raster"), Disc(8), block_size=128)
    pairs = block_pairs(layout, Disc(8))
    assert told.cost.full == pairs.full_count
    assert "128 x 65 image tokens and 512 of text" in str(told)
    assert f"{told.cost.density:.2%}" in str(told)


def test_an_explanation_says_plainly_where_there_is_no_gain():
    assert "Do not expect a speed-up" in str(flexclear.explain(512, 512, r=16))
    assert "speed-up" not in str(flexclear.explain(4096, 4096, r=16))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 1024), ValueError, "height must be an int >= 16 in pixels, got 10"),
        ((1024, 1024.0), TypeError, "width must be an int >= 16 in pixels, got 1024.0"),
        ((1024, 1024, 0), ValueError, "window radius r must be an int >= 1"),
    ],
)
def test_bad_explanations_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        flexclear.explain(*arguments)


def test_explain_prints_density_blocks_and_work():
    done = flexclear_command("explain", "--height", 1024, "--width", 1024, "--r", 16)
    assert done.returncode == 0, done.stderr
    for text in ("33.21%", "86.6  GFLOPs", "full blocks            544", "executed / useful     1.42"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("explain", "--height", 1024, "--width", 1024, "--r", 0),
            "'--r'",
        ),
        (("explain", "--height", 8, "--width", 1024), "--height must be at least one token's 16 pixels, got 8"),
        (("demo", "--size", 100), "--size must be a multiple of 8 pixels, got 100"),
        (("demo", "--r", -1), "'--r'"),
    ],
    ids=["radius", "height", "size", "demo radius"],
)
def test_a_bad_argument_is_one_line_and_exit_status_2(arguments, message):
    done = flexclear_command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("flexclear: ")


def test_the_demo_writes_a_sheet_and_a_table_and_names_unknown_words(tmp_path):
    done = flexclear_command(
        *(
            "demo",
            "--prompt",
            "a red apple on a zebra background",
            "--r",
            3,
            "--steps",
            2,
            "--seed",
            5,
            "--out",
            "here",
        ),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "was not trained on: zebra" in done.stderr
    assert done.stdout.startswith("| "), "standard output begins with the result"
    with Image.open(tmp_path / "here" / "contact_sheet.png") as sheet:
        assert sheet.width > 500
        assert len(sheet.convert("RGB").getcolors(1 << 24)) > 50
    table = (tmp_path / "here" / "table.md").read_text()
    assert "| dense | 100 % | 1.00 |" in table
    density = cost(Layout(32, 32, 64), Disc(3), channels=128).density
    assert f"| 3 | {100 * density:.1f} % |" in table
    assert "contact_sheet.png" in done.stdout
    assert "table.md" in done.stdout


def test_a_contact_sheet_keeps_each_picture_in_its_place():
    colours = [["red", "lime"], ["blue", "black"]]
    rows = [[Image.new("RGB", (8, 4 if c == "blue" else 8), c) for c in row] for row in colours]
    sheet = contact_sheet(rows, ["first", "second"], ["a", "b"], cell=100)
    left, right, top, bottom = 180 + 50, 180 + 112 + 50, 46 + 50, 46 + 112 + 50
    assert sheet.getpixel((left, top)) == (255, 0, 0)
    assert sheet.getpixel((right, top)) == (0, 255, 0)
    assert sheet.getpixel((left, bottom)) == (0, 0, 255)
    assert sheet.getpixel((right, bottom)) == (0, 0, 0)
    assert sheet.getpixel((left, bottom - 30)) == (255, 255, 255), "the aspect ratio is kept"


def test_a_sheet_whose_labels_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="got 1 row labels for 2 rows and 1 column labels"):
        contact_sheet([[Image.new("RGB", (8, 8))]] * 2, ["one"], ["a"])
