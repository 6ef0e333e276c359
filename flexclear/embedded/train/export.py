"""Write the trained parts as a pipeline folder, with its vocabulary, reference sheet and license."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from flexclear.embedded.captions import split_words
from flexclear.embedded.font import extract_bitmaps
from flexclear.embedded.reference import write_reference_sheet
from flexclear.embedded.train import corpus
from flexclear.embedded.train.assembly import corpus_captions, load_trained
from flexclear.embedded.vocabulary import FILE_NAME, Vocabulary

NOTICE = """\
The weights in this folder were trained on images drawn from the Noto Color Emoji font, and
emoji.png holds small drawings of some of its glyphs.

Noto Color Emoji is Copyright 2013-2017 Google Inc. and licensed under the SIL Open Font License,
Version 1.1, which is in OFL-1.1.txt. The font itself is not included.
"""
LICENCE_NAME = "OFL-1.1.txt"


def export_model(folder: Path, target: Path, font: Path | None = None) -> Path:
    """Write the model of the checkpoints in ``folder`` to ``target`` in bfloat16 and return ``target``.

    The new folder replaces an old one only when it is complete.
    """
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    load_trained(folder).to(dtype=torch.bfloat16).save_pretrained(partial, safe_serialization=True)
    (partial / FILE_NAME).write_text(trained_vocabulary().to_json(), encoding="utf-8")
    (partial / "NOTICE.txt").write_text(NOTICE, encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name(LICENCE_NAME), partial / LICENCE_NAME)
    write_reference_sheet(extract_bitmaps(corpus.EMOJI_CODE_POINTS, font), partial)
    for path in partial.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return target


def trained_vocabulary() -> Vocabulary:
    """Return the vocabulary of the corpus."""
    emoji = corpus.emoji()
    backgrounds = list(corpus.BACKGROUNDS)
    return Vocabulary(
        emoji=tuple(emoji),
        backgrounds=dict(corpus.BACKGROUNDS),
        words=frozenset(word for text in corpus_captions() for word in split_words(text)),
        held_out_pairs=tuple((emoji[e].name, backgrounds[b]) for e, b in corpus.held_out_pairs()),
    )
