"""One pipeline that draws from the same noise dense and under a window, one request at a time."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import flexclear
from flexclear.common.choices import EMBEDDED, check_seeds
from flexclear.common.reading import check_unicode
from flexclear.compile.undoing import afterwards
from flexclear.embedded.evaluation import picture_psnr
from flexclear.families import family_of
from flexclear.families.target import models_of, px_per_token
from flexclear.generation.calls import call_arguments
from flexclear.generation.generate import EMBEDDED_DEFAULTS
from flexclear.generation.kinds import parameters_of
from flexclear.masks import Layout
from flexclear.play.settings import PLAIN, Ready, Weights
from flexclear.runtime import carrying
from flexclear.runtime.exchange import as_before
from flexclear.weights import keys

OnStep = Callable[[int, int], None]
"""Called after each denoising step with its number from 1 and the total."""

RADIUS, EMBEDDED_RADIUS = 16, 4
"""Initial window radius of a page, in tokens."""

SIDES = ((1.0, 1.0), (0.5, 0.5), (0.8, 1.25), (1.25, 0.8), (1.5, 1.5), (2.0, 2.0))
"""Sizes offered if none was requested: height and width as multiples of the pipeline's own side."""


class Stopped(Exception):
    """The server is shutting down, so the current image is abandoned."""


@dataclass(frozen=True)
class Wish:
    """What to draw, dense and under a window.

    Attributes:
        prompt: the prompt of both images.
        height, width: in pixels.
        seed: seed of the noise that both start from.
        steps: denoising steps.
    """

    prompt: str
    height: int
    width: int
    seed: int
    steps: int


@dataclass(frozen=True)
class Drawn:
    """One image.

    Attributes:
        image: the image as the pipeline returned it.
        seconds: time of the call, from prompt to image, including compilation in a first call.
        pace: median seconds of a step, without the first; None if there is only one step.
        counted: number of steps in ``pace``.
    """

    image: Image.Image
    seconds: float
    pace: float | None
    counted: int


@dataclass(frozen=True)
class Work:
    """What attention does in one step under windows, for one sample.

    Attributes:
        layout: the sequence that the model was called with.
        allowed: pairs of query and key inside the windows, as a share of dense attention's.
        executed: pairs that are computed, as a share of dense attention's: those in FlexAttention's blocks, including padding,
            or all of them.
        masked: whether masked SDPA ran, which computes all pairs.
        flops, dense_flops: FLOPs of all layers, over allowed pairs and over all pairs.
    """

    layout: Layout
    allowed: float
    executed: float
    masked: bool
    flops: int
    dense_flops: int


@dataclass(frozen=True)
class Windowed:
    """An image drawn under windows, and its comparison with the dense one.

    Attributes:
        drawn: the image.
        radius: window radius in tokens.
        weights: the weights that it was drawn with.
        work: what attention did.
        psnr: PSNR to the dense image, in dB.
    """

    drawn: Drawn
    radius: int
    weights: Weights
    work: Work
    psnr: float


@dataclass
class Studio:
    """Draws with one pipeline, which is dense between calls. Calls from several threads wait for each other.

    Attributes:
        ready: the checked settings.
        pipe: from ``load_play``.
    """

    ready: Ready
    pipe: Any
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _kept: tuple[Wish, Drawn] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an initial radius that is beyond all sizes."""
        asked = self.ready.settings.r
        if asked is not None and asked > self.largest_radius:
            raise ValueError(
                f"--r {asked} is more than the {self.largest_radius} tokens from which on a window is the whole image"
            )

    @property
    def name(self) -> str:
        """The model's name as requested."""
        return self.ready.settings.model

    @property
    def px(self) -> int:
        """Side of a token in pixels."""
        return px_per_token(self.pipe)

    @property
    def weights(self) -> tuple[Weights, ...]:
        """Weights that a window can be drawn with, the pipeline's own first."""
        return self.ready.weights

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of the offered sizes, all of which the pipeline can draw; the initial one first."""
        if self.ready.settings.sizes:
            return list(dict.fromkeys(self.ready.settings.sizes))
        side, px = self._own_side(), self.px
        return list(dict.fromkeys(tuple(max(1, round(f * side / px)) * px for f in pair) for pair in SIDES))  # type: ignore[misc]

    def _own_side(self) -> int:
        """Side in pixels of the square that the pipeline draws by default."""
        stated = parameters_of(type(self.pipe)).get("height")
        if isinstance(stated, int):
            return stated
        latents, factor = (getattr(self.pipe, name, None) for name in ("default_sample_size", "vae_scale_factor"))
        return latents * factor if isinstance(latents, int) and isinstance(factor, int) else 1024

    @property
    def largest_radius(self) -> int:
        """Radius from which on a window covers the whole image at every size."""
        return max(math.isqrt((h // self.px - 1) ** 2 + (w // self.px - 1) ** 2) + 1 for h, w in self.sizes)

    @property
    def first(self) -> tuple[int, Weights]:
        """Initial radius and weights of a page: weights for that radius if there are any."""
        asked = self.ready.settings.r
        given = self.weights[1:]
        if asked is None and self.ready.settings.weights:
            chosen = given[-len(self.ready.settings.weights)]
            return min(chosen.radius or RADIUS, self.largest_radius), chosen
        radius = asked or min(EMBEDDED_RADIUS if self.name == EMBEDDED else RADIUS, self.largest_radius)
        fitting = (choice for choice in given if choice.radius == radius and choice.down_factor is None)
        return radius, next(fitting, PLAIN)

    @property
    def steps(self) -> int:
        """Initial number of denoising steps of a page."""
        return int(self._fixed["num_inference_steps"])

    @property
    def _fixed(self) -> dict[str, Any]:
        """Arguments that all calls share."""
        kind = type(self.pipe)
        defaults = parameters_of(kind) | (EMBEDDED_DEFAULTS if self.name == EMBEDDED else {})
        return call_arguments(kind, self.ready.settings.as_generate(), defaults)

    def check(self, wish: Wish, radius: int = 1) -> None:
        """Raise for what the pipeline cannot draw.

        Raises:
            ValueError: it cannot draw this.
        """
        if not wish.prompt.strip():
            raise ValueError("write a prompt first: it is empty")
        check_unicode(wish.prompt, "the prompt")
        check_seeds("the seed", wish.seed)
        if wish.steps < 1:
            raise ValueError(f"there must be 1 or more steps, got {wish.steps}")
        if (wish.height, wish.width) not in self.sizes:
            offered = ", ".join(f"{height}x{width}" for height, width in self.sizes)
            raise ValueError(
                f"the size {wish.height}x{wish.width} is not among those offered: {offered}. flexclear play --size offers others"
            )
        if not 1 <= radius <= self.largest_radius:
            raise ValueError(f"the window radius must be from 1 to {self.largest_radius} tokens, got {radius}")

    def dense(self, wish: Wish, on_step: OnStep = lambda step, steps: None) -> Drawn:
        """Draw the image with dense attention. The last one is cached, since it does not depend on the window.

        Raises:
            ValueError: the pipeline cannot draw it.
            Stopped: the server is shutting down.
        """
        self.check(wish)
        with self._lock:
            if self._kept is None or self._kept[0] != wish:
                self._kept = wish, self._draw(wish, on_step)
            return self._kept[1]

    def windowed(
        self, wish: Wish, dense: Drawn, radius: int, weights: Weights, on_step: OnStep = lambda step, steps: None
    ) -> Windowed:
        """Draw the image with a window in every layer, and compare. The pipeline is dense again afterwards.

        Args:
            wish: what to draw.
            dense: the same wish drawn by ``dense``.
            radius: window radius in tokens.
            weights: one of ``weights``.
            on_step: see ``OnStep``.

        Raises:
            ValueError: the pipeline cannot draw it, or the weights do not fit it.
            Stopped: the server is shutting down.
        """
        self.check(wish, radius)
        with self._lock, self._with(radius, weights), self._watched() as seen:
            drawn = self._draw(wish, on_step)
            work = self._work(*seen[0])
        return Windowed(drawn, radius, weights, work, _psnr(drawn.image, dense.image))

    def stop(self, wait: float) -> bool:
        """End the current drawing after its current step, and draw nothing more.

        Args:
            wait: seconds to wait for that step.

        Returns:
            Whether it has ended.
        """
        self._stopping.set()
        ended = self._lock.acquire(timeout=wait)
        if ended:
            self._lock.release()  # for waiting threads, which draw nothing
        return ended

    @contextlib.contextmanager
    def _with(self, radius: int, weights: Weights) -> Iterator[None]:
        """Apply windows and weights inside the block, and restore the pipeline afterwards."""
        with contextlib.ExitStack() as undo:
            for model in models_of(self.pipe):
                undo.enter_context(as_before(model))
                if weights.path is not None:
                    undo.enter_context(_weights_as_before(model))
            backend = self.ready.settings.backend
            if weights.path is not None and weights.stated:
                # Loading the file sets its own window. Then set the requested one, which keeps pooling weights.
                flexclear.load_weights(self.pipe, weights.path)
            flexclear.transform(self.pipe, r=radius, down_factor=weights.down_factor, backend=backend)
            if weights.path is not None and not weights.stated:
                flexclear.load_weights(self.pipe, weights.path)
            yield

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[tuple[Layout, bool]]]:
        """Yield a list that collects the layout of each call, and whether its mask is for masked SDPA."""
        seen: list[tuple[Layout, bool]] = []

        def note(model: Any, args: Any, kwargs: Any) -> None:
            plan = getattr(carrying.here, "leaving", None)
            if plan is not None:
                seen.append((plan.base.layout, any(isinstance(slot.mask, Tensor) for slot in plan.slots)))

        with contextlib.ExitStack() as undo:
            for model in models_of(self.pipe):  # after the hook that plans the call
                undo.callback(model.register_forward_pre_hook(note, with_kwargs=True).remove)
            yield seen

    def _work(self, layout: Layout, masked: bool) -> Work:
        """What attention does in a call over ``layout``; ``masked``: with masked SDPA."""
        told = flexclear.explain(
            self.pipe, height=layout.height * self.px, width=layout.width * self.px, text_len=layout.text_len
        )
        costs = [layer.cost for layer in told.layers if layer.cost is not None]
        pairs, executed, dense = (
            sum(getattr(cost, name) * cost.channels for cost in costs)
            for name in ("pairs", "executed_pairs", "dense_pairs")
        )
        return Work(layout, pairs / dense, 1.0 if masked else executed / dense, masked, told.flops, told.dense_flops)

    def _draw(self, wish: Wish, on_step: OnStep) -> Drawn:
        device = self.ready.setup.device
        ends: list[float] = []

        def wait() -> float:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter()

        def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            ends.append(wait())
            if self._stopping.is_set():
                raise Stopped
            on_step(len(ends), wish.steps)
            return tensors

        if self._stopping.is_set():
            raise Stopped
        callback = "callback_on_step_end" in parameters_of(type(self.pipe))
        begin = wait()
        made = self.pipe(
            prompt=wish.prompt,
            height=wish.height,
            width=wish.width,
            generator=torch.Generator().manual_seed(wish.seed),
            **{**self._fixed, "num_inference_steps": wish.steps},
            **({"callback_on_step_end": step_end} if callback else {}),
        )
        seconds = wait() - begin
        paces = [after - before for before, after in itertools.pairwise(ends)]
        return Drawn(made.images[0], seconds, statistics.median(paces) if paces else None, len(paces))


@contextlib.contextmanager
def _weights_as_before(model: Any) -> Iterator[None]:
    """Restore everything that ``flexclear.load_weights`` writes, after a ``with`` block."""
    kept = [(place, place.keep()) for place in keys.places(model, list(family_of(model).layers(model))).values()]

    def put_back() -> None:
        for place, numbers in kept:
            place.put_back(numbers)

    with afterwards(put_back):
        yield


def _psnr(image: Image.Image, other: Image.Image) -> float:
    first, second = (torch.from_numpy(np.array(one.convert("RGB")))[None].float() / 255 for one in (image, other))
    return float(picture_psnr(first, second))
