"""The table of blocks and kernel options: every GPU has a row, what is asked for wins or is refused, masks carry it."""

from __future__ import annotations

import pytest
import torch

import flexclear
from flexclear.compile import kernels
from flexclear.compile.kernels import HALF, Kernel, check_kernel_options, choose, completed, find_row, with_kernel
from flexclear.masks import Disc, Layout, block_mask, with_text_mask
from flexclear.masks.carried import KERNEL_OPTIONS
from flexclear.runtime.hooks import entry_hook_of
from flexclear.runtime.plan import build_plan, get_plan, plans

from helpers.models import flux_call, tiny_flux

GPUS = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 7))
CUDA = torch.device("cuda", 0)
LONG = 1 << 16


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that GPUs are of one capability, as far as choosing goes."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        kernels._backward_tile.cache_clear()

    yield pretend
    kernels._backward_tile.cache_clear()


@pytest.mark.parametrize("capability", GPUS, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256, 512])
def test_every_gpu_has_a_forward_tile_that_divides_its_blocks(gpu, capability, head_dim):
    gpu(capability)
    for dtype in (*HALF, torch.float32):
        for seq_len in (4608, 1 << 20):
            kernel = choose(CUDA, dtype, head_dim, seq_len=seq_len)
            options = dict(kernel.options)
            assert kernel.block_size[0] % options["fwd_BLOCK_M"] == 0
            assert kernel.block_size[1] % options["fwd_BLOCK_N"] == 0
            assert options["fwd_num_warps"] in (1, 2, 4, 8)
        assert choose(CUDA, dtype, head_dim, backward=True).block_size == (128, 128)


@pytest.mark.parametrize("block_size", [(16, 16), (48, 80), (96, 32), (256, 256), (112, 16)], ids=str)
def test_the_tile_shrinks_to_divide_blocks_that_are_asked_for(gpu, block_size):
    gpu((9, 0))
    kernel = choose(CUDA, torch.bfloat16, 128, block_size=block_size)
    tile = (dict(kernel.options)["fwd_BLOCK_M"], dict(kernel.options)["fwd_BLOCK_N"])
    assert kernel.block_size == block_size
    assert all(size % part == 0 and part >= 16 for size, part in zip(block_size, tile, strict=True))


def test_padded_text_has_warps_of_its_own_where_its_mask_would_spill(gpu):
    gpu((9, 0))
    warps = [
        dict(choose(CUDA, torch.bfloat16, 64, text_padded=padded).options)["fwd_num_warps"] for padded in (False, True)
    ]
    assert warps == [4, 8]
    given = choose(CUDA, torch.bfloat16, 64, text_padded=True, options=(("num_warps", 4),))
    assert dict(given.options)["num_warps"] == 4


def test_the_backward_pass_has_warps_of_its_own(gpu):
    gpu((8, 9))
    forward = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3}
    backward = {**forward, "bwd_num_warps": 8, "bwd_num_stages": 2}
    assert dict(choose(CUDA, torch.bfloat16, 128).options) == forward
    assert dict(choose(CUDA, torch.bfloat16, 128, backward=True).options) == backward
    found = dict(choose(CUDA, torch.bfloat16, 128, backward=True, options=(("num_warps", 4),)).options)
    assert found["num_warps"] == 4
    assert not {"fwd_num_warps", "bwd_num_warps"} & set(found)


def test_amds_gpus_are_unknown_ones_whatever_their_number(gpu, monkeypatch):
    """An MI200 calls itself 9.0, as an H100 does."""
    gpu((9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert dict(choose(CUDA, torch.bfloat16, 128).options)["fwd_num_stages"] == 1
    with pytest.raises(ValueError, match="USE_TMA needs"):
        choose(CUDA, torch.bfloat16, 128, options=(("USE_TMA", True),))


def test_unknown_gpus_and_head_dims_meet_the_last_rows():
    assert find_row((13, 7), torch.bfloat16, 64) is kernels.TABLE[-2]
    assert find_row((9, 0), torch.bfloat16, LONG) is kernels.TABLE[-1]
    assert all(row.reason for row in kernels.TABLE)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"num_warps": 4}, {"num_warps": 4, "fwd_num_stages": 3}),
        ({"fwd_num_warps": 4}, {"fwd_num_warps": 4, "fwd_num_stages": 3}),
        ({"bwd_num_stages": 1}, {"bwd_num_stages": 1, "fwd_num_stages": 3, "fwd_num_warps": 8}),
        ({"BLOCK_N": 32}, {"BLOCK_N": 32, "fwd_BLOCK_M": 128}),
        ({"PRESCALE_QK": True, "USE_TMA": True}, {"PRESCALE_QK": True, "USE_TMA": True, "fwd_BLOCK_N": 64}),
    ],
    ids=str,
)
def test_what_is_asked_for_wins_over_the_table(gpu, options, kept):
    gpu((10, 0))
    found = dict(choose(CUDA, torch.bfloat16, 128, options=check_kernel_options(options)).options)
    assert kept.items() <= found.items()
    replaced = {f"fwd_{name}" for name in options}
    assert not replaced & set(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ROWS_GUARANTEED_SAFE": True}, "ROWS_GUARANTEED_SAFE cannot be given.*nan"),
        ({"BLOCKS_ARE_CONTIGUOUS": True}, "other keys would be attended to"),
        ({"IS_DIVISIBLE": True}, "IS_DIVISIBLE must be False"),
        ({"BLOCK_M": 48}, "BLOCK_M must be a power of two from 16 to 256, got 48"),
        ({"bwd_BLOCK_N1": 512}, "bwd_BLOCK_N1 must be a power of two"),
        ({"num_warps": True}, "num_warps must be 1, 2, 4, 8 or 16, got True"),
        ({"num_stages": 0}, "num_stages must be an int from 1 to 8, got 0"),
        ({"USE_TMA": 1}, "USE_TMA must be True or False, got 1"),
        ({"fwd_PRESCALE_QK": True}, "'fwd_PRESCALE_QK' is not one of"),
        ({"fwd_BLOCK_M1": 64}, "'fwd_BLOCK_M1' is not one of"),
        ({"bwd_BLOCK_M": 64}, "'bwd_BLOCK_M' is not one of"),
        ({"BACKEND": "TRITON_DECODE"}, "BACKEND must be one of"),
        ({"waves": 3}, "'waves' is not one of"),
        ({3: 3}, "3 is not one of"),
    ],
    ids=str,
)
def test_options_that_are_wrong_or_unknown_are_refused_before_anything_changes(options, message):
    model = tiny_flux()
    with pytest.raises(ValueError, match=message):
        flexclear.transform(model, r=4, kernel_options=options)
    assert entry_hook_of(model) is None


def test_options_that_are_no_mapping_are_refused():
    with pytest.raises(TypeError, match=r"must be a mapping.*got \['num_warps'\]"):
        check_kernel_options(["num_warps"])


@pytest.mark.parametrize(
    ("capability", "dtype", "arguments", "message"),
    [
        ((8, 9), torch.bfloat16, {"options": {"USE_TMA": True}}, "needs compute capability 9.0; this GPU has .* 8.9"),
        ((8, 0), torch.bfloat16, {"options": {"BACKEND": "FLASH"}}, "needs compute capability 9.x to 11.x"),
        ((9, 0), torch.float32, {"options": {"BACKEND": "FLASH"}}, "bfloat16 or float16, got torch.float32"),
        ((9, 0), torch.float16, {"options": {"BACKEND": "FLASH"}}, "needs the package flash-attn-4"),
        ((9, 0), torch.float16, {"options": {"BLOCK_M": 128}, "block_size": (64, 64)}, "BLOCK_M=128 does not divide"),
        ((9, 0), torch.bfloat16, {"block_size": (128, 64), "backward": True}, "does not work in training.*128 keys"),
        ((9, 0), torch.bfloat16, {"options": {"BLOCK_N1": 256}, "backward": True}, "BLOCK_N1=256"),
        ((9, 0), torch.bfloat16, {"options": {"BLOCK_M1": 128, "BLOCK_N1": 64}, "backward": True}, "M1 must divide"),
        ((9, 0), torch.bfloat16, {"options": {"bwd_BLOCK_M2": 32}, "backward": True}, "BLOCK_N2 must divide BLOCK_M2"),
    ],
    ids=str,
)
def test_what_a_gpu_cannot_take_is_refused_with_what_it_can(gpu, monkeypatch, capability, dtype, arguments, message):
    gpu(capability)
    monkeypatch.setattr(kernels, "_has_flash", lambda: False)
    arguments = {**arguments, "options": check_kernel_options(arguments.get("options"))}
    with pytest.raises(ValueError, match=message):
        choose(CUDA, dtype, 128, **arguments)


def test_masks_for_flash_have_no_shifts(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "_has_flash", lambda: True)
    gpu((9, 0))
    found = {}
    for name in ("TRITON", "FLASH"):
        kernel = choose(CUDA, torch.bfloat16, 64, options=check_kernel_options({"BACKEND": name}))
        plan = build_plan(Layout(8, 8, 5), Disc(3), "flex", kernel, torch.device("cpu"), backward=False)
        places = torch.arange(69)
        graph = torch.fx.experimental.proxy_tensor.make_fx(plan.mask.image.mask_mod)(
            None, None, places[:, None], places
        )
        found[name] = {str(node.target) for node in graph.graph.nodes if "shift" in str(node.target)}
    assert found == {"TRITON": {"aten.__rshift__.Scalar"}, "FLASH": set()}


def test_flash_takes_its_own_blocks_and_no_options_of_triton(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "_has_flash", lambda: True)
    flash = check_kernel_options({"BACKEND": "FLASH"})
    for capability, blocks in (((9, 0), (128, 128)), ((10, 0), (256, 128))):
        gpu(capability)
        assert choose(CUDA, torch.bfloat16, 128, options=flash) == Kernel(blocks, flash, "separate", text_apart=True)
        with pytest.raises(ValueError, match="takes blocks of"):
            choose(CUDA, torch.bfloat16, 128, options=flash, block_size=(64, 64))
    with pytest.raises(ValueError, match="head dims up to 128, got 256"):
        choose(CUDA, torch.bfloat16, 256, options=flash)
    with pytest.raises(ValueError, match="options of Triton's kernels"):
        choose(CUDA, torch.bfloat16, 128, options=check_kernel_options({"BACKEND": "FLASH", "num_warps": 8}))


@pytest.mark.parametrize(
    ("layout", "block_size", "divisible"),
    [
        (Layout(64, 64, 512), (128, 64), True),
        (Layout(64, 64, 511), (128, 64), False),
        (Layout(8, 8, 64), (16, 16), True),
        (Layout(8, 8), (16, 16), False),
        (Layout(8, 8, 0), (16, 16), False),  # 64 tokens: less than the 128 that Inductor's own tiles may be
        (Layout(16, 8, 0), (256, 64), False),
        (Layout(16, 24, 0), (96, 128), True),
        (Layout(16, 16, 0), (96, 128), False),
    ],
    ids=str,
)
def test_only_lengths_that_every_tile_divides_are_called_divisible(layout, block_size, divisible):
    mask = block_mask(layout, Disc(3), block_size=block_size)
    options = dict(completed(Kernel(block_size, (("fwd_num_warps", 8),)), mask))
    assert options["IS_DIVISIBLE"] is divisible
    assert dict(completed(Kernel(block_size, (("IS_DIVISIBLE", False),)), mask)) == {"IS_DIVISIBLE": False}


def test_a_mask_carries_its_options_through_padding():
    layout = Layout(8, 8, 64)
    mask = with_kernel(block_mask(layout, Disc(3), text_padded=True), Kernel((128, 64), (("num_warps", 8),)))
    padded = with_text_mask(mask, layout, torch.ones(2, 64, dtype=torch.bool))
    assert getattr(padded, KERNEL_OPTIONS) == getattr(mask, KERNEL_OPTIONS)
    assert dict(getattr(padded, KERNEL_OPTIONS)) == {"num_warps": 8, "IS_DIVISIBLE": True}


def test_plans_differ_by_their_options_and_the_cpu_has_none(gpu):
    plans.clear()
    cpu, layout = torch.device("cpu"), Layout(16, 16, 0)
    asked = check_kernel_options({"num_warps": 4})
    kernel = choose(cpu, torch.float32, 64, seq_len=layout.seq_len, options=asked)
    assert kernel == Kernel((32, 32), coordinates="computed", text_apart=True)
    plain = get_plan(layout, Disc(3), "flex", kernel, cpu)
    other = get_plan(layout, Disc(3), "flex", Kernel((128, 64), asked), cpu)
    assert getattr(plain.mask, KERNEL_OPTIONS) == ()
    assert dict(getattr(other.mask, KERNEL_OPTIONS))["num_warps"] == 4


def test_a_model_keeps_its_options_when_it_is_transformed_again():
    model = tiny_flux()
    flexclear.transform(model, r=4, backend="sdpa", kernel_options={"num_stages": 2})
    flexclear.convert.transform_again(model)
    settings = entry_hook_of(model).settings
    assert settings.kernel_options == (("num_stages", 2),)
    assert settings.head_dim == model.config.attention_head_dim
    assert "kernel options num_stages=2" in str(flexclear.explain(model))
    with torch.no_grad():
        model(**flux_call(8, 8, 4))
