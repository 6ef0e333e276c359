"""What only a GPU can show: compiled forward, log-sum-exp and gradients on CUDA, and a whole model there."""

from __future__ import annotations

import copy

import pytest
import torch

import flexclear
from flexclear.compile.kernels import Kernel
from flexclear.masks import Disc, Downsampled, Layout, dense_mask
from flexclear.runtime.plan import get_plan, plans
from flexclear.testing import assert_matches_dense

from helpers.models import flux_call, tiny_flux

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


LAYOUTS = [Layout(64, 64), Layout(48, 85, 256), Layout(91, 91, 333, text_first=False), Layout(17, 9, 5)]
WINDOWS = [Disc(8), Downsampled(Disc(8), 4)]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_output_log_sum_exp_and_gradients_equal_masked_sdpa(layout, window, head_dim):
    assert_matches_dense(layout, window, dtype=torch.bfloat16, head_dim=head_dim, device="cuda")


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.name)
def test_so_they_do_in_float32(window):
    assert_matches_dense(Layout(48, 85, 256), window, head_dim=64, device="cuda")


def test_a_transformed_model_trains_through_compiled_attention_with_the_gradients_of_the_dense_mask():
    model = tiny_flux(attention_head_dim=32, axes_dims_rope=(8, 12, 12)).cuda()
    original = copy.deepcopy(model)
    call = {name: tensor.cuda() for name, tensor in flux_call(24, 20, 16).items()}
    mask = dense_mask(Layout(24, 20, 16, order="raster"), Disc(5), device="cuda")
    flexclear.transform(model, r=5, backend="flex")
    ours = model(**call).sample
    theirs = original(**call, joint_attention_kwargs={"attention_mask": mask}).sample
    assert (ours - theirs).abs().max() <= 1e-3
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), original.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4, rtol=1e-2), name


def test_a_plan_on_the_gpu_keeps_nothing_on_the_cpu():
    plans.clear()
    plan = get_plan(Layout(32, 32), Disc(8), "flex", Kernel((128, 64)), torch.device("cuda", 0), backward=True)
    assert {tensor.device.type for tensor in plan.tensors()} == {"cuda"}
