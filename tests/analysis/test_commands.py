"""``flexclear analyze`` as a user runs it, on the embedded model; the cost table against the published figures."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from flexclear.analysis.cost import cost_table, markdown, published_seconds, read_measured
from flexclear.cli import app, main

SMALL = ["--prompt", "a red apple on a blue background", "--size", "64x48", "--steps", "2", "--text-len", "8"]


def test_attention_is_drawn_and_told_for_every_layer(tmp_path):
    done = CliRunner().invoke(
        app, ["analyze", "attention", "embedded", *SMALL, "--query", "4x2", "--layer", "0", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    (told,) = json.loads((tmp_path / "mass.json").read_text())
    assert told["step"] == 1
    assert told["grid"] == [8, 6]
    assert all(sum(head) == pytest.approx(1) for head in told["mass"])
    (maps,) = tmp_path.glob("maps_*_step_1.png")
    for file in (maps, tmp_path / "mass.png", tmp_path / "picture.png"):
        with Image.open(file) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 22)) > 20
    assert (tmp_path / "mass.md").read_text() in done.stdout


def test_perturbed_pictures_are_compared(tmp_path):
    done = CliRunner().invoke(
        app, ["analyze", "perturb", "embedded", *SMALL, "--remote", "8", "--local", "3", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "perturb.json").read_text())
    assert rows["as it is"]["psnr"] == 120
    assert rows["remote distances clipped at 8"]["psnr"] > 60, "nothing is farther than 8 tokens here"
    assert rows["local distances clipped at 3"]["psnr"] < 60
    with Image.open(tmp_path / "perturb.png") as sheet:
        assert sheet.width > 3 * 176


def test_costs_are_the_published_ones(tmp_path):
    rows = {(row.side, row.radius): row for row in cost_table([1024, 2048], [8, 16])}
    assert {key: round(row.flops / 1e9, 1) for key, row in rows.items()} == {
        (1024, None): 260.9,
        (1024, 8): 63.5,
        (1024, 16): 86.6,
        (2048, None): 3507.9,
        (2048, 8): 246.2,
        (2048, 16): 352.6,
    }
    assert rows[2048, 8].published_seconds == 15.67
    assert rows[1024, None].amplification == 1 < rows[1024, 8].amplification
    assert published_seconds(1536, 8) is None
    page = markdown(list(rows.values()))
    assert "| 2048 | r = 8 | 246.2 | 7.02% |" in page
    assert "1.33 x" in page


def test_the_cost_command_puts_measured_times_beside(tmp_path):
    measured = tmp_path / "results"
    measured.mkdir()
    entry = {"variant": "tiled order", "tokens": "64 x 64 + 512", "r": 8, "ms": 91.7, "speedup": 1.43}
    (measured / "attention-cpu.json").write_text(json.dumps({"facts": {}, "rows": [entry]}))
    arguments = ["analyze", "cost", "--side", "512", "--side", "1024", "--r", "8", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--results", str(measured)])
    assert done.exit_code == 0, done.output
    assert "| 64 x 64 + 512 | 8 | tiled order | 92 | 1.43 x |" in done.stdout
    told = json.loads((tmp_path / "out" / "cost.json").read_text())
    assert [row["side"] for row in told["rows"]] == [512, 512, 1024, 1024]
    with Image.open(tmp_path / "out" / "cost.png") as plot:
        assert plot.width > 1500
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_measured(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no attention"):
        read_measured(tmp_path / "out")
    (measured / "attention-cpu.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is not a result of bench/attention/speed\.py"):
        read_measured(measured)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "embedded", *SMALL, "--query", "4"], "--query is ROWxCOLUMN in tokens"),
        (["attention", "embedded", *SMALL, "--at", "2"], "--at 2: the run has steps 0 to 1"),
        (["attention", "nothing/here/at/all", *SMALL], "no folder nothing/here/at/all"),
    ],
)
def test_a_bad_argument_is_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["analyze", *arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
