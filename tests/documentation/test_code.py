"""Code on the pages: the README's runs, as does what is cheap; of all of it names and arguments are those of the library."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, WanPipeline
from typer.main import get_command

import flexclear
from flexclear import cli
from flexclear.cli import app
from flexclear.distill.config import from_mapping as distill_settings
from flexclear.evaluation.config import from_mapping as evaluation_settings
from flexclear.families import FAMILIES

from helpers.documents import DOCS, FENCE, README, ROOT, blocks, commands, pages, title
from helpers.models_video import tiny_wan
from helpers.pipelines_video import TEXT, wan_parts

FAST = ("--steps", "2", "--text-len", "16", "--size", "64x64", "--backend", "sdpa", "--device", "cpu")
PYTHON = [block for page in pages() for block in blocks(page, "python")]
CONSOLE = [(title(page), command) for page in pages() for command in commands(page)]


def resolved(node, names):
    """The object that a name or a dotted name stands for, or None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, names)
        if owner is None:
            return None
        if inspect.ismodule(owner) and not hasattr(owner, node.attr):
            return importlib.import_module(f"{owner.__name__}.{node.attr}")
        if inspect.ismodule(owner) or inspect.isclass(owner):
            return getattr(owner, node.attr)
    return None


def imported(tree):
    """What the import statements of a block bind."""
    names = {"flexclear": flexclear, "torch": torch}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                found = getattr(module, alias.name, None)
                names[alias.asname or alias.name] = (
                    importlib.import_module(f"{node.module}.{alias.name}") if found is None else found
                )
        elif isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = importlib.import_module(alias.name)
    return names


def check_call(node, called):
    """Raise TypeError unless the callable takes what the call gives it."""
    if any(isinstance(one, ast.Starred) for one in node.args) or any(one.arg is None for one in node.keywords):
        return
    try:
        signature = inspect.signature(called)
    except ValueError:
        return
    signature.bind(*node.args, **{one.arg: one.value for one in node.keywords})


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_names_and_arguments_are_those_of_the_library(block):
    tree = ast.parse(block.code)
    names = imported(tree)
    local = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolved(node, names)
        if isinstance(node, ast.Call):
            called = resolved(node.func, names)
            if callable(called) and getattr(node.func, "id", None) not in local:
                check_call(node, called)


def run(code, folder, **names):
    """Run a block in a folder; what it binds is returned."""
    namespace = {"torch": torch, "flexclear": flexclear, **names}
    with contextlib.chdir(folder):
        exec(compile(code, "<a page>", "exec"), namespace)
    return namespace


def replaced(code, **pairs):
    for given, here in pairs.values():
        assert given in code, given
        code = code.replace(given, here)
    return code


@pytest.fixture
def pipe():
    made = flexclear.embedded.pipeline()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def families():
    before = list(FAMILIES)
    yield
    FAMILIES[:] = before


def only(page, beginning):
    """The one block of a page that has these words."""
    (found,) = [block for block in blocks(page, "python") if beginning in block.code]
    return found.code


def test_the_readme_s_script_for_production_runs(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pipe)
    flexclear.transform(pipe, r=16)
    flexclear.save_weights(pipe, tmp_path / "clear_local_16.safetensors")
    flexclear.restore(pipe)
    code = replaced(
        only(README, "requests"),
        device=('"cuda"', '"cpu"'),
        recipe=("fp8=True", 'fp8="weight_only", min_features=128, compile=False, progress=False'),
        sizes=("[(1024, 1024), (2048, 2048)]", "[(64, 64)]"),
        steps=("width=width)", "width=width, num_inference_steps=2, max_sequence_length=16)"),
        basic=("logging.basicConfig()\n", ""),
        level=('logging.getLogger("flexclear").setLevel(logging.INFO)', "pass"),
    )
    code = code.replace("transform(pipe, r=16)", 'transform(pipe, r=16, backend="sdpa")')
    run(code, tmp_path, requests=[("a red apple on a blue background", 64, 96)])
    assert (tmp_path / "0.png").is_file()
    assert capsys.readouterr().out


def test_the_guide_to_windows_runs(pipe, tmp_path, capsys):
    page = DOCS / "guide" / "windows.md"
    for block in blocks(page, "python"):
        if "explain" in block.code:
            code = block.code.replace("4096", "64")
        else:
            code = re.sub(r"(transform\(pipe,[^\n]*)\)(  #|\n|$)", r'\1, backend="sdpa")\2', block.code)
        code = code.replace(
            "height=4096, width=4096", "height=64, width=64, num_inference_steps=1, max_sequence_length=16"
        )
        run(code, tmp_path, pipe=pipe, prompt="a red apple")
    assert "layer" in capsys.readouterr().out


def test_the_guide_to_weights_runs(pipe, tmp_path):
    page = DOCS / "guide" / "weights.md"
    flexclear.transform(pipe, r=16)
    flexclear.save_weights(pipe, tmp_path / "clear_local_16.safetensors")
    flexclear.restore(pipe)
    for block in blocks(page, "python"):
        run(block.code, tmp_path, pipe=pipe)
    assert (tmp_path / "mine.safetensors").is_file()


def test_the_page_on_masks_runs(pipe, tmp_path, capsys):
    names = {"pipe": pipe}
    for block in blocks(DOCS / "masks.md", "python"):
        names |= run(block.code, tmp_path, **names)
    assert "pairs" in capsys.readouterr().out


def test_the_guide_to_videos_runs(tmp_path, monkeypatch):
    pipe = WanPipeline(**wan_parts(tiny_wan(text_dim=TEXT)))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pipe)
    (block,) = blocks(DOCS / "guide" / "video.md", "python")
    run(block.code.replace('"cuda"', '"cpu"'), tmp_path)
    assert "tube_r32" in repr(flexclear.summary(pipe)), "radial(32), the last one"


def test_the_declaration_of_a_family_can_be_registered(families, tmp_path):
    run(only(DOCS / "families.md", "register("), tmp_path)
    assert FAMILIES[-1].model_class == "MyTransformer2DModel"


@pytest.mark.parametrize(
    ("page", "read"),
    [("guide/distillation.md", distill_settings), ("guide/evaluation.md", evaluation_settings)],
    ids=["distill", "eval"],
)
def test_settings_on_the_pages_are_read(page, read, tmp_path):
    found = blocks(DOCS / page, "yaml")
    assert found
    for block in found:
        read(yaml.safe_load(block.code), tmp_path)


EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def parse(arguments):
    """Give arguments to the command line's parser, down to the command that they name."""
    command, context = get_command(app), None
    name = "flexclear"
    while True:
        with command.make_context(name, list(arguments), parent=context) as context:
            if not hasattr(command, "resolve_command"):
                return
            name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])


@pytest.mark.parametrize(("page", "line"), CONSOLE, ids=[f"{page}:{line[:40]}" for page, line in CONSOLE])
def test_commands_are_ones_that_there_are(page, line):
    words = shlex.split(line, comments=True)
    if "flexclear" in words:
        parse(words[words.index("flexclear") + 1 :])
    elif words[0] == "make":
        assert set(words[1:]) <= TARGETS
    elif words[:2] == ["pip", "install"]:
        for extra in re.findall(r"\[([\w,]+)\]", line):
            assert set(extra.split(",")) <= set(EXTRAS)
    elif "-m" in words:
        assert importlib.util.find_spec(words[words.index("-m") + 1]) is not None
    else:
        assert words[0] in ("torchrun", "accelerate")


def test_modules_that_pages_run_are_there():
    named = {name for page in pages() for name in re.findall(r"python -m ([\w.]+\w)", page.read_text(encoding="utf-8"))}
    assert {"bench.peers.run", "bench.distillation.study"} <= named
    missing = [
        name
        for name in named - {"bench.FOLDER.NAME"}
        if not any(
            (ROOT / path).is_file()
            for path in (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__main__.py")
        )
    ]
    assert missing == []


def test_what_is_cheap_of_the_readme_s_commands_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_here = [
        line for line in commands(README) if line.startswith(("flexclear explain", "flexclear generate embedded"))
    ]
    assert len(run_here) == 2
    for line in run_here:
        words = shlex.split(line)[1:]
        with pytest.raises(SystemExit) as end:
            cli.main([*words, *(FAST if words[0] == "generate" else ())])
        assert not end.value.code
    assert "image tokens" in capsys.readouterr().out
    assert list(Path("images").glob("*.png"))


def test_every_kind_of_block_is_checked():
    languages = {found[1] for page in pages() for found in FENCE.finditer(page.read_text(encoding="utf-8"))}
    assert languages - {"json", "text"} == {"python", "console", "yaml"}, "what is printed is json or text"
    assert len(PYTHON) >= 25
