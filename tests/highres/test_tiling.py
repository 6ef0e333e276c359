"""The VAE in tiles: what it changes, what it gives back, and how its memory grows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexclear.highres import tiled


def peak_bytes(work):
    """Most memory that the CPU allocator held at once during ``work``, from the profiler's record of every allocation."""
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        work()
    held = np.cumsum(
        [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    )
    return int(held.max())


def growth(vae, sides, side):
    """Peak bytes per pixel of decoding and encoding squares of each side, in tiles or (None) whole."""
    found = []
    for pixels in sides:
        latents, picture = torch.randn(1, 8, pixels // 4, pixels // 4), torch.randn(1, 3, pixels, pixels)

        def both(latents=latents, picture=picture):
            return peak_bytes(lambda: vae.decode(latents)), peak_bytes(lambda: vae.encode(picture))

        if side is None:
            found.append(both())
        else:
            with tiled(vae, side):
                found.append(both())
    return np.array(found)


def test_memory_grows_with_the_picture_and_not_with_the_feature_maps(embedded):
    sides = [64, 128, 256]
    whole, tiles = growth(embedded.vae, sides, None), growth(embedded.vae, sides, 64)
    areas = np.array(sides)[:, None] ** 2
    assert np.allclose(whole / areas, whole[-1] / areas[-1], rtol=0.15), "whole: every byte is per pixel"
    assert (tiles[-1] < whole[-1] / 3).all()
    marginal = (tiles[-1] - tiles[-2]) / (areas[-1] - areas[-2])
    assert marginal[0] <= 4 * 12 + 8, "decoding adds the image of 12 bytes a pixel, and its tiles, rows and sum"
    assert marginal[1] <= 16, "encoding adds latents only: the pixels are there before"


def test_pictures_of_one_tile_are_not_cut_and_larger_ones_differ_little(embedded):
    vae = embedded.vae
    latents = torch.randn(1, 8, 32, 32)
    with torch.no_grad():
        whole = vae.decode(latents).sample
        smooth = vae.encode(
            torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), (128, 128), mode="bicubic")
        ).latent_dist
        plain = vae.decode(smooth.mode()).sample
        with tiled(vae, 128):
            assert torch.equal(vae.decode(latents).sample, whole)
        with tiled(vae, 64):
            cut = vae.decode(smooth.mode()).sample
    assert 0 < (cut - plain).abs().mean() < 0.05


@pytest.mark.parametrize("tile", [None, 32])
def test_the_vae_s_own_tiling_comes_back(embedded, tile):
    vae = embedded.vae
    vae.enable_tiling()
    names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")
    before = [getattr(vae, name) for name in names]
    try:
        with tiled(vae, tile) as side:
            assert side == (tile or 128)
            assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (side, side // 4)
        assert [getattr(vae, name) for name in names] == before
        with pytest.raises(AttributeError), tiled(vae, tile):
            vae.decode(None)
        assert [getattr(vae, name) for name in names] == before
    finally:
        vae.disable_tiling()


def test_blocks_of_generators_that_take_turns_end_with_their_own_generator(embedded):
    vae = embedded.vae
    before = vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size

    def drawing(side):
        with tiled(vae, side):
            while True:
                yield vae.tile_sample_min_size

    first, second = drawing(32), drawing(64)
    assert (next(first), next(second)) == (32, 64)
    first.close()
    assert (vae.use_tiling, next(second)) == (True, 64)
    second.close()
    assert (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size) == before


def test_tiles_that_make_no_sense_are_refused(embedded):
    for tile, error, message in (
        (40, ValueError, "multiple of 16 pixels for this VAE, got 40; near it: 32"),
        (0, ValueError, "multiple of 16"),
        (True, TypeError, "tile must be a side in pixels"),
    ):
        with pytest.raises(error, match=message), tiled(embedded.vae, tile):
            pytest.fail("entered")
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny.__new__(AutoencoderTiny)
    torch.nn.Module.__init__(tiny)
    with pytest.raises(TypeError, match="AutoencoderTiny has no square tiles"), tiled(tiny):
        pytest.fail("entered")
