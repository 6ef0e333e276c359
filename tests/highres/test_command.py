"""``flexclear generate --highres``."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from flexclear import cli
from flexclear.highres import upscale_cascade
from flexclear.images.files import read_settings

PROMPT = "a red apple on a blue background"
FAST = ("--steps", "2", "--text-len", "16", "--r", "dense", "--device", "cpu", "--json")


def test_stages_are_drawn_kept_and_told(embedded, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flexclear.embedded.pipeline", lambda dtype: embedded)
    arguments = [
        "generate", "embedded", *FAST, "--prompt", PROMPT, "--seed", "3", "--highres", "64x48,96", "--shift", "2",
        "--stages", str(tmp_path / "stages"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    for resumed in (False, True):
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        assert done.value.code == 0
        line = json.loads(capsys.readouterr().out.strip())
        assert (line["height"], line["width"], line["steps"]) == (96, 72, 1 if resumed else 2 + 2)
        expected = upscale_cascade(
            embedded, PROMPT, [(64, 48), 96], steps=2, shift=2.0, seed=3, max_sequence_length=16
        ).image  # fmt: skip
        assert np.array_equal(np.asarray(Image.open(line["path"])), np.asarray(expected))
    with pytest.raises(SystemExit) as done:
        cli.main([*arguments, "--resume"])
    assert not done.value.code
    assert capsys.readouterr().out == ""
    told = read_settings(line["path"])["settings"]
    assert [stage["method"] for stage in told["stages"]] == ["base", "sdedit"]
    assert [stage["shift"] for stage in told["stages"]] == [2.0, 2.0]
    kept = tmp_path / "stages" / "a-red-apple-on-a-blue-background_3"
    assert sorted(path.name for path in kept.iterdir()) == ["cascade.json", "stage_1_64x48.png", "stage_2_96x72.png"]


BAD = {
    "no sizes": (("--highres", "big"), "sizes are written 1024,2048,4096"),
    "no multiple": (("--highres", "64,100"), "size 100: sides must be multiples of 8 pixels; near it: 96 x 96"),
    "shrinking": (("--highres", "128,64"), "every stage must be larger"),
    "two kinds of sizes": (("--highres", "64,128", "--size", "64x64"), "--highres names the sizes of all stages"),
    "a method": (("--highres", "64,128", "--highres-method", "magic"), "--highres-method must be one of"),
    "strength alone": (("--strength", "0.5"), "--strength needs --image, or the stages of --highres"),
    "shift and stages alone": (("--shift", "2", "--stages", "x"), "--shift, --stages needs the stages of --highres"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_named_before_anything_is_loaded(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(SystemExit) as done:
        cli.main(["generate", "embedded", "--prompt", PROMPT, "--out", str(tmp_path / "out"), *arguments])
    assert done.value.code == 2
    assert message in capsys.readouterr().err
