"""Importing flexclear is cheap: no diffusers, no torchao, no CUDA. Each check runs in a fresh process."""

from __future__ import annotations

import subprocess
import sys


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_flexclear_imports_neither_diffusers_nor_torchao_and_does_not_initialise_cuda():
    heavy = python(
        "import sys, flexclear, flexclear.masks, flexclear.compile, flexclear.embedded, torch\n"
        "heavy = {'diffusers', 'torchao', 'transformers', 'torch._inductor', 'rich', 'typer'} & set(sys.modules)\n"
        "print(sorted(heavy), torch.cuda.is_initialized())"
    )
    assert heavy == "[] False"


def test_importing_flexclear_loads_few_modules_beyond_torch():
    # Under 0.5 s is asked for. A clock would make this test depend on the machine; modules do not.
    loaded = int(
        python("import sys, torch\nbefore = set(sys.modules)\nimport flexclear\nprint(len(set(sys.modules) - before))")
    )
    assert loaded <= 5


def test_names_load_on_first_use_whatever_was_imported_before():
    assert python("import flexclear; print(callable(flexclear.transform), callable(flexclear.restore))") == "True True"
    assert python("import flexclear.convert, flexclear; print(callable(flexclear.transform))") == "True"
    assert python("from flexclear import transform, masks; print(masks.Layout(2, 3).image_len)") == "6"


def test_an_unknown_name_is_an_attribute_error():
    assert python("import flexclear; print(hasattr(flexclear, 'transfrom'))") == "False"
