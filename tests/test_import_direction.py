"""Imports go downwards: which part of the package may import which, read off its source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"flexclear.masks": "masks", "flexclear.compile": "compile", "flexclear": "flexclear"}
"""Where the packages lie."""

BELOW = None
"""A part may import every part above it in the table."""

PARTS: dict[str, tuple[str, ...] | None] = {
    "common": (),
    "masks": (),
    "compile": ("masks",),
    "runtime": ("common", "masks", "compile"),
    "images": ("common", "compile"),
    "alternatives": ("masks", "runtime"),
    "families": ("masks", "compile", "runtime"),
    "convert": ("common", "masks", "compile", "runtime", "alternatives", "families"),
    "parallel": ("common", "masks", "compile", "runtime", "families", "convert"),
    "saved": ("common", "masks", "runtime", "alternatives", "families", "convert"),
    "optimization": ("compile", "runtime", "families", "convert"),
    "weights": ("common", "masks", "compile", "runtime", "families", "convert"),
    "rates": ("common", "masks", "compile"),
    "explanation": ("common", "masks", "compile", "runtime", "families", "images", "rates"),
    "embedded": BELOW,
    "alternatives.properties": BELOW,
    "analysis": BELOW,
    "testing": BELOW,
    "highres": BELOW,
    "generation": BELOW,
    "distill": BELOW,
    "evaluation": BELOW,
    "cluster": BELOW,
    "measuring": BELOW,
    "embedded.train": BELOW,
    "": BELOW,  # flexclear/__init__.py, which hands names out
    "tools": BELOW,
    "play": BELOW,
    "commands": BELOW,
    "cli": BELOW,
    "__main__": BELOW,
}
"""What each part may import besides itself, a part above those that import it. The longest name that fits counts."""

LIBRARIES = {"masks": {"torch"}, "compile": {"torch", "torchao", "safetensors"}}
"""The other packages that a part may import at all."""

AT_IMPORT = {"common": set(), "runtime": {"torch", "numpy"}, "families": {"torch"}}
"""Those that it may import when it is imported itself, and not later."""


@dataclass(frozen=True)
class Import:
    """One name imported.

    Attributes:
        source: module that imports.
        target: what is imported: a module of flexclear, or a library.
        line: where.
        kind: ``"module"`` (when the source is imported), ``"function"`` (later), ``"types"`` (never).
    """

    source: str
    target: str
    line: int
    kind: str


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of the package, by name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            if package == "flexclear" and parts[0] in FOLDERS.values():
                continue  # a link to a package that lies beside
            found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


def imports_of(module: str, path: Path, modules: Iterable[str]) -> list[Import]:
    """Everything that a module imports, inside functions and for types, too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node, kind in _walk(ast.parse(path.read_text(encoding="utf-8")), "module"):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] != "flexclear":
                found.append(Import(module, name.split(".")[0], node.lineno, kind))
                continue
            while name not in modules:
                name = name.rpartition(".")[0]
            if name != module:
                found.append(Import(module, name, node.lineno, kind))
    return found


def _walk(node: ast.AST, kind: str) -> Iterator[tuple[ast.AST, str]]:
    for child in ast.iter_child_nodes(node):
        within = "function" if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and kind != "types" else kind
        yield child, kind
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for part, inside in ((child.body, "types"), (child.orelse, kind)):
                yield from _walk(ast.Module(part, []), inside)
        else:
            yield from _walk(child, within)


def read(root: Path) -> list[Import]:
    """Every import of the package."""
    modules = modules_of(root)
    return [one for name, path in modules.items() for one in imports_of(name, path, modules)]


def part_of(module: str) -> str | None:
    """The part that a module belongs to; None where the table has none."""
    path = module.removeprefix("flexclear").removeprefix(".")
    fitting = [part for part in PARTS if path == part or (part and path.startswith(f"{part}."))]
    return max(fitting, key=len, default=None)


def upwards(imports: Iterable[Import]) -> list[str]:
    """Each import of a part that the table does not allow, in words."""
    order, found = list(PARTS), []
    for one in imports:
        source, target = part_of(one.source), part_of(one.target)
        if one.target.split(".")[0] != "flexclear" or source == target:
            continue
        allowed = None if source is None else PARTS[source]
        if source is not None and allowed is BELOW:
            allowed = tuple(order[: order.index(source)])
        if allowed is None or target not in allowed:
            found.append(f"{one.source}:{one.line} imports {one.target}")
    return found


def strangers(imports: Iterable[Import]) -> list[str]:
    """Each import of a library that a part must not know, in words."""
    found = []
    for one in imports:
        part = part_of(one.source)
        if one.target == "flexclear" or one.target.startswith("flexclear.") or one.target in sys.stdlib_module_names:
            continue
        late = one.kind != "module"
        if (part in LIBRARIES and one.target not in LIBRARIES[part]) or (
            part in AT_IMPORT and not late and one.target not in AT_IMPORT[part]
        ):
            found.append(f"{one.source}:{one.line} imports {one.target}")
    return found


def circles(imports: Iterable[Import]) -> list[list[str]]:
    """Modules that import each other, directly or by way of others: each such set, sorted."""
    graph: dict[str, set[str]] = {}
    for one in imports:
        graph.setdefault(one.source, set()).add(one.target)
    reached = {module: _reached(graph, module) for module in graph}
    sets = {
        tuple(sorted(other for other in found if module in reached.get(other, ())))
        for module, found in reached.items()
        if module in found
    }
    return [list(one) for one in sorted(sets)]


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph.get(waiting.pop(), ()):
            if target not in found:
                found.add(target)
                waiting.append(target)
    return found


IMPORTS = read(ROOT)


def test_every_module_has_a_part_and_every_part_has_modules():
    parts = {module: part_of(module) for module in modules_of(ROOT)}
    assert [module for module, part in parts.items() if part is None] == []
    assert set(parts.values()) == set(PARTS)
    assert len(IMPORTS) > 1000


def test_every_import_goes_downwards():
    assert upwards(IMPORTS) == []


def test_the_lower_parts_know_the_libraries_that_they_are_about():
    assert strangers(IMPORTS) == []


def test_no_modules_import_each_other_when_they_are_imported():
    assert circles(one for one in IMPORTS if one.kind == "module") == []


def test_no_modules_import_each_other_inside_functions():
    assert circles(one for one in IMPORTS if one.kind != "types") == []


def test_modules_that_name_each_other_s_types_are_of_one_part():
    assert [found for found in circles(IMPORTS) if len({part_of(module) for module in found}) > 1] == []


def test_few_modules_lie_beside_the_folders():
    assert sorted(path.name for path in (ROOT / "flexclear").glob("*.py")) == [
        "__init__.py", "__main__.py", "cli.py", "convert.py", "optimization.py",
    ]  # fmt: skip


GOOD = {
    "flexclear/__init__.py": "from flexclear.common import words\n",
    "flexclear/common/__init__.py": "",
    "flexclear/common/words.py": "import re\n",
    "flexclear/runtime/__init__.py": "",
    "flexclear/runtime/plan.py": "import torch\nfrom flexclear import masks\nfrom flexclear.masks.windows import Window\n",
    "flexclear/runtime/hooks.py": "from .plan import Plan\n",
    "flexclear/families/__init__.py": "from flexclear.runtime.plan import Plan\n",
    "flexclear/families/flux.py": "def f():\n    import diffusers\n",
    "flexclear/convert.py": "from flexclear.families import family_of\n",
    "flexclear/parallel/__init__.py": "from flexclear.runtime import hooks\n\ndef f():\n    from flexclear import convert\n",
    "flexclear/tools/demo.py": "import flexclear\nfrom flexclear import transform\n",
    "masks/__init__.py": "import torch\nfrom flexclear.masks.windows import Window\n",
    "masks/windows.py": "import functools\n",
    "compile/__init__.py": "import torch\nimport torchao\nimport flexclear.masks.windows\n",
}


def tree(folder: Path, **changed: str) -> list[Import]:
    """The imports of a small package, with lines added to some of its files."""
    for name, text in GOOD.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + changed.get(name.removesuffix(".py").replace("/", "_"), ""), encoding="utf-8")
    return read(folder)


def test_a_package_whose_imports_go_downwards_passes(tmp_path):
    imports = tree(tmp_path)
    assert (upwards(imports), strangers(imports), circles(imports)) == ([], [], [])
    assert Import("flexclear.runtime.hooks", "flexclear.runtime.plan", 1, "module") in imports
    assert Import("flexclear.parallel", "flexclear.convert", 4, "function") in imports


WRONG = {
    "upwards": ("masks_windows", "from flexclear.runtime.plan import Plan\n", "flexclear.runtime.plan"),
    "upwards, by package": ("compile___init__", "from flexclear import runtime\n", "flexclear.runtime"),
    "upwards, without from": ("flexclear_runtime_plan", "import flexclear.parallel\n", "flexclear.parallel"),
    "upwards, relative": ("flexclear_runtime_hooks", "from .. import convert\n", "flexclear.convert"),
    "inside a function": ("flexclear_runtime_hooks", "def f():\n    import flexclear.families\n", "flexclear.families"),
    "inside a method": (
        "flexclear_convert",
        "class A:\n    async def f(self):\n        from flexclear.parallel import enable\n",
        "flexclear.parallel",
    ),
    "for types": (
        "flexclear_runtime_plan",
        "import typing\nif typing.TYPE_CHECKING:\n    from flexclear.parallel import Session\n",
        "flexclear.parallel",
    ),
    "sideways": ("flexclear_families___init__", "from flexclear.common import words\n", "flexclear.common.words"),
    "of the package's own names": ("flexclear_parallel___init__", "from flexclear import transform\n", "flexclear"),
    "in a branch": ("masks_windows", "try:\n    import flexclear.compile\nexcept ImportError:\n    pass\n", "flexclear.compile"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_import_in_the_wrong_direction_is_found(name, tmp_path):
    file, text, target = WRONG[name]
    (found,) = upwards(tree(tmp_path, **{file: text}))
    assert found.endswith(f" imports {target}")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("masks_windows", "def f():\n    import diffusers.models\n"),
        ("compile___init__", "from diffusers import FluxPipeline\n"),
        ("flexclear_common_words", "import torch.nn as nn\n"),
        ("flexclear_families___init__", "import diffusers\n"),
    ],
)
def test_a_library_that_a_part_must_not_know_is_found(file, text, tmp_path):
    assert len(strangers(tree(tmp_path, **{file: text}))) == 1


@pytest.mark.parametrize("text", ["from flexclear.runtime.hooks import Hook\n", "def f():\n    from . import hooks\n"])
def test_a_circle_is_found(text, tmp_path):
    imports = tree(tmp_path, flexclear_runtime_plan=text)
    assert upwards(imports) == []
    assert circles(imports) == [["flexclear.runtime.hooks", "flexclear.runtime.plan"]]
    at_import = circles(one for one in imports if one.kind == "module")
    assert bool(at_import) == text.startswith("from")


def test_a_longer_circle_is_one_set(tmp_path):
    (tmp_path / "flexclear/runtime").mkdir(parents=True)
    (tmp_path / "flexclear/runtime/grid.py").write_text("import flexclear.runtime.hooks\n", encoding="utf-8")
    imports = tree(tmp_path, flexclear_runtime_plan="import flexclear.runtime.grid\n")
    assert circles(imports) == [[f"flexclear.runtime.{name}" for name in ("grid", "hooks", "plan")]]


def test_a_module_without_a_part_may_import_nothing(tmp_path):
    (tmp_path / "flexclear").mkdir()
    (tmp_path / "flexclear/elsewhere.py").write_text("import flexclear.masks\n", encoding="utf-8")
    assert upwards(tree(tmp_path)) == ["flexclear.elsewhere:1 imports flexclear.masks"]
