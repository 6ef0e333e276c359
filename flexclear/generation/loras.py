"""LoRA files of ``flexclear generate``: checked before the model's weights are read, then fused into them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


def check_loras(kind: Any, config: dict[str, Any], loras: Sequence[tuple[Path, float]]) -> None:
    """Raise for LoRA that ``load_loras`` could not load, as far as that is known without the model's weights.

    Args:
        kind: the pipeline's class; None: not from diffusers.
        config: the pipeline's configuration.
        loras: file and scale of each.

    Raises:
        ValueError: a file is not a LoRA, or the pipeline loads none.
    """
    if not loras:
        return
    from flexclear.weights.files import read_header

    if not hasattr(kind, "load_lora_weights"):
        raise ValueError(f"--lora: {config.get('_class_name')} of diffusers loads none; leave it out")
    if (config.get("transformer_2") or (None, None))[1] is not None:
        raise ValueError(
            f"--lora: {config.get('_class_name')} has two transformers here, and a file is for one of them. Load it in Python: "
            "pipe.load_lora_weights(..., load_into_transformer_2=...)"
        )
    for path, _ in loras:
        names = read_header(path, path.name).shapes
        if not any("lora" in name.lower() for name in names):
            raise ValueError(
                f"--lora: {path} holds no LoRA: no tensor is named so (the first: {next(iter(names), 'none')!r})"
            )


def load_loras(pipe: Any, loras: Sequence[tuple[Path, float]], say: Callable[[str], None]) -> None:
    """Load LoRA files, each with its scale, and fuse them into the weights.

    Raises:
        ValueError: a file fits nothing in the transformer, or diffusers refuses it.
    """
    if not loras:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    from flexclear.families.target import model_of

    model = model_of(pipe)
    names = [f"lora_{number}" for number in range(1, len(loras) + 1)]
    for name, (path, scale) in zip(names, loras, strict=True):
        with _said_by_diffusers() as said:
            try:
                pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
            except ValueError as error:
                raise ValueError(f"--lora: {path} does not fit the {type(model).__name__}: {error!s:.200}") from error
        # diffusers continues without them.
        if left := next((line for line in said if "unexpected keys" in line or "missing keys" in line), None):
            raise ValueError(f"--lora: {path} fits the {type(model).__name__} in part only: {left:.300}")
        layers = [
            module
            for module in model.modules()
            if isinstance(module, BaseTunerLayer) and name in getattr(module, "lora_A", {})
        ]
        if not layers:
            raise ValueError(f"--lora: nothing in {path} fits the {type(model).__name__}: it is for another model")
        say(f"LoRA {path.name}: {len(layers)} layers, scale {scale:g}")
    pipe.set_adapters(names, [scale for _, scale in loras])
    pipe.fuse_lora(adapter_names=names, safe_fusing=True)
    pipe.unload_lora_weights()


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def _said_by_diffusers() -> Iterator[list[str]]:
    """Collect what diffusers logs inside the block without printing it: a LoRA without text encoder keys is a warning, too."""
    logger, kept = logging.getLogger("diffusers"), _Kept()
    before = logger.handlers
    logger.handlers = [kept]
    try:
        yield kept.lines
    finally:
        logger.handlers = before
