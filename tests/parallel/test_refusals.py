"""What ``enable`` refuses before there is any other process, and the merging of partial softmax results."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist

import flexclear
from flexclear import parallel
from flexclear.parallel.facts import differences, digest, facts_of_model, sums
from flexclear.parallel.session import Options
from flexclear.parallel.softmax import merged, partial_attention, weighted
from flexclear.runtime.hooks import entry_hook_of

from helpers.models import tiny_flux
from helpers.parallel_group import free_port


@pytest.fixture
def model():
    return flexclear.transform(tiny_flux(), r=3, backend="sdpa")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": "some"}, "text must be one of"),
        ({"exchange": "later"}, "exchange must be one of"),
        ({"too_small": "skip"}, "too_small must be one of"),
        ({"warmup_steps": 0}, "warmup_steps must be a number of steps >= 1"),
        ({"warmup_steps": True}, "warmup_steps must be"),
        ({"timeout": 0}, "timeout must be a positive number"),
        ({"timeout": float("nan")}, "timeout must be a positive number"),
        ({"exchange": "stale"}, "needs to know the denoising step: pass the pipeline"),
        ({}, "no process group: start with torchrun"),
    ],
)
def test_an_argument_that_makes_no_sense_is_named(model, options, words):
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match=words):
        parallel.enable(model, **options)
    with pytest.raises(ValueError, match="does not run on several ranks"):
        parallel.sent_bytes(model)


@pytest.mark.parametrize(
    ("rank", "words"), [(0, "rank 0, set-up: waited 1 s for others"), (1, "waited 1 s for rank 0")]
)
def test_ranks_that_never_start_are_named(model, monkeypatch, rank, words):
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(parallel.ParallelError, match=words):
        parallel.enable(model, timeout=1.0)
    assert not dist.is_initialized()


def test_a_dense_model_is_told_what_shares_it_out():
    with pytest.raises(ValueError, match=r"is dense.*transform\(model, r=...\) first.*enable_dense"):
        parallel.enable(tiny_flux())
    with pytest.raises(TypeError, match="pipeline with a transformer"):
        parallel.enable("model")


def test_windows_and_diffusers_context_parallelism_are_not_mixed(model):
    from types import SimpleNamespace

    with pytest.raises(ValueError, match=r"has windows: use flexclear\.parallel\.enable"):
        parallel.enable_dense(model)
    with pytest.raises(ValueError, match="kind must be 'ring' or 'ulysses'"):
        parallel.enable_dense(tiny_flux(), kind="star")
    with pytest.raises(ValueError, match="no process group: start with torchrun"):
        parallel.enable_dense(tiny_flux(), kind="ulysses")
    ringed = tiny_flux()
    inner = SimpleNamespace(ring_degree=2, ulysses_degree=1)
    ringed._parallel_config = SimpleNamespace(context_parallel_config=inner)
    for enable in (parallel.enable, parallel.enable_dense):
        with pytest.raises(
            ValueError, match=r"ring_degree=2, ulysses_degree=1.*Both at once would cut the image twice"
        ):
            enable(ringed)


@pytest.mark.parametrize(("devices", "fitting"), [(0, "_native_flash"), (2, "_native_cudnn")])
def test_a_ring_is_refused_with_an_attention_that_gives_no_log_sum_exp(monkeypatch, devices, fitting):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    model = tiny_flux()
    with pytest.raises(
        ValueError, match=rf"'native'.*not return here: use model\.set_attention_backend\('{fitting}'\)"
    ):
        parallel.enable_dense(model)
    # What gives it gets further, to the next thing that is missing here.
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = fitting
    with pytest.raises(ValueError, match="no process group"):
        parallel.enable_dense(model)


def test_a_model_that_diffusers_cannot_share_and_a_single_rank_are_refused(monkeypatch):
    from helpers.models import tiny_sd3

    with pytest.raises(ValueError, match=r"no plan for sharing the dense SD3Transformer2DModel \(_cp_plan\)"):
        parallel.enable_dense(tiny_sd3(), kind="ulysses")
    monkeypatch.setattr(parallel.dense, "ranks_of", lambda mesh: [0])
    with pytest.raises(ValueError, match="there is only one rank"):
        parallel.enable_dense(tiny_flux(), kind="ulysses")


def test_disabling_leaves_what_somebody_else_enabled():
    from types import SimpleNamespace

    dense = tiny_flux()
    dense._parallel_config = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2, ulysses_degree=1))
    theirs = dense._parallel_config
    assert parallel.disable(dense)._parallel_config is theirs


def test_a_formula_is_refused_with_what_can_be_shared():
    model = flexclear.transform(tiny_flux(), attention="linear")
    with pytest.raises(ValueError, match="attention='linear' is not softmax over a window"):
        parallel.enable(model)


def test_a_model_with_a_cache_is_refused(model):
    from diffusers import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"it has a cache \(enable_cache\).*disable_cache"):
        parallel.enable(model)


def test_a_qwen_that_modulates_token_by_token_is_refused():
    from helpers.models import tiny_qwen

    with pytest.raises(ValueError, match="zero_cond_t"):
        parallel.enable(flexclear.transform(tiny_qwen(zero_cond_t=True), r=3, backend="sdpa"))


def test_disabling_what_is_not_enabled_changes_nothing(model):
    hooks = dict(model._forward_pre_hooks)
    assert parallel.disable(model) is model
    assert dict(model._forward_pre_hooks) == hooks
    assert copy.deepcopy(model) is not model


def reference(query, key, value, scale, keep=None):
    scores = query.double() @ key.double().mT * scale
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], -math.inf)
    return scores.softmax(-1) @ value.double(), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_dim", [16, 24])
@pytest.mark.parametrize("padded", [False, True])
def test_parts_of_a_softmax_merge_into_the_whole(dtype, value_dim, padded):
    query, key = torch.randn(2, 3, 7, 16, dtype=dtype), torch.randn(2, 3, 50, 16, dtype=dtype) * 9
    value = torch.randn(2, 3, 50, value_dim, dtype=dtype)
    keep = torch.rand(2, 50) < 0.5 if padded else None
    expected, expected_lse = reference(query, key, value, 0.25, keep)
    cuts = [(0, 20), (20, 20), (20, 50)]
    parts = [
        partial_attention(query, key[:, :, a:b], value[:, :, a:b], 0.25, None if keep is None else keep[:, a:b])
        for a, b in cuts
    ]
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    out, lse = merged(parts)
    assert (out - expected).abs().max() <= bound
    assert (lse - expected_lse).abs().max() <= 1e-3
    top = torch.stack([lse for _, lse in parts]).amax(0)
    total = sum(weighted(*part, top) for part in parts)
    assert (total[..., :-1] / total[..., -1:] - expected).abs().max() <= bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_of_a_gpu_tell_the_same_log_sum_exp(dtype):
    query, key, value = (torch.randn(2, 3, n, 64, dtype=dtype, device="cuda") for n in (77, 300, 300))
    out, lse = partial_attention(query, key, value)
    expected, expected_lse = reference(query, key, value, 1 / 8)
    assert (out - expected).abs().max() <= (1e-4 if dtype == torch.float32 else 2e-2)
    assert (lse - expected_lse).abs().max() <= 1e-2


def test_facts_differ_with_seeds_and_weights_and_not_with_rounding():
    tensor = torch.randn(3, 1000)
    other = torch.randn(3, 1000)
    said = [{"a": sums(tensor)}, {"a": sums(tensor + 1e-5 * other)}, {"a": sums(other)}]
    assert differences(said[:2], (0, 1)) == ""
    assert differences(said, (4, 5, 6)) == "rank 6 differs from rank 4 in a"
    assert digest(tensor) != digest(other)
    assert digest(tensor) == digest(tensor.clone())
    assert digest(torch.empty(3, device="meta")) == ""
    assert "radius: 4 against 3" in differences([{"radius": 3}, {"radius": 4}], (0, 1))


OTHERS = {
    "windows": {"r": 4},
    "backend": {"backend": "flex"},
    "order": {"order": "raster"},
    "block_size": {"block_size": 64},
    "kernel_options": {"kernel_options": {"num_stages": 2}},
    "exact_position_ids": {"exact_position_ids": False},
    "formula": {"attention": "sigmoid"},
    "ntk_factor": {"ntk_factor": 10.0},
    "proportional_attention": {"proportional_attention": True},
}
"""By setting, what differs from ``transform(model, r=3, backend="sdpa")``."""


@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_that_ranks_do_not_share_is_named(name):
    facts = []
    for changed in ({}, OTHERS[name]):
        asked = {"backend": "sdpa", **({} if "attention" in changed else {"r": 3}), **changed}
        settings = entry_hook_of(flexclear.transform(tiny_flux(), **asked)).settings
        facts.append(facts_of_model(torch.nn.Module(), settings, Options()))
    said = differences(facts, (0, 1))
    assert "rank 1 differs from rank 0" in said
    assert ("the windows (r)" if name == "windows" else f"{name}=") in said


def test_every_setting_of_transform_is_compared():
    settings = entry_hook_of(flexclear.transform(tiny_flux(), r=3)).settings
    own = {"dense_steps", "ntk_floor", "training_tokens"}  # of pipelines and of override
    assert set(settings.options()) == set(OTHERS) | own
