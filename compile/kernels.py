"""How FlexAttention's CUDA kernels are built: the mask's blocks and the kernel's tile, by GPU, type and head dim.

Inductor has its own tile for each GPU, and generates no kernel whose tile does not divide the mask's blocks. One table here
therefore chooses both. Only the tile of the backward pass is left to torch, as blocks of 128 x 128 work with any.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from flexclear.masks.blocks import MANY_TOKENS, default_block_size
from flexclear.masks.carried import KERNEL_OPTIONS
from flexclear.masks.coordinates import Source, default_source

Capability = tuple[int, int]
Value = int | bool | str
Options = tuple[tuple[str, Value], ...]
"""Kernel options as (name, value) pairs, sorted by name: hashable, and constant to a compiler."""

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Row:
    """How the kernels are built for some GPUs, types and head dims.

    Attributes:
        capabilities: compute capabilities of the GPUs; None: any.
        dtypes: dtypes of query, key and value; None: any.
        head_dim: the largest head dim that the row covers.
        tile: (queries, keys) that a thread block of the forward pass works on at a time.
        warps, stages: number of warps of such a thread block, and of stages of its pipeline.
        block_size: block size of the mask; None: ``default_block_size``.
        reason: the reason for this choice.
        backward: warps and stages of the backward pass; None: Inductor's own.
        backward_tile: queries and keys of the tiles of the backward pass; None: Inductor's own.
        padded: warps and stages of the forward pass with padded text, whose mask takes more registers; None: the same.
    """

    capabilities: tuple[Capability, ...] | None
    dtypes: tuple[torch.dtype, ...] | None
    head_dim: int
    tile: tuple[int, int]
    warps: int
    stages: int
    reason: str
    block_size: tuple[int, int] | None = None
    backward: tuple[int, int] | None = None
    backward_tile: int | None = None
    padded: tuple[int, int] | None = None


HOPPER: tuple[Capability, ...] = ((9, 0),)
"""228 KB of shared memory: H100, H200."""
BLACKWELL: tuple[Capability, ...] = ((10, 0), (10, 3))
"""228 KB: B200, B300."""
AMPERE: tuple[Capability, ...] = ((8, 0), (8, 7))
"""164 KB: A100, Orin."""
SMALL: tuple[Capability, ...] = ((8, 6), (8, 9), (12, 0), (12, 1))
"""100 KB: RTX 30, 40, 50, L4, L40S."""

TABLE: tuple[Row, ...] = (
    Row(
        HOPPER,
        HALF,
        64,
        (64, 128),
        4,
        2,
        "measured: 0.91 of the time of 64 x 64, 0.72 of 128 x 64; padded text spills with 4 warps",
        (64, 128),
        padded=(8, 2),
    ),
    Row(HOPPER, HALF, 128, (64, 64), 4, 3, "measured: 0.75 of the time of 128 x 64; two thread blocks fit", (64, 64)),
    Row(HOPPER, HALF, 256, (64, 32), 4, 3, "Inductor's own; backward, it spills", backward=(8, 2), backward_tile=32),
    Row(BLACKWELL, HALF, 64, (128, 64), 8, 3, "Inductor's own has 128 keys: no divisor of 64", backward=(8, 3)),
    Row(BLACKWELL, HALF, 128, (128, 64), 8, 3, "Inductor's own; backward, 4 warps spill", backward=(8, 3)),
    Row(BLACKWELL, HALF, 256, (64, 32), 4, 3, "Inductor's own; backward, 4 warps spill", backward=(8, 1)),
    Row((*AMPERE, *SMALL), HALF, 64, (128, 64), 8, 3, "of Inductor's own, half the instructions with 8 warps"),
    Row(AMPERE, HALF, 128, (128, 64), 8, 3, "Inductor's own; backward, 4 warps spill", backward=(8, 2)),
    Row(AMPERE, HALF, 256, (32, 64), 4, 3, "Inductor's own; backward, it spills", backward=(8, 1), backward_tile=32),
    Row(SMALL, HALF, 128, (128, 64), 8, 3, "Inductor's own, 2.5 KB below what there is", backward=(8, 2)),
    Row(SMALL, HALF, 256, (64, 64), 8, 1, "fewest instructions a key that fit", backward=(8, 1), backward_tile=32),
    Row(None, (torch.float32,), 64, (64, 32), 8, 2, "exact products fill registers: Inductor's own tiles spill"),
    Row(None, (torch.float32,), 128, (64, 16), 8, 2, "the same; backward, 4 warps spill", backward=(8, 2)),
    Row(None, (torch.float32,), 256, (32, 16), 8, 2, "the same"),
    Row(None, None, 128, (64, 32), 4, 1, "an unknown GPU: 48 KB of shared memory suffice in half precision"),
    Row(None, None, 1 << 16, (16, 16), 4, 1, "the same for long heads"),
)
"""The first row that fits applies. A new GPU gets a row before the last two.

No row depends on the window's radius. From r = 4 to 32, at 1024 to 4096 px, blocks of 64 x 128 execute 6 to 13 % more pairs
than 64 x 64; by the rates measured at r = 16 on an H100 (head dim 64) they would be slower from 23 % on. At head dim 128,
blocks of 128 x 128 execute 7 to 34 % more pairs, and were no faster per pair.
"""

_TILE = ("BLOCK_M", "BLOCK_N")
_BACKWARD_TILE = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
_TILES = (*_TILE, *_BACKWARD_TILE, *(f"fwd_{name}" for name in _TILE), *(f"bwd_{name}" for name in _BACKWARD_TILE))
_SWITCHES = ("PRESCALE_QK", "USE_TMA", "IS_DIVISIBLE")
_UNSAFE = {
    "ROWS_GUARANTEED_SAFE": "a query's first blocks may hold no key that it sees, and the result would be nan",
    "BLOCKS_ARE_CONTIGUOUS": "the blocks of a window are not, and other keys would be attended to",
}
_BACKENDS = ("TRITON", "FLASH")


@dataclass(frozen=True)
class Kernel:
    """Blocks and kernel options chosen for some calls.

    Attributes:
        block_size: tokens per (query, key-value) block of the mask.
        options: kernel options; ``completed`` adds those that depend on the mask's lengths.
        coordinates: where the ``mask_mod`` gets coordinates from.
        text_apart: whether text queries get their own attention call if the mask allows it (``flexclear.masks.apart``).
    """

    block_size: tuple[int, int]
    options: Options = ()
    coordinates: Source = "packed"
    text_apart: bool = False


def check_kernel_options(options: Mapping[str, Any] | None) -> Options:
    """``options`` of FlexAttention's kernels, checked and sorted.

    Args:
        options: by the names in ``torch.nn.attention.flex_attention.FlexKernelOptions``, which explains them. Accepted are the
            tile (``BLOCK_M``, ``BLOCK_N``; backward ``BLOCK_M1``, ``BLOCK_N1``, ``BLOCK_M2``, ``BLOCK_N2``), ``num_warps``,
            ``num_stages``, ``USE_TMA``, ``PRESCALE_QK``, ``IS_DIVISIBLE`` (False only: True is set automatically when it
            holds) and ``BACKEND``. The prefix ``fwd_`` or ``bwd_`` restricts a tile size, ``num_warps``, ``num_stages`` or
            ``USE_TMA`` to one of the kernels. ``BACKEND="FLASH"`` is FlashAttention 4: it needs the package flash-attn-4, a
            Hopper or Blackwell GPU, and head dims up to 128 in half precision.

    Raises:
        TypeError: not a mapping.
        ValueError: an unknown option or value.
    """
    if options is None:
        return ()
    if not isinstance(options, Mapping):
        raise TypeError(f"kernel_options must be a mapping of FlexAttention's kernel options, got {options!r}")
    return tuple(sorted((name, _checked(name, value)) for name, value in options.items()))


def _checked(name: str, value: Any) -> Value:
    plain = name[4:] if isinstance(name, str) and name.startswith(("fwd_", "bwd_")) else name
    if plain in _UNSAFE:
        raise ValueError(f"kernel_options: {name} cannot be given, since {_UNSAFE[plain]}")
    wanted: str | None = None
    if name in _TILES:
        if not _is_int(value) or value & (value - 1) or not 16 <= value <= 256:
            wanted = "a power of two from 16 to 256"
    elif plain == "num_warps":
        if not _is_int(value) or value not in (1, 2, 4, 8, 16):
            wanted = "1, 2, 4, 8 or 16"
    elif plain == "num_stages":
        if not _is_int(value) or not 1 <= value <= 8:
            wanted = "an int from 1 to 8"
    elif plain == "USE_TMA" or name == "PRESCALE_QK":
        wanted = None if isinstance(value, bool) else "True or False"
    elif name == "IS_DIVISIBLE":
        wanted = None if value is False else "False; True is chosen automatically for lengths that divide"
    elif name == "BACKEND":
        wanted = None if value in _BACKENDS else f"one of {list(_BACKENDS)}"
    else:
        known = [*_TILE, *_BACKWARD_TILE, "num_warps", "num_stages", *_SWITCHES, "BACKEND"]
        raise ValueError(f"kernel_options: {name!r} is not one of {known} (some may have fwd_ or bwd_ in front)")
    if wanted is not None:
        raise ValueError(f"kernel_options: {name} must be {wanted}, got {value!r}")
    checked: Value = value
    return checked


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    backward: bool = False,
    seq_len: int = 0,
    text_padded: bool = False,
    reach: int | None = None,
    pools: bool = False,
    block_size: tuple[int, int] | None = None,
    options: Options = (),
) -> Kernel:
    """Blocks and kernel options for attention on ``device``.

    Args:
        device, dtype, head_dim: device, dtype and head dim of query, key and value.
        backward: whether a backward pass follows.
        seq_len: tokens of the sequence.
        text_padded: whether the mask checks each text key for padding.
        reach, pools: ``Window.reach`` and ``Window.pools``.
        block_size: block size that the mask has or should get; None: choose one.
        options: from ``check_kernel_options``; they take precedence over the table's. No effect on CPU.

    Raises:
        ValueError: the kernel does not support the block size, or this GPU does not support an option.
    """
    # Text apart costs one more kernel, but makes image rows equally long. On two CPU cores the two calls take 0.87 to 0.95 of the
    # time of one; on 132 multiprocessors the long rows of a single call cost 1.18 to 1.30 times as much (simulated).
    apart = not (backward or text_padded or pools)
    if device.type != "cuda":
        chosen = block_size or default_block_size(seq_len, backward, device, reach, dtype)
        return Kernel(chosen, (), default_source(device), apart)
    # ROCm gives AMD's GPUs similar numbers, but none of them is in the table.
    capability = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)
    row = find_row(capability, dtype, head_dim)
    given = dict(options)
    _check_device(given, capability, dtype, head_dim)
    if given.get("BACKEND") == "FLASH":
        return Kernel(_flash_blocks(capability, block_size), options, "separate", apart)
    own = row.block_size if (seq_len < MANY_TOKENS or apart) and not backward else None
    chosen = block_size or own or default_block_size(seq_len, backward)
    if backward:
        _check_backward(chosen, capability, head_dim, dtype, given)
    tile = {name: given.get(f"fwd_{name}", given.get(name)) for name in _TILE}
    for name, size in zip(_TILE, chosen, strict=True):
        asked = tile[name]
        if asked is not None and size % int(asked):
            raise ValueError(
                f"kernel_options: {name}={asked} does not divide the blocks of {chosen[0]} x {chosen[1]} (query x key-value) "
                "tokens; pass block_size as well"
            )
    wanted: dict[str, Value] = {
        f"fwd_{name}": _divisor(size, most) for name, size, most in zip(_TILE, chosen, row.tile, strict=True)
    }
    warps, stages = row.padded if text_padded and row.padded is not None else (row.warps, row.stages)
    wanted.update(fwd_num_warps=warps, fwd_num_stages=stages)
    if backward and row.backward is not None:
        wanted.update(bwd_num_warps=row.backward[0], bwd_num_stages=row.backward[1])
    if backward and row.backward_tile is not None:
        wanted.update({f"bwd_{name}": row.backward_tile for name in _BACKWARD_TILE})
    for name in given:
        for replaced in (name, f"fwd_{name}", f"bwd_{name}"):
            wanted.pop(replaced, None)
    if backward:
        _check_backward_tile({**wanted, **given}, _backward_tile(capability, head_dim, dtype))
    return Kernel(chosen, tuple(sorted({**wanted, **given}.items())), default_source(device), apart)


def find_row(capability: Capability, dtype: torch.dtype, head_dim: int) -> Row:
    """The row of ``TABLE`` that applies."""
    return next(
        row
        for row in TABLE
        if (row.capabilities is None or capability in row.capabilities)
        and (row.dtypes is None or dtype in row.dtypes)
        and head_dim <= row.head_dim
    )


def _divisor(size: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides ``size``."""
    return min(size & -size, most)


def _check_device(given: Mapping[str, Value], capability: Capability, dtype: torch.dtype, head_dim: int) -> None:
    """Raise if an option does not work with this GPU, type, head dim or torch.

    Raises:
        ValueError: one does not.
    """
    here = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    if any(given.get(name) for name in ("USE_TMA", "fwd_USE_TMA", "bwd_USE_TMA")) and capability < (9, 0):
        raise ValueError(f"kernel_options: USE_TMA needs compute capability 9.0; {here}")
    if "BACKEND" not in given:
        return
    if not _knows_backend():
        raise ValueError(f"kernel_options: BACKEND is not known to torch {torch.__version__}; leave it out")
    if given["BACKEND"] != "FLASH":
        return
    if capability[0] not in (9, 10, 11):
        raise ValueError(f"kernel_options: BACKEND='FLASH' needs compute capability 9.x to 11.x; {here}")
    if dtype not in HALF:
        raise ValueError(f"kernel_options: BACKEND='FLASH' computes in bfloat16 or float16, got {dtype}")
    if head_dim > 128:
        raise ValueError(f"kernel_options: BACKEND='FLASH' is for head dims up to 128, got {head_dim}")
    if not _has_flash():
        raise ValueError(
            "kernel_options: BACKEND='FLASH' needs the package flash-attn-4: pip install --pre flash-attn-4"
        )
    others = sorted(set(given) - {"BACKEND"})
    if others:
        raise ValueError(
            f"kernel_options: {others} are options of Triton's kernels and have no effect on BACKEND='FLASH'"
        )


def _knows_backend() -> bool:
    from torch.nn.attention import flex_attention

    return "BACKEND" in getattr(getattr(flex_attention, "FlexKernelOptions", None), "__annotations__", {})


def _has_flash() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


def _flash_blocks(capability: Capability, block_size: tuple[int, int] | None) -> tuple[int, int]:
    """The blocks that FlashAttention 4 supports: a thread block's tile, or two of them on Blackwell.

    Raises:
        ValueError: others are requested.
    """
    only = (128, 128) if capability[0] == 9 else (256, 128)
    if block_size not in (None, only):
        raise ValueError(f"BACKEND='FLASH' takes blocks of {only} on this GPU, got block_size={block_size}")
    return only


def _check_backward(
    block_size: tuple[int, int],
    capability: Capability,
    head_dim: int,
    dtype: torch.dtype,
    given: Mapping[str, Value],
) -> None:
    """Raise if Inductor has no backward kernel for blocks of this size. It checks against its own tile, whatever is requested.

    Raises:
        ValueError: it has none.
    """
    tile = _backward_tile(capability, head_dim, dtype)
    asked = {name: given.get(f"bwd_{name}", given.get(name)) for name in _BACKWARD_TILE}
    for name, own in zip(_BACKWARD_TILE, tile, strict=True):
        size = block_size[0 if "_M" in name else 1]
        for number in (own, asked[name]):
            if number is not None and size % int(number):
                raise ValueError(
                    f"block_size {block_size[0]} x {block_size[1]} (query x key-value tokens) does not work in training: the "
                    f"backward kernel at head dim {head_dim} in {dtype} works on {name}={number} at a time on this GPU. Use "
                    f"multiples of {max(tile[0], tile[2])} queries and {max(tile[1], tile[3])} keys, or leave block_size out"
                )


def _check_backward_tile(options: Mapping[str, Value], own: tuple[int, int, int, int]) -> None:
    """Raise if the sides of the backward tile do not fit together; Triton would fail with a bare assertion.

    Raises:
        ValueError: they do not.
    """
    sides = zip(_BACKWARD_TILE, own, strict=True)
    m1, n1, m2, n2 = (int(options.get(f"bwd_{name}", options.get(name, side))) for name, side in sides)
    if n1 % m1 or m2 % n2:
        raise ValueError(
            "kernel_options: BLOCK_M1 must divide BLOCK_N1, and BLOCK_N2 must divide BLOCK_M2; they would be "
            f"BLOCK_M1={m1}, BLOCK_N1={n1}, BLOCK_M2={m2}, BLOCK_N2={n2}"
        )


@functools.cache
def _backward_tile(capability: Capability, head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Inductor's own tile of the backward kernel (M1, N1, M2, N2) on the current GPU, which has this capability."""
    try:
        from torch._inductor.choices import InductorChoices

        tile = InductorChoices().get_flex_attention_bwd_configs(head_dim, dtype, "cuda")[-1]
        return tile.block_m1, tile.block_n1, tile.block_m2, tile.block_n2
    except (ImportError, AttributeError, TypeError):  # another torch: the largest possible tile
        return (128, 128, 128, 128)


def completed(kernel: Kernel, mask: BlockMask) -> Options:
    """The options of ``kernel`` for ``mask``, with ``IS_DIVISIBLE`` if its lengths are multiples of its blocks.

    ``IS_DIVISIBLE`` drops every comparison with the ends of the sequence. Inductor determines it only for lengths that are
    compiled in.
    """
    options = dict(kernel.options)
    if options and options.get("BACKEND") != "FLASH":
        divisible = all(
            length % 128 == 0 and length % size == 0
            for length, size in zip(mask.seq_lengths, mask.BLOCK_SIZE, strict=True)
        )
        options.setdefault("IS_DIVISIBLE", divisible)
    return tuple(sorted(options.items()))


def as_dict(options: Options) -> Any:
    """Options in the form that FlexAttention takes."""
    return dict(options)


def with_kernel(mask: BlockMask, kernel: Kernel) -> BlockMask:
    """Attach the kernel options for ``mask`` to it."""
    setattr(mask, KERNEL_OPTIONS, completed(kernel, mask))
    return mask
