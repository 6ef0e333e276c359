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

    ``still`` trains on images without jitter. Under jitter an emoji's name explains a tenth of the latents' variance
    only, too little to be noticed at the start; on still images it explains nearly all of it. Where ``folder`` holds
    an ``emphasis.json``, the emoji that it favours are shown more often; ``faint`` favours pairs of little contrast.
    ``unnamed`` is the share of images on backgrounds of other colours, see :mod:`backgrounds`; ``noisier`` moves the
    noise levels up, to where place, size and direction of an emoji are decided; ``large_share`` is the share of
    batches at 256 pixels.

    Latents are kept, in a file for each ``still`` and ``unnamed``. A run that is resumed keeps the normalization that
    it began with.
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
