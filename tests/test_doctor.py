"""``flexclear doctor``: versions, what works here, and the reason where it does not."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch
from typer.testing import CliRunner

import flexclear
from flexclear import cli
from flexclear.compile import RECIPES, why_not_compiled, why_not_recipe
from flexclear.tools import doctor

UNABLE = why_not_compiled(torch.device("cpu"))
able = pytest.mark.skipif(UNABLE is not None, reason=f"FlexAttention is not compiled here: {UNABLE}")


def run(*arguments):
    return CliRunner().invoke(cli.app, ["doctor", *arguments])


@able
def test_what_is_tried_works_as_transform_does():
    done = run("--device", "cpu", "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["problem"]) == (0, None), done.output
    assert found["tried"]
    assert found["backends"] == {"flex": None, "sdpa": None}
    assert found["compile"] is None
    assert found["device"]["type"] == "cpu"
    assert found["device"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["versions"]["flexclear"] == flexclear.__version__
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(found["versions"]) >= {"python", "torch", "diffusers", "transformers", "torchao"}
    assert set(found["optional"]) == {"peft", "natten", "flash-attn"}
    for name in RECIPES:
        assert found["recipes"][name] == why_not_recipe(name, torch.device("cpu")), "it works where it should"


@able
def test_people_get_lines_with_reasons():
    done = run("--device", "cpu", "--quick")
    assert done.exit_code == 0, done.output
    assert "rowwise     no: FP8 products need a CUDA device; this is 'cpu'" in done.stdout
    assert "flex        should work" in done.stdout
    assert done.stdout.rstrip().endswith("transform runs compiled here")


@able
def test_a_missing_compiler_is_the_reason_and_the_exit_status_is_1(monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    from flexclear.compile import flex

    def missing():
        raise InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    flex.why_no_cpp_compiler.cache_clear()
    try:
        done = run("--device", "cpu", "--quick")
        as_json = run("--device", "cpu", "--quick", "--json")
    finally:
        flex.why_no_cpp_compiler.cache_clear()
    assert done.exit_code == as_json.exit_code == 1
    assert "transform does not run compiled: no C++ compiler was found" in done.stdout
    assert "sdpa        should work" in done.stdout
    assert json.loads(as_json.stdout)["backends"]["flex"].startswith("no C++ compiler")
    assert "no C++ compiler was found" in as_json.stderr


@able
@pytest.mark.parametrize("quick", [True, False])
def test_compilation_that_is_switched_off_is_the_reason(quick):
    with torch._dynamo.config.patch(disable=True):
        found = doctor.diagnose("cpu", quick=quick)
    assert "torch.compile is disabled" in found.problem
    assert "torch.compile is disabled" in found.compile
    assert found.backends["sdpa"] is None


@able
def test_a_failure_while_trying_is_told_on_one_line(monkeypatch):
    def broken(device, backend):
        if backend == "flex":
            raise RuntimeError("\nthe compiler fell over\nwith many lines")
        return torch.ones(1)

    monkeypatch.setattr(doctor, "_transformed", broken)
    found = doctor.diagnose("cpu")
    assert found.problem == found.backends["flex"] == "RuntimeError: the compiler fell over"
    assert found.compile is None, "torch.compile itself works"


@able
def test_attention_that_computes_something_else_is_no_working_attention(monkeypatch):
    monkeypatch.setattr(doctor, "_transformed", lambda device, backend: torch.ones(2) * (2 if backend == "flex" else 1))
    assert "something other than masked SDPA: relative error 1.0e+00" in doctor._attempt(
        lambda: doctor._agree(torch.device("cpu"))
    )


@pytest.mark.parametrize(
    ("version", "said", "too_old"),
    [
        ("2.7.1+cu128", "torch 2.7.1+cu128 is too old", True),
        ("2.8.0", None, False),
        ("2.13.0+cpu", None, False),
        ("2.14.0.dev20261101", "is newer than what was tested; tested with 2.8 to 2.13", False),
        ("3.0.0", "is newer than what was tested", False),
    ],
)
def test_torch_versions_are_judged_by_what_was_tested(version, said, too_old):
    reason, is_too_old = doctor._torch_range(version)
    assert is_too_old == too_old
    assert (reason is None) if said is None else (said in reason)


def test_a_device_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "--device", "toaster"])
    assert end.value.code == 2
    assert "--device 'toaster' cannot be used" in capsys.readouterr().err
