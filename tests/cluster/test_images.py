"""``flexclear generate --ray`` on a cluster of two nodes draws what one process draws, whatever happens to workers."""

from __future__ import annotations

import json

import pytest

from helpers.ray_cluster import in_cluster

SET = (
    "generate",
    "embedded",
    "--prompt",
    "a red apple",
    "--prompt",
    "a blue cup",
    "--size",
    "64x64",
    "--size",
    "96x64",
)
FAST = ("--steps", "3", "--text-len", "16", "--r", "4", "--backend", "sdpa", "--device", "cpu", "--json")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def drawn(tmp_path):
    """Draws a set while things happen, and compares it with that of one process."""

    def run(*arguments, **steps):
        folders = {name: str(tmp_path / name) for name in ("out", "alone")}
        found = in_cluster("images", arguments=[*SET, *FAST, *arguments], **folders, **steps)
        assert found["status"] == [0, 0], found["err"]
        assert contents(tmp_path / "out") == contents(tmp_path / "alone")
        told = [json.loads(line)["path"] for line in found["out"].splitlines()]
        assert sorted(told) == sorted(str(path) for path in (tmp_path / "out").iterdir()), "each is drawn once"
        return found

    return run


def test_a_set_that_loses_a_node_is_that_of_one_process(drawn):
    found = drawn("--seed", "1", "--seed", "2", removed_after=2)
    assert found["did"] == ["removed"]


@pytest.mark.kept
def test_a_set_that_loses_an_actor_and_a_node_is_that_of_one_process(drawn):
    found = drawn(*(part for seed in range(12) for part in ("--seed", str(seed))), killed_after=2, removed_after=16)
    assert found["did"] == ["killed", "removed"]
    assert found["err"].count("was lost") >= 2


@pytest.mark.kept
def test_a_set_is_completed_by_another_process_or_the_cluster(tmp_path):
    line = [*SET, *FAST, "--seed", "1", "--seed", "2", "--batch", "2", "--out", str(tmp_path / "out")]
    [(status, _, err)] = in_cluster("runs", commands=[[*line, "--ray", "ADDRESS"]])["runs"]
    assert status == 0, err
    whole = contents(tmp_path / "out")
    names = sorted(whole)
    for name in (names[1], names[6], names[7]):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "other").mkdir()
    for name in names[:3]:
        (tmp_path / "other" / name).write_bytes(whole[name])
    resumed = [
        [*line, "--resume", "--ray", "ADDRESS"],
        [*line[:-1], str(tmp_path / "other"), "--resume"],
        [*line, "--steps", "2", "--resume", "--ray", "ADDRESS"],
    ]
    found = in_cluster("runs", commands=resumed)["runs"]
    assert [status for status, _, _ in found] == [0, 0, 2], found
    assert [len(out.splitlines()) for _, out, _ in found] == [3, 5, 0]
    assert [sorted(contents(tmp_path / name)) for name in ("out", "other")] == [names, names]
    assert {name for name in names[:3] if contents(tmp_path / "other")[name] != whole[name]} == set()
    assert "is not of this set" in found[2][2]
