"""On a GPU: every family's kernels, called one by one and from compiled blocks, equal to the dense mask on the CPU."""

from __future__ import annotations

import pytest
import torch

import flexclear

from .oracle import RADIUS, differ, expected, gradients, run, twins
from .shapes import Shape
from .table import cases, every
from .test_compile import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
    pytest.mark.filterwarnings("ignore:flexclear. a reference image"),
]

PLACE = torch.device("cuda")

NEAR = 2.0**-14
"""Of the largest output: eight times ``oracle.TOLERANCE``, since the two sides run on different processors, whose exponentials,
normalizations and products round differently in every operation. A radius of one more token makes 2^-8 or more."""


@pytest.fixture(autouse=True)
def exact():
    """Products of whole float32 values on the GPU, convolutions included."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])
    torch.compiler.reset()


def there(given):
    """Tensors of a call on the GPU."""
    if isinstance(given, torch.Tensor):
        return given.to(PLACE)
    if isinstance(given, dict):
        return {name: there(value) for name, value in given.items()}
    if isinstance(given, (list, tuple)):
        return type(given)(there(value) for value in given)
    return given


def check(row, shape, optimized=False, down_factor=None):
    model, plain = twins(row, head_64=True, one_block=True)
    pooled = {} if down_factor is None else {"down_factor": down_factor}
    flexclear.transform(model.to(PLACE), r=RADIUS, **row.frames, backend="flex", **pooled)
    if optimized:
        flexclear.optimize(model, dynamic=True)
    right = expected(row, plain, shape, **pooled)
    for _ in range(2):  # a second call is served from what the first has kept
        mine = run(model, there(row.call(shape))).cpu()
        assert mine.shape == right.shape
        assert differ(mine, right) <= NEAR, (str(shape), differ(mine, right))


@cases(kernels)
def test_every_family_attends_on_the_gpu_as_under_the_dense_mask(row, shape):
    check(row, shape)


@every()
def test_so_do_its_compiled_blocks(row):
    check(row, Shape(9, 13, 20, 2), optimized=True)


@every("pooled keys")
def test_so_do_pooled_keys(row):
    check(row, Shape(9, 13, batch=2), down_factor=4)


@every()
def test_a_family_on_the_gpu_trains_with_the_gradients_of_the_cpu(row):
    model, plain = twins(row, head_64=True, one_block=True)
    shape = Shape(9, 13, 20, 2)
    found = []
    for each, backend, move in ((model.to(PLACE), "flex", there), (plain, "sdpa", dict)):
        flexclear.transform(each, r=RADIUS, **row.frames, backend=backend)
        found.append([None if one is None else one.cpu() for one in gradients(each, move(row.call(shape)))])
    largest = max(gradient.abs().max() for gradient in found[1] if gradient is not None)
    for mine, right in zip(*found, strict=True):
        assert (mine is None) == (right is None)
        # Eight times as much again: a gradient passes every operation twice and sums over all tokens.
        assert mine is None or (mine - right).abs().max() <= 8 * NEAR * largest
