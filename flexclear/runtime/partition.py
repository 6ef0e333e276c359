"""What the hooks need from a run over several processes, each of which has a part of the image.

``flexclear.parallel`` implements ``Partition``, and ``Band`` of ``call_plan``. Neither this module nor those that use these
protocols import it: the code that shares a model gives its entry hook a ``Partition``, which gives every call its ``Band``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flexclear.compile.kernels import Kernel
from flexclear.masks import Layout, Window
from flexclear.runtime.call_plan import Band
from flexclear.runtime.facts import Call, Settings, Slot
from flexclear.runtime.family import Family
from flexclear.runtime.plan import Plan


class Partition(Protocol):
    """A model's run over several processes, from one call to the next."""

    @property
    def current(self) -> Band | None:
        """The running call, or None between calls."""

    def check(self, model: nn.Module, family: Family, settings: Settings) -> None:
        """Raise if a model transformed with these settings cannot be shared.

        Raises:
            ValueError: it cannot.
        """

    def watch(self, pipe: Any) -> None:
        """Watch how a pipeline's denoising loop ends."""

    def begin(
        self, model: nn.Module, kwargs: Mapping[str, Any], call: Call, family: Family, settings: Settings
    ) -> None:
        """Begin a call, once its arguments are known, by agreeing on it with the other processes.

        Raises:
            ValueError: the call cannot be shared, or the processes' calls differ.
        """

    def part(
        self,
        layout: Layout,
        window: Window | None,
        backend: str,
        kernel: Kernel,
        device: torch.device,
        text_padded: bool,
    ) -> Plan:
        """This process's plan for the call that has begun; arguments as in ``get_plan``."""

    def band(
        self, plans: Sequence[Any], masks: Sequence[Any], slots: Sequence[Slot], keep: Mapping[str, Tensor]
    ) -> Band:
        """The call that has begun, with its plans and masks, one per slot."""

    def close(self) -> None:
        """End the run: this process computes whole images again."""
