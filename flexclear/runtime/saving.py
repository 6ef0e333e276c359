"""``save_pretrained`` of a transformed model: writes its window to the ``config.json`` next to the weights."""

from __future__ import annotations

import json
import os
import sys
import warnings
from types import FrameType
from typing import Any

from torch import nn

from flexclear.compile.files import whole_file
from flexclear.runtime.carrying import Hook
from flexclear.runtime.facts import Settings
from flexclear.runtime.stated import KEY, state

METHOD = "save_pretrained"


class SaveHook(Hook):
    """``state_dict`` pre-hook: writes the settings when the caller is ``save_pretrained``, the model's or a pipeline's.

    A hook follows the model everywhere: into copies, pickles, other pipelines. diffusers has already written ``config.json``
    when it asks for the weights. Other callers of ``state_dict`` are not affected.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        level = 1
        frame: FrameType | None = sys._getframe()
        while frame is not None and not _saves(frame, model):
            level, frame = level + 1, frame.f_back
        if frame is None or not frame.f_locals.get("is_main_process", True):
            return
        why = self._write(model, frame.f_locals.get("save_directory"))
        if why is None:
            return
        # The warning should point to the caller of save_pretrained, also when a pipeline's method calls the model's.
        while frame is not None and frame.f_code.co_name == METHOD:
            level, frame = level + 1, frame.f_back
        warnings.warn(
            f"flexclear: save_pretrained writes the weights of this {type(model).__name__}, but not its window: {why}. When "
            "loaded, it will be dense; call flexclear.transform again with the same arguments",
            stacklevel=level,
        )

    def _write(self, model: Any, directory: Any) -> str | None:
        """Put the settings into a folder's ``config.json``, or return the reason why that is impossible."""
        try:
            stated = state(model, self.settings)
        except ValueError as error:
            return str(error)
        path = os.path.join(directory or "", getattr(model, "config_name", None) or "config.json")
        if directory is None or not os.path.isfile(path):
            return f"there is no {path} to write it to"
        with open(path, encoding="utf-8") as stream:
            config = json.load(stream)
        with whole_file(path) as beside:
            text = json.dumps({**config, KEY: stated}, indent=2, sort_keys=True)
            beside.write_text(text + "\n", encoding="utf-8")
        return None


def _saves(frame: FrameType, model: Any) -> bool:
    return frame.f_code.co_name == METHOD and frame.f_locals.get("self") is model
