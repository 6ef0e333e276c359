"""``flexclear generate --resume``: a set that was killed is completed, as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from flexclear.images.files import png_bytes, read_settings

from helpers.generate_calls import APPLE, FAST, FLOWER

SET = ("--prompt", APPLE, "--prompt", FLOWER, "--seed", 5, "--seed", 6)

KILLED = """
import os, signal, sys
from flexclear import cli
from flexclear.compile import files

finished, publish = [], files._publish_new

def until_the_third(beside, path):
    if len(finished) == 2:
        beside.write_bytes(beside.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
    finished.append(path)
    publish(beside, path)

files._publish_new = until_the_third
cli.main(sys.argv[1:])
"""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the set, drawn without interruption."""
    from flexclear import cli

    out = tmp_path_factory.mktemp("whole")
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in ("generate", "embedded", *FAST, *SET, "--out", out)])
    assert not end.value.code
    return contents(out)


def test_a_set_whose_process_was_killed_is_completed_bit_for_bit(whole, generate, tmp_path):
    out = tmp_path / "out"
    arguments = [str(argument) for argument in ("generate", "embedded", *FAST, *SET, "--out", out)]
    threads = str(torch.get_num_threads())  # sums over other shares round differently
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert sorted(contents(out)) == sorted(whole)[:2]
    assert any(path.name.startswith(".0003_") for path in out.iterdir())
    lines = generate(*SET, "--resume")
    assert [line["path"].rpartition("/")[2][:4] for line in lines] == ["0003", "0004"]
    assert contents(out) == whole
    assert generate(*SET, "--resume") == []
    assert contents(out) == whole


def test_a_missing_image_gets_its_own_number_back_and_other_images_stay(whole, generate, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "0001_another.png").write_bytes(b"not even an image")
    for name, content in whole.items():
        (out / f"{int(name[:4]) + 7:04d}{name[4:]}").write_bytes(content)
    _, second, third, _ = sorted(contents(out))[1:]
    (out / second).unlink()
    before = contents(out)
    [line] = generate(*SET, "--resume")
    assert line["path"] == str(out / second)
    assert contents(out) == {**before, second: whole[f"0002{second[4:]}"]}
    (out / third).unlink()
    (out / f"{third[:4]}_taken.png").write_bytes(b"")
    [line] = generate(*SET, "--resume")
    assert line["path"] == str(out / f"0012{third[4:]}")


@pytest.mark.parametrize(
    ("changed", "difference"),
    [(("--steps", 3), "settings.steps was 2, is 3"), (("--r", 3), "settings.r was 16, is 3")],
)
def test_a_folder_of_other_images_only_is_refused(whole, command, tmp_path, changed, difference):
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    before = contents(tmp_path)
    status, _, error = command("generate", "embedded", *FAST, *changed, *SET, "--out", tmp_path, "--resume")
    assert status == 2
    assert "is not of this set" in error
    assert difference in error
    assert contents(tmp_path) == before


def test_images_of_other_versions_are_of_another_set(whole, command, tmp_path):
    from PIL import Image

    name, content = next(iter(sorted(whole.items())))
    (tmp_path / name).write_bytes(content)
    told = read_settings(tmp_path / name)
    older = png_bytes(Image.new("RGB", (96, 64)), told["settings"], {**told["versions"], "torch": "2.0"})
    (tmp_path / name).write_bytes(older)
    status, _, error = command("generate", "embedded", *FAST, *SET, "--out", tmp_path, "--resume")
    assert status == 2
    assert 'versions.torch was "2.0", is ' in error


def test_a_single_file_is_kept_where_it_is_the_one(whole, command, tmp_path):
    file = tmp_path / "one.png"
    file.write_bytes(whole["0001_a-red-apple-on-a-blue-background.png"])
    before = file.read_bytes()
    arguments = ("generate", "embedded", *FAST, "--prompt", APPLE, "--out", file, "--resume", "--json")
    status, output, error = command(*arguments, "--seed", 5)
    assert (status, output) == (0, "")
    assert f"{file}: finished already" in error
    status, _, error = command(*arguments, "--seed", 6)
    assert status == 2
    assert "settings.seed was 5, is 6" in error
    assert file.read_bytes() == before


def test_what_contradicts_resume_is_refused(command, tmp_path):
    arguments = ("generate", "embedded", *FAST, "--prompt", APPLE, "--out", tmp_path, "--resume")
    status, _, error = command(*arguments, "--overwrite")
    assert status == 2
    assert "--resume keeps the finished images" in error


def test_an_image_counts_once_and_many_are_found_quickly(tmp_path, monkeypatch):
    from flexclear.generation import resuming
    from flexclear.images.files import Target

    wanted = [{"prompt": f"p{number // 2}", "seed": 1} for number in range(400)]  # each one twice
    for number in range(399):
        (tmp_path / f"{number + 4:04d}_p.png").touch()
    told = {
        tmp_path / f"{number + 4:04d}_p.png": {"settings": entry, "versions": {}} for number, entry in enumerate(wanted)
    }
    monkeypatch.setattr(resuming, "read_settings", told.__getitem__)
    calls = []
    compare = resuming._differing
    monkeypatch.setattr(resuming, "_differing", lambda *pair: calls.append(pair) or compare(*pair))
    kept, target = resuming.find_finished(Target(tmp_path, False, False), wanted, {})
    assert {number: path.name for number, path in kept.items()} == {n: f"{n + 3:04d}_p.png" for n in range(1, 400)}
    assert target.first == 4
    assert len(calls) <= 2 * len(wanted)
