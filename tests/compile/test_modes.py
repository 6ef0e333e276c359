"""Inductor's modes and the compiled VAE decoder give what uncompiled code gives; on a GPU, with CUDA graphs too."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline

import flexclear
from flexclear import embedded
from flexclear.compile import report, uncompile

from helpers.models import flux_call, tiny_flux

GPU = pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.kept("*cuda")
@pytest.mark.parametrize(
    ("mode", "device"),
    [
        ("max-autotune-no-cudagraphs", "cpu"),
        pytest.param("max-autotune-no-cudagraphs", "cuda", marks=GPU),
        pytest.param("max-autotune", "cuda", marks=GPU),
        pytest.param("reduce-overhead", "cuda", marks=GPU),
    ],
)
def test_every_mode_gives_what_uncompiled_blocks_give(mode, device):
    # Two blocks of one kind, the first of which CUDA graphs may not let write where the second reads.
    def make():
        return tiny_flux(num_layers=0).to(device)

    model = flexclear.transform(make(), r=3, backend="flex")
    flexclear.optimize(model, mode=mode)
    call = {name: value.to(device) for name, value in flux_call(16, 12, 20).items()}
    plain = flexclear.transform(make(), r=3, backend="sdpa")
    with torch.no_grad():
        expected = plain(**call).sample
        for _ in range(3):  # CUDA graphs are recorded in the second call and replayed in the third
            torch.compiler.cudagraph_mark_step_begin()
            assert (model(**call).sample - expected).abs().max() <= 1e-4


def test_a_compiled_vae_decoder_draws_what_the_plain_one_draws_and_is_given_back():
    pipe = embedded.pipeline()
    # Of two levels in place of three, each of which Inductor has kernels of its own for.
    vae = AutoencoderKL(
        latent_channels=pipe.vae.config.latent_channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        mid_block_add_attention=False,
        shift_factor=0.0,
    )
    pipe = FluxPipeline(**{**pipe.components, "vae": vae})
    pipe.set_progress_bar_config(disable=True)
    flexclear.transform(pipe, r=4, backend="sdpa")

    def draw():
        generator = torch.Generator().manual_seed(1)
        options = {"height": 32, "width": 32, "num_inference_steps": 1, "generator": generator}
        return pipe("an apple", max_sequence_length=16, output_type="pt", **options).images

    expected, before = draw(), report()
    flexclear.optimize(pipe, compile=False, vae=True)
    assert (draw() - expected).abs().max() <= 1e-4
    assert len(report().since(before).graphs) >= 1
    assert pipe.vae.decoder._compiled_call_impl is not None
    state = pipe.vae.state_dict()
    assert not any("_orig_mod" in name for name in state)
    uncompile(pipe.vae.decoder)
    assert torch.equal(draw(), expected)
