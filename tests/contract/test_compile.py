"""Compiled: blocks by Dynamo in as few graphs as today, and FlexAttention by Inductor, equal to the dense mask."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

import flexclear
from flexclear.compile import report, why_not_compiled

from .oracle import RADIUS, TOLERANCE, expected, gradients, run, same, twins, under
from .shapes import REFERENCES, Shape
from .table import ROWS, cases, every

pytestmark = pytest.mark.filterwarnings("ignore:flexclear. a reference image")
CPU = torch.device("cpu")


@pytest.fixture
def graphs():
    """Dynamo's caches empty before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# The eager backend runs what Dynamo traced as it is: graphs and guards are the real ones, and no kernel is built.
@pytest.mark.costly(
    "zimage"
)  # tests/compile counts the graphs of all for texts of many lengths, and of sizes in FLUX.1
@every()
@pytest.mark.usefixtures("graphs")
def test_blocks_compile_to_whole_graphs_that_serve_another_size(row):
    model, plain = twins(row, one_block=True)
    flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa")
    flexclear.optimize(model, backend="eager", dynamic=True)
    padding = next(iter(row.paddings), None)
    made = []
    for sizes in ((16, 24, 70), (11, 17, 66)):
        shape = Shape(*sizes, batch=2, padding=padding)
        before = report()
        same(run(model, row.call(shape)), expected(row, plain, shape), str(shape))
        made.append(len(report().since(before).graphs))
    assert made == [row.graphs, 0]


@pytest.mark.costly("chroma")  # whose plan changes its carrier under checkpointing
@every("checkpointing")
@pytest.mark.usefixtures("graphs")
def test_checkpointed_blocks_compile_to_whole_graphs_with_the_gradients_of_the_dense_mask(row):
    model, plain = twins(row, one_block=True)
    padding = next(iter(row.paddings), None)
    shape = Shape(8, 9, 70 if padding else 9, 2, padding=padding)
    call = row.call(shape)
    with under(row, shape):
        theirs = gradients(plain.train(), call)
    flexclear.transform(model.train(), r=RADIUS, **row.frames, backend="sdpa").enable_gradient_checkpointing()
    flexclear.optimize(model, backend="eager")
    largest = max(gradient.abs().max() for gradient in theirs if gradient is not None)
    for mine, right in zip(gradients(model, call), theirs, strict=True):
        assert (mine is None) == (right is None)
        assert mine is None or (mine - right).abs().max() <= TOLERANCE * largest


@pytest.mark.costly("flux")
@pytest.mark.parametrize("row", [row for row in ROWS if row.one_graph], ids=lambda row: row.name)
@pytest.mark.usefixtures("graphs")
def test_the_whole_model_compiles_to_one_graph(row):
    """With an empty dictionary of attention arguments too, as pipelines hand over."""
    model, plain = twins(row)
    shape = Shape(batch=2)
    call = row.call(shape)
    takes = inspect.signature(type(model).forward).parameters
    empty = {name: {} for name in ("joint_attention_kwargs", "attention_kwargs") if name in takes}
    flexclear.transform(model, r=RADIUS, **row.frames, backend="sdpa").compile(fullgraph=True, backend="eager")
    for given in (call, {**call, **empty}):
        same(run(model, given), expected(row, plain, shape, call))


def kernels(row):
    """Plain attention, with references where there are any, and each kind of padded text."""
    plain = REFERENCES[0] if "references" in row.abilities else Shape(9, 13, 20, 2)
    return [plain, *(row.padded(kind, references=plain.references) for kind in row.paddings)]


compiles = pytest.mark.skipif(why_not_compiled(CPU) is not None, reason=str(why_not_compiled(CPU)))


def check_kernels(row, shape, **config):
    model, plain = twins(row, head_64=True, **config)
    flexclear.transform(model, r=RADIUS, **row.frames, backend="flex")
    for each in (shape, dataclasses.replace(shape, height=16, width=11, references=())):
        same(run(model, row.call(each)), expected(row, plain, each), str(each))


# One process runs this file, so that families share kernels: one of plain attention, one where text is padded, one where a
# mask is added.
@pytest.mark.costly("flux", "qwen", "sd3", "krea2")
@pytest.mark.brief("krea2", "text20")  # heads of keys that several of the query share
@compiles
@cases(lambda row: [] if row.joint_block is None else kernels(row))
def test_compiled_flex_attention_equals_the_plain_model_under_the_dense_mask(row, shape):
    check_kernels(row, shape, **row.joint_block)


@pytest.mark.costly  # kernels for the strides of each kind of block: for no family in the suite
@compiles
@cases(kernels)
def test_compiled_flex_attention_of_every_kind_of_block_does_so_too(row, shape):
    check_kernels(row, shape, one_block=True)


@pytest.mark.costly  # tests/test_pooling has it in the suite
@compiles
@every("pooled keys")
def test_compiled_flex_attention_lets_image_queries_alone_see_the_mean_of_each_cell(row):
    model, plain = twins(row, head_64=True, one_block=True)
    flexclear.transform(model, r=RADIUS, **row.frames, backend="flex", down_factor=4)
    shape = Shape(9, 13, batch=2)
    same(run(model, row.call(shape)), expected(row, plain, shape, down_factor=4))
