"""Files for those who work on the project or cite it: they parse, and name what there is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import flexclear

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
TAG = re.compile(r"actions/[a-z-]+@v\d+\.\d+\.\d+")


def read(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def text(path):
    return (ROOT / path).read_text(encoding="utf-8")


def steps(path):
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_make_targets_that_exist(path):
    commands = [step["run"] for step in steps(path) if "run" in step]
    assert commands
    for command in commands:
        target = re.fullmatch(r"make ([a-z]+)( [A-Z]+=\S+| PYTHON=python\$\{\{ matrix\.python \}\})*", command)
        assert target, command
        assert target[1] in TARGETS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_pins_its_actions_has_a_limit_and_no_secrets(path):
    for step in steps(path):
        assert "run" in step or TAG.fullmatch(step["uses"]), step
    found = read(path)
    assert found["permissions"] == {"contents": "read"}
    assert all(0 < job["timeout-minutes"] <= 360 for job in found["jobs"].values())
    assert "secrets" not in text(path)
    assert f"TORCH: torch{next(iter(re.findall('==[0-9.]+', text('Makefile'))))} " in text(
        path
    )  # the CPU build, as tested


def test_the_interpreters_of_the_workflows_are_those_that_the_package_takes_and_that_are_documented():
    matrix = read(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    floor = re.fullmatch(r">=(3\.\d+)", PROJECT["project"]["requires-python"])[1]
    assert matrix[0] == floor
    [told] = re.findall(r"^\| Python \|.*$", text("docs/stability.md"), re.M)
    assert [*dict.fromkeys(re.findall(r"3\.\d+", told))] == matrix


def test_hooks_run_what_make_installs_and_lints_with():
    [repository] = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", text("Makefile"), re.M)[1]
    for hook in repository["hooks"]:
        assert {"id", "name", "entry", "language"} <= hook.keys()
        program, *arguments = hook["entry"].split()
        if program == "make":
            assert arguments[0] in TARGETS
        else:
            assert program == ".venv/bin/ruff"
            assert f"$(BIN)/ruff {arguments[0]}" in lint


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_has_what_github_requires(path):
    form = read(path)
    assert {"name", "description", "body"} <= form.keys()
    inputs = [part for part in form["body"] if part["type"] != "markdown"]
    assert inputs
    assert len({part["id"] for part in inputs}) == len(inputs)
    for part in inputs:
        assert part["type"] in {"input", "textarea", "dropdown", "checkboxes"}
        assert part["attributes"]["label"]
    assert any(part.get("validations", {}).get("required") for part in inputs)


def test_the_bug_form_asks_for_a_program_what_was_expected_and_the_doctor():
    required = {
        part["id"]: part["attributes"]["label"]
        for part in read(".github/ISSUE_TEMPLATE/bug.yml")["body"]
        if part.get("validations", {}).get("required")
    }
    assert required.keys() == {"program", "expected", "happened", "doctor"}
    assert required["doctor"] == "flexclear doctor --json"


def test_the_citation_is_of_this_version_and_of_the_paper():
    found = read("CITATION.cff")
    assert found["version"] == PROJECT["project"]["version"] == flexclear.__version__
    assert found["license"] == PROJECT["project"]["license"]
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    [paper] = found["references"]
    assert paper["url"] == PROJECT["project"]["urls"]["Paper"]
    assert [author["family-names"] for author in paper["authors"]] == ["Liu", "Tan", "Wang"]


def test_every_public_name_has_a_row_that_says_whether_it_is_stable():
    rows = [line for line in text("docs/stability.md").splitlines() if line.startswith("| `flexclear.")]
    said = {}
    for row in rows:
        names, covered = (cell.strip() for cell in row.strip("|").split("|", 1))
        for name in re.findall(r"`(?:flexclear\.)?(\w+)`", names):
            assert name not in said
            said[name] = covered
    assert said.keys() == {*flexclear.__all__, "testing"}
    assert all(re.match("stable|experimental", covered) for covered in said.values())
    for name in ("compile", "masks", "testing"):
        listed = set(re.findall(r"`(\w+)`", said[name])) - {"import", "Window"}
        assert listed <= set(getattr(flexclear, name).__all__)


@pytest.mark.parametrize("path", ["CONTRIBUTING.md", "docs/stability.md", "examples/README.md"])
def test_files_and_targets_that_a_page_names_exist(path):
    page = text(path)
    for target in re.findall(r"`?make ([a-z]+)[`\s]", page):
        assert target in TARGETS, target
    for link in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (ROOT / path).parent.joinpath(link).exists(), link
    for name in re.findall(r"`((?:tests|bench|examples|masks|compile|flexclear|docs)/[\w/.*]*)`", page):
        assert list(ROOT.glob(name.rstrip("/"))), name


def test_the_marks_that_contributing_explains_are_those_that_there_are():
    marks = {mark.partition(":")[0].partition("(")[0] for mark in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    explained = re.search(r"^- Marks:(.*?)^- ", text("CONTRIBUTING.md"), re.M | re.S)[1]
    assert set(re.findall(r"`([a-z]+)[`(]", explained)) == marks
