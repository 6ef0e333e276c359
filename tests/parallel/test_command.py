"""``flexclear generate --parallel`` under torchrun: the picture of one process, written and told by the first rank only."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from flexclear import cli
from flexclear.picture_files import read_settings

OPTIONS = [
    "--prompt", "a red apple", "--radius", "4", "--backend", "sdpa", "--device", "cpu", "--steps", "2", "--text-len", "16",
    "--size", "64x128", "--json",
]  # fmt: skip


def test_two_processes_write_one_picture_which_is_that_of_one(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "embedded", *OPTIONS, "--out", str(tmp_path / "one.png")])
    assert not end.value.code, capsys.readouterr().err
    launcher = ["torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [
            sys.executable, "-m", *launcher, "-m", "flexclear", "generate", "embedded", *OPTIONS, "--parallel",
            "--out", str(tmp_path / "two.png"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = done.stdout.splitlines()
    assert json.loads(line)["path"] == str(tmp_path / "two.png")
    assert done.stderr.count("two.png") == 1, "one rank speaks"
    assert read_settings(tmp_path / "two.png")["settings"]["ranks"] == 2
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.size == two.size == (128, 64)
        furthest = max(abs(a - b) for a, b in zip(one.tobytes(), two.tobytes(), strict=True))
    assert furthest <= 1, "rounding to whole colours"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--parallel"], "start them with torchrun --nproc-per-node N -m flexclear generate ... --parallel"),
        (["--exchange", "stale"], "--parallel-text and --exchange are of --parallel"),
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
