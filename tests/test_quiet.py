"""What is printed: results on standard output, our own progress on standard error, and nothing of other libraries."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import flexclear
from flexclear import cli
from flexclear.common import foreign
from flexclear.common.versions import dtype_option, release

README = Path(__file__).parent.parent / "README.md"
FAST = ("--steps", "2", "--text-len", "16", "--size", "64x64", "--backend", "sdpa", "--device", "cpu")


def process(*arguments, cwd):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_generate_prints_its_pictures_and_its_progress_and_nothing_else(tmp_path):
    command = ("-m", "flexclear", "generate", "embedded", "--prompt", "a red apple on a zebra", *FAST)
    results, rest = process(*command, cwd=tmp_path)
    assert len(results) == 1
    assert re.match(r"images/0001_a-red-apple-on-a-zebra\.png: 64 x 64, seed 0, 2 steps in ", results[0])
    assert rest.pop(0) == (
        "The embedded model was not trained on: zebra (in 'a red apple on a zebra'). It draws all the same."
    )
    assert [re.sub(r"[━╸╺ ]*\d+/\d+ .*", "", line).strip() for line in rest] == ["images", "steps"]


def readme_snippet():
    """The first example of the README, made to fit this machine: another model, size and device."""
    code = re.search(r"```python\n(import torch, flexclear\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    text = code[1]
    for given, here in (
        ('"black-forest-labs/FLUX.1-dev"', '"pipe"'),
        ('"cuda"', '"cpu"'),
        ("torch.bfloat16", "torch.float32"),
        ("r=16)", 'r=4, backend="sdpa")'),
        ("height=4096, width=4096", "height=64, width=64, num_inference_steps=2, max_sequence_length=16"),
    ):
        assert given in text
        text = text.replace(given, here)
    return text


def test_a_program_prints_the_progress_of_its_pipeline_and_nothing_else(tmp_path):
    # Reading and drawing are calls of the program to diffusers, whose bars are the program's to show or not.
    flexclear.embedded.pipeline().save_pretrained(tmp_path / "pipe")
    results, rest = process("-c", readme_snippet(), cwd=tmp_path)
    assert results == []
    bars = [line for line in re.split(r"[\r\n]|\x1b\[A", "\n".join(rest)) if line.strip()]
    assert {re.split(r":? *\d+%", line)[0] for line in bars} <= {
        "Loading pipeline components...",
        "Loading weights",
        "",
    }
    assert (tmp_path / "plane.png").is_file()


LIBRARY = """
import warnings, logging
import flexclear
pipe = flexclear.embedded.pipeline()
pipe.set_progress_bar_config(disable=True)
flexclear.transform(pipe, r=4, backend="sdpa")
flexclear.load_weights(pipe, "embedded", filename="clear_local_4.safetensors")
pipe("a red apple " * 40, num_inference_steps=1, height=64, width=64, max_sequence_length=16)
warnings.warn("the user's own")
flexclear.transform(pipe, r=2, backend="sdpa")
flexclear.load_weights(pipe, "embedded", filename="clear_local_4.safetensors")
import diffusers.utils.logging, transformers.utils.logging
print(diffusers.utils.logging.is_progress_bar_enabled(), transformers.utils.logging.is_progress_bar_enabled())
"""


def test_the_library_prints_nothing_but_warnings_that_concern_its_user(tmp_path):
    results, rest = process("-c", LIBRARY, cwd=tmp_path)
    assert results == ["True True"], "the bars of other loads are as they were"
    text = "\n".join(rest)
    for own in (
        "UserWarning: the user's own",
        "trained for another window than the model has",
        "was truncated because CLIP",
    ):
        assert text.count(own) == 1, text
        text = "\n".join(line for line in text.splitlines() if own not in line)
    assert "torchao" not in text
    assert "torchvision" not in text
    assert "%|" not in text


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``flexclear explain`` with a function that is called meanwhile; gives the lines on standard error."""

    def run(work, *options):
        from flexclear.explanation.window import explain_window

        def explain(*args, **kwargs):
            work()
            return explain_window(*args, **kwargs)

        monkeypatch.setattr("flexclear.explanation.window.explain_window", explain)
        with pytest.raises(SystemExit) as end:
            cli.main(["explain", "--height", "64", "--width", "64", *options])
        captured = capsys.readouterr()
        assert not end.value.code
        assert captured.out.startswith("4 x 4 image tokens")
        monkeypatch.undo()
        return captured.err.splitlines()

    return run


def speak():
    warnings.warn("a user's warning", UserWarning, stacklevel=1)
    warnings.warn("an old name", FutureWarning, stacklevel=1)
    logging.getLogger("flexclear").info("compiling")
    logging.getLogger("flexclear").warning("something\nto know")


@pytest.mark.parametrize("options", [(), ("--quiet",)], ids=["plain", "quiet"])
def test_a_command_shows_warnings_as_lines(command, options):
    assert command(speak, *options) == ["flexclear: warning: a user's warning", "flexclear: something to know"]


def test_verbose_shows_log_lines_and_what_other_libraries_say(command):
    def speak_more():
        speak()
        logging.getLogger("torchao").warning("Failed to load /x/_C_mxfp8.cpython-27-x86_64-linux-gnu.so: no")

    lines = command(speak_more, "--verbose")
    assert "flexclear: compiling" in lines
    level = logging.getLogger("flexclear").level
    assert command(speak) == ["flexclear: warning: a user's warning", "flexclear: something to know"]
    assert logging.getLogger("flexclear").level == level


def test_quiet_leaves_results_and_warnings(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "embedded", "--quiet", "--prompt", "a zebra", *FAST, "--out", str(tmp_path)])
    captured = capsys.readouterr()
    assert captured.out.startswith(str(tmp_path))
    assert captured.err == ""


TORCHAO = "Failed to load /x/torchao/_C_{}: Could not load this library"


class Enum:
    """Stands for an enumeration of torchao's."""


@pytest.mark.parametrize(
    ("logger", "text", "arguments", "shown"),
    [
        ("torchao", TORCHAO.format("mxfp8.cpython-27-x86_64-linux-gnu.so"), (), False),
        ("torchao", TORCHAO.format("cutlass_90a.abi3.so"), (), "cuda"),
        ("torchao", "Skipping import of cpp extensions due to incompatible torch version", (), True),
        ("torch.utils._pytree", "%s is an Enum subclass and is now natively supported by torch.compile", (Enum,), True),
        ("diffusers.quantizers.torchao.torchao_quantizer", "`torchao` is too old", (), True),
        (
            "transformers.utils.import_utils",
            "`OwnImageProcessor` requires torchvision (not installed); falling back to `OwnImageProcessorPil`",
            (),
            True,
        ),
    ],
)
@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_exactly_the_known_lines_are_dropped(monkeypatch, logger, text, arguments, shown, cuda):
    import torch

    monkeypatch.setattr(torch.version, "cuda", cuda)
    record = logging.LogRecord(logger, logging.WARNING, "x.py", 1, text, arguments, None)
    foreign.hush()
    assert bool(logging.getLogger(logger).filter(record)) is (cuda is not None if shown == "cuda" else shown)
    assert sum(type(one).__name__ == "_Known" for one in logging.getLogger(logger).filters) == 1


def test_the_data_type_has_the_name_that_the_installed_diffusers_knows(monkeypatch):
    for version, name in (
        ("0.36.0", "torch_dtype"),
        ("0.39.0.dev0", "torch_dtype"),
        ("0.40.0", "dtype"),
        ("1.0", "dtype"),
    ):
        monkeypatch.setattr("flexclear.common.versions.installed", lambda name, version=version: version)
        assert dtype_option() == name
    assert release(None) == (0, 0)


def test_bars_are_off_while_any_thread_loads_and_then_as_before():
    from diffusers.utils import logging as bars

    assert bars.is_progress_bar_enabled()
    with foreign.without_bars:
        with foreign.without_bars:
            assert not bars.is_progress_bar_enabled()
        assert not bars.is_progress_bar_enabled()
    assert bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with foreign.without_bars:
            pass
        assert not bars.is_progress_bar_enabled(), "off before, off afterwards"
    finally:
        bars.enable_progress_bar()


def test_warming_up_shows_its_progress_on_standard_error(capsys):
    from flexclear.optimization import _warm

    drawn = []
    _warm(None, [], [(64, 64), (64, 96)], lambda height, width: drawn.append((height, width)), progress=True)
    captured = capsys.readouterr()
    assert drawn == [(64, 64), (64, 96)]
    assert captured.out == ""
    assert "compiling 64 x 96" in captured.err
