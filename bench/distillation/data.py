"""The two sets of images of bench/distillation/study.py: drawn by the teacher, and real ones with the same captions.

The real ones show drawings that the teacher never saw: those of another set of emoji.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flexclear import embedded
from flexclear.common.choices import EMBEDDED
from flexclear.compile.files import whole_file
from flexclear.distill.caching import cache
from flexclear.distill.samples import CachedSamples, Sample, Shape
from flexclear.embedded.captions import FULL_TEMPLATES, caption
from flexclear.embedded.font import DEFAULT_FONT_PATH, extract_bitmaps
from flexclear.embedded.reference import read_reference_sheet
from flexclear.embedded.scenes import draw, random_scene
from flexclear.embedded.vocabulary import Vocabulary

from bench.distillation.rows import Comparison
from bench.resume import check_settings

SELF, REAL = "self-generated", "real"
DRAWINGS = "drawings.json"
"""Names the drawings that a set of real images shows."""
BATCH = 16
OnItem = Callable[[str, int, int], None]


def picture_path(pictures: Path, number: int) -> Path:
    """File of an image; its name is what ``noise_of`` knows the seed by."""
    return pictures / f"{number:06d}.png"


def keep(image: Image.Image, text: str, path: Path) -> None:
    """Write an image and, first, its caption: an image that is there is finished."""
    with whole_file(path.with_suffix(".txt")) as beside:
        beside.write_text(f"{text}\n", encoding="utf-8")
    with whole_file(path) as beside:
        image.save(beside, format="PNG", compress_level=1)


def bitmaps_of(vocabulary: Vocabulary) -> list[Any]:
    """The emoji's drawings: the font's where it is installed, else those that come with the model."""
    if DEFAULT_FONT_PATH.is_file():
        return extract_bitmaps([item.code_point for item in vocabulary.emoji])
    return read_reference_sheet(embedded.model_directory(), len(vocabulary.emoji))


def foreign_drawings(folder: Path, vocabulary: Vocabulary) -> list[Image.Image]:
    """Another set's drawing of each emoji, RGBA, from WebP or PNG files that are named by code point (``1f34e.webp``).

    Raises:
        FileNotFoundError: one is missing; the message names it.
    """
    found = []
    for item in vocabulary.emoji:
        names = [f"{item.code_point:x}{form}.{kind}" for form in ("", "-fe0f") for kind in ("webp", "png")]
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{folder} has no drawing of the {item.name}: none of {', '.join(names)}")
        with Image.open(file) as opened:
            found.append(opened.convert("RGBA"))
    return found


def shown_pairs(vocabulary: Vocabulary, count: int, seed: int) -> list[tuple[int, int, str]]:
    """(emoji, background, caption) of each image; pairs that were kept out of the teacher's training are kept out here."""
    names = list(vocabulary.backgrounds)
    hidden = set(vocabulary.held_out_pairs)
    shown = [
        (emoji, background)
        for emoji, item in enumerate(vocabulary.emoji)
        for background, name in enumerate(names)
        if (item.name, name) not in hidden
    ]
    choice = random.Random(f"{seed}/pairs")
    found: list[tuple[int, int, str]] = []
    while len(found) < count:
        choice.shuffle(shown)
        found += [(e, b, caption(vocabulary.emoji[e].name, names[b], choice.choice(FULL_TEMPLATES))) for e, b in shown]
    return found[:count]


def self_generated(
    folder: Path,
    vocabulary: Vocabulary,
    size: Comparison,
    count: int,
    steps: int,
    seed: int,
    device: str,
    on_item: OnItem,
) -> CachedSamples:
    """Have the teacher draw the images that are missing in ``folder``, and encode them. Image i has seed i."""
    pictures = folder / "pictures"
    captions = [text for _, _, text in shown_pairs(vocabulary, count, seed)]
    missing = [number for number in range(count) if not picture_path(pictures, number).is_file()]
    pipe = embedded.pipeline(device=device) if missing else None
    for start in range(0, len(missing), BATCH):
        part = missing[start : start + BATCH]
        drawn = pipe(
            [captions[number] for number in part],
            height=size.pixels,
            width=size.pixels,
            num_inference_steps=steps,
            max_sequence_length=size.text_len,
            generator=[torch.Generator().manual_seed(number) for number in part],
        )
        for number, image in zip(part, drawn.images, strict=True):
            keep(image, captions[number], picture_path(pictures, number))
        on_item("the teacher draws", count - len(missing) + start + len(part), count)
    return _cached(folder, size.text_len, device, on_item)


def real(
    folder: Path,
    vocabulary: Vocabulary,
    size: Comparison,
    count: int,
    seed: int,
    device: str,
    on_item: OnItem,
    drawings: Path,
) -> CachedSamples:
    """Show ``foreign_drawings`` with the captions of the self-generated set, jittered as in the teacher's training, and encode
    them.

    Raises:
        FileNotFoundError: see ``foreign_drawings``.
        ValueError: the folder's images show other drawings.
    """
    pictures = folder / "pictures"
    bitmaps, colours = foreign_drawings(drawings, vocabulary), list(vocabulary.backgrounds.values())
    digest = hashlib.sha256(b"".join(bitmap.tobytes() for bitmap in bitmaps)).hexdigest()[:16]
    check_settings(folder / DRAWINGS, {"drawings": digest})
    for number, (emoji, background, text) in enumerate(shown_pairs(vocabulary, count, seed)):
        path = picture_path(pictures, number)
        if not path.is_file():
            scene = random_scene(emoji, background, random.Random(f"{seed}/scene {number}"))
            keep(Image.fromarray(draw(scene, bitmaps, colours, size.pixels)), text, path)
            on_item("real images", number + 1, count)
    return _cached(folder, size.text_len, device, on_item)


def _cached(folder: Path, text_len: int, device: str, on_item: OnItem) -> CachedSamples:
    place = folder / "cache"
    cache(
        folder / "pictures",
        EMBEDDED,
        place,
        text_len=text_len,
        device=device,
        on_item=lambda done, total: on_item("encoding", done, total),
    )
    return CachedSamples(place)


def noise_of(samples: CachedSamples, index: int) -> Tensor:
    """The noise that the teacher began sample ``index`` of its own set from, ``[C, h, w]``."""
    seed = int(Path(samples.entries[index]["name"]).stem)
    mean, _, _ = samples.shape(index)
    return torch.randn((1, *mean), generator=torch.Generator().manual_seed(seed))[0]


class Joined:
    """Several sets of one model's samples as one.

    Raises:
        ValueError: their latents are scaled in different ways, or by different models.
    """

    def __init__(self, *sets: CachedSamples) -> None:
        known = {(part.scaling_factor, part.shift_factor, part.fingerprint) for part in sets}
        if len(known) != 1:
            raise ValueError(f"the sets must have one scaling and one model, got {sorted(known, key=repr)}")
        ((self.scaling_factor, self.shift_factor, self.fingerprint),) = known
        self._places = [(part, index) for part in sets for index in range(len(part))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        part, own = self._places[index]
        return part[own]

    def shape(self, index: int) -> Shape:
        part, own = self._places[index]
        return part.shape(own)
