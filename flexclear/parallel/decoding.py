"""Tiled VAE decoding shared by several ranks: each rank decodes some tiles, and every rank blends all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexclear.parallel.ends import put, told
from flexclear.parallel.errors import AgreedError
from flexclear.parallel.facts import differences, sums

if TYPE_CHECKING:
    from flexclear.parallel.session import Session

KNOWN = ("AutoencoderKL",)
"""VAEs whose ``tiled_decode`` gives its decoder one tile at a time and nothing else."""


def split_decoding(pipe: Any, session: Session) -> None:
    """Share the tiles of the ``tiled_decode`` of a pipeline's VAE among ranks until the session is closed. Without a known VAE,
    do nothing.

    The VAE's own method cuts and blends. It first runs to find out which tiles it passes to its decoder; the ranks take turns
    decoding and broadcast the results, and the method runs again with these. Every rank gets the same image as a single process.
    """
    vae: Any = getattr(pipe, "vae", None)
    if type(vae).__name__ not in KNOWN:
        return
    whole, links = vae.tiled_decode, session.links

    def tiled_decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        if links.size == 1:
            return whole(z, *args, **kwargs)
        with told(session):
            links.start("decoding", resume=True)
            said, _ = links.meet({"the denoising step": "decoding", "the shape": list(z.shape), "the latents": sums(z)})
            found = differences(said, links.ranks)
            if found:
                raise AgreedError(f"decoding: {found}. All ranks must decode the same latents")
            image = shared(z, *args, **kwargs)
            links.end()
            return image

    def shared(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoder = vae.decoder
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        asked: list[Tensor] = []

        def remember(tile: Tensor, *rest: Any, **named: Any) -> Tensor:
            asked.append(tile)
            height, width = tile.shape[-2:]
            return tile.new_zeros(*tile.shape[:-3], vae.config.out_channels, height * scale, width * scale)

        _with_forward(decoder, remember, lambda: whole(z, *args, **kwargs))
        found = []
        for number, tile in enumerate(asked):
            owner = number % links.size
            shape = (*tile.shape[:-3], vae.config.out_channels, tile.shape[-2] * scale, tile.shape[-1] * scale)
            mine = decoder(tile).contiguous() if owner == links.rank else tile.new_empty(shape)
            found.append(mine)
        for number, picture in enumerate(found):
            links.broadcast(picture, number % links.size, "vae")
        ready = iter(found)
        return _with_forward(decoder, lambda tile, *rest, **named: next(ready), lambda: whole(z, *args, **kwargs))

    put(vae, "tiled_decode", tiled_decode, session)


def _with_forward(module: torch.nn.Module, forward: Callable[..., Any], call: Callable[[], Any]) -> Any:
    """``call()`` while ``forward`` replaces a module's forward."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        return call()
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
