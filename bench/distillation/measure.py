"""How near images are to the teacher's, and whether they show what was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexclear import embedded
from flexclear.common.metrics import require_for_metrics
from flexclear.compile.files import whole_file
from flexclear.embedded.evaluation import Request, evaluate, generate, held_out_requests
from flexclear.embedded.retrieval import Retriever
from flexclear.embedded.vocabulary import Vocabulary
from flexclear.evaluation import Networks, score_tensors

from bench.distillation.data import bitmaps_of
from bench.distillation.rows import Comparison

PAIRS_SEED = 1


PAIRED = ("psnr", "ssim", "stlpips-alex", "fd-lite0")
"""To the reference. ST-LPIPS of VGG-16 would add 1.1 s of a core per pair of 256 px, five times as much as of AlexNet;
``flexclear eval`` has it."""
ALONE = ("score-lite0",)


@dataclass(frozen=True)
class Measured:
    """What ``flexclear.evaluation`` says of the images, 8 bits a channel, and what retrieval does.

    Attributes:
        psnr: dB, mean over the pairs with the reference images of the same prompts and seeds; None where there are none.
        ssim, stlpips_alex: means over the same pairs.
        fd_lite0: Fréchet distance of EfficientNet-Lite0's features, to those of the reference.
        score_lite0: class score of EfficientNet-Lite0.
        emoji, background, both: shares, 0 to 1, that retrieval finds to be what the prompt names.
        pictures: how many.
    """

    psnr: float | None
    ssim: float | None
    stlpips_alex: float | None
    fd_lite0: float | None
    score_lite0: float
    emoji: float
    background: float
    both: float
    pictures: int


def as_bytes(pictures: Tensor) -> Tensor:
    """Values 0 to 1 as a PNG has them: uint8."""
    return (pictures * 255).round().clamp(0, 255).to(torch.uint8)


class Examiner:
    """Draws the measured prompts, pairs that neither the teacher nor a student was trained on, and compares.

    Args:
        vocabulary: of the embedded model.
        size: of the images and of the text.
        count: images, two or more; every held-out pair once before one comes twice.
        steps: denoising steps.
        device: where.

    Raises:
        ImportError: a package that the metrics need is not installed.
    """

    def __init__(self, vocabulary: Vocabulary, size: Comparison, count: int, steps: int, device: str) -> None:
        require_for_metrics([*PAIRED, *ALONE])
        repeats = -(-count // len(vocabulary.held_out_pairs))
        self.requests: list[Request] = held_out_requests(vocabulary, repeats, PAIRS_SEED)[:count]
        self._vocabulary, self._size, self._steps, self._device = vocabulary, size, steps, device
        self._networks = Networks(device=torch.device(device))
        self._retriever = Retriever(bitmaps_of(vocabulary), list(vocabulary.backgrounds.values()))

    def pipeline(self) -> Any:
        """A fresh teacher."""
        pipe = embedded.pipeline(device=self._device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: Any, on_done: Any = None, steps: int | None = None) -> Tensor:
        """``[n, 3, h, w]``, values 0 to 1, on the CPU."""
        taken = self._steps if steps is None else steps
        return generate(
            pipe,
            self._vocabulary,
            self.requests,
            taken,
            self._size.pixels,
            max_sequence_length=self._size.text_len,
            on_done=on_done,
        )

    def compare(self, pictures: Tensor, reference: Tensor | None) -> Measured:
        """Images of the requests, values 0 to 1, with the reference's of the same, if there is one."""
        score = evaluate(self._retriever, self.requests, pictures)
        asked = ALONE if reference is None else (*PAIRED, *ALONE)
        of = None if reference is None else as_bytes(reference).to(self._device)
        found = score_tensors(as_bytes(pictures).to(self._device), of, asked, networks=self._networks)
        values = [found.get(name) for name in PAIRED]
        return Measured(*values, found["score-lite0"], score.emoji, score.background, score.both, len(pictures))

    def kept(self, path: Path, make: Any) -> Tensor:
        """Images in a file; made and written where it is missing."""
        if not path.is_file():
            with whole_file(path) as beside:
                save_file({"pictures": make().contiguous()}, beside)
        return load_file(path)["pictures"]
