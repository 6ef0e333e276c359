"""What a call may look like: grids, text, batch, padding."""

from __future__ import annotations

from dataclasses import dataclass

Grid = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """The sizes of one call.

    Attributes:
        height, width: of the image in tokens.
        text_len: text tokens.
        batch: samples.
        references: (height, width) of each reference image.
        padding: which samples' text ends early, by kind (``Row.paddings``); None where all text is there.
        seed: of the random inputs.
        frames: of a video, in tokens; None: of an image, or as many as the row's videos have.
    """

    height: int = 9
    width: int = 13
    text_len: int = 20
    batch: int = 1
    references: tuple[Grid, ...] = ()
    padding: str | None = None
    seed: int = 0
    frames: int | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """Text tokens of each sample that are not padding."""
        short = self.text_len // 3 if self.padding else 0
        return tuple(self.text_len - short * (1 + sample) for sample in range(self.batch))

    def __str__(self) -> str:
        grids = "+".join(f"{height}x{width}" for height, width in ((self.height, self.width), *self.references))
        padded = f" {self.padding}" if self.padding else ""
        grids = grids if self.frames is None else f"{self.frames}x{grids}"
        return f"{grids} text{self.text_len} batch{self.batch}{padded}"


# Whole tiles; odd sides; a strip each way. No length but the first is a multiple of a block's.
SIZES = (Shape(16, 16, 32), Shape(9, 13, 20, 2), Shape(24, 7, 5), Shape(6, 23, 77, 2))

REFERENCES = (
    Shape(8, 12, 7, 2, references=((8, 12), (5, 9))),
    Shape(11, 6, 12, references=((14, 9),)),  # larger than the image
)

# Calls one after another: another size, as many tokens on another grid, another text, and the first again.
ALTERNATING = (Shape(8, 12), Shape(12, 8), Shape(6, 16), Shape(8, 12, 9), Shape(10, 11), Shape(8, 12))
