"""Draw every window into bench/results/windows.png, one query in the middle and one near the corner.

python -m bench.masks.windows
"""

from __future__ import annotations

from flexclear.images.sheet import side_by_side
from flexclear.masks import Disc, Layout, Neighborhood, Square, Strided, Swin
from flexclear.masks.pictures import window_picture

from bench.machine import RESULTS

LAYOUT = Layout(32, 32)
CORNER = (2, 5)


def main() -> None:
    """Draw."""
    windows = [Disc(8), Square(8), Neighborhood(15), Swin(8), Strided(4), Disc(12) & Strided(2), Disc(4) | Strided(8)]
    pictures = [window_picture(LAYOUT, window, query) for window in windows for query in (None, CORNER)]
    titles = [f"{window.name}{at}" for window in windows for at in ("", ", corner")]
    RESULTS.mkdir(exist_ok=True)
    side_by_side(pictures, titles, least_side=128, columns=7).save(RESULTS / "windows.png")
    print(RESULTS / "windows.png")


if __name__ == "__main__":
    main()
