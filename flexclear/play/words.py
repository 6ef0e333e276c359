"""What the page says about images and about a token, in Markdown."""

from __future__ import annotations

from flexclear.play.looking import Grid, Place, seen_from
from flexclear.play.studio import Drawn, Windowed


def table(dense: Drawn, windowed: Windowed) -> str:
    """Table of times and work of both images."""
    work = windowed.work
    of_weights = "" if windowed.weights.path is None else f", {windowed.weights.label}"
    rows = [
        ("time per step", _pace(dense), _pace(windowed.drawn)),
        ("time in all", _time(dense.seconds), _time(windowed.drawn.seconds)),
        ("pairs of tokens that see each other", "100%", f"{work.allowed:.1%}"),
        ("pairs that attention executes", "100%", f"{work.executed:.1%}{_how(windowed)}"),
        ("attention of one step", _flops(work.dense_flops), _flops(work.flops)),
        ("PSNR to dense", "", f"{windowed.psnr:.1f} dB"),
    ]
    head = f"| | dense | window, r = {windowed.radius}{of_weights} |\n|---|---|---|\n"
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows) + _remark(windowed)


def _how(windowed: Windowed) -> str:
    return " (masked SDPA)" if windowed.work.masked else " (blocks of FlexAttention)"


def _remark(windowed: Windowed) -> str:
    weights, remarks = windowed.weights, []
    if weights.radius is not None and weights.radius != windowed.radius:
        remarks.append(f"These weights were trained for r = {weights.radius}.")
    if weights.down_factor is not None:
        factor = weights.down_factor
        remarks.append(f"Besides the window, every token sees the mean of each cell of {factor} x {factor} tokens.")
    return "".join(f"\n\n{remark}" for remark in remarks)


def _pace(drawn: Drawn) -> str:
    return "one step only" if drawn.pace is None else f"{_time(drawn.pace)} (median of {drawn.counted})"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _flops(flops: int) -> str:
    return f"{flops / 1e12:.2f} TFLOPs" if flops >= 1e11 else f"{flops / 1e9:.2f} GFLOPs"


def of_token(grid: Grid, token: Place, windowed: Windowed) -> str:
    """Describe what a token sees."""
    seen, tokens = int(seen_from(grid, token, windowed.radius).sum()), grid.height * grid.width
    text = windowed.work.layout.text_len
    beside = f" and all {text} text tokens" if text else ""
    return (
        f"The token in row {token[0]}, column {token[1]} sees **{seen} of {tokens}** image tokens ({seen / tokens:.1%}){beside}; "
        f"under dense attention, all {tokens}."
    )


HINT = "Click an image: the window of the token that you click is drawn over it."
NO_GRID = "The tokens of this model do not lie over the image as squares: no window is drawn over it."
