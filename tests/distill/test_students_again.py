"""bench/distillation/students.py: students that ship go on from their own weights when their teacher has changed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from flexclear.common.metrics import PACKAGES
from flexclear.common.shipped import students_directory
from flexclear.embedded.fingerprint import teacher_fingerprint
from flexclear.embedded.students import read_students

sys.path.append(str(Path(__file__).parent.parent.parent))
from bench.distillation import students as bench
from bench.distillation.data import Joined

for package in PACKAGES.values():
    pytest.importorskip(package)

NAMES = ("clear_local_4.safetensors", "clear_local_4_down_4.safetensors")


@pytest.fixture
def source(tmp_path) -> Path:
    """Two of the students that ship, said to be of another teacher."""
    place = tmp_path / "students"
    place.mkdir()
    for name in NAMES:
        shutil.copyfile(students_directory() / name, place / name)
    entries = [{"path": NAMES[0], "radius": 4, "down_factor": None}, {"path": NAMES[1], "radius": 4, "down_factor": 4}]
    (place / "students.json").write_text(json.dumps({"teacher": "another", "students": entries}))
    return place


def invoke(source: Path, *more: str, steps: tuple[int, ...] = (2,)):
    app = typer.Typer()
    app.command()(bench.main)
    home = source.parent
    return CliRunner().invoke(
        app,
        [
            *(part for count in steps for part in ("--steps", str(count))),
            "--batch-size",
            "2",
            "--pictures",
            "4",
            "--side",
            "16",
            "--measure",
            "2",
            "--threads",
            "2",
            "--folder",
            str(home / "work"),
            "--source",
            str(source),
            "--output",
            str(home / "out"),
            *more,
        ],
    )


@pytest.mark.kept
def test_students_go_on_from_their_weights_one_process_after_the_other(source, monkeypatch):
    monkeypatch.setattr(bench, "DENOISING", 2)
    # Masked SDPA: kernels for two windows would take longer than all the rest.
    monkeypatch.setattr("flexclear.compile.flex._why_not_compiled_on_cpu", lambda: "none are compiled for this test")
    before = {name: load_file(source / name) for name in NAMES}
    assert invoke(source, "--draw-only").exit_code == 0
    first = invoke(source, "--only", NAMES[0])
    assert first.exit_code == 0, first.output
    assert f"missing: {NAMES[1]}" in first.output
    assert all(torch.equal(before[NAMES[0]][k], v) for k, v in load_file(source / NAMES[0]).items())
    assert not (source.parent / "out").exists()

    done = invoke(source)
    assert done.exit_code == 0, done.output
    assert [student.path.name for student in read_students(source)] == list(NAMES)
    for name in NAMES:
        after = load_file(source / name)
        assert after.keys() == before[name].keys()
        moved = torch.stack([(after[k].float() - before[name][k].float()).abs().max() for k in after])
        assert 0 < moved.max() < 0.02, name  # Two steps on from its own weights, not from the teacher's.
    report = json.loads((source.parent / "out" / "students.json").read_text())
    assert report["settings"]["teacher"] == teacher_fingerprint()
    assert list(report["students"]) == ["r = 4, distilled", "r = 4 + pooled 4 x 4, distilled"]
    for row in report["students"].values():
        (after,) = row["rounds"]
        assert row["before"]["128"]["pictures"] == after["measured"]["128"]["pictures"] == 2
        assert abs(row["before"]["128"]["psnr"] - after["measured"]["128"]["psnr"]) < 3
        assert (after["steps"], after["batch_size"], after["learning_rate"]) == (2, 2, 1e-3)
    page = (source.parent / "out" / "students.md").read_text()
    assert "r = 4 + pooled 4 x 4, distilled" in page
    assert teacher_fingerprint() in page

    with pytest.raises(ValueError, match=r"steps: 2 then, 4 now"):
        raise invoke(source, steps=(4,)).exception
    with pytest.raises(ValueError, match=r"pictures: 4 then, 6 now"):
        raise invoke(source, "--pictures", "6").exception

    # A further round of one student: the first is not trained again, and nothing ships before the other one has it, too.
    shipped = {name: load_file(source / name) for name in NAMES}
    rates = ("--learning-rate", "0.001", "--learning-rate", "0.0005")
    further = invoke(source, "--only", NAMES[0], *rates, steps=(2, 3))
    assert further.exit_code == 0, further.output
    assert f"missing: {NAMES[1]}" in further.output
    assert all(torch.equal(shipped[NAMES[0]][k], v) for k, v in load_file(source / NAMES[0]).items())
    last = invoke(source, *rates, steps=(2, 3))
    assert last.exit_code == 0, last.output
    again = json.loads((source.parent / "out" / "students.json").read_text())["students"]
    for label, row in report["students"].items():
        assert again[label]["before"] == row["before"]
        assert again[label]["rounds"][:1] == row["rounds"]
        assert [one["steps"] for one in again[label]["rounds"]] == [2, 3]
    assert any(not torch.equal(shipped[NAMES[0]][k], v) for k, v in load_file(source / NAMES[0]).items())
    assert "| + 3 x 2, 0.0005 |" in " ".join((source.parent / "out" / "students.md").read_text().split("\n"))


def test_learning_rates_are_one_or_one_for_each_round(source):
    found = invoke(source, "--learning-rate", "0.001", "--learning-rate", "0.002", steps=(2, 2, 2))
    assert found.exit_code == 2
    assert "got 2 for 3 rounds" in " ".join(found.output.replace("│", " ").split())


def test_an_unknown_student_is_named(source):
    found = invoke(source, "--only", "clear_local_3.safetensors")
    assert found.exit_code == 2
    assert "clear_local_3.safetensors" in found.output


@pytest.mark.kept
def test_a_window_without_a_student_begins_with_the_teacher_s_weights(source, monkeypatch):
    monkeypatch.setattr(bench, "DENOISING", 1)
    monkeypatch.setattr("flexclear.compile.flex._why_not_compiled_on_cpu", lambda: "none are compiled for this test")
    kept = {}
    trained = bench.distill

    def watched(config, **given):
        kept["config"], kept["shapes"] = config, {given["data"].shape(i)[0] for i in range(len(given["data"]))}
        return trained(config=config, **given)

    monkeypatch.setattr(bench, "distill", watched)
    done = invoke(source, "--window", "3", "--small", "4", "--measure", "5")
    assert done.exit_code == 0, done.output
    assert (kept["config"].r, kept["config"].down_factor, kept["config"].initial_weights) == (3, None, None)
    assert kept["shapes"] == {(8, 32, 32)}
    (student,) = read_students(source)
    assert (student.path.name, student.radius) == ("clear_local_3.safetensors", 3)
    assert not (source / NAMES[0]).exists(), "the index names one student now"
    row = json.loads((source.parent / "out" / "students.json").read_text())["students"]["r = 3, distilled"]
    (after,) = row["rounds"]
    assert row["before"]["128"]["psnr"] != after["measured"]["128"]["psnr"]
    assert after["measured"]["128"]["pictures"] == 5, "of the one size that there is, not half as many"


def test_sets_of_two_sizes_are_joined_and_those_of_two_models_are_not():
    def part(size, fingerprint):
        samples = [f"{size}/{i}" for i in range(3)]

        class Part(list):
            scaling_factor, shift_factor = 1.0, 0.0

            def shape(self, index):
                return ((8, size, size), (4, 8), (8,))

        made = Part(samples)
        made.fingerprint = fingerprint
        return made

    joined = Joined(part(32, "a"), part(64, "a"))
    assert len(joined) == 6
    assert [joined[index] for index in (0, 2, 3, 5)] == ["32/0", "32/2", "64/0", "64/2"]
    assert [joined.shape(index)[0][1] for index in (2, 3)] == [32, 64]
    with pytest.raises(ValueError, match="one scaling and one model"):
        Joined(part(32, "a"), part(64, "b"))


@pytest.mark.parametrize("window", ["", "r8", "8/", "4/4/4", "0", "-3"])
def test_a_window_that_is_none_is_named(source, window):
    found = invoke(source, f"--window={window}")
    assert found.exit_code == 2
    assert "a window is a radius such as 8" in " ".join(found.output.replace("│", " ").split())
