"""The page says what the results say, and the check of committed results finds a wrong figure."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1]))
from bench import machine
from bench.paper import check
from bench.paper.counterparts import COUNTERPARTS
from bench.paper.page import PAGE, with_section

BY_NAME = {one.name: one for one in check.CHECKS}


def test_the_page_has_every_table_and_figure_as_the_results_say_now():
    """But for dates and commits, which a shallow clone does not know."""
    page = PAGE.read_text(encoding="utf-8")
    undated = re.sub(r"\(\d{4}-\d\d-\d\d, [0-9a-f]+\+?\)|\(not committed yet\)", "(then)", page)
    assert undated == with_section(undated, lambda file: "then"), "python -m bench.paper.page writes it"
    names = [one.name for one in COUNTERPARTS]
    assert names == [f"Table {n}" for n in range(1, 11)] + [f"Figure {n}" for n in (2, 4, 5, 10, 11)]
    for one in COUNTERPARTS:
        assert all((machine.RESULTS / name).is_file() for name in one.results), one.name


def test_a_result_says_itself_where_it_comes_from(tmp_path):
    file = tmp_path / "made.json"
    file.write_text(json.dumps({"facts": {"commit": "0123abcde", "date": "2026-01-02"}, "rows": []}))
    assert machine.origin_of(file) == {"commit": "0123abcde", "date": "2026-01-02"}
    assert set(machine.origin()) <= {"commit", "date"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"students": "others"}, "The distilled weights were earlier ones than those that ship."),
        ({"teacher": "another"}, "The model was an earlier version of the one that ships."),
    ],
    ids=["the same", "students", "teacher"],
)
def test_a_result_of_earlier_weights_says_so(changed, said):
    ships = json.loads((machine.RESULTS / "students.json").read_text(encoding="utf-8"))
    of_now = {"teacher": ships["settings"]["teacher"], "students": ships["fingerprint"]}
    enlarged = {"facts": {**of_now, **changed}, "rows": []}
    (table,) = (one for one in COUNTERPARTS if one.name == "Table 3")
    text = table.said({"highres.json": enlarged, "students.json": ships})
    assert ("earlier" in text) == bool(said)
    assert text.endswith(said)


def committed(one):
    return json.loads((machine.RESULTS / one.result).read_text(encoding="utf-8"))


def spoilt(content, name, step):
    """The content with the first number under that key moved by a step."""
    changed = copy.deepcopy(content)

    def move(part):
        if isinstance(part, dict) and isinstance(part.get(name), int | float):
            part[name] += step
            return True
        if isinstance(part, dict) and isinstance(part.get(name), list):
            part[name][0] = part[name][0] + step if not isinstance(part[name][0], list) else part[name][0]
            return True
        return any(map(move, part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()))

    assert move(changed), name
    return changed


@pytest.mark.parametrize(
    ("name", "key", "within", "beyond"),
    [
        ("cost", "flops", 0, 1),
        ("parallel_model", "speed_up_sync", 0, 0.1),
        ("clips", "chosen", 0, 0.01),
        ("properties", "relative_distance", 1e-3, 0.01),
        ("properties", "rank_limit", 0, 1),
        ("perturb-128", "psnr", -30, -50),
        ("blockmask", "partial", 0, 1),
        ("blockmask", "ms", 0.1, 1e4),
    ],
)
def test_a_wrong_figure_is_found_and_one_within_its_bar_is_not(name, key, within, beyond):
    one = BY_NAME[name]
    content = committed(one)
    assert check.compared(content, content, one) == []
    assert check.compared(spoilt(content, key, within), content, one) == []
    wrong = check.compared(spoilt(content, key, beyond), content, one)
    assert wrong
    assert key in wrong[0] or "times as fast" in wrong[0]


def test_equal_images_are_those_that_differ_by_some_rounded_values():
    one = BY_NAME["perturb-128"]
    assert (
        check.compared({"psnr": 120.0}, {"psnr": 95.0}, one)
        == check.compared({"psnr": 79.0}, {"psnr": 120.0}, one)
        == []
    )
    assert check.compared({"psnr": 120.0}, {"psnr": 77.0}, one) == ["psnr is 120.0, and 77.0 now (more than 0.1 apart)"]
    assert check.compared({"psnr": 77.9}, {"psnr": 77.5}, one)


def test_results_of_another_shape_are_found():
    one = BY_NAME["clips"]
    content = committed(one)
    shorter = {**content, "rows": content["rows"][1:]}
    assert "rows has" in check.compared(shorter, content, one)[0]
    other = {**content, "facts": {**content["facts"], "blocks": [64, 64], "torch": "2.99", "new": 1}}
    assert check.compared(other, content, one) == [
        "facts.blocks[0] is 64, and 128 now",
        "facts.new is only in the committed result",
    ]


def test_the_command_makes_a_result_again_and_fails_on_a_wrong_committed_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    app = typer.Typer()
    app.command()(check.main)
    one = BY_NAME["cost"]
    place = tmp_path / one.result
    place.parent.mkdir()
    content = committed(one)
    place.write_text(json.dumps(content))
    fine = CliRunner().invoke(app, ["--only", "cost", "--results", str(tmp_path)])
    assert (fine.exit_code, fine.output) == (0, "cost: as committed\n")
    monkeypatch.setattr(check, "again", lambda one, folder: content)  # It has been made again once; that takes seconds.
    place.write_text(json.dumps(spoilt(content, "flops", 1)))
    wrong = CliRunner().invoke(app, ["--only", "cost", "--results", str(tmp_path)])
    assert wrong.exit_code == 1
    assert "cost/cost.json: rows[0].flops is 260919263233, and 260919263232 now" in wrong.output
    unknown = CliRunner().invoke(app, ["--only", "costs"])
    assert unknown.exit_code == 2
