"""From what a caller asks of ``upscale_cascade`` to the settings of each stage."""

from __future__ import annotations

import math
from typing import Any

from flexclear.highres.kinds import Kind
from flexclear.highres.stages import BASE, OWN, Stage, settings_of
from flexclear.highres.state import windows_of
from flexclear.masks import Window
from flexclear.runtime.family import Family
from flexclear.runtime.mechanism import Formula
from flexclear.runtime.switches import Switches, in_force


class Planner:
    """Makes stages from the requested settings."""

    def __init__(
        self,
        pipe: Any,
        kind: Kind,
        method: str,
        negative_prompt: str | None,
        text_length: int,
        native: int | None,
        seed: int,
    ) -> None:
        from flexclear.convert import family_of
        from flexclear.runtime.hooks import entry_hook_of

        self.pipe, self.kind, self.method, self.seed = pipe, kind, method, seed
        self.family: Family = family_of(pipe.transformer)
        self.entry = entry_hook_of(pipe.transformer)
        self.guided = kind.takes_guidance(pipe, negative_prompt)
        self.token = kind.px_per_token(pipe)
        side = pipe.default_sample_size * pipe.vae_scale_factor if native is None else native
        if isinstance(side, bool) or not isinstance(side, int) or side < self.token:
            raise ValueError(f"native must be a side in pixels, {self.token} or more, got {native!r}")
        self.native_tokens = (side // self.token) ** 2
        # SD3 adds CLIP's 77 tokens to T5's.
        self.text_tokens = text_length if self.family.text_first else text_length + pipe.tokenizer_max_length

    def stage(
        self,
        number: int,
        size: tuple[int, int],
        asked: dict[str, Any],
        is_base: bool,
        windows: dict[str, Window | None] | None,
    ) -> Stage:
        """Make one stage. Raises for what this model cannot do.

        Raises:
            TypeError, ValueError: see ``upscale_cascade``.
        """
        height, width = size
        most = self.kind.largest(self.pipe)
        if most is not None and max(size) > most * self.token:
            raise ValueError(
                f"{height} x {width}: the position embedding of this {type(self.pipe.transformer).__name__} ends at "
                f"{most} x {most} tokens, {most * self.token} x {most * self.token} pixels"
            )
        if asked["guidance"] is not None and not self.guided:
            raise ValueError(
                f"guidance={asked['guidance']!r}: this FLUX.1 has no guidance input (guidance_embeds is False); pass a "
                "negative_prompt for classifier-free guidance, or leave guidance out"
            )
        settings = settings_of(self.method, is_base, asked, self.kind.released_base)
        guidance = settings["guidance"]
        if guidance is None and self.guided:
            guidance = self.kind.default("guidance_scale")
        shift = None if settings["shift"] == OWN else float(settings["shift"])
        formula = None if self.entry is None or windows is not None else self.entry.settings.formula
        switches = self._switches(height, width, settings, asked, is_base, formula)
        layers = windows_of(self.pipe) if windows is None else windows
        dense = "dense" if formula is None else formula.name
        return Stage(
            number=number,
            method=BASE if is_base else self.method,
            height=height,
            width=width,
            windows=tuple(dense if window is None else window.name for window in layers.values()),
            steps=settings["steps"] or self.kind.default("num_inference_steps"),
            strength=settings["strength"],
            guidance=guidance if self.guided else None,
            shift=shift,
            ntk_factor=switches.ntk_factor,
            ntk_floor=switches.ntk_floor,
            proportional_attention=switches.proportional_attention,
            training_tokens=switches.training_tokens,
            seed=self.seed + number - 1,
        )

    def _switches(
        self,
        height: int,
        width: int,
        settings: dict[str, Any],
        asked: dict[str, Any],
        is_base: bool,
        formula: Formula | None,
    ) -> Switches:
        own = in_force(Switches() if self.entry is None else self.entry.settings.switches)
        if is_base:
            return own
        factor, proportional = settings["ntk_factor"], settings["proportional_attention"]
        if not self.family.rope:
            if asked["ntk_factor"] not in (None, 1):
                raise ValueError(
                    f"ntk_factor={factor!r}: {type(self.pipe.transformer).__name__} {self.family.no_ntk}; leave it out"
                )
            factor = 1.0
        if formula is not None:
            if asked["proportional_attention"]:
                kind = formula.kind
                raise ValueError(f"proportional_attention: attention={kind!r} has its own formula. Leave it out")
            proportional = False
        tokens = height * width // self.token**2
        floor = 0.0
        if self.method == "imax" and factor != 1:
            floor = min(1.0, math.sqrt(self.native_tokens / tokens))
        return Switches(
            ntk_factor=factor,
            proportional_attention=proportional,
            ntk_floor=floor,
            training_tokens=self.native_tokens + self.text_tokens,
        )
