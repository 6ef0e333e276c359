"""What bench/kernels/run.py compiles and interprets: which GPUs, types, head dims, masks and options, and why these."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from fakegpu.cases import CLIPS, MASKS, Case

Capability = tuple[int, int]

CAPABILITIES: tuple[Capability, ...] = ((9, 0), (8, 9), (10, 0), (8, 0))

CHECKPOINTS = {
    64: "SD3-medium, SD3.5-medium, SD3.5-large",
    128: "FLUX.1, FLUX.2, Qwen-Image, Chroma, Z-Image; of video models Wan, HunyuanVideo",
    256: "AuraFlow (no family of flexclear: its own attention may call compiled_flex_attention)",
}
"""Head dims of published checkpoints, and whose."""

HALF = ("bfloat16", "float16")

OPTIONS: tuple[dict[str, int | bool | str], ...] = (
    {"PRESCALE_QK": True},
    {"USE_TMA": True},
    {"num_warps": 4},
    {"num_warps": 8},
    {"num_stages": 2},
    {"num_stages": 3},
    {"IS_DIVISIBLE": False},
    {"PRESCALE_QK": True, "USE_TMA": True},
    {"BACKEND": "FLASH"},
)
"""Kernel options that a caller may choose, beside the table's other choices."""

LAYOUTS = {
    "odd sizes, text first": Case(height=17, width=9, text_len=5, r=4),
    "odd sizes, text last": Case(height=13, width=21, text_len=37, text_first=False, r=3),
    "no text": Case(height=16, width=16, text_len=0, r=5),
    "pooled keys": Case(height=13, width=11, text_len=37, text_first=False, r=3, pooled=4),
    "references": Case(height=9, width=11, text_len=20, r=3, references=((7, 13), (5, 5))),
    "padded text": Case(height=9, width=17, text_len=50, r=4, padding=(50, 7)),
    "lengths that divide": Case(height=16, width=16, text_len=128, r=5),
    "computed coordinates": Case(height=17, width=9, text_len=5, r=4, coordinates="computed"),
    "image alone": Case(height=17, width=9, text_len=128, r=4, apart=True),
    "pooled keys, padded text last": Case(
        height=11, width=13, text_len=30, text_first=False, r=3, pooled=4, padding=(1, 30)
    ),
    "clip, text last": Case(frames=5, height=7, width=9, text_len=5, text_first=False, made_by=("cylinder", 4, 1)),
    "clip without text, radii in steps": Case(frames=6, height=5, width=8, text_len=0, made_by=("radial", 4)),
    "clip, computed coordinates": Case(
        frames=5, height=7, width=9, text_len=5, made_by=("ball", 4, 2), coordinates="computed"
    ),
}
"""Small enough for an interpreter, of every kind that a mask may be of."""

INTERPRETED_FOR = (9, 0)


@dataclass(frozen=True)
class Job:
    """One case on one GPU.

    Attributes:
        section: what it is made for.
        name: of the mask, options or layout, as tables show it.
    """

    section: str
    name: str
    capability: Capability
    case: Case

    @property
    def how(self) -> str:
        return "interpret" if self.section == "interpreter" else "compile"


def jobs() -> Iterator[Job]:
    """All of them, what is most asked for first.

    ``attention``: head dims of checkpoints, three types, inference and training, every mask. ``every``: what the first
    leaves out of head dims 32 to 128. ``options``: those that a caller may choose. ``interpreter``: layouts, in float32.
    ``clips``: masks of several frames beside the image's, in bfloat16.
    """
    for head_dim in (64, 128):
        for name, layout in LAYOUTS.items():
            changes = {"head_dim": head_dim, "dtype": "float32", "heads": 1, "backward": not layout.apart}
            if head_dim == 64 or name in ("odd sizes, text first", "pooled keys"):
                yield Job("interpreter", name, INTERPRETED_FOR, dataclasses.replace(layout, **changes))
    yield from _clips()
    first = {"disc": MASKS["disc"]}
    others = {name: mask for name, mask in MASKS.items() if name != "disc"}
    for masks, dtypes in ((first, HALF), (first, ("float32",)), (others, HALF), (others, ("float32",))):
        for capability in CAPABILITIES:
            for name, mask in masks.items():
                for head_dim in CHECKPOINTS:
                    for dtype in dtypes:
                        for backward in (False,) if name == "apart" else (False, True):
                            case = Case(head_dim=head_dim, dtype=dtype, backward=backward, **mask)
                            yield Job("attention", name, capability, case)
        if masks is first and dtypes is HALF:
            yield from _options()
        if masks is first and dtypes is not HALF:
            for capability in CAPABILITIES:
                for dtype in ("bfloat16", "float32"):
                    for backward in (False, True):
                        yield Job("every", "disc", capability, Case(head_dim=32, dtype=dtype, backward=backward))


def _options() -> Iterator[Job]:
    for capability in ((9, 0), (10, 0), (8, 9)):
        for head_dim in (64, 128):
            for options in OPTIONS:
                if capability >= (9, 0) or not options.keys() & {"USE_TMA", "BACKEND"}:
                    name = ", ".join(f"{key}={value}" for key, value in options.items())
                    yield Job("options", name, capability, Case(head_dim=head_dim, options=options))


def _clips() -> Iterator[Job]:
    for capability in ((9, 0), (8, 9), (8, 0)):
        for head_dim in (64, 128):
            for name, mask in {"disc": MASKS["disc"], **CLIPS}.items():
                for backward in (False, True) if name in TRAINED else (False,):
                    yield Job("clips", name, capability, Case(head_dim=head_dim, backward=backward, **mask))
            if capability == (9, 0):
                for name in ("clip, cylinder", "clip, radial"):
                    case = Case(head_dim=head_dim, options={"BACKEND": "FLASH"}, **CLIPS[name])
                    yield Job("clips", f"{name}, BACKEND=FLASH", capability, case)


TRAINED = ("disc", "clip, cylinder", "clip, radial")
"""Masks of ``clips`` that are compiled for training too."""
