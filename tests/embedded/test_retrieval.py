"""The retriever itself, on images whose right answer is certain."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from flexclear import embedded
from flexclear.embedded.evaluation import Request, evaluate, picture_psnr, score
from flexclear.embedded.reference import read_reference_sheet, write_reference_sheet
from flexclear.embedded.retrieval import Match, Retriever
from flexclear.embedded.validation import clean_pictures, vae_round_trip


@pytest.fixture(scope="module")
def bitmaps(vocabulary):
    return read_reference_sheet(embedded.model_directory(), len(vocabulary.emoji))


@pytest.fixture(scope="module")
def retriever(vocabulary, bitmaps) -> Retriever:
    return Retriever(bitmaps, list(vocabulary.backgrounds.values()))


def test_clean_drawings_are_all_recognized(vocabulary, bitmaps, retriever):
    pictures, requests = clean_pictures(vocabulary, bitmaps, 64, seed=11)
    found = evaluate(retriever, requests, pictures)
    assert (found.emoji, found.background) == (1, 1)
    assert found.error < 0.005


def test_larger_clean_drawings_are_recognized(vocabulary, bitmaps, retriever):
    pictures, requests = clean_pictures(vocabulary, bitmaps, 16, seed=12, pixels=256)
    assert evaluate(retriever, requests, pictures).both == 1


def test_autoencoder_round_trips_are_recognized(pipe, vocabulary, bitmaps, retriever):
    pictures, requests = clean_pictures(vocabulary, bitmaps, 64, seed=13)
    decoded = vae_round_trip(pipe.vae, pictures)
    assert evaluate(retriever, requests, decoded).both >= 0.98
    assert picture_psnr(decoded, pictures).median().item() > 25


def test_a_wrong_emoji_and_a_wrong_background_are_told_apart(vocabulary, bitmaps, retriever):
    pictures, requests = clean_pictures(vocabulary, bitmaps, 8, seed=14)
    backgrounds = len(vocabulary.backgrounds)
    asked = [Request(item.emoji + 1, (item.background + 1) % backgrounds, item.seed) for item in requests]
    found = evaluate(retriever, asked, pictures)
    assert (found.emoji, found.background, found.both) == (0, 0, 0)


def test_noise_matches_badly(retriever):
    noise = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert all(match.error > 0.01 for match in retriever.match(noise))


@pytest.mark.parametrize("shape", [(1, 1, 128, 128), (1, 3, 128, 64), (1, 3, 100, 100)])
def test_other_shapes_are_refused(retriever, shape):
    with pytest.raises(ValueError, match="multiple of 64"):
        retriever.match(torch.zeros(shape))


def test_too_little_to_choose_from_is_refused(bitmaps):
    with pytest.raises(ValueError, match="two emoji"):
        Retriever(bitmaps[:1], [(0, 0, 0)])


def test_score_needs_one_match_per_request():
    match = Match(0, 0, 0.0, 1, 0.1)
    with pytest.raises(ValueError, match="one match per request"):
        score([Request(0, 0, 0)], [match, match])
    with pytest.raises(ValueError, match="one match per request"):
        score([], [])


def test_reference_sheet_survives_its_file(bitmaps, tmp_path):
    write_reference_sheet(bitmaps, tmp_path)
    again = read_reference_sheet(tmp_path, len(bitmaps))
    assert [picture.size for picture in again] == [(96, 96)] * len(bitmaps)
    assert all(isinstance(picture, Image.Image) for picture in again)
    with pytest.raises(ValueError, match="at most"):
        read_reference_sheet(tmp_path, 65)
    with pytest.raises(FileNotFoundError, match=r"emoji\.png"):
        read_reference_sheet(tmp_path / "nowhere", 1)
