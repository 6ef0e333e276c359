"""The embedded model's ControlNet: its conditions, its training, its folder, and the benchmark that draws with it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import flexclear
from flexclear import embedded
from flexclear.common.metrics import PACKAGES
from flexclear.common.shipped import controlnet_directory
from flexclear.common.stopping import StopFlag
from flexclear.embedded.control import FACTS_NAME, MODES
from flexclear.embedded.controlled import controlled_pipeline, generate_controlled, originals
from flexclear.embedded.evaluation import held_out_requests
from flexclear.embedded.fingerprint import teacher_fingerprint
from flexclear.embedded.font import DEFAULT_FONT_PATH
from flexclear.embedded.reference import read_reference_sheet
from flexclear.embedded.scenes import draw
from flexclear.embedded.students import read_students
from flexclear.embedded.train import corpus
from flexclear.embedded.train.checkpoint import load_checkpoint
from flexclear.embedded.train.controlnet import (
    LARGEST_BYTES,
    build_controlnet,
    control_loss,
    export_controlnet,
    train_controlnet,
)
from flexclear.embedded.train.controlnet_data import ControlBatchMaker, conditioned_set
from flexclear.embedded.train.controlnet_recipe import ControlRecipe
from flexclear.embedded.train.pictures import training_pairs, training_scenes
from flexclear.evaluation.conditions import CONDITIONS, distance_to_condition

sys.path.append(str(Path(__file__).parents[2]))
from bench.quality import controlnet as bench

RECIPE = ControlRecipe(
    steps=4, batch=3, pictures=4, single_layers=1, half_precision=False, compiled=False, save_every=1, seed=3
)
COLOURS = list(corpus.BACKGROUNDS.values())


@pytest.fixture(scope="module")
def bitmaps(vocabulary):
    return read_reference_sheet(embedded.model_directory(), len(vocabulary.emoji))


@pytest.fixture(scope="module")
def scenes():
    pairs = training_pairs(len(corpus.EMOJI_CODE_POINTS), len(COLOURS), corpus.held_out_pairs())
    return training_scenes(pairs, RECIPE.pictures, RECIPE.seed)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "latents.pt"


@pytest.fixture(scope="module")
def data(pipe, scenes, bitmaps, cache):
    return conditioned_set(pipe.vae, scenes, bitmaps, COLOURS, cache, "this one")


@pytest.fixture(scope="module")
def maker(pipe, data):
    names = [item.name for item in corpus.emoji()]
    parts = (pipe.tokenizer, pipe.tokenizer_2, RECIPE.batch, RECIPE.noise_logit, RECIPE.seed)
    return ControlBatchMaker(data, names, list(corpus.BACKGROUNDS), *parts)


@pytest.fixture(scope="module")
def lively(pipe):
    """An untrained ControlNet that has an effect."""
    torch.manual_seed(0)
    model = build_controlnet(pipe.transformer, 1, 2).eval()
    for name, parameter in model.named_parameters():
        if name.startswith("controlnet_"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="module")
def folder(lively, tmp_path_factory):
    """The same as a folder."""
    return export_controlnet(lively, tmp_path_factory.mktemp("export") / "model", {"teacher": teacher_fingerprint()})


def test_a_new_controlnet_is_the_models_first_blocks_and_changes_nothing(pipe, maker):
    model = build_controlnet(pipe.transformer, 1, 2)
    assert model.config.num_mode == len(MODES) == 3
    for stack, count in (("transformer_blocks", 1), ("single_transformer_blocks", 2)):
        ours, theirs = getattr(model, stack), getattr(pipe.transformer, stack)
        assert len(ours) == count
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name])
    batch = maker.make(0)
    swapped = dataclasses.replace(batch, modes=(batch.modes + 1) % 3, conditions=batch.conditions.flip(0))
    with torch.no_grad():
        first, second = (control_loss(pipe, model, each, False).item() for each in (batch, swapped))
    assert first == second


def test_mode_and_condition_matter_to_a_controlnet_that_has_an_effect(pipe, maker, lively):
    batch = maker.make(0)
    variants = [
        batch,
        dataclasses.replace(batch, modes=(batch.modes + 1) % 3),
        dataclasses.replace(batch, conditions=batch.conditions.flip(0)),
    ]
    with torch.no_grad():
        losses = [control_loss(pipe, lively, each, False).item() for each in variants]
    assert abs(losses[0] - losses[1]) > 1e-5
    assert abs(losses[0] - losses[2]) > 1e-5


def test_conditions_are_those_that_pictures_are_measured_by(pipe, data, scenes, bitmaps):
    picture = Image.fromarray(draw(scenes[1], bitmaps, COLOURS))
    config = pipe.vae.config
    for kind, mode in MODES.items():
        pixels = torch.from_numpy(np.array(CONDITIONS[kind](picture))).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = pipe.vae.encode(pixels).latent_dist
        mean = (posterior.mean[0] - config.shift_factor) * config.scaling_factor
        assert (data.means[mode, 1].float() - mean).abs().mean() < 0.02
        assert (data.means[mode, 0].float() - mean).abs().mean() > 0.1
        assert (data.deviations[mode, 1].float() - posterior.std[0] * config.scaling_factor).abs().mean() < 0.02
    kept_out = set(corpus.held_out_pairs())
    assert not kept_out & set(zip(data.emoji.tolist(), data.backgrounds.tolist(), strict=True))


def test_encoded_conditions_are_kept_until_what_decides_them_changes(pipe, data, scenes, bitmaps, cache):
    before = cache.stat().st_mtime_ns
    again = conditioned_set(pipe.vae, scenes, bitmaps, COLOURS, cache, "this one")
    assert cache.stat().st_mtime_ns == before
    assert torch.equal(again.means, data.means)
    other = cache.with_name("other.pt")
    other.write_bytes(cache.read_bytes())
    fewer = conditioned_set(pipe.vae, scenes[:1], bitmaps, COLOURS, other, "another one")
    assert fewer.latents.shape == (1, 8, 32, 32)
    assert load_checkpoint(other)["identity"] == "another one"


def test_the_batch_of_a_step_is_always_the_same_and_holds_every_mode(maker, data):
    batch, again, next_one = maker.make(5), maker.make(5), maker.make(6)
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(batch).items())
    assert not torch.equal(batch.noise, next_one.noise)
    assert sorted(batch.modes.flatten().tolist()) == [0, 1, 2]
    assert ((batch.sigmas > 0) & (batch.sigmas < 1)).all()
    for mode, latents, condition in zip(batch.modes.flatten(), batch.latents, batch.conditions, strict=True):
        row = next(n for n, kept in enumerate(data.latents) if torch.equal(kept.float(), latents))
        away = (condition - data.means[mode, row].float()) / data.deviations[mode, row].float()
        assert 0.9 < away.std() < 1.1


def test_training_can_begin_with_a_trained_controlnet(pipe, maker, tmp_path, folder, lively):
    recipe = dataclasses.replace(RECIPE, steps=1, single_layers=2, matrix_rate=0.0, other_rate=0.0)
    model, _ = train_controlnet(recipe, pipe, maker, tmp_path, "teacher", start=folder)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, lively.state_dict()[name].bfloat16().float(), rtol=0, atol=0)


def test_training_goes_on_where_it_stopped_to_the_bit_and_leaves_the_model_alone(pipe, maker, tmp_path):
    frozen = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    whole, done = train_controlnet(RECIPE, pipe, maker, tmp_path / "whole", "teacher")
    assert done == RECIPE.steps
    calls = iter([False, True])
    _, done = train_controlnet(RECIPE, pipe, maker, tmp_path / "parts", "teacher", stop=lambda: next(calls))
    assert done == 2
    parts, done = train_controlnet(RECIPE, pipe, maker, tmp_path / "parts", "teacher")
    assert done == RECIPE.steps
    start = build_controlnet(pipe.transformer, 1, 1).state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
        assert value.isfinite().all()
    assert whole.controlnet_blocks[0].weight.abs().max() > 1e-4, "the zero outputs never moved"
    assert not torch.equal(whole.state_dict()["x_embedder.weight"], start["x_embedder.weight"])
    assert all(torch.equal(value, frozen[name]) for name, value in pipe.transformer.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "parts" / "controlnet.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]

    for changed, message in (({"seed": 4}, "seed 3 there, 4 here"), ({"steps": 9}, "steps 4 there, 9 here")):
        with pytest.raises(ValueError, match=message):
            train_controlnet(dataclasses.replace(RECIPE, **changed), pipe, maker, tmp_path / "parts", "teacher")
    with pytest.raises(ValueError, match="teacher teacher there, other here"):
        train_controlnet(RECIPE, pipe, maker, tmp_path / "parts", "other")


class OneBatch(ControlBatchMaker):
    """Makes the first batch at every step."""

    def make(self, step):
        return super().make(0)


def test_a_batch_that_is_seen_again_and_again_is_learned(pipe, maker, tmp_path):
    recipe = dataclasses.replace(RECIPE, steps=8)
    before = build_controlnet(pipe.transformer, 1, 1)
    after, _ = train_controlnet(recipe, pipe, OneBatch(**vars(maker)), tmp_path, "teacher")
    with torch.no_grad():
        losses = [control_loss(pipe, model, maker.make(0), False).item() for model in (before, after)]
    assert losses[1] < 0.9 * losses[0]


def test_a_signal_is_noted_inside_the_block_only():
    before = signal.getsignal(signal.SIGTERM)
    with StopFlag() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_folder_is_small_whole_and_loads_as_it_was_trained(folder, lively):
    assert sum(path.stat().st_size for path in folder.iterdir()) <= LARGEST_BYTES
    assert "Noto Color Emoji" in (folder / "NOTICE.txt").read_text()
    assert "emoji.png" not in (folder / "NOTICE.txt").read_text()
    assert "_name_or_path" not in json.loads((folder / "config.json").read_text())
    assert json.loads((folder / FACTS_NAME).read_text())["modes"] == MODES
    assert not folder.with_name("model.partial").exists()
    loaded = embedded.controlnet(folder=folder)
    assert type(loaded).__name__ == "FluxControlNetModel"
    assert not loaded.training
    assert loaded.config.num_mode == 3
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, lively.state_dict()[name].bfloat16().float()), name
    assert embedded.controlnet(torch.bfloat16, "cpu", folder).dtype == torch.bfloat16


def test_a_folder_that_is_missing_or_of_another_model_is_an_error(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"embedded\.train controlnet$"):
        embedded.controlnet(folder=tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / FACTS_NAME).write_text('{"teacher": "somebody else"}')
    with pytest.raises(ValueError, match=r"was trained with another model \(somebody else"):
        embedded.controlnet(folder=other)


def test_a_controlnet_too_large_to_ship_is_not_written(pipe, tmp_path):
    large = build_controlnet(pipe.transformer, 2, 3)
    with pytest.raises(ValueError, match=f"at most {LARGEST_BYTES} ship"):
        export_controlnet(large, tmp_path / "model", {"teacher": "nobody"})
    assert list(tmp_path.iterdir()) == []


def test_a_picture_follows_its_own_condition_whatever_the_batch(pipe, vocabulary, bitmaps, lively):
    requests = held_out_requests(vocabulary, 1, seed=1)[:2]
    clean = originals(requests, bitmaps, vocabulary)
    conditions = [CONDITIONS["grey"](picture) for picture in clean]
    guided = controlled_pipeline(pipe, lively)

    def drawn(kind="grey", scale=1.0, given=conditions, chosen=requests):
        pictures = generate_controlled(guided, vocabulary, chosen, given, kind, steps=1, scale=scale)
        return np.stack([np.asarray(picture, dtype=float) for picture in pictures])

    both = drawn()
    assert both.shape == (2, 128, 128, 3)
    assert np.abs(drawn(given=conditions[1:], chosen=requests[1:])[0] - both[1]).max() <= 1
    without = drawn(scale=0.0)
    assert np.abs(without - both).max() > 8
    assert np.abs(drawn(kind="blur") - both).max() > 2
    assert np.abs(drawn(given=conditions[::-1]) - both).max() > 8
    assert np.array_equal(drawn(scale=0.0, given=conditions[::-1]), without)
    with pytest.raises(ValueError, match=r"kind must be one of .*'edges'"):
        drawn(kind="edges")
    with pytest.raises(ValueError, match="one condition per request, got 1 and 2"):
        drawn(given=conditions[:1])


def run_bench(*options):
    app = typer.Typer()
    app.command()(bench.main)
    return CliRunner().invoke(
        app, ["--pictures", "2", "--shown", "1", "--steps", "1", "--threads", "1", *map(str, options)]
    )


def test_the_benchmarks_rows_are_windows_and_the_weights_that_ship_or_those_named(tmp_path):
    names = [variant.name for variant in bench.variants_of([8], None)]
    assert names[0] == "clear_r8"
    assert {f"{student.path.stem}_distilled" for student in read_students()} == set(names[1:]) != set()
    assert [variant.name for variant in bench.variants_of([8, 4], [])] == ["clear_r8", "clear_r4"]


@pytest.mark.kept
def test_the_benchmark_fills_the_papers_table_from_pictures_that_it_keeps(folder, pipe, tmp_path):
    for package in PACKAGES.values():
        pytest.importorskip(package)
    flexclear.transform(pipe, r=4, backend="sdpa")
    flexclear.save_weights(pipe, tmp_path / "student.safetensors")
    flexclear.restore(pipe)
    kept, out = tmp_path / "kept", tmp_path / "out"
    done = run_bench(
        *("--radii", "4,8", "--kinds", "tile", "--backend", "sdpa", "--model", folder, "--out", out),
        *("--pictures-in", kept, "--weights", f"student={tmp_path / 'student.safetensors'}"),
    )
    assert done.exit_code == 0, done.output
    told = json.loads((out / "controlnet.json").read_text())
    rows = {row["row"]: row for row in told["rows"]}
    assert list(rows) == [bench.DENSE, bench.ALONE, "clear_r4", "clear_r8", "student"]
    assert told["facts"]["teacher"] == teacher_fingerprint()
    assert rows["student"]["psnr"] == rows["clear_r4"]["psnr"] < rows["clear_r8"]["psnr"] < 60
    assert rows[bench.DENSE]["psnr"] is None

    def pictures(name):
        return [Image.open(kept / "tile" / name / f"00{number}.png") for number in range(2)]

    for name in ("dense", "clear_r4"):
        distances = [
            distance_to_condition(*p, "tile") for p in zip(pictures(name), pictures("conditions"), strict=True)
        ]
        assert rows[name]["rmse"] == pytest.approx(np.mean(distances))
    levels = []
    for one, two in zip(pictures("clear_r4"), pictures("dense"), strict=True):
        error = np.mean((np.asarray(one, float) - np.asarray(two, float)) ** 2)
        levels.append(10 * np.log10(255**2 / error))
    assert rows["clear_r4"]["psnr"] == pytest.approx(np.mean(levels), abs=1e-3)
    for column in bench.MORE:
        assert rows["clear_r4"][column] > rows["clear_r8"][column] > 0, column
    page = (out / "controlnet.md").read_text()
    assert "| tile | clear_r4 |" in page
    assert "RMSE to condition" in page
    with Image.open(out / "controlnet.png") as sheet:
        assert sheet.width > 7 * 176

    from flexclear.cli import app

    again = CliRunner().invoke(app, ["eval", "run", str(kept / "tile.yaml")])
    assert again.exit_code == 0, again.output
    scores = json.loads((kept / "results" / "tile" / "results.json").read_text())["scores"]
    assert scores["clear_r8"]["rmse"]["value"] == rows["clear_r8"]["rmse"]
    assert "## In the layout of Table 5" in (kept / "results" / "tile" / "results.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kinds", "grey,edges"), "got edges"),
        (("--weights", "student"), "NAME=FILE"),
        (("--weights", "student=nothing.safetensors"), "no file"),
        (("--radii", "4,4"), "names of their own"),
        (("--pictures-in", "."), "name a new folder"),
    ],
)
def test_a_mistake_in_the_benchmarks_options_is_named(options, message, tmp_path):
    done = run_bench(*options, "--out", tmp_path)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not DEFAULT_FONT_PATH.is_file(), reason="the emoji font is not installed")
def test_the_command_trains_writes_and_shows_and_finds_itself_done(tmp_path, monkeypatch):
    from flexclear.embedded.train import controlnet_command
    from flexclear.embedded.train.__main__ import app

    monkeypatch.setattr(controlnet_command, "SHEET_STEPS", 1)
    monkeypatch.setattr(controlnet_command, "SHEET_ROWS", 1)
    options = [
        "--steps",
        "2",
        "--batch",
        "3",
        "--images",
        "3",
        "--single-layers",
        "0",
        "--no-compiled",
        "--threads",
        "1",
    ]
    target = tmp_path / "model"
    call = ["controlnet", *options, "--folder", str(tmp_path / "run"), "--target", str(target)]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert embedded.controlnet(folder=target).config.num_layers == 1
    with Image.open(tmp_path / "run" / "sheets" / "controlnet00002.png") as sheet:
        assert sheet.width > 7 * 176
    before = (target / "diffusion_pytorch_model.safetensors").read_bytes()
    again = CliRunner().invoke(app, call)
    assert again.exit_code == 0, again.output
    assert (target / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_the_shipped_controlnet_is_small_and_holds_pictures_to_their_conditions(pipe, vocabulary, bitmaps):
    folders = (controlnet_directory(), embedded.model_directory(), embedded.model_directory().parent / "students")
    assert sum(path.stat().st_size for path in folders[0].iterdir()) <= LARGEST_BYTES
    assert sum(path.stat().st_size for each in folders for path in each.rglob("*.safetensors")) <= 15_000_000
    requests = held_out_requests(vocabulary, 1, seed=7)[:4]
    clean = originals(requests, bitmaps, vocabulary)
    guided = controlled_pipeline(pipe, embedded.controlnet())
    for kind, condition in CONDITIONS.items():
        given = [condition(picture) for picture in clean]
        with_it, without = (
            np.mean(
                [
                    distance_to_condition(picture, one, kind)
                    for picture, one in zip(
                        generate_controlled(guided, vocabulary, requests, given, kind, 8, scale), given, strict=True
                    )
                ]
            )
            for scale in (1.0, 0.0)
        )
        assert with_it < 0.7 * without, kind
