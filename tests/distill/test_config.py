"""Settings in YAML, the memory estimate, and the three commands end to end on the embedded model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import flexclear
from flexclear import cli
from flexclear.distill import DistillConfig, OptimizerConfig, read_config
from flexclear.distill.config import as_mapping, from_mapping
from flexclear.distill.estimate import estimate, estimate_model
from flexclear.distill.students import trained_parameters
from flexclear.images.files import read_settings

from helpers.models import tiny_flux

PROMPTS = "a red apple on a blue background\na rocket on a yellow background\nan octopus on a green background\n"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return end.value.code or 0, captured.out, captured.err


def test_a_file_of_settings_is_read_with_paths_beside_it(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "model: embedded\ndata: cache\noutput: runs/a\nr: 4\n"
        "optimizer: {name: adamw, learning_rate: 1e-4, betas: [0.9, 0.95]}\n"
        "losses: {attention: 0}\nema: 0.99\nsheets: {every: 5, prompts: [a rocket]}\n"
    )
    config = read_config(file)
    assert (config.output, config.data) == (tmp_path / "runs/a", tmp_path / "cache")
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.betas == (0.9, 0.95)
    assert (config.losses.flow, config.losses.attention) == (1.0, 0.0)
    assert config.sheets.prompts == ("a rocket",)
    assert from_mapping(json.loads(json.dumps(as_mapping(config)))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must hold settings"),
        ("a: [", "is not valid YAML"),
        ("model: embedded\ndata: x", "output is missing"),
        ("model: embedded\noutput: x", "data is missing"),
        ("data: d\noutput: x", "model is missing"),
        ("model: embedded\ndata: d\noutput: x\nstep: 5", r"unknown setting step \(meant steps\?\)"),
        ("model: embedded\ndata: d\noutput: x\nlosses: {flwo: 1}", r"losses.flwo \(meant flow\?\)"),
        ("model: embedded\ndata: d\noutput: x\nlosses: 3", "losses must hold settings"),
        ("model: embedded\ndata: d\noutput: x\nlosses: {flow: 0, prediction: 0, attention: 0}", "all three weights"),
        ("model: embedded\ndata: d\noutput: x\nlosses: {flow: -1}", "losses.flow must be"),
        ("model: embedded\ndata: d\noutput: x\nsteps: many", "steps must be int, got 'many'"),
        ("model: embedded\ndata: d\noutput: x\nsteps: true", "steps must be int"),
        ("model: embedded\ndata: d\noutput: x\noptimizer: {name: sgd}", "optimizer.name must be one of"),
        ("model: embedded\ndata: d\noutput: x\nsheets: {every: 3}", "sheets.prompts"),
        ("model: embedded\ndata: d\noutput: x\nema: 1.5", "ema must be"),
        ("model: embedded\ndata: d\noutput: x\nsteps: 5\n'steps': 6", "'steps' is given twice, in lines 4 and 5"),
        ("{model: embedded, losses: {flow: 1, flow: 1}}", "'flow' is given twice, in lines 1 and 1"),
        ("a: " + "[" * 700, "nested too deeply"),
        ("model: embedded\ndata: d\noutput: x\nsteps: 1" + "0" * 5000, "4300 digits"),
        (
            "model: embedded\ndata: d\noutput: x\nsteps: 0x1" + "0" * 5000,
            "steps must fit into 64 bits, got a number of",
        ),
        ("model: embedded\ndata: d\noutput: x\nsteps: 1" + "0" * 30, "steps must fit into 64 bits"),
        ("model: embedded\ndata: d\noutput: x\nguidance: 1" + "0" * 400, "guidance is too large"),
        ("model: embedded\ndata: d\noutput: x\nguidance: .nan", "guidance must be finite, got nan"),
        ("model: embedded\ndata: d\noutput: x\nguidance: 1e999", "guidance must be finite, got inf"),
        ("model: embedded\ndata: d\noutput: x\ntimesteps: {mean: .nan}", "timesteps.mean must be finite"),
        ("model: embedded\ndata: d\noutput: x\ntimesteps: {shift: .inf}", "timesteps.shift must be finite"),
        ("model: embedded\ndata: d\noutput: x\noptimizer: {betas: [.9, .nan]}", r"optimizer.betas\[1\] must be finite"),
        ("model: embedded\ndata: d\noutput: x\noptimizer: {epsilon: -1}", "optimizer.epsilon must be"),
        ("model: embedded\ndata: d\noutput: x\nsheets: {width: 0}", "sheets.width must be"),
        (
            'model: embedded\ndata: d\noutput: x\nsheets: {prompts: ["\\ud800"]}',
            r"sheets.prompts\[0\] is not valid Unicode",
        ),
        (
            f"output: x\nlosses: [&a0 [x, x], {', '.join(f'&a{i + 1} [*a{i}, *a{i}]' for i in range(40))}]",
            "losses must hold",
        ),
        ("model: embedded\ndata: d\noutput: x\ninitial_weights: gone.safetensors", "no file"),
    ],
)
def test_a_mistake_in_the_settings_is_named(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message) as error:
        read_config(file)
    assert str(file) in str(error.value)


def test_a_missing_or_mismatched_cache_is_one_line_before_anything_runs(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("model: embedded\ndata: gone\noutput: run\n")
    status, _, error = run(capsys, "distill", file)
    assert status == 2
    assert "not a finished cache" in error
    file.write_text("model: nowhere/at/all\ndata: gone\noutput: run\n")
    assert run(capsys, "distill", file)[0] == 2
    assert not (tmp_path / "run").exists()


def test_the_estimate_counts_what_a_run_has(tmp_path):
    model = tiny_flux(num_single_layers=3)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    config = DistillConfig(output=tmp_path, mixed_precision="no", ema=0.9)
    found = estimate_model(model, config, (128, 128), 16)
    assert (found.parameters, found.trained) == (total, trained)
    assert found.exact["frozen weights"] == (total - trained) * 4
    assert found.exact["optimizer states"] == trained * 16
    adamw = DistillConfig(output=tmp_path, optimizer=OptimizerConfig("adamw"))
    assert estimate_model(model, adamw, (128, 128), 16).exact["optimizer states"] == trained * 8
    assert found.exact["average"] == trained * 4
    assert found.exact["the teacher's projections"] == trained * 4
    checkpointed = DistillConfig(output=tmp_path, mixed_precision="no", gradient_checkpointing=True)
    assert estimate_model(model, checkpointed, (128, 128), 16).total < found.total
    assert "approximate" in str(estimate(DistillConfig(output=tmp_path, model="embedded")))


def test_an_estimate_of_flux_1_dev_is_what_its_configuration_says(tmp_path):
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    config = DistillConfig(output=tmp_path, mixed_precision="bf16", gradient_checkpointing=True)
    found = estimate_model(model, config, (1024, 1024), 512)
    assert found.parameters == pytest.approx(11.9e9, rel=0.01)
    assert found.trained == 57 * 3 * (3072**2 + 3072) + 19 * (3072**2 + 3072)
    assert 40 < found.total / 2**30 < 80


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A dozen images by the embedded pipeline and their cache, made by the commands."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "prompts.txt").write_text(PROMPTS)
    generate = ["data", "generate", "embedded", "--prompts", folder / "prompts.txt", "--count", 12, "--steps", 6]
    generate += ["--text-len", 32, "--size", "64x64", "--device", "cpu", "--out", folder / "pictures"]
    for shard in ("0/2", "1/2"):
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in (*generate, "--shard", shard)])
        assert not end.value.code
    with pytest.raises(SystemExit) as end:
        cli.main(
            [str(a) for a in ("data", "cache", folder / "pictures", "--model", "embedded", "--out", folder / "cache")]
            + ["--text-len", "32", "--device", "cpu"]
        )
    assert not end.value.code
    return folder, generate


def test_generated_pictures_are_kept_and_the_missing_ones_drawn_again(cached, capsys):
    folder, generate = cached
    files = sorted(place.name for place in (folder / "pictures").iterdir())
    pictures = [f"{number:06d}{suffix}" for number in range(12) for suffix in (".png", ".txt")]
    assert files == [*pictures, "settings.json"]
    gone, kept = folder / "pictures" / "000005.png", folder / "pictures" / "000004.png"
    before, stamp = gone.read_bytes(), kept.stat().st_mtime_ns
    gone.unlink()
    status, output, _ = run(capsys, *generate)
    assert status == 0
    assert "1 images drawn, 11 were there already" in output
    assert gone.read_bytes() == before
    assert kept.stat().st_mtime_ns == stamp
    assert gone.with_suffix(".txt").read_text() == "an octopus on a green background\n"
    assert read_settings(gone)["settings"]["seed"] == 5
    status, _, error = run(capsys, *generate, "--seed", 3)
    assert status == 2
    assert "Name another folder" in error
    assert run(capsys, *generate, "--shard", "2/2")[0] == 2


def test_pictures_of_other_settings_are_never_mixed_and_a_deleted_caption_comes_back(cached, capsys):
    folder, generate = cached
    pictures = folder / "pictures"
    before = {place.name: place.read_bytes() for place in pictures.iterdir()}
    caption = pictures / "000007.txt"
    for option, value, told in (
        ("--steps", 7, "steps was 6, is 7"),
        ("--size", "64x72", r"sizes was [[64, 64]], is [[64, 72]]"),
        ("--guidance", 2, "guidance was null, is 2.0"),
        ("--dtype", "bfloat16", 'dtype was "float32", is "bfloat16"'),
    ):
        caption.unlink(missing_ok=True)
        status, _, error = run(capsys, *generate, option, value, "--count", 13)
        assert status == 2
        assert "holds images with other settings" in error
        assert told in error
        assert not caption.exists()
    status, output, _ = run(capsys, *generate)
    assert status == 0
    assert "0 images drawn, 12 were there already" in output
    assert {place.name: place.read_bytes() for place in pictures.iterdir()} == before
    settings = pictures / "settings.json"
    for damaged in (b"{", b'{"steps": 6, "steps": 6}', b"[1]", b"\xff"):
        settings.write_bytes(damaged)
        status, _, error = run(capsys, *generate)
        assert status == 2
        assert f"{settings} is " in error
    settings.unlink()
    status, _, error = run(capsys, *generate)
    assert status == 2
    assert "holds images, but no settings.json" in error
    settings.write_bytes(before["settings.json"])


def write_config(folder, name, **changed):
    settings = {
        "model": "embedded",
        "data": str(folder / "cache"),
        "output": name,
        "r": 4,
        "backend": "sdpa",
        "device": "cpu",
        "batch_size": 4,
        "optimizer": {"name": "adamw", "learning_rate": 3e-4},
        "checkpoints": {"every": 5},
        "held_out": {"count": 4, "batch_size": 4},
        "steps": 25,
        **changed,
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    return file


def test_a_short_training_lowers_the_held_out_loss_of_the_embedded_model(cached, capsys):
    folder, _ = cached
    sheets = {"every": 25, "prompts": ["a rocket on a yellow background"], "steps": 2, "height": 64, "width": 64}
    status, output, error = run(capsys, "distill", write_config(folder, "short", r=2, sheets=sheets))
    assert status == 0, error
    held_out = [json.loads(line) for line in (folder / "short" / "held_out.jsonl").read_text().splitlines()]
    assert [record["step"] for record in held_out] == [0, 25]
    assert held_out[1]["loss"] < held_out[0]["loss"]
    assert held_out[1]["prediction"] < 0.9 * held_out[0]["prediction"]
    assert str(folder / "short" / "weights.safetensors") in output
    assert Image.open(folder / "short" / "sheets" / "step_00000025.png").size == (64, 64)
    pipe = flexclear.embedded.pipeline()
    flexclear.transform(pipe, r=2, backend="sdpa")
    assert flexclear.load_weights(pipe, folder / "short" / "weights.safetensors").radius == 2


def test_a_killed_process_loses_at_most_the_steps_since_the_last_checkpoint(cached, capsys):
    folder, _ = cached
    file = write_config(folder, "killed", steps=400, checkpoints={"every": 2})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "flexclear", "distill", str(file)], env=environment, stderr=subprocess.DEVNULL
    )
    losses = folder / "killed" / "losses.jsonl"
    deadline = time.monotonic() + 120
    while (len(losses.read_text().splitlines()) if losses.is_file() else 0) < 5 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [json.loads(line) for line in losses.read_text().splitlines()]
    file = write_config(folder, "killed", steps=before[-1]["step"] + 1, checkpoints={"every": 2})
    status, _, error = run(capsys, "distill", file)
    assert status == 0, error
    start = int(error.split("resuming from step ")[1].split()[0])
    assert before[-1]["step"] - start <= 2
    after = [json.loads(line) for line in losses.read_text().splitlines()]
    assert [record["step"] for record in after] == list(range(1, before[-1]["step"] + 2))
    assert [r["loss"] for r in after[: len(before)]] == pytest.approx([r["loss"] for r in before], rel=1e-5)


@pytest.mark.kept
def test_two_processes_train_what_one_does_with_twice_the_accumulation(cached, capsys):
    folder, _ = cached
    common = {"batch_size": 2, "steps": 2, "held_out": {"count": 2}}
    two = write_config(folder, "two", gradient_accumulation=1, **common)
    launcher = ["torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "flexclear", "distill", str(two)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("weights: ") == 1
    assert run(capsys, "distill", write_config(folder, "one", gradient_accumulation=2, **common))[0] == 0
    records = {
        name: [json.loads(line) for line in (folder / name / "losses.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    }
    for own, theirs in zip(records["one"], records["two"], strict=True):
        for key in ("loss", "flow", "prediction", "attention", "gradient_norm"):
            assert own[key] == pytest.approx(theirs[key], rel=1e-4)
    one, two = (load_file(folder / name / "weights.safetensors") for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
