"""Decide what each training step sees: which images, which captions, how much padding."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from transformers import CLIPTokenizer, T5TokenizerFast

from flexclear.embedded.captions import random_caption
from flexclear.embedded.scenes import UNNAMED
from flexclear.embedded.train.latents import LatentCache


@dataclass(frozen=True)
class BatchKind:
    """One shape of training batch.

    Attributes:
        share: how often it is drawn, relative to the others.
        pictures: images in the batch.
        large: whether the images are the 256-pixel ones (1,024 image tokens) or the 128-pixel ones (256).
        text_length: T5 tokens, padding included.
    """

    share: float
    pictures: int
    large: bool
    text_length: int

    @property
    def noise_logit(self) -> float:
        """Median of the noise levels' logit: twice the side needs twice the noise to hide as much (SD3, section 5.3.2)."""
        return 0.5 + (math.log(2) if self.large else 0.0)


BATCH_KINDS = (
    BatchKind(0.50, 16, False, 24),
    BatchKind(0.10, 16, False, 64),
    BatchKind(0.10, 6, False, 512),
    BatchKind(0.25, 5, True, 40),
    BatchKind(0.05, 3, True, 512),
)


def shares(large: float | None = None) -> list[float]:
    """Return how often each of ``BATCH_KINDS`` is drawn, with ``large`` of all batches, 0 to 1, at 256 pixels if given."""
    drawn = [kind.share for kind in BATCH_KINDS]
    if large is None:
        return drawn
    usual = sum(kind.share for kind in BATCH_KINDS if kind.large) / sum(drawn)
    return [kind.share * (large / usual if kind.large else (1 - large) / (1 - usual)) for kind in BATCH_KINDS]


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        latents: shape (images, 8, side, side), float32, normalized.
        noise: the same shape, standard normal.
        sigmas: shape (images,), noise levels strictly between 0 and 1.
        clip_ids: shape (images, longest caption), int64.
        t5_ids: shape (images, text length), int64.
        empty_clip_ids: the same shape as ``clip_ids``, for the empty caption.
        empty_t5_ids: the same shape as ``t5_ids``, for the empty caption.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    sigmas: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor
    empty_clip_ids: torch.Tensor
    empty_t5_ids: torch.Tensor


@dataclass(frozen=True)
class BatchMaker:
    """Makes the batch of any step number, the same one every time.

    ``emphasis``, shape (emoji, backgrounds), says how often each pair is drawn relative to the others; without it, all are
    equal. An image with an unnamed background counts like its emoji's average. ``noisier`` is added to the noise levels'
    logits. ``large_share`` is the share of batches at 256 pixels, if it differs from that of ``BATCH_KINDS``.
    """

    cache: LatentCache
    emoji_names: Sequence[str]
    background_names: Sequence[str]
    clip_tokenizer: CLIPTokenizer
    t5_tokenizer: T5TokenizerFast
    seed: int
    emphasis: torch.Tensor | None = None
    noisier: float = 0.0
    large_share: float | None = None

    def make(self, step: int) -> Batch:
        """Return the batch of step ``step``."""
        choice = random.Random(f"{self.seed}/{step}")
        kind = choice.choices(BATCH_KINDS, shares(self.large_share))[0]
        chosen_set = self.cache.large if kind.large else self.cache.small
        rows = self._rows(kind, len(chosen_set.latents), choice)
        captions = [
            random_caption(
                self.emoji_names[int(chosen_set.emoji[row])],
                self._background_name(int(chosen_set.backgrounds[row])),
                choice,
            )
            for row in rows
        ]
        generator = torch.Generator().manual_seed(choice.getrandbits(62))
        latents = chosen_set.latents[rows].float()
        clip_ids = self.clip_tokenizer(captions, padding="longest", return_tensors="pt").input_ids
        return Batch(
            latents=latents,
            noise=torch.randn(latents.shape, generator=generator),
            sigmas=torch.sigmoid(torch.randn(kind.pictures, generator=generator) + kind.noise_logit + self.noisier),
            clip_ids=clip_ids,
            t5_ids=self._t5_ids(captions, kind.text_length),
            empty_clip_ids=self.clip_tokenizer(
                [""] * kind.pictures, padding="max_length", max_length=clip_ids.shape[1], return_tensors="pt"
            ).input_ids,
            empty_t5_ids=self._t5_ids([""] * kind.pictures, kind.text_length),
        )

    def _background_name(self, index: int) -> str | None:
        return None if index == UNNAMED else self.background_names[index]

    @cached_property
    def _shares(self) -> dict[bool, list[float]]:
        """Running sums of how often each image is drawn, for the small and for the large ones."""
        assert self.emphasis is not None
        sets = {False: self.cache.small, True: self.cache.large}
        # UNNAMED indexes the last column.
        emphasis = torch.cat([self.emphasis, self.emphasis.mean(1, keepdim=True)], dim=1)
        return {
            large: list(accumulate(emphasis[shown.emoji, shown.backgrounds].tolist())) for large, shown in sets.items()
        }

    def _rows(self, kind: BatchKind, count: int, choice: random.Random) -> list[int]:
        if self.emphasis is None:
            return [choice.randrange(count) for _ in range(kind.pictures)]
        return choice.choices(range(count), cum_weights=self._shares[kind.large], k=kind.pictures)

    def _t5_ids(self, captions: Sequence[str], length: int) -> torch.Tensor:
        encoded = self.t5_tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return encoded.input_ids
