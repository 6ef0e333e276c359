"""Reads a checkout of the released code, and runs parts of it without copying them: modules by path, statements by their text.

What is adapted, in this process only: FlexAttention runs uncompiled, ``cv2``, which is imported and never used, may be
missing, and ``FluxPipeline``'s private helpers count as in diffusers 0.31, which the code was written for.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import FluxPipeline
from torch.nn.attention import flex_attention


class Checkout:
    """A checkout of the released code.

    Raises:
        FileNotFoundError: the folder lacks one of the files that are run.
    """

    FILES = ("attention_processor.py", "transformer_flux.py", "distill.py", "distill.sh", "dataset.py",
             "inference_t2i_highres.ipynb")  # fmt: skip

    def __init__(self, folder: Path) -> None:
        missing = [name for name in self.FILES if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} is no checkout of the released code: it lacks {', '.join(missing)}")
        self.folder = folder
        self.script = ast.parse((folder / "distill.py").read_text(encoding="utf-8"))

    def commit(self) -> str:
        """Its commit."""
        told = subprocess.run(
            ["git", "-C", str(self.folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        return told.stdout.strip()

    def module(self, name: str) -> types.ModuleType:
        """One of its modules, imported once by its path."""
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, self.folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        sys.modules[name] = made  # its modules import each other by these names
        if "cv2" not in sys.modules and importlib.util.find_spec("cv2") is None:
            sys.modules["cv2"] = types.ModuleType("cv2")
        with mock.patch.object(torch, "compile", lambda function, **_: function):
            spec.loader.exec_module(made)
        return made

    def attention(self) -> types.ModuleType:
        """Its attention, uncompiled."""
        made = self.module("attention_processor")
        made.torch = types.SimpleNamespace(**{**vars(torch), "compile": lambda function, **_: function})
        made.create_block_mask = lambda *args, _compile=False, **kwargs: flex_attention.create_block_mask(
            *args, **kwargs
        )
        return made

    def arguments(self, *changed: str) -> argparse.Namespace:
        """What its script makes of the options in its shell script, and of more."""
        text = (self.folder / "distill.sh").read_text(encoding="utf-8").replace("\\\n", " ")
        values = dict(re.findall(r"export (\w+)=\"?([^\"\n]*)\"?", text))
        words = shlex.split(re.sub(r"\$(\w+)", lambda found: values[found[1]], text))
        options = words[words.index("distill.py") + 1 :]
        return self.function("parse_args", {"argparse": argparse, "os": os})([*options, *changed])

    def function(self, name: str, names: dict[str, Any]) -> Callable[..., Any]:
        """A function of its training script, wherever it is defined; ``names`` are its globals."""
        (found,) = (node for node in ast.walk(self.script) if isinstance(node, ast.FunctionDef) and node.name == name)
        self._execute([found], names)
        return names[name]

    def run(self, first: str, last: str, names: dict[str, Any]) -> None:
        """Execute statements of its training script in ``names``: of one block, from and to those that begin with these words.

        Raises:
            LookupError: there are none, so the code is another one.
        """
        for node in ast.walk(self.script):
            block = getattr(node, "body", None)
            if isinstance(block, list):
                texts = [ast.unparse(statement) for statement in block]
                starts = [i for i, text in enumerate(texts) if text.startswith(first)]
                ends = [i for i, text in enumerate(texts) if text.startswith(last)]
                if starts and ends:
                    self._execute(block[starts[0] : ends[-1] + 1], names)
                    return
        raise LookupError(f"distill.py has no block from {first!r} to {last!r}")

    def _execute(self, statements: list[ast.stmt], names: dict[str, Any]) -> None:
        exec(compile(ast.Module(statements, []), str(self.folder / "distill.py"), "exec"), names)

    def notebook(self) -> list[ast.stmt]:
        """Statements of its notebook for high resolution."""
        cells = json.loads((self.folder / "inference_t2i_highres.ipynb").read_text(encoding="utf-8"))["cells"]
        sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        return [statement for source in sources for statement in ast.parse(source).body]


class PipelineOf031:
    """``FluxPipeline``'s helpers, called as diffusers 0.31 has them: ids in latents, a VAE factor that includes packing."""

    _pack_latents = staticmethod(FluxPipeline._pack_latents)

    @staticmethod
    def _prepare_latent_image_ids(batch: int, height: int, width: int, *rest: Any) -> torch.Tensor:
        return FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, *rest)

    @staticmethod
    def _unpack_latents(latents: torch.Tensor, height: int, width: int, vae_scale_factor: int) -> torch.Tensor:
        return FluxPipeline._unpack_latents(latents, height, width, vae_scale_factor // 2)
