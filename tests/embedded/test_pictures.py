"""The images that the embedded pipeline draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexclear import embedded
from flexclear.embedded.evaluation import (
    Request,
    evaluate,
    generate,
    held_out_requests,
    picture_psnr,
    trained_requests,
)
from flexclear.embedded.reference import read_reference_sheet
from flexclear.embedded.retrieval import Retriever

APPLE = "a red apple on a blue background"


@pytest.fixture(scope="module")
def retriever(vocabulary) -> Retriever:
    bitmaps = read_reference_sheet(embedded.model_directory(), len(vocabulary.emoji))
    return Retriever(bitmaps, list(vocabulary.backgrounds.values()))


def draw(pipe, prompt: str, seed: int, steps: int = 8, **options) -> torch.Tensor:
    """Return one image, shape (1, 3, side, side), values 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    output = pipe(prompt, num_inference_steps=steps, generator=generator, output_type="pt", **options)
    return output.images.float()


def test_default_call_draws_128_pixels(pipe):
    picture = pipe(APPLE).images[0]
    assert picture.size == (128, 128)
    frame = np.asarray(picture)[:2].reshape(-1, 3).mean(0)
    assert np.abs(frame - (44, 96, 206)).max() < 40


def test_seeds_differ_visibly(pipe):
    pictures = [draw(pipe, APPLE, seed, max_sequence_length=32) for seed in (1, 2, 3)]
    nearness = [picture_psnr(pictures[0], other).item() for other in pictures[1:]]
    assert min(nearness) < 20, nearness


def test_one_seed_repeats(pipe):
    first = draw(pipe, APPLE, 1, steps=2, max_sequence_length=32)
    assert torch.equal(first, draw(pipe, APPLE, 1, steps=2, max_sequence_length=32))


def test_case_does_not_matter(pipe):
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        assert tokenizer(APPLE).input_ids == tokenizer(APPLE.upper()).input_ids
        assert tokenizer(APPLE).input_ids == tokenizer(APPLE.title()).input_ids


def test_every_known_word_is_one_token(pipe, vocabulary):
    for word in sorted(vocabulary.words):
        assert len(pipe.tokenizer(word).input_ids) == 3, word
        assert len(pipe.tokenizer_2(word).input_ids) == 2, word


def test_padding_changes_little(pipe):
    short = draw(pipe, APPLE, 3, max_sequence_length=32)
    long = draw(pipe, APPLE, 3, max_sequence_length=512)
    assert picture_psnr(short, long).item() > 22


@pytest.mark.kept
@pytest.mark.parametrize("kind", ["trained", "held out"])
def test_nineteen_pictures_in_twenty_are_right(pipe, vocabulary, retriever, kind):
    """On pairs that training showed, and on every pair that it did not; bench/quality/retrieval.py measures more of them."""
    requests = (
        trained_requests(vocabulary, 51, seed=3) if kind == "trained" else held_out_requests(vocabulary, 1, seed=3)
    )
    assert len(requests) == 51
    found = evaluate(retriever, requests, generate(pipe, vocabulary, requests, steps=16))
    assert found.both >= 0.95, found


def test_larger_grid_is_drawn(pipe, vocabulary, retriever):
    requests = [Request(vocabulary_index, background, seed=5) for vocabulary_index, background in ((0, 5), (12, 1))]
    pictures = generate(pipe, vocabulary, requests, steps=10, pixels=256)
    assert pictures.shape == (2, 3, 256, 256)
    assert evaluate(retriever, requests, pictures).both == 1


def test_bfloat16(vocabulary, retriever):
    pipe = embedded.pipeline(torch_dtype=torch.bfloat16)
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder_2.dtype == torch.bfloat16
    pipe.set_progress_bar_config(disable=True)
    requests = [Request(0, 5, seed=5)]
    assert evaluate(retriever, requests, generate(pipe, vocabulary, requests, steps=8)).background == 1
