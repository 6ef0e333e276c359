"""Draw every window into bench/results/windows.png, one query in the middle and one near the corner, and those over a video into
bench/results/windows-clips.png, frame beside frame.

python -m bench.masks.windows
"""

from __future__ import annotations

from flexclear.images.sheet import side_by_side
from flexclear.masks import (
    Anchors,
    Disc,
    Layout,
    Neighborhood,
    Square,
    Strided,
    Swin,
    TileWindow,
    all_frames,
    ball,
    cylinder,
    radial,
)
from flexclear.masks.pictures import window_picture

from bench.machine import RESULTS

LAYOUT = Layout(32, 32)
CORNER = (2, 5)
CLIP = Layout(24, 32, frames=13)
CLIP_WINDOWS = {
    "cylinder(8, 3)": cylinder(8, 3),
    "all_frames(6)": all_frames(6),
    "ball(10, 3)": ball(10, 3),
    "radial(10)": radial(10),
    "cylinder(6, 1) | Anchors((0,))": cylinder(6, 1) | Anchors((0,)),
    "Neighborhood((5, 9, 9), stride=(2, 3, 3))": Neighborhood((5, 9, 9), (2, 3, 3)),
    "TileWindow((4, 8, 8), (3, 3, 3))": TileWindow((4, 8, 8), 3),
}


def main() -> None:
    """Draw."""
    windows = [Disc(8), Square(8), Neighborhood(15), Swin(8), Strided(4), Disc(12) & Strided(2), Disc(4) | Strided(8)]
    pictures = [window_picture(LAYOUT, window, query) for window in windows for query in (None, CORNER)]
    titles = [f"{window.name}{at}" for window in windows for at in ("", ", corner")]
    RESULTS.mkdir(exist_ok=True)
    side_by_side(pictures, titles, least_side=128, columns=7).save(RESULTS / "windows.png")
    strips = [window_picture(CLIP, window) for window in CLIP_WINDOWS.values()]
    side_by_side(strips, list(CLIP_WINDOWS), least_side=48, columns=1).save(RESULTS / "windows-clips.png")
    print(RESULTS / "windows.png", RESULTS / "windows-clips.png")


if __name__ == "__main__":
    main()
