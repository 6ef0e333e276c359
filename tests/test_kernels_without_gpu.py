"""The kernels of CUDA GPUs on a machine that has none: generated, compiled for two GPUs, and run in Triton's interpreter.

What patches torch for it runs in processes of its own (``fakegpu``). ``bench/kernels/run.py`` does the same for every GPU,
type and mask.
"""

from __future__ import annotations

import functools
import os
import re

import pytest

from fakegpu import assemble, device, worker
from fakegpu.cases import CLIPS, Case

ADA, HOPPER = (8, 9), (9, 0)
HEAD_DIMS = (64, 128)


@pytest.fixture(scope="module", autouse=True)
def _possible():
    """Skip where there is nothing to compile with, and say why; in continuous integration that is a failure."""
    reason = device.why_not()
    if reason is not None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


# Inference and training of each head dim over the circular window, and what no kernel can be generated for.
CASES = [Case(head_dim=head_dim, backward=backward) for head_dim in HEAD_DIMS for backward in (False, True)]
UNEVEN = {ADA: 64, HOPPER: 128}
PADDED = {ADA: (64,), HOPPER: HEAD_DIMS}
"""Head dims that are compiled with lengths that do not divide, and with padded text: those that were nearest to spilling."""
APART, TABLE, COMPUTED = (
    Case(head_dim=128, **kind) for kind in ({"apart": True}, {"coordinates": "packed"}, {"coordinates": "computed"})
)
GROUPED = Case(head_dim=128, heads=8, key_heads=2)
OF_CLIPS = {name: Case(head_dim=128, **CLIPS[name]) for name in ("clip, cylinder", "clip, radial")}
FLASH = {
    name: Case(head_dim=64, options={"BACKEND": "FLASH"}, **kind)
    for name, kind in (
        ("disc", {}),
        ("pooled keys", {"pooled": 4}),
        ("padded text", {"padding": (512, 77)}),
        ("clip, cylinder", CLIPS["clip, cylinder"]),
        ("clip, radial", CLIPS["clip, radial"]),
    )
}
IMPOSSIBLE = Case(head_dim=64, block_size=(128, 64), options={"BLOCK_N": 128}, exact=True)


@functools.cache
def results(capability):
    cases = [*CASES, Case(head_dim=UNEVEN[capability], text_len=500)]
    cases += [Case(head_dim=head_dim, padding=(512, 77)) for head_dim in PADDED[capability]]
    if capability == HOPPER:
        cases += [GROUPED, *FLASH.values(), *OF_CLIPS.values(), APART, TABLE, COMPUTED, IMPOSSIBLE]
    return dict(zip(cases, worker.run(capability, cases), strict=True))


def compiled(capability, head_dim, kind, **others):
    result = results(capability)[Case(head_dim=head_dim, backward=kind != "forward", **others)]
    assert result["status"] == "ok", result["reason"]
    (kernel,) = (kernel for kernel in result["kernels"] if kernel["kind"] == kind)
    return kernel


@pytest.mark.kept("sm_90-*")
@pytest.mark.parametrize("kind", ["forward", "lse", "backward"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", [ADA, HOPPER], ids=["sm_89", "sm_90"])
def test_the_kernel_compiles_without_spills_within_the_gpus_shared_memory(capability, head_dim, kind):
    kernel = compiled(capability, head_dim, kind)
    assert kernel["target"] == {ADA: "sm_89", HOPPER: "sm_90a"}[capability]
    assert kernel["constants"]["QK_HEAD_DIM"] == head_dim
    assert 0 < kernel["shared"] <= device.GPUS[capability][2]
    assert kernel["wgmma" if capability == HOPPER else "mma"] > 0
    loops = [loop["instructions"] for loop in kernel["loops"]]
    if kind == "backward":
        # For queries and for keys, each over partial blocks and over full ones, which ask no mask_mod.
        assert len(loops) == 4
        assert loops[0] > loops[1]
        assert loops[2] > loops[3]
    else:
        assert (kernel["spill_stores"], kernel["spill_loads"]) == (0, 0)
        partial, full = loops
        assert partial > full


@pytest.mark.kept("sm_90")
@pytest.mark.parametrize(("capability", "head_dim"), UNEVEN.items(), ids=["sm_89", "sm_90"])
def test_comparisons_with_the_sequences_end_are_left_out_only_where_lengths_divide(capability, head_dim):
    even, uneven = (compiled(capability, head_dim, "forward", text_len=length) for length in (512, 500))
    assert (even["constants"]["IS_DIVISIBLE"], uneven["constants"]["IS_DIVISIBLE"]) == (True, False)
    assert (uneven["spill_stores"], uneven["spill_loads"]) == (0, 0)
    assert 0 < uneven["shared"] <= device.GPUS[capability][2]


@pytest.mark.parametrize(
    ("capability", "head_dim"), [(capability, each) for capability, dims in PADDED.items() for each in dims]
)
def test_a_mask_that_asks_for_padding_spills_nothing(capability, head_dim):
    kernel = compiled(capability, head_dim, "forward", padding=(512, 77))
    assert (kernel["spill_stores"], kernel["spill_loads"]) == (0, 0)


def test_heads_of_keys_that_several_queries_share_are_read_as_they_are():
    kernel = compiled(HOPPER, 128, "forward", heads=8, key_heads=2)
    assert kernel["constants"]["GQA_SHARED_HEADS"] == 4
    assert (kernel["spill_stores"], kernel["spill_loads"]) == (0, 0)


def test_coordinates_cost_no_more_registers_than_a_table():
    """As they are chosen: with arithmetic the kernel has more, and a longer loop over partial blocks."""
    chosen, apart, table, computed = (
        compiled(HOPPER, 128, "forward", **kind)
        for kind in ({}, {"apart": True}, {"coordinates": "packed"}, {"coordinates": "computed"})
    )
    assert chosen["registers"] <= table["registers"]
    assert apart["registers"] <= table["registers"] + 8  # they are given out in steps of 8
    assert computed["loops"][0]["instructions"] > table["loops"][0]["instructions"]
    for kernel in (apart, computed):
        assert (kernel["spill_stores"], kernel["spill_loads"]) == (0, 0)


@pytest.mark.parametrize("name", OF_CLIPS)
def test_a_mask_of_several_frames_costs_no_shared_memory_no_spills_and_full_blocks_nothing(name):
    kernel, of_image = (compiled(HOPPER, 128, "forward", **kind) for kind in (CLIPS[name], {}))
    assert (kernel["spill_stores"], kernel["spill_loads"]) == (0, 0)
    assert kernel["shared"] == of_image["shared"]  # a gather for every pair would go through it
    (partial, full), (partial_of_image, full_of_image) = (
        [loop["instructions"] for loop in one["loops"]] for one in (kernel, of_image)
    )
    assert partial > partial_of_image
    assert full <= full_of_image * 1.05  # moves of registers differ


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_is_generated_of_what_its_language_has(name):
    result = results(HOPPER)[FLASH[name]]
    assert result["status"] == "ok", result["reason"]
    assert "flex_attention" in (result.get("compiled") or result["generated"])


LAYOUTS = {
    "odd sizes, text first": Case(heads=1, height=17, width=9, text_len=5, r=4),
    "pooled keys, text last": Case(heads=1, height=13, width=11, text_len=37, text_first=False, r=3, pooled=4),
    "grouped heads": Case(heads=2, key_heads=1, height=17, width=9, text_len=5, r=4),
    "computed, turned, pooled keys": Case(
        heads=1, height=16, width=11, text_len=37, text_first=False, r=3, pooled=4, coordinates="computed"
    ),
    "image alone, a band of 9 rows": Case(
        heads=1, height=17, width=11, text_len=128, r=4, coordinates="computed", apart=True
    ),
    "clip, text last": Case(
        heads=1, frames=3, height=6, width=8, text_len=5, text_first=False, made_by=("cylinder", 3, 1)
    ),
    "clip without text, radii in steps": Case(heads=1, frames=6, height=5, width=8, text_len=0, made_by=("radial", 4)),
}
INFERENCE = [name for name, case in LAYOUTS.items() if case.coordinates == "computed" or case.made_by == ("radial", 4)]


@functools.cache
def interpreted():
    cases = [Case(**{**case.to_json(), **SMALL, "backward": name not in INFERENCE}) for name, case in LAYOUTS.items()]
    return dict(zip(LAYOUTS, worker.run(HOPPER, cases, "interpret"), strict=True))


SMALL = {"head_dim": 64, "dtype": "float32"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_log_sum_exp_and_gradients_of_the_generated_code_equal_masked_sdpa(layout):
    """In the interpreter, in float32; 1e-5 is what ``flexclear.testing`` asks of float32 anywhere."""
    result = interpreted()[layout]
    gradients = set() if layout in INFERENCE else {"query", "key", "value"}
    assert set(result["errors"]) == {"output", "lse"} | gradients
    assert all(error <= 1e-5 for error in result["errors"].values()), result["errors"]
    assert result["unmasked"] > 0.1


def test_what_inductor_cannot_generate_is_a_refusal_with_its_reason():
    result = results(HOPPER)[IMPOSSIBLE]
    assert result["status"] == "refused"
    assert "Q and KV block size must be divisible by BLOCK_M and BLOCK_N" in result["reason"]


def test_a_process_that_fails_says_how():
    with pytest.raises(RuntimeError, match=r"worker ended with 1: (?s:.*)no GPU of capability \(7, 5\) is described"):
        list(worker.run((7, 5), [Case()]))


class TestWhyNot:
    @pytest.fixture
    def packages(self, tmp_path, monkeypatch):
        """Write packages that are found in place of torch and triton."""

        def write(version="2.13.0", built_for="cuda", triton=("backends/nvidia/bin/ptxas",)):
            builds = {name: repr("1") if name == built_for else None for name in ("cuda", "hip", "xpu")}
            lines = [
                f"__version__ = {version!r}",
                *(f"{name}: Optional[str] = {build}" for name, build in builds.items()),
            ]
            files = {"torch/__init__.py": "", "torch/version.py": "\n".join(lines)}
            if triton is not None:
                files.update(dict.fromkeys([f"triton/{name}" for name in ("__init__.py", *triton)], ""))
            for name, text in files.items():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_text(text)

            def find_spec(name):
                origin = tmp_path / name / "__init__.py"
                return type("Spec", (), {"origin": str(origin)}) if origin.is_file() else None

            monkeypatch.setattr(device.importlib.util, "find_spec", find_spec)

        return write

    def test_nothing_is_wrong_with_a_cuda_build_and_triton(self, packages):
        packages()
        assert device.why_not() is None

    @pytest.mark.parametrize(
        ("found", "reason"),
        [
            ({"triton": None}, r"triton is not installed \(pip install triton\)"),
            ({"triton": ()}, "triton .* has no backend for NVIDIA GPUs"),
            ({"built_for": "hip"}, "torch 2.13.0 is built for hip, whose kernels are others"),
            ({"version": "2.7.1+cu126"}, r"needs torch 2\.8 or later, this is 2\.7\.1\+cu126"),
        ],
        ids=["no triton", "triton of another vendor", "torch of another vendor", "old torch"],
    )
    def test_what_is_missing_is_named_with_what_is_not_checked(self, packages, found, reason):
        packages(**found)
        expected = rf"CUDA kernels are neither generated nor compiled nor interpreted here: .*{reason}"
        assert re.fullmatch(expected, device.why_not())

    def test_no_compiler_matters_to_the_cpu_build_alone(self, packages, monkeypatch):
        monkeypatch.setattr(device.shutil, "which", lambda name: None)
        packages()
        assert device.why_not() is None
        packages(built_for=None)
        assert "no C++ compiler" in device.why_not()


def test_loops_are_found_in_machine_code():
    code = """
.L_x_1:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0010*/                   MUFU.EX2 R5, R5 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*0060*/                   EXIT ;
"""
    assert assemble.loops(code) == [assemble.Loop(instructions=3, products=1)]
