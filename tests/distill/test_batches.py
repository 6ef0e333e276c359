"""What a training step sees."""

from __future__ import annotations

import pytest
import torch

from flexclear.distill import MemorySamples
from flexclear.distill.batches import BatchMaker, Order, held_out_batches
from flexclear.distill.config import TimestepConfig

from helpers.distill_samples import random_samples


def test_every_epoch_visits_every_sample_in_batches_of_one_shape(samples):
    mixed = MemorySamples(samples.samples + random_samples(5, 8, 8).samples)
    order = Order(mixed, range(11), 4, 7)
    assert order.per_epoch == 4
    epochs = [[order[number] for number in range(at, at + 4)] for at in (0, 4)]
    for epoch in epochs:
        assert {index for batch in epoch for index in batch} == set(range(11))
        assert all(len(batch) == 4 and len({mixed.shape(index) for index in batch}) == 1 for batch in epoch)
    assert epochs[0] != epochs[1]
    again = Order(mixed, range(11), 4, 7)
    assert again[6] == order[6]


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode"])
def test_noise_levels_lie_between_0_and_1_and_follow_the_shift(samples, sampling):
    def levels(shift):
        maker = BatchMaker(samples, range(6), 6, 0, TimestepConfig(sampling=sampling, shift=shift))
        return torch.cat([maker.make(number).sigmas for number in range(50)])

    plain, shifted = levels(1.0), levels(3.0)
    assert plain.min() >= 0
    assert plain.max() <= 1
    assert torch.allclose(shifted, 3 * plain / (1 + 2 * plain))


def test_held_out_batches_are_the_same_whatever_their_size(samples):
    one, all_at_once = held_out_batches(samples, [1, 4, 5], 1, 3), held_out_batches(samples, [1, 4, 5], 3, 3)
    assert torch.equal(torch.cat([batch.noise for batch in one]), all_at_once[0].noise)
    assert torch.equal(torch.cat([batch.latents for batch in one]), all_at_once[0].latents)
    assert all_at_once[0].sigmas.tolist() == pytest.approx([1 / 6, 3 / 6, 5 / 6])


def test_latents_are_drawn_from_the_moments_or_are_their_means(samples):
    drawn = BatchMaker(samples, range(6), 6, 0, TimestepConfig()).make(0)
    mean = BatchMaker(samples, range(6), 6, 0, TimestepConfig(), drawn=False).make(0)
    order = Order(samples, range(6), 6, 0)[0]
    expected = (torch.stack([samples[index].mean for index in order]) - 0.1) * 1.2
    assert torch.allclose(mean.latents, expected)
    deviation = ((drawn.latents - mean.latents) / 1.2).flatten()
    assert 0.1 < deviation.std() < 0.3  # exp(-4 / 2) and more: log variances are around -4
    assert torch.equal(drawn.noise, mean.noise)
