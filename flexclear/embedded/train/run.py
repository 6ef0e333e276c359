"""Set up and run the transformer's training from the files of the earlier step."""

from __future__ import annotations

from pathlib import Path

import torch

from flexclear.embedded.captions import caption
from flexclear.embedded.font import extract_bitmaps
from flexclear.embedded.train import corpus
from flexclear.embedded.train.assembly import assemble, kept_normalization, load_vae
from flexclear.embedded.train.backgrounds import unname
from flexclear.embedded.train.batches import BatchMaker
from flexclear.embedded.train.emphasis import faintness, read_emphasis
from flexclear.embedded.train.latents import build_cache
from flexclear.embedded.train.pictures import training_pairs, training_scenes
from flexclear.embedded.train.transformer import TransformerRecipe, train_transformer


def run_transformer(
    recipe: TransformerRecipe,
    folder: Path,
    font: Path | None,
    small_pictures: int,
    large_pictures: int,
    total: int | None,
    decay_from: int | None,
    still: bool = False,
    faint: float = 0.0,
    unnamed: float = 0.0,
    noisier: float = 0.0,
    large_share: float | None = None,
) -> int:
    """Train the transformer with checkpoints in ``folder`` and return the number of steps done so far.

    ``still`` trains on images without jitter. Under jitter, an emoji's name explains only a tenth of the latents' variance, too
    little to be noticed at the start; on still images it explains nearly all of it. If ``folder`` holds an ``emphasis.json``,
    the emoji that it favors are shown more often; ``faint`` favors pairs with little contrast. ``unnamed`` is the share of
    images on backgrounds of other colors, see :mod:`backgrounds`. ``noisier`` raises the noise levels, towards where an emoji's
    place, size and direction are decided. ``large_share`` is the share of batches at 256 pixels.

    Latents are cached, in one file for each ``still`` and ``unnamed``. A resumed run keeps its original normalization.
    """
    emoji = corpus.emoji()
    names = list(corpus.BACKGROUNDS)
    colours = list(corpus.BACKGROUNDS.values())
    held_out = corpus.held_out_pairs()
    pairs = training_pairs(len(emoji), len(colours), held_out)
    vae = load_vae(folder)
    bitmaps = extract_bitmaps(corpus.EMOJI_CODE_POINTS, font)
    counts = (small_pictures, large_pictures)
    small, large = (
        unname(
            training_scenes(pairs, count, recipe.seed + i, still), unnamed, bitmaps, colours, held_out, recipe.seed + i
        )
        for i, count in enumerate(counts)
    )
    kind = ("-still" if still else "") + (f"-unnamed-{unnamed:g}" if unnamed else "")
    cache = build_cache(vae, (small, large), bitmaps, colours, folder / f"latents{kind}.pt", kept_normalization(folder))
    pipeline, learners = assemble(folder, vae, cache.shift, cache.scaling, recipe.seed)
    favoured = read_emphasis(folder, [item.name for item in emoji])
    emphasis = None
    if favoured is not None or faint:
        emphasis = torch.tensor(favoured or [1.0] * len(emoji))[:, None] * faintness(bitmaps, colours, faint)
    maker = BatchMaker(
        cache,
        [item.name for item in emoji],
        names,
        pipeline.tokenizer,
        pipeline.tokenizer_2,
        recipe.seed,
        emphasis,
        noisier,
        large_share,
    )
    prompts = [caption(emoji[(5 * i) % len(emoji)].name, names[i % len(names)]) for i in range(24)]
    return train_transformer(recipe, learners, maker, pipeline, prompts, folder, total, decay_from)
