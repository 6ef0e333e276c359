"""From the second step on a window reads nothing that is on the device, in any mode, compiled or not, and breaks no graph."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import flexclear
from flexclear.compile import why_not_compiled
from flexclear.runtime import attention, grid, hooks

from helpers.parallel_families import build
from helpers.reads import Reads, made_here, reads_of

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_a_device(monkeypatch):
    """Tensors whose memory the host cannot look into."""
    monkeypatch.setattr(grid, "_is_in_host_memory", lambda tensor: False)


@pytest.fixture
def kernels_unseen(monkeypatch):
    """FlexAttention's kernel is one call: what is in it is not counted, nor does it matter to the rest what comes out."""
    monkeypatch.setattr(attention, "compiled_flex_attention", lambda query, *others: query.clone())


def backend_of(mode):
    """FlexAttention, which the graphs of a CPU have in inference alone."""
    return "sdpa" if why_not_compiled(CPU, needs_grad=mode == "grad") else "flex"


@pytest.mark.usefixtures("kernels_unseen")
@pytest.mark.parametrize("kind", ["flux", "qwen", "sd3"])
@pytest.mark.parametrize("mode", MODES)
def test_later_steps_read_nothing(mode, kind):
    with MODES[mode]():
        model, call = build(kind)
        call = made_here(call)
        own = reads_of(model, call)
        assert own == 0 or kind == "qwen"
        flexclear.transform(model, r=3, backend=backend_of(mode))
        model(**call)
        assert [reads_of(model, call) for _ in range(3)] == [own] * 3


@pytest.fixture
def reads_of_hooks(monkeypatch):
    """How much the hooks at the model's entry and exit read, by call. Dynamo compiles nothing under a mode that counts."""
    counts = []

    def counted(hook):
        called = hook.__call__

        @torch.compiler.disable
        def call(*args):
            with Reads() as reads:
                found = called(*args)
            counts.append(reads.count)
            return found

        monkeypatch.setattr(hook, "__call__", call)

    counted(hooks.EntryHook), counted(hooks.ExitHook)
    return counts


@pytest.mark.parametrize(
    ("region", "kind"), [("blocks", "flux"), ("blocks", "qwen"), ("blocks", "sd3"), ("whole", "flux")]
)
@pytest.mark.parametrize("mode", MODES)
def test_later_compiled_steps_read_nothing_and_no_graph_breaks(mode, region, kind, reads_of_hooks):
    torch.compiler.reset()
    counters.clear()
    with MODES[mode]():
        model, call = build(kind)
        call = made_here(call)
        flexclear.transform(model, r=3, backend="sdpa")
        # Graphs as they are: what Dynamo cannot put into one is a break, reading a number for Python included.
        flexclear.optimize(model, compile=region, backend="eager", progress=False)
        model(**call)
        made = counters["stats"]["unique_graphs"]
        reads_of_hooks.clear()
        for _ in range(3):
            model(**call)
    assert reads_of_hooks == [0] * 6
    assert 0 < made == counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    torch.compiler.reset()
