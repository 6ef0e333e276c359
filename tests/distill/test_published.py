"""The defaults are the published settings: the method, section 5, and the released script's arguments, written out here."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from flexclear.distill import DistillConfig, OptimizerConfig
from flexclear.distill.config import from_mapping
from flexclear.distill.optimizers import make_optimizer

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "distillation.md"

PUBLISHED = {
    "radius": 16,
    "train": "projections",
    "initial_weights": None,
    "steps": 10_000,
    "batch_size": 2,
    "max_grad_norm": 1.0,
    "guidance": 3.5,
    "ema": None,
    "losses.flow": 1.0,
    "losses.prediction": 0.5,
    "losses.attention": 0.5,
    "losses.attention_every": 4,
    "optimizer.name": "prodigy",
    "optimizer.rate": 1.0,
    "optimizer.betas": (0.9, 0.999),
    "optimizer.weight_decay": 1e-4,
    "optimizer.epsilon": 1e-8,
    "optimizer.use_bias_correction": True,
    "optimizer.safeguard_warmup": True,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "timesteps.sampling": "uniform",
    "timesteps.shift": 1.0,
}
OF_THE_MACHINE = {"gradient_accumulation": 4, "mixed_precision": "bf16", "gradient_checkpointing": True}
"""Published for four GPUs of 80 GB, under accelerate's configuration for ZeRO stage 2; left to the machine by default."""


def setting(config, name):
    return functools.reduce(getattr, name.split("."), config)


def test_the_defaults_are_the_published_settings():
    config = DistillConfig(output=Path("run"))
    config.check()
    assert {name: setting(config, name) for name in PUBLISHED} == PUBLISHED
    assert all(name in DistillConfig.__doc__ for name in OF_THE_MACHINE)


def test_the_guide_s_configuration_is_the_published_run_on_four_gpus():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    config = from_mapping(yaml.safe_load(block), Path())
    config.check()
    wanted = PUBLISHED | OF_THE_MACHINE
    assert {name: setting(config, name) for name in wanted} == wanted
    assert config.batch_size * config.gradient_accumulation * 4 == 32


@pytest.fixture
def parameter():
    return torch.nn.Parameter(torch.ones(3))


def test_prodigy_is_made_with_the_released_arguments(parameter, capsys):
    pytest.importorskip("prodigyopt")
    optimizer = make_optimizer(OptimizerConfig(), [parameter])
    (group,) = optimizer.param_groups
    released = {
        "lr": 1.0,
        "betas": (0.9, 0.999),
        "beta3": None,
        "weight_decay": 1e-4,
        "eps": 1e-8,
        "decouple": True,
        "use_bias_correction": True,
        "safeguard_warmup": True,
    }
    assert type(optimizer).__name__ == "Prodigy"
    assert {name: group[name] for name in released} == released
    assert capsys.readouterr().out == "", "the package would say that its decay is decoupled"
    changed = OptimizerConfig(use_bias_correction=False, safeguard_warmup=False, weight_decay=0.01)
    (group,) = make_optimizer(changed, [parameter]).param_groups
    assert (group["use_bias_correction"], group["safeguard_warmup"], group["weight_decay"]) == (False, False, 0.01)


def test_prodigy_s_step_size_is_not_that_of_its_package_s_defaults():
    prodigyopt = pytest.importorskip("prodigyopt")

    def step_size(make):
        torch.manual_seed(0)
        target = torch.randn(64)
        parameter = torch.nn.Parameter(torch.zeros(64))
        optimizer = make([parameter])
        for _ in range(30):
            optimizer.zero_grad()
            (parameter - target + 0.3 * torch.randn(64)).square().mean().backward()
            optimizer.step()
        return float(optimizer.param_groups[0]["d"])

    ours = step_size(lambda parameters: make_optimizer(OptimizerConfig(), parameters))
    assert ours == step_size(
        lambda parameters: prodigyopt.Prodigy(
            parameters, lr=1.0, weight_decay=1e-4, use_bias_correction=True, safeguard_warmup=True
        )
    )
    defaults = step_size(lambda parameters: prodigyopt.Prodigy(parameters, weight_decay=0.01))
    assert abs(math.log10(ours / defaults)) > 1


def test_adamw_is_made_with_the_released_arguments(parameter):
    optimizer = make_optimizer(OptimizerConfig("adamw"), [parameter])
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    released = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 1e-4, "eps": 1e-8}
    assert {name: group[name] for name in released} == released


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 1e-4}, r"multiplies it by this, usually 1; 0.0001 would hardly train. name: adamw takes"),
        (
            {"name": "adamw", "use_bias_correction": False},
            "optimizer.use_bias_correction is for name: prodigy, not for adamw",
        ),
        ({"name": "adamw", "safeguard_warmup": False}, "optimizer.safeguard_warmup is for name: prodigy"),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changed).check()
