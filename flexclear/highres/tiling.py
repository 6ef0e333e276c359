"""Run the VAE in tiles for some calls: its memory then grows with the image, not with the feature maps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from flexclear.compile.undoing import afterwards

_STATE = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")

OVERLAP = 0.25
"""Fraction of a tile that is blended with the next one, as in diffusers."""


def tile_size(vae: Any, tile: int | None = None) -> int:
    """Side in pixels of the VAE's tiles; see ``tiled``.

    Raises:
        TypeError: diffusers does not tile this VAE.
        ValueError: the tile is not a multiple of what the VAE needs.
    """
    if not all(hasattr(vae, name) for name in _STATE):
        raise TypeError(f"a {type(vae).__name__} has no square tiles; AutoencoderKL, the VAE of FLUX.1 and SD3.5, does")
    step = 4 * 2 ** (len(vae.config.block_out_channels) - 1)  # A quarter of a tile is a whole number of latents.
    if tile is None:
        side = vae.config.sample_size
        side = max(side) if isinstance(side, list | tuple) else side
        return max(2 * step, side // step * step)
    if isinstance(tile, bool) or not isinstance(tile, int):
        raise TypeError(f"tile must be a side in pixels, got {tile!r}")
    if tile < step or tile % step:
        near = max(step, round(tile / step) * step)
        raise ValueError(f"tile must be a multiple of {step} pixels for this VAE, got {tile}; near it: {near}")
    return tile


@contextlib.contextmanager
def tiled(vae: Any, tile: int | None = None) -> Iterator[int]:
    """Encode and decode in overlapping, blended tiles inside a ``with`` block, then restore the VAE's own settings. Several
    blocks on one VAE may end in any order.

    Images up to one tile are not cut. Larger ones differ slightly from the untiled result, because group norms see one tile at
    a time.

    Args:
        vae: an ``AutoencoderKL``.
        tile: side of a tile in pixels; by default the VAE's training size, 1024 for FLUX.1 and SD3.5.

    Yields:
        The side of a tile in pixels.

    Raises:
        TypeError, ValueError: see ``tile_size``.
    """
    side = tile_size(vae, tile)
    mine = dict(zip(_STATE, (True, side, side // 2 ** (len(vae.config.block_out_channels) - 1), OVERLAP), strict=True))
    states = _open.setdefault(vae, [{name: getattr(vae, name) for name in _STATE}])

    def put_back() -> None:
        states[:] = [state for state in states if state is not mine]
        _set(vae, states[-1])
        if len(states) == 1:
            _open.pop(vae, None)

    with afterwards(put_back):
        states.append(mine)
        _set(vae, mine)
        yield side


_open: WeakKeyDictionary[Any, list[dict[str, Any]]] = WeakKeyDictionary()
"""Settings of VAEs with open blocks: the VAE's own, then each block's."""


def _set(vae: Any, state: dict[str, Any]) -> None:
    for name, value in state.items():
        setattr(vae, name, value)
