"""How near pictures are to the teacher's, and whether they show what was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexclear import embedded
from flexclear.compile.files import whole_file
from flexclear.embedded.evaluation import Request, evaluate, generate, held_out_requests, picture_psnr
from flexclear.embedded.retrieval import Retriever
from flexclear.embedded.vocabulary import Vocabulary

from bench.distillation.data import bitmaps_of
from bench.distillation.rows import TEXT_LEN

PAIRS_SEED = 1


@dataclass(frozen=True)
class Measured:
    """Means over the pictures.

    Attributes:
        psnr: dB, to the reference pictures of the same prompts and seeds; None where there are none.
        ssim: Wang et al. 2004, Gaussian windows, of 1.
        features: see ``feature_distance``.
        emoji, background, both: shares, 0 to 1, that retrieval finds to be what the prompt names.
        pictures: how many.
    """

    psnr: float | None
    ssim: float | None
    features: float | None
    emoji: float
    background: float
    both: float
    pictures: int


def ssim(first: Tensor, second: Tensor) -> float:
    """Mean structural similarity of picture pairs ``[n, 3, h, w]``, values 0 to 1."""
    from skimage.metrics import structural_similarity

    values = [
        structural_similarity(
            a.numpy(), b.numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(first, second, strict=True)
    ]  # fmt: skip
    return float(sum(values) / len(values))


@torch.no_grad()
def feature_distance(vae: Any, first: Tensor, second: Tensor, batch: int = 16) -> float:
    """A stand-in for LPIPS, whose networks and trained weights are not at hand: the same formula over the features of the
    embedded VAE's encoder, without LPIPS's trained factors.

    After the first convolution and after each stage, features are scaled to unit length over channels at every position;
    squared differences are summed over channels, averaged over positions, and summed over the stages.

    Args:
        vae: with an encoder of diffusers' kind.
        first, second: picture pairs ``[n, 3, h, w]``, values 0 to 1.
        batch: pairs at once.

    Returns:
        The mean over the pairs; 0 for equal pictures.
    """
    device, total = next(vae.parameters()).device, 0.0
    for a, b in zip(first.split(batch), second.split(batch), strict=True):
        pairs = zip(_features(vae, a.to(device)), _features(vae, b.to(device)), strict=True)
        total += sum((x - y).square().sum(1).mean((1, 2)).sum().item() for x, y in pairs)
    return total / len(first)


def _features(vae: Any, pictures: Tensor) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        found.append(torch.nn.functional.normalize(output.float(), dim=1))

    encoder = vae.encoder
    handles = [part.register_forward_hook(keep) for part in (encoder.conv_in, *encoder.down_blocks, encoder.mid_block)]
    try:
        encoder((pictures * 2 - 1).to(next(vae.parameters()).dtype))
    finally:
        for handle in handles:
            handle.remove()
    return found


class Examiner:
    """Draws the measured prompts, pairs that neither the teacher nor a student was trained on, and compares.

    Args:
        vocabulary: of the embedded model.
        count: pictures; every held-out pair once before one comes twice.
        steps: denoising steps.
        device: where.
    """

    def __init__(self, vocabulary: Vocabulary, count: int, steps: int, device: str) -> None:
        repeats = -(-count // len(vocabulary.held_out_pairs))
        self.requests: list[Request] = held_out_requests(vocabulary, repeats, PAIRS_SEED)[:count]
        self._vocabulary, self._steps, self._device = vocabulary, steps, device
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
            pipe, self._vocabulary, self.requests, taken, max_sequence_length=TEXT_LEN, on_done=on_done
        )  # fmt: skip

    def compare(self, pipe: Any, pictures: Tensor, reference: Tensor | None) -> Measured:
        """Pictures of the requests with the reference's of the same; ``pipe`` lends its VAE."""
        score = evaluate(self._retriever, self.requests, pictures)
        shares = (score.emoji, score.background, score.both, len(pictures))
        if reference is None:
            return Measured(None, None, None, *shares)
        psnr = picture_psnr(pictures, reference).mean().item()
        return Measured(psnr, ssim(pictures, reference), feature_distance(pipe.vae, pictures, reference), *shares)

    def kept(self, path: Path, make: Any) -> Tensor:
        """Pictures in a file; made and written where it is missing."""
        if not path.is_file():
            with whole_file(path) as beside:
                save_file({"pictures": make().contiguous()}, beside)
        return load_file(path)["pictures"]
