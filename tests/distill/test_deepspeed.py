"""Distillation by DeepSpeed over two processes, with its own configuration files, against one process."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from flexclear.distill.config import LoraConfig

from helpers import distill_cases
from helpers.parallel_group import Group

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the package deepspeed is not installed"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="its processes are CPUs, DeepSpeed would take the CUDA device"
    ),
]

CLIPPED = {"max_grad_norm": 0.05}  # half of what the gradients have
BFLOAT16 = 2**-7  # what its last bit is worth
OPEN = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
STAGES = {
    2: {"stage": 2},
    3: {"stage": 3, "stage3_param_persistence_threshold": 0},  # of small parameters too, each process has a part only
}


@pytest.fixture(scope="module")
def two():
    group = Group(2)
    yield group
    group.close()


@pytest.fixture
def file(tmp_path):
    """Writes a configuration file of DeepSpeed."""

    def write(stage, **changed):
        path = tmp_path / f"zero{stage}.json"
        path.write_text(json.dumps({"zero_optimization": STAGES[stage], **OPEN, **changed}))
        return path

    return write


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Runs of one process, whose accumulated batches are those of two."""
    folder = tmp_path_factory.mktemp("one")
    return {
        train: distill_cases.train(
            folder / train, gradient_accumulation=2, train=train, lora=LoraConfig(4, 8), **CLIPPED
        )
        for train in ("projections", "lora")
    }


@pytest.mark.kept("2-projections")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("stage", "train"), [(2, "projections"), (2, "lora"), (3, "projections"), (3, "lora")])
def test_deepspeed_trains_what_one_process_trains_and_goes_on(two, one, file, tmp_path, stage, train):
    options = {
        "train": train,
        "lora": LoraConfig(4, 8),
        "teacher": "copy" if stage == 3 else "shared",
        **CLIPPED,
    }
    output = tmp_path / "run"
    first = two.results("train_by_deepspeed", output, file(stage), steps=2, **options)
    second = two.results("train_by_deepspeed", output, file(stage), **options)
    expected = one[train]
    for begun, ended in zip(first, second, strict=True):
        assert begun["kind"] == ended["kind"] == "DEEPSPEED"
        records = begun["losses"] + ended["losses"]
        for ours, theirs in zip(records, expected["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert ended["held_out"][-1] == pytest.approx(expected["held_out"][-1], rel=1e-5)
    ours, theirs = load_file(output / "weights.safetensors"), load_file(expected["file"])
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= 1e-6, name


def near_in_bfloat16(name, value):
    """The prediction loss is the mean square d^2 of a difference of outputs of about 1, which bfloat16 rounds by 2^-8 of
    themselves, however small the difference is: an error of up to 2 d 2^-8."""
    return pytest.approx(value, rel=BFLOAT16, abs=2 * value**0.5 * 2**-8 if name == "prediction" else 0)


@pytest.mark.kept
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("any_precision")
def test_deepspeed_in_bfloat16_trains_what_one_process_trains(two, file, tmp_path):
    options = {"mixed_precision": "bf16", "dtype": torch.bfloat16}
    expected = distill_cases.train(tmp_path / "one", gradient_accumulation=2, **options)
    for stage, teacher in ((2, "shared"), (3, "copy")):
        own = file(stage, bf16={"enabled": "auto"})
        output = tmp_path / str(stage)
        for found in two.results("train_by_deepspeed", output, own, teacher=teacher, **options):
            for ours, theirs in zip(found["losses"], expected["losses"], strict=True):
                assert ours == {name: near_in_bfloat16(name, value) for name, value in theirs.items()}
        assert {tensor.dtype for tensor in load_file(output / "weights.safetensors").values()} == {torch.bfloat16}


@pytest.mark.kept
@pytest.mark.filterwarnings("ignore")
def test_sharded_weights_draw_sheets(two, file, tmp_path):
    expected = distill_cases.draw_sheets(tmp_path / "one")["sheet"]
    zero = two.results("draw_sheets_by_deepspeed", tmp_path / "zero", file(3))
    for found in [*zero, *two.results("draw_sheets_sharded", tmp_path / "fsdp")]:
        assert found["steps"] == 1
        assert abs(found["sheet"] - expected).max() <= 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changed", "own", "message"),
    [
        ({"teacher": "shared"}, {}, "teacher: shared needs whole weights on every device"),
        (
            {"mixed_precision": "bf16"},
            {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}},
            "DeepSpeed in bf16 casts the whole model, while the teacher stays in torch.float32: load the model in torch.bfloat16",
        ),
        ({"teacher": "copy", "ema": 0.9}, {}, "ema needs whole weights on every device"),
        (
            {"teacher": "copy"},
            {"train_micro_batch_size_per_gpu": 7},
            "has train_micro_batch_size_per_gpu: 7, the settings have batch_size: 2; set it to",
        ),
        (
            {"teacher": "copy"},
            {"gradient_clipping": 0.5},
            "has gradient_clipping: 0.5, the settings have max_grad_norm: 1.0",
        ),
        (
            {"teacher": "copy", "gradient_accumulation": 3},
            {"gradient_accumulation_steps": 2},
            "has gradient_accumulation_steps: 2, the settings have gradient_accumulation: 3",
        ),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_deepspeed_cannot_do_or_would_do_otherwise_is_refused(two, file, tmp_path, changed, own, message):
    for kind, text in two.errors("train_by_deepspeed", tmp_path / "run", file(3, **own), **changed):
        assert kind == "ValueError"
        assert message in text
    assert not (tmp_path / "run").exists()
