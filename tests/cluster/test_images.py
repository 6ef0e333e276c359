"""``flexclear generate --ray`` on a cluster of two nodes draws what one process draws, whatever happens to workers."""

from __future__ import annotations

import json

import pytest

from helpers.models_video import tiny_wan
from helpers.pipelines_video import TEXT, wan_parts
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


@pytest.mark.kept
def test_a_set_that_loses_a_node_is_that_of_one_process(drawn):
    found = drawn("--seed", "1", "--seed", "2", removed_after=2)
    assert found["did"] == ["removed"]


@pytest.mark.kept
def test_a_set_that_loses_an_actor_and_a_node_is_that_of_one_process(drawn):
    found = drawn(*(part for seed in range(12) for part in ("--seed", str(seed))), killed_after=2, removed_after=16)
    assert found["did"] == ["killed", "removed"]
    assert found["err"].count("was lost") >= 2


@pytest.mark.kept
def test_an_interrupt_keeps_what_is_finished_and_ends_the_actors(tmp_path):
    seeds = [part for seed in range(6) for part in ("--seed", str(seed))]
    found = in_cluster(
        "interrupted",
        arguments=[*SET, *FAST, *seeds],
        out=str(tmp_path / "out"),
        alone=str(tmp_path / "alone"),
        after=3,
    )
    status, told, said = found["first"]
    assert status == 130, said
    assert "Traceback" not in said
    assert 3 <= len(found["kept"]) < 24
    assert len(told.splitlines()) <= len(found["kept"])
    assert found["actors"] == [], "actors go on"
    status, told, said = found["resumed"]
    assert status == 0, said
    assert len(told.splitlines()) == 24 - len(found["kept"]), "drawn again"
    assert found["alone"][0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.kept
def test_videos_of_a_cluster_and_of_this_machine_are_those_of_one_process(tmp_path):
    from diffusers import WanPipeline

    WanPipeline(**wan_parts(tiny_wan(text_dim=TEXT))).save_pretrained(tmp_path / "wan")
    line = ["generate", str(tmp_path / "wan"), "--prompt", "a red apple that rolls", "--size", "32x48", "--r", "2"]
    line += ["--num-frames", "9", "--frame-radius", "1", "--steps", "1", "--text-len", "16", "--backend", "sdpa"]
    two = [*line, "--seed", "1", "--seed", "2", "--format", "gif", "--device", "cpu", "--out"]
    commands = [
        [*two, str(tmp_path / "out"), "--ray", "ADDRESS"],
        [*two, str(tmp_path / "local"), "--ray", "local"],
        [*two, str(tmp_path / "alone")],
        [*line, "--seed", "2", "--device", "cpu", "--out", str(tmp_path / "single.gif"), "--ray", "ADDRESS"],
    ]
    found = in_cluster("runs", commands=commands)["runs"]
    assert [status for status, _, _ in found] == [0] * 4, found
    alone = contents(tmp_path / "alone")
    assert len(alone) == 2
    assert contents(tmp_path / "out") == alone
    assert contents(tmp_path / "local") == alone
    assert (tmp_path / "single.gif").read_bytes() in alone.values()
    assert not any("raylet" in out for _, out, _ in found)


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
