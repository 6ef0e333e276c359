"""``save_pretrained`` of a transformed model writes weights, not windows: what says so."""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any

from torch import nn

from flexclear.runtime.carrying import Hook

METHOD = "save_pretrained"


class SaveHook(Hook):
    """``state_dict`` pre-hook: warns where it is ``model.save_pretrained`` that asks, a pipeline's too.

    A hook, because it goes with the model wherever that goes: into copies, pickles, other pipelines. Other callers of
    ``state_dict`` keep the model and its window, and are not warned.
    """

    def __call__(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        level = 1
        frame: FrameType | None = sys._getframe()
        while frame is not None and not _saves(frame, model):
            level, frame = level + 1, frame.f_back
        if frame is None or not frame.f_locals.get("is_main_process", True):
            return
        # Blame whoever called it, past the method of the same name that a pipeline has.
        while frame is not None and frame.f_code.co_name == METHOD:
            level, frame = level + 1, frame.f_back
        name = type(model).__name__
        warnings.warn(
            f"flexclear: save_pretrained writes the weights of this {name}, but not its window: from_pretrained will give a "
            "dense model. Either flexclear.transform what was loaded with the same arguments; or flexclear.save_weights(model, "
            "path) beside it, and flexclear.load_weights(model, path) then, which brings back windows and pooling weights "
            "(down_factor) too",
            stacklevel=level,
        )


def _saves(frame: FrameType, model: Any) -> bool:
    return frame.f_code.co_name == METHOD and frame.f_locals.get("self") is model
