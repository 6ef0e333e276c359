"""Finds everything that can be wrong with a run before any weights are read."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from flexclear.common.extras import require
from flexclear.distill.batches import held_out_indices
from flexclear.distill.calls import caller_of, check_samples, class_name
from flexclear.distill.capture import compared_layers
from flexclear.distill.config import DistillConfig
from flexclear.distill.encoding import samples_of
from flexclear.distill.models import check_class, fingerprint, pipeline_folder, skeleton
from flexclear.distill.optimizers import check_optimizer
from flexclear.distill.samples import Samples
from flexclear.families.target import model_of
from flexclear.runtime.hooks import entry_hook_of


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` finds out before any weights are read."""

    samples: Samples
    folder: Path | None
    fingerprint: str | None


def prepare(
    config: DistillConfig,
    model_or_pipe: Any = None,
    data: Samples | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Prepared:
    """Check everything that can be wrong with a run before weights are read. Then encode images, if needed.

    Raises:
        FileNotFoundError: there is no such model, cache or file.
        ImportError: an optional package that the settings ask for is missing.
        TypeError, ValueError: a setting is invalid, the model cannot be trained, or the data belong to another model.
    """
    config.check()
    check_optimizer(config.optimizer)
    if config.train == "lora":
        require("peft", "train: lora")
    if config.tracker is not None and importlib.util.find_spec(config.tracker) is None:
        raise ImportError(f"tracker: {config.tracker} is not installed (pip install {config.tracker})")
    if config.sheets.every and model_or_pipe is not None and isinstance(model_or_pipe, nn.Module):
        raise ValueError("sheets.every needs the pipeline, which draws them; a bare model was passed")
    if data is None and config.data is None:
        raise ValueError("data is missing: a folder of flexclear data cache")
    folder = made = None
    if model_or_pipe is None:
        if config.model is None:
            raise ValueError("model is missing: a pipeline folder, a hub id or 'embedded'")
        folder = pipeline_folder(config.model)
        model = skeleton(folder)
        made = fingerprint(folder)
    else:
        model = model_of(model_or_pipe)
        check_class(class_name(model))
        entry = entry_hook_of(model)
        if config.initial_weights is not None and entry is not None and entry.settings.formula is not None:
            raise ValueError(
                f"initial_weights are for windows; this model's attention={entry.settings.formula.kind!r} has its own formula"
            )
        if config.model is not None:
            made = fingerprint(pipeline_folder(config.model))
    video = caller_of(model).video
    if config.sheets.every and video:
        raise ValueError(f"sheets.every draws images, but {type(model).__name__} is a video model; leave it out")
    if config.losses.attention:
        compared_layers(model, config.losses.attention_every)
    if data is None:
        data = samples_of(config, say)
    check_samples(data, model, made, f"the cache {config.data}" if config.data else "the data")
    left = len(data) - len(held_out_indices(config.held_out.count, len(data), config.seed))
    if config.batch_size > left:
        raise ValueError(
            f"batch_size is {config.batch_size}, but there are only {left} samples to train on: every batch would hold some of "
            "them twice. Use a smaller one, with gradient_accumulation for the rest"
        )
    return Prepared(data, folder, made if made is not None else data.fingerprint)
