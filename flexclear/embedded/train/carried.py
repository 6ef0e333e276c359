"""A training run of the transformer in one small file, so that another machine can continue it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from flexclear.embedded.train.assembly import begin_with
from flexclear.embedded.train.checkpoint import load_checkpoint, save_checkpoint
from flexclear.embedded.train.transformer import CHECKPOINT_NAME

MOST_BYTES = 10 * 2**20


def pack_run(folder: Path, file: Path) -> Path:
    """Write weights and Muon's momentum of the run in ``folder`` to ``file``, in bfloat16, and return ``file``.

    AdamW's moments, twice as large as its weights, are left out: they recover within some hundred steps. The autoencoder and
    the tokenizers are those of the exported model that the run began with.

    Raises:
        FileNotFoundError: no run in ``folder``.
        ValueError: the file would be larger than ``MOST_BYTES``.
    """
    state = load_checkpoint(folder / CHECKPOINT_NAME)
    muon = None if state["optimizer"] is None else state["optimizer"][0]
    carried = {
        **state,
        "learners": _cast(state["learners"], torch.bfloat16),
        "optimizer": None if muon is None else [{**muon, "state": _cast(muon["state"], torch.bfloat16)}, None],
    }
    size = sum(tensor.nbytes for tensor in _tensors([carried["learners"], carried["optimizer"]]))
    if size > MOST_BYTES:
        raise ValueError(f"the run of {folder} would take {size} bytes, at most {MOST_BYTES} are to be kept")
    save_checkpoint(file, carried)
    return file


def unpack_run(file: Path, source: Path, folder: Path) -> Path:
    """Write checkpoints to ``folder`` that continue the run in ``file``, written by ``pack_run``. Return ``folder``.

    Args:
        file: the packed run.
        source: the exported model that the run began with: its autoencoder and tokenizers.
        folder: for the checkpoints.

    Raises:
        FileExistsError: ``folder`` holds a run already.
        FileNotFoundError: ``file`` or the model is not there.
        ValueError: the run's latents are normalized differently from the model's.
    """
    carried = load_checkpoint(file)
    config = source / "vae" / "config.json"
    if config.is_file():  # otherwise begin_with reports the missing model
        vae = json.loads(config.read_text(encoding="utf-8"))
        ours, theirs = (carried["shift"], carried["scaling"]), (vae["shift_factor"], vae["scaling_factor"])
        if ours != theirs:
            raise ValueError(f"{file} is normalized by {ours}, the model in {source} by {theirs}")
    begin_with(source, folder)
    wide = {**carried, "learners": _cast(carried["learners"], torch.float32)}
    if carried["optimizer"] is not None:
        muon, others = carried["optimizer"]
        wide["optimizer"] = [{**muon, "state": _cast(muon["state"], torch.float32)}, others]
    save_checkpoint(folder / CHECKPOINT_NAME, wide)
    return folder


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating-point tensors in nested dictionaries to another type."""
    if isinstance(value, dict):
        return {key: _cast(one, dtype) for key, one in value.items()}
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [tensor for one in value.values() for tensor in _tensors(one)]
    if isinstance(value, list):
        return [tensor for one in value for tensor in _tensors(one)]
    return [value] if isinstance(value, torch.Tensor) else []
