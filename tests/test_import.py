"""Importing flexclear is cheap: no diffusers, no torchao, no CUDA. Each check runs in a process that has imported torch alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Torch is imported once; a fork of that process runs each piece of code that comes in.
FORKS = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        status = 0
        try:
            exec(compile(json.loads(line), "<check>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    print(json.dumps([os.waitpid(child, 0)[1], said]), flush=True)
"""


@pytest.fixture(scope="module")
def python():
    """Runs code in a process of its own, and gives what it prints."""
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forks:

        def run(code):
            print(json.dumps(code), file=forks.stdin, flush=True)
            status, said = json.loads(forks.stdout.readline())
            assert status == 0, said
            return said.strip()

        yield run
        forks.stdin.close()


def test_importing_flexclear_imports_neither_diffusers_nor_torchao_and_does_not_initialize_cuda(python):
    heavy = python(
        "import sys, flexclear, flexclear.masks, flexclear.compile, flexclear.embedded, torch\n"
        "heavy = {'diffusers', 'torchao', 'transformers', 'torch._inductor', 'rich', 'typer'} & set(sys.modules)\n"
        "print(sorted(heavy), torch.cuda.is_initialized())"
    )
    assert heavy == "[] False"


def test_importing_flexclear_loads_few_modules_beyond_torch(python):
    # Under 0.5 s is asked for. A clock would make this test depend on the machine; modules do not.
    loaded = int(
        python("import sys, torch\nbefore = set(sys.modules)\nimport flexclear\nprint(len(set(sys.modules) - before))")
    )
    assert loaded <= 5


def test_names_load_on_first_use_whatever_was_imported_before(python):
    assert python("import flexclear; print(callable(flexclear.transform), callable(flexclear.restore))") == "True True"
    assert python("import flexclear.convert, flexclear; print(callable(flexclear.transform))") == "True"
    assert python("from flexclear import transform, masks; print(masks.Layout(2, 3).image_len)") == "6"


def documented_names():
    """Each dotted name below ``flexclear`` that the README and the pages write, without the prefix."""
    text = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    text = re.sub(r"(?m)^::: .*$", "", text)  # directives of the API reference, which are paths in the source
    return sorted(set(re.findall(r"(?<![/#])\bflexclear\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)", text)))


INTERNAL = {
    "cluster",
    "commands",
    "common",
    "explanation",
    "generation",
    "images",
    "measuring",
    "play",
    "rates",
    "runtime",
    "saved",
    "tools",
}
"""Packages that other packages use and users do not."""


def public_packages():
    """Each package of the library that users import; two lie beside ``flexclear/``."""
    inside = {path.parent.name for path in (ROOT / "flexclear").glob("*/__init__.py")}
    return sorted(inside - INTERNAL | {"compile", "masks"})


def test_every_public_name_resolves_after_import_flexclear_alone(python):
    # The module's own __getattr__ is asked: an attribute may be there because some other module has been imported.
    told = python(
        "import flexclear\n"
        f"names = set(flexclear.__all__) - {{'__version__'}} | set({public_packages()!r})\n"
        "for name in sorted(names):\n"
        "    flexclear.__getattr__(name)\n"
        "print(len(names), names <= set(dir(flexclear)), sorted(names - set(flexclear.__all__)))"
    )
    count, shown, listed = told.split()
    assert int(count) >= 19
    assert (shown, listed) == ("True", "['testing']"), "testing needs an extra, which a star import must not"


def test_every_name_that_the_pages_write_resolves(python):
    names = documented_names()
    assert {"transform", "compile.report", "parallel.enable_dense"} <= set(names)
    missing = python(
        "import importlib, flexclear\n"
        "def resolves(name):\n"
        "    thing, path = flexclear, 'flexclear'\n"
        "    for part in name.split('.'):\n"
        "        path += '.' + part\n"
        "        try:\n"
        "            thing = getattr(thing, part)\n"
        "        except AttributeError:\n"
        "            try:\n"
        "                thing = importlib.import_module(path)\n"
        "            except ImportError:\n"
        "                return False\n"
        "    return True\n"
        f"print([name for name in {names!r} if not resolves(name)])"
    )
    assert missing == "[]"


@pytest.mark.parametrize("package", public_packages())
def test_every_name_in_a_package_s_all_is_there(package):
    module = __import__(f"flexclear.{package}", fromlist=["__all__"])
    assert [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)] == []


def test_an_unknown_name_is_an_attribute_error(python):
    assert python("import flexclear; print(hasattr(flexclear, 'transfrom'))") == "False"
