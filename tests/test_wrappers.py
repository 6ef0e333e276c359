"""Wrappers around a model are refused by every function that is given a model, with the way to what is inside."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import flexclear
from flexclear.runtime.hooks import entry_hook_of

from helpers.interruptions import same, state_of
from helpers.models import tiny_flux


def by_peft(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"]))


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine(nn.Module):
    """DeepSpeed's engine and the like have the model as ``module``."""

    def __init__(self, model):
        super().__init__()
        self.module = model


WRAPPERS = {
    "peft": (by_peft, ".get_base_model()"),
    "ddp": (DistributedDataParallel, ".module"),
    "data parallel": (nn.DataParallel, ".module"),
    "averaged": (torch.optim.swa_utils.AveragedModel, ".module"),
    "engine": (Engine, ".module"),
    "peft in ddp": (lambda model: DistributedDataParallel(by_peft(model)), ".module.get_base_model()"),
    "compiled in ddp": (
        lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
        ".module._orig_mod",
    ),
}
FUNCTIONS = {
    "transform": lambda model, path: flexclear.transform(model, r=2),
    "restore": lambda model, path: flexclear.restore(model),
    "save_weights": lambda model, path: flexclear.save_weights(model, path / "a.safetensors"),
    "load_weights": lambda model, path: flexclear.load_weights(model, path / "a.safetensors"),
    "optimize": lambda model, path: flexclear.optimize(model),
    "explain": lambda model, path: flexclear.explain(model),
    "enable": lambda model, path: flexclear.parallel.enable(model),
    "disable": lambda model, path: flexclear.parallel.disable(model),
}


class Pipe:
    def __init__(self, transformer):
        self.transformer = transformer


@pytest.mark.parametrize(("wrap", "path"), WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_refused_with_the_way_to_it(wrap, path, one_rank, tmp_path):
    model = flexclear.transform(tiny_flux(), r=3, backend="sdpa")
    wrapped = wrap(model)
    before = state_of(model)
    for name, call in FUNCTIONS.items():
        for given, said in ((wrapped, "model"), (Pipe(wrapped), "pipe.transformer")):
            with pytest.raises(TypeError) as caught:
                call(given, tmp_path)
            assert f"the {type(wrapped).__name__} given wraps a FluxTransformer2DModel" in str(caught.value), name
            assert str(caught.value).endswith(f"pass {said}{path}"), name
    assert same(state_of(model), before)
    inside = eval(f"wrapped{path}", {"wrapped": wrapped})
    assert type(inside) is type(model)
    assert entry_hook_of(flexclear.restore(inside)) is None


def test_a_wrapper_around_something_else_is_named_itself():
    with pytest.raises(TypeError, match="Engine is not a model that flexclear can transform"):
        flexclear.transform(Engine(nn.Linear(2, 2)))


def test_a_model_that_is_sharded_in_place_is_no_wrapper(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_flux(num_layers=1, num_single_layers=1)
    mesh = init_device_mesh("cpu", (1,))
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        fully_shard(block.attn, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert type(model).__name__ == "FSDPFluxTransformer2DModel"
    assert entry_hook_of(flexclear.transform(model, r=2)) is not None
