"""A pipeline to transform and its untouched twin, which runs under the dense boolean mask."""

from __future__ import annotations

import pytest
import torch

import flexclear
from flexclear.masks import Disc, Layout, dense_mask

from helpers.models import flux_call, tiny_flux

RADIUS = 3


def bare_pipeline(model):
    """A FluxPipeline with nothing but a transformer and a scheduler: enough for its loaders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **parts)


class Twins:
    """Two pipelines with equal weights: ``ours`` is transformed, ``theirs`` never is."""

    def __init__(self, **config):
        self.ours, self.theirs = (bare_pipeline(tiny_flux(**config)) for _ in range(2))

    def transform(self, **options):
        flexclear.transform(self.ours, **{"r": RADIUS, "backend": "sdpa", **options})
        return self

    def both(self, action):
        """Do the same to both pipelines."""
        for pipe in (self.ours, self.theirs):
            action(pipe)

    def agree(self, height=9, width=13, text_len=20, batch=2, seed=0, extra=None, **changes):
        """Assert that ours equals theirs under the dense mask, and that the mask matters; return our output.

        ``extra`` are joint attention arguments, ``changes`` further arguments of the call.
        """
        call = {**flux_call(height, width, text_len, batch, seed), **changes}
        mask = dense_mask(Layout(height, width, text_len, order="raster"), Disc(RADIUS))
        extra = extra or {}
        with torch.no_grad():
            ours = self.ours.transformer(**call, joint_attention_kwargs=dict(extra)).sample
            masked = self.theirs.transformer(**call, joint_attention_kwargs={**extra, "attention_mask": mask}).sample
            dense = self.theirs.transformer(**call, joint_attention_kwargs=dict(extra)).sample
        assert (ours - masked).abs().max() <= 1e-4
        assert (dense - masked).abs().max() > 1e-3, "the window makes no difference here"
        return ours


@pytest.fixture
def twins():
    return Twins()


@pytest.fixture
def make_twins():
    """Twins of another size: ``make_twins(num_layers=1)``."""
    return Twins


@pytest.fixture(scope="session")
def embedded():
    """The embedded pipeline, to be copied or restored by whoever changes it."""
    pipe = flexclear.embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe
