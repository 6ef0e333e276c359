"""Every option of every command, read off the parser: what it does not take is one line and exit status 2, and nothing is begun.

An option that is added is tried without being named here, unless it takes any text or names what is written.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import typer.main

from flexclear import cli

from helpers.parser import PAGE, commands, with_tables

ANY_TEXT = {"prompt", "negative_prompt"}
"""Options that take every text."""

WRITTEN = {"out", "png", "stages"}
"""Options that name a file or folder that need not be there."""

OF_WEIGHTS = {("analyze", "attention", "layer")}
"""Options that are compared with the loaded model."""

NEEDED = {
    "model": "embedded",
    "prompt": "a",
    "prompts": "{here}/prompts.txt",
    "count": "1",
    "out": "{here}/out",
    "source": "{here}",
    "config": "{here}/options.yaml",
    "file": "{here}/picture.png",
    "a_dir": "{here}",
    "b_dir": "{here}",
    "out_dir": "{here}",
    "height": "64",
    "width": "64",
}
"""A value for what a command cannot do without."""

WITH = {
    ("generate", "shift"): ("--highres", "64,128"),
    ("generate", "stages"): ("--highres", "64,128"),
    ("generate", "height"): ("--width", "64"),
    ("generate", "width"): ("--height", "64"),
    ("explain", "frame_radius"): ("--num-frames", "9"),
}
"""Options that have a meaning together with others only."""


def wrong_values(parameter):
    """(what is wrong, value) of what a parameter does not take; places are in braces."""
    below = () if parameter.least is None else (("too small", str(parameter.least - 1)),)
    above = () if parameter.most is None else (("too large", str(parameter.most + 1)),)
    if parameter.kind is bool:
        return [("a value", None)]
    if parameter.kind is int:
        return [("a word", "many"), ("a fraction", "1.5"), *below, *above]
    if parameter.kind is float:
        return [("a word", "many"), ("nan", "nan"), ("inf", "inf"), *below, *above]
    if parameter.name in WRITTEN:
        return [("below a file", "{here}/picture.png/x")]
    if parameter.kind is Path:
        return [("a missing file", "{here}/nowhere/at-all")]
    return [] if parameter.name in ANY_TEXT else [("nonsense", "./no such: thing")]


def cases():
    for path, parameters, _ in commands():
        for parameter in parameters:
            for what, value in wrong_values(parameter):
                shown = parameter.flag or parameter.name.upper()
                yield pytest.param(path, parameters, parameter, value, id=f"{' '.join(path)} {shown}: {what}")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("parser")
    (folder / "prompts.txt").write_text("a red apple\n")
    (folder / "options.yaml").write_text("{}\n")
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def parser():
    """The parser, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.mark.parametrize(("path", "parameters", "parameter", "value"), list(cases()))
def test_what_an_option_does_not_take_is_one_line(
    path, parameters, parameter, value, here, capsys, monkeypatch, tmp_path
):
    def read(*arguments, **options):
        pytest.fail("weights were read")

    if path == ("play",):
        monkeypatch.setattr(
            "flexclear.commands.play.require", lambda *needed: None
        )  # Gradio has an environment of its own
    late = (*path, parameter.name) in OF_WEIGHTS
    if not late:
        monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", read)
    monkeypatch.chdir(tmp_path)
    before = sorted(here.rglob("*"))
    line, arguments = list(path), []
    for other in parameters:
        if other.required and other.name != parameter.name:
            given = NEEDED[other.name]
            line += [other.flag, given] if other.flag else []
            arguments += [] if other.flag else [given]
    if path == ("generate",) and parameter.name != "prompt":
        line += ["--prompt", "a"]
    line += WITH.get((path[0], parameter.name), ())
    if parameter.flag is None:
        place = [one.name for one in parameters if one.flag is None].index(parameter.name)
        arguments.insert(place, value)
    elif value is None:
        line += [f"{parameter.flag}=x"]
    else:
        line += [parameter.flag, value]
    line = [part.format(here=here) for part in (*line, *arguments)]
    with pytest.raises(SystemExit) as end:
        cli.main(line)
    output, error = capsys.readouterr()
    assert (end.value.code, output) == (2, ""), (line, error)
    assert error.startswith("flexclear: "), line
    assert error.count("\n") == 1, error
    wrong = (value or "").format(here=here)
    assert (parameter.flag or wrong) in error or (wrong and wrong.removeprefix("./") in error), (line, error)
    assert sorted(here.rglob("*")) == before, "nothing is begun"
    assert late or not list(tmp_path.iterdir())


def test_no_command_is_left_out():
    found = [" ".join(path) for path, _, _ in commands()]
    assert len(found) == len(set(found)) == 18
    assert {"generate", "settings", "data cache", "eval run", "analyze cost", "report"} <= set(found)


def test_the_page_s_tables_are_those_of_the_parser():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "cd tests && python -m helpers.parser writes them"
    for path, parameters, _ in commands():
        assert f"### {' '.join(path)}\n" in page
        assert all(f"`{one.flag}`" in page for one in parameters if one.flag)
