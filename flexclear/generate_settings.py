"""What ``flexclear generate`` is asked for, and how sizes, radii and prompt files are written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from flexclear.compile.quantize import MIN_FEATURES
from flexclear.masks import Disc
from flexclear.reading import lines_of, read_text

DENSE = "dense"
BEST = "best"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class GenerateSettings:
    """What to draw and how. Pictures are all combinations of prompts, sizes and seeds, in this order.

    Attributes:
        model: a local pipeline folder, a hub id, or ``"embedded"``.
        prompts: one or more.
        out: a folder, or a ``.png`` file for one picture.
        sizes: (height, width) in pixels; empty: the pipeline's own size.
        seeds: of the noise, which is made on the CPU: the same on every device.
        r: window radius in tokens; ``"dense"``: the plain model; None: what the weights say, or else 16.
        down_factor: side of the pooled cells in tokens, or None.
        weights: for ``flexclear.load_weights``: a file, or ``PLACE:FILE`` in a folder or hub repository, or of those that
            ship with the embedded model: ``embedded:clear_local_8.safetensors``.
        recipe: a name of ``flexclear.compile.RECIPES``, ``"best"`` for the best FP8 one here, or None.
        min_features: linears smaller than this are not quantised.
        steps, guidance, text_len: None: the pipeline's own.
        dtype: a name of ``DTYPES``, or ``"auto"``: bfloat16 on CUDA, float32 elsewhere.
        device: as torch names it, or ``"auto"``: CUDA where there is one.
        backend: of ``flexclear.transform``.
        compile: compile the blocks (``flexclear.optimize``); the first picture of each size takes longer.
        overwrite: see ``flexclear.picture_files.Target``.
        resume: keep the finished images of this set in ``out`` and draw the missing ones under their own numbers.
        highres: sizes of the stages of ``flexclear.highres.upscale_cascade``, in place of ``sizes``; empty: none.
        highres_method, strength, shift: of it.
        stages: folder in which the stages of each picture are kept, and from which they go on; or None.
        parallel: share each picture among the processes that torchrun has started (``flexclear.parallel``); the first one
            writes it.
        text, exchange: of ``flexclear.parallel.enable``.
    """

    model: str
    prompts: tuple[str, ...]
    out: Path
    sizes: tuple[tuple[int, int], ...] = ()
    seeds: tuple[int, ...] = (0,)
    r: int | str | None = None
    down_factor: int | None = None
    weights: str | None = None
    recipe: str | None = None
    min_features: int = MIN_FEATURES
    steps: int | None = None
    guidance: float | None = None
    text_len: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    compile: bool = False
    overwrite: bool = False
    resume: bool = False
    highres: tuple[int | tuple[int, int], ...] = ()
    highres_method: str = "sdedit"
    strength: float | None = None
    shift: float | None = None
    stages: Path | None = None
    parallel: bool = False
    text: str = "exact"
    exchange: str = "sync"

    @property
    def pictures(self) -> int:
        return len(self.prompts) * max(1, len(self.sizes)) * len(self.seeds)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of ``"HxW"``.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"(\d+)\s*[xX×]\s*(\d+)", text.strip())  # noqa: RUF001
    if match is None or 0 in (size := (int(match[1]), int(match[2]))):
        raise ValueError(f"a size is HEIGHTxWIDTH in pixels, such as 1024x768; got {text!r}")
    return size


def parse_radius(text: str) -> int | str:
    """The radius, or ``"dense"``.

    Raises:
        ValueError: it is neither.
    """
    if text == DENSE:
        return text
    try:
        Disc(radius := int(text))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"--r is a window radius of 1 or more tokens, or {DENSE!r} for the plain model; got {text!r}"
        ) from error
    return radius


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt per line of a UTF-8 file; blank lines and lines that begin with ``#`` are left out.

    Lines end at newlines only: a prompt may hold U+2028 or U+0085.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, no UTF-8 text, or holds no prompt.
    """
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(f"--prompts must be a text file, {path} is a folder")
    if not path.exists():
        raise FileNotFoundError(f"--prompts: no file {path}")
    try:
        lines = [line.strip() for line in lines_of(read_text(path))]
    except ValueError as error:
        raise ValueError(f"--prompts must be a UTF-8 text file: {error}") from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise ValueError(f"--prompts {path} holds no prompt, only blank lines and # comments")
    return prompts
