"""Arguments are checked before torch is imported; every command has the same options for its output."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import typing

import pytest

import flexclear
from flexclear.cli import app
from flexclear.commands.common import finite
from flexclear.common import choices
from flexclear.generation.settings import GenerateSettings

GENERATE = ("generate", "embedded", "--prompt", "a red apple")

BAD = {
    "unknown command": (("draw",), "No such command 'draw'"),
    "unknown option": ((*GENERATE, "--size-of", "2"), "No such option"),
    "a seed of 70 bits": ((*GENERATE, "--seed", 2**70), "'--seed'"),
    "a seed below 0": ((*GENERATE, "--seed", -1), "'--seed'"),
    "guidance nan": ((*GENERATE, "--guidance", "nan"), "'--guidance': must be a finite number, got nan"),
    "guidance inf": ((*GENERATE, "--guidance", "inf"), "must be a finite number, got inf"),
    "shift nan": ((*GENERATE, "--highres", "128,256", "--shift", "nan"), "'--shift': must be a finite number"),
    "strength -inf": ((*GENERATE, "--highres", "128,256", "--strength", "-inf"), "'--strength': must be a finite"),
    "bytes": ((*GENERATE[:-1], "a\udcff"), "an argument is not valid Unicode: 'a\\udcff' has"),
    "an empty prompt": ((*GENERATE[:-1], " "), "a prompt is needed"),
    "size": ((*GENERATE, "--size", "9" * 5000 + "x64"), "a size is HEIGHTxWIDTH"),
    "stages": ((*GENERATE, "--highres", "1024,x"), "sizes are written"),
    "radius": ((*GENERATE, "--r", "9" * 5000), "--r is a window radius"),
    "data type": ((*GENERATE, "--dtype", "float8"), "--dtype must be one of"),
    "backend": ((*GENERATE, "--backend", "magic"), "--backend must be one of"),
    "recipe": ((*GENERATE, "--recipe", "int3"), "--recipe must be one of"),
    "method": ((*GENERATE, "--highres-method", "magic"), "--highres-method must be one of"),
    "parallel": ((*GENERATE, "--parallel"), "torchrun"),
    "exchange": ((*GENERATE, "--exchange", "later"), "--exchange must be one of"),
    "model": (("generate", "./nowhere", "--prompt", "a"), "no folder ./nowhere"),
    "prompt file": (("generate", "embedded", "--prompts", "nowhere.txt"), "no file nowhere.txt"),
    "demo: seeds": (("demo", "--seed", 2**64 - 1), "for 4 images with a seed each"),
    "demo: size": (("demo", "--size", "100"), "a multiple of 8"),
    "explain: size": (("explain", "--height", "8", "--width", "64"), "--height must be at least"),
    "explain: text": (("explain", "--height", "64", "--width", "64", "--text-len", "-1"), "'--text-len'"),
    "bench: sizes": (("bench", "--sizes", "1024,x"), "sizes are written"),
    "bench: radii": (("bench", "--r", "8,0"), "--r takes window radii in tokens from 1 on"),
    "bench: type": (("bench", "--dtype", "float8"), "--dtype must be one of"),
    "bench: model": (("bench", "flux.3"), "the model must be one of ['flux.1-dev', "),
    "bench: seconds": (("bench", "--seconds", "nan"), "'--seconds'"),
    "bench: tuning": (("bench", "--tune-seconds", "inf"), "'--tune-seconds': must be a finite number"),
    "fuzz: seconds": (("fuzz", "--seconds", "nan"), "'--seconds'"),
    "soak: seconds": (("soak", "--seconds", "inf"), "'--seconds': must be a finite number"),
    "soak: growth": (("soak", "--growth", "nan"), "'--growth': must be a finite number"),
    "soak: backend": (("soak", "--backend", "magic"), "--backend must be one of"),
    "soak: seed": (("soak", "--seed", 2**70), "'--seed'"),
    "data generate: guidance": (
        ("data", "generate", "embedded", "--prompts", __file__, "--count", "2", "--out", "d", "--guidance", "nan"),
        "'--guidance': must be a finite number",
    ),
    "data generate: shard": (
        ("data", "generate", "embedded", "--prompts", __file__, "--count", "2", "--out", "d", "--shard", "x"),
        "--shard is I/N",
    ),
    "data generate: seeds": (
        ("data", "generate", "embedded", "--prompts", __file__, "--count", "2", "--out", "d", "--seed", 2**64 - 1),
        "for 2 images with a seed each",
    ),
    "data cache: source": (("data", "cache", "nowhere", "--model", "embedded", "--out", "c"), "at nowhere"),
    "data cache: type": (
        ("data", "cache", ".", "--model", "embedded", "--out", "c", "--dtype", "float8"),
        "--dtype must be one of",
    ),
    "distill: file": (("distill", "nowhere.yaml"), "no file nowhere.yaml"),
    "distill: pixels": (("distill", __file__, "--estimate", "--pixels", "9"), "a size is HEIGHTxWIDTH"),
    "eval: metric": (("eval", ".", ".", "--metrics", "fidd"), "unknown metric 'fidd' (meant fid?)"),
    "eval: folder": (("eval", "nowhere", "."), "no folder nowhere"),
    "eval run: file": (("eval", "run", "nowhere.yaml"), "no file nowhere.yaml"),
    "attention: query": (
        ("analyze", "attention", "embedded", "--prompt", "a", "--query", "x"),
        "--query is ROWxCOLUMN",
    ),
    "attention: seed": (("analyze", "attention", "embedded", "--prompt", "a", "--seed", 2**70), "'--seed'"),
    "perturb: size": (("analyze", "perturb", "embedded", "--prompt", "a", "--size", "x"), "a size is HEIGHTxWIDTH"),
    "cost: results": (("analyze", "cost", "--results", "nowhere"), "no folder nowhere"),
    "report: folder": (("report", "nowhere"), "no folder nowhere"),
    "both": ((*GENERATE, "--quiet", "--verbose"), "give --quiet or --verbose, not both"),
}

GOOD = (("--version",), ("--help",), ("generate", "--version"), ("generate", "--help"), ("eval", "run", "--help"))

# One process for all of them: what must not happen, an import of torch, would happen to all.
MANY = """
import contextlib, io, json, sys
from flexclear.cli import main
found = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as end:
            status = end.code
    heavy = sorted({"torch", "diffusers", "transformers"} & set(sys.modules))
    found.append([status, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    cases = [list(one) for one in GOOD] + [[str(argument) for argument in arguments] for arguments, _ in BAD.values()]
    done = subprocess.run(
        [sys.executable, "-c", MANY],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path_factory.mktemp("arguments"),
    )
    return dict(zip((*GOOD, *BAD), json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_one_line_before_torch_is_imported(outcomes, name):
    status, out, err, heavy = outcomes[name]
    assert (status, out, heavy) == (2, "", [])
    assert BAD[name][1] in err
    assert err.startswith("flexclear: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", GOOD)
def test_version_and_help_need_no_torch(outcomes, arguments):
    status, out, err, heavy = outcomes[arguments]
    assert (status, err, heavy) == (0, "", [])
    assert out == f"flexclear {flexclear.__version__}\n" if "--version" in arguments else "Usage: flexclear" in out


def commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield (*path, name), command
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_command_has_the_same_options_for_its_output():
    from typer.main import get_command

    root = get_command(app)
    found = {(): root, **dict(commands(root))}
    assert len(found) == 1 + 14 + 7
    for path, command in found.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--quiet", "--verbose", "--debug", "--version"} <= options, path
        assert "--show-completion" in options or path, "typer's completion is for all of them"


def test_every_number_of_the_command_line_is_checked_for_nan():
    groups = [app, *(group.typer_instance for group in app.registered_groups)]
    checked = []
    for command in (command for group in groups for command in group.registered_commands):
        for parameter in inspect.signature(command.callback).parameters.values():
            kind, *rest = typing.get_args(parameter.annotation) or (None,)
            if float in (kind, *typing.get_args(kind)):
                assert rest[0].callback is finite, (command.callback.__name__, parameter.name)
                checked.append(parameter.name)
    assert sorted(checked) == [
        *(
            "control_scale",
            "fps",
            "growth",
            "guidance",
            "guidance",
            "seconds",
            "seconds",
            "seconds",
            "shift",
            "strength",
        ),
        *("true_cfg_scale", "tune_seconds"),
    ]


def test_the_shell_completes_commands():
    done = subprocess.run(
        [sys.executable, "-m", "flexclear"],
        env={**os.environ, "_FLEXCLEAR_COMPLETE": "complete_bash", "COMP_WORDS": "flexclear gen", "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["generate"]


def test_names_are_those_of_what_they_choose():
    from flexclear.compile import RECIPES

    assert tuple(RECIPES) == choices.RECIPES


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": (0, 2**64)}, "--seed must be from 0 to 18446744073709551615, got 18446744073709551616"),
        ({"guidance": float("nan")}, "--guidance must be a finite number, got nan"),
        ({"highres": (128,), "shift": float("inf")}, "--shift must be a finite number, got inf"),
        ({"prompts": ("a\ud800",)}, "a prompt is not valid Unicode"),
    ],
)
def test_settings_made_in_python_are_checked_alike(tmp_path, changed, message):
    settings = GenerateSettings(**{"model": "embedded", "prompts": ("a",), "out": tmp_path, **changed})
    with pytest.raises(ValueError, match=message):
        settings.check()


def test_more_text_tokens_than_the_pipeline_takes_are_refused_before_weights_are_read(tmp_path, monkeypatch):
    from flexclear.distill.caching import cache
    from flexclear.generation.generate import check

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *args, **kwargs: pytest.fail("read"))
    settings = GenerateSettings("embedded", ("a",), tmp_path / "out", text_len=100000, device="cpu")
    with pytest.raises(ValueError, match="--text-len 100000: `max_sequence_length` cannot be greater than 512"):
        check(settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="--text-len 100000: `max_sequence_length` cannot be greater than 512"):
        cache(tmp_path, "embedded", tmp_path / "out", text_len=100000)
    assert not (tmp_path / "out").exists()
