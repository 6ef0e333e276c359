"""``flexclear generate --parallel`` as torchrun starts it: one process's image, written and told by the first rank."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from flexclear import cli
from flexclear.images.files import read_settings

from helpers.parallel_group import Group

OPTIONS = [
    "--prompt", "a red apple", "--radius", "4", "--backend", "sdpa", "--device", "cpu", "--steps", "2", "--text-len", "16",
    "--json",
]  # fmt: skip


@pytest.fixture
def two():
    group = Group(2)
    yield group
    group.close()


@pytest.mark.parametrize("sizes", [("--size", "64x128"), ("--highres", "64x96,96x144")], ids=" ".join)
def test_two_processes_write_one_picture_which_is_that_of_one(two, sizes, tmp_path, capsys):
    arguments = ["generate", "embedded", *OPTIONS, *sizes, "--out"]
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, str(tmp_path / "one.png")])
    assert not end.value.code, capsys.readouterr().err
    first, other = two.results("command", *arguments, str(tmp_path / "two.png"), "--parallel")
    assert [status for status, *_ in (first, other)] == [0, 0], (first, other)
    [line] = first[1].splitlines()
    assert json.loads(line)["path"] == str(tmp_path / "two.png")
    assert "images" in first[2]
    assert other[1] == ""
    assert "two.png" not in other[2], "one rank speaks"
    assert "images" not in other[2], "and draws the bar"
    assert not first[3], "the process group is given back"
    assert not other[3]
    assert read_settings(tmp_path / "two.png")["settings"]["ranks"] == 2
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two_:
        assert one.size == two_.size == ((144, 96) if "--highres" in sizes else (128, 64))
        furthest = max(abs(a - b) for a, b in zip(one.tobytes(), two_.tobytes(), strict=True))
    assert furthest <= 1, "rounding to whole colours"


def test_torchrun_leaves_the_options_to_the_command():
    from torch.distributed.run import parse_args

    given = ["-m", "flexclear", "generate", "embedded", *OPTIONS, "--parallel"]
    parsed = parse_args(["--nproc-per-node", "2", *given])
    assert (parsed.nproc_per_node, parsed.training_script) == ("2", "flexclear")
    assert parsed.training_script_args == given[2:]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--parallel"], "start them with torchrun --nproc-per-node N -m flexclear generate ... --parallel"),
        (["--exchange", "stale"], "--parallel-text and --exchange need --parallel"),
        (["--parallel", "--exchange", "later"], "--exchange must be one of"),
        (["--parallel", "--parallel-text", "some"], "--parallel-text must be one of"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "embedded", "--prompt", "a red apple", *options, "--out", str(tmp_path / "no.png")])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_a_folder_of_stages_is_refused_where_several_processes_would_write_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["--parallel", "--highres", "64,128", "--stages", str(tmp_path / "kept")]
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "embedded", "--prompt", "a red apple", *options, "--out", str(tmp_path / "no.png")])
    assert end.value.code == 2
    assert "--stages keeps files that several processes would write" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
