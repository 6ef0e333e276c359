"""The losses of section 5 of the method, and the one forward pass of student and teacher that they come from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexclear.distill.batches import Batch
from flexclear.distill.calls import caller_of
from flexclear.distill.capture import Captured, capture, compared_layers
from flexclear.distill.config import LossConfig
from flexclear.runtime.switches import override


@dataclass(frozen=True)
class Losses:
    """0-d float32 tensors; a loss with weight 0 is None.

    Attributes:
        total: the weighted sum.
        flow, prediction, attention: the unweighted losses.
    """

    total: Tensor
    flow: Tensor | None
    prediction: Tensor | None
    attention: Tensor | None

    def values(self) -> dict[str, Tensor]:
        """The losses that are not None, detached."""
        parts = {"loss": self.total, "flow": self.flow, "prediction": self.prediction, "attention": self.attention}
        return {name: value.detach() for name, value in parts.items() if value is not None}


def attention_loss(student: dict[str, Captured], teacher: dict[str, Captured]) -> Tensor:
    """Mean squared error of each layer's outputs, averaged over the layers."""
    parts = []
    for name, own in student.items():
        theirs = teacher[name]
        errors = [
            F.mse_loss(a.float() if a.dtype != torch.float64 else a, _in_order(b, own, place).to(a.device, _wide(a)))
            for place, (a, b) in enumerate(zip(own.outputs, theirs.outputs, strict=True))
        ]
        parts.append(torch.stack(errors).mean())
    return torch.stack(parts).mean()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _in_order(teacher: Tensor, student: Captured, place: int) -> Tensor:
    """Permute the teacher's output from raster order to the order of the student's."""
    if student.plan is None or place > 0:
        return teacher
    if len(student.outputs) > 1:
        return student.plan.to_image_order(teacher)
    layout = student.plan.base.layout
    text_len = layout.text_len
    if layout.text_first:
        text, image = teacher[:, :text_len], teacher[:, text_len:]
        return torch.cat([text, student.plan.to_image_order(image)], dim=1)
    image, text = teacher[:, :-text_len], teacher[:, -text_len:]
    return torch.cat([student.plan.to_image_order(image), text], dim=1)


class Objective:
    """Computes the losses of a batch.

    Args:
        student: the bare model, for its layers and configuration.
        teacher: dense and frozen.
        weights: those of the losses.
        guidance: see ``flexclear.distill.calls.Caller``.
        autocast: makes a context for both models' calls.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        weights: LossConfig,
        guidance: float = 3.5,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._student, self._teacher, self._weights = student, teacher, weights
        self._caller = caller_of(student)
        self._guidance, self._autocast = guidance, autocast
        self._layers = compared_layers(student, weights.attention_every) if weights.attention else []

    def __call__(self, batch: Batch, forward: Callable[..., Any] | None = None) -> Losses:
        """Compute the losses of a batch on the models' device.

        Args:
            batch: from ``BatchMaker``.
            forward: what to call for the student if it is wrapped; otherwise the bare model is called.
        """
        weights = self._weights
        call = self._caller.call(self._student, batch, self._guidance)
        # No step of a pipeline: those that draw densely (transform(dense_steps=)) would be any, by its idle scheduler.
        windowed = override(dense_steps=(0, 0))
        with capture(self._student, self._layers) as own, self._autocast(), windowed:
            predicted = (forward or self._student)(**call)[0]
        predicted = predicted.to(_wide(predicted))
        flow = prediction = attention = None
        if weights.flow:
            flow = F.mse_loss(predicted, self._caller.velocity(self._student, batch).to(predicted.dtype))
        if weights.prediction or weights.attention:
            with torch.no_grad(), capture(self._teacher, self._layers) as theirs, self._autocast():
                taught = self._teacher(**call)[0]
            if weights.prediction:
                prediction = F.mse_loss(predicted, taught.to(predicted.dtype))
            if weights.attention:
                attention = attention_loss(own, theirs)
        parts = ((weights.flow, flow), (weights.prediction, prediction), (weights.attention, attention))
        total = torch.stack([weight * loss for weight, loss in parts if loss is not None]).sum()
        return Losses(total, flow, prediction, attention)
