"""``flexclear eval run``: variants drawn, scored, and put into the paper's tables."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flexclear.alternatives import SwinAttention
from flexclear.alternatives.flops import flops
from flexclear.cli import app
from flexclear.evaluation import evaluate
from flexclear.evaluation.conditions import CONDITIONS, distance_to_condition
from flexclear.evaluation.config import read_eval_config
from flexclear.evaluation.networks import NetworkMissing, Networks
from flexclear.evaluation.run import as_variant, run
from flexclear.evaluation.tables import COLUMNS, TABLES, cell
from flexclear.masks import Disc, Layout

from helpers.evaluation_pictures import disturbed, picture

CONFIG = """
model: embedded
prompts: prompts.txt
output: out
sizes: [64x48]
steps: 1
text_len: 8
backend: sdpa
tables: [2, 6]
columns: [psnr, ssim]
variants:
  - {name: original, r: dense}
  - {name: clear_2, r: 2}
  - {name: swin, attention: swin, sizes: {size: 4}}
"""


@pytest.fixture
def own_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def written(folder, text=CONFIG):
    (folder / "prompts.txt").write_text("a red apple on a blue background\na sunflower on a white background\n")
    file = folder / "config.yaml"
    file.write_text(text)
    return file


def test_variants_of_the_embedded_model_fill_the_tables_and_are_drawn_once(tmp_path, networks, own_hub):
    file = written(tmp_path, CONFIG + f"networks: {{inception: {networks['inception']}, dino: {networks['dino']}}}\n")
    done = CliRunner().invoke(app, ["eval", "run", str(file)])
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    told = json.loads((out / "results.json").read_text())
    assert list(told["scores"]) == ["original", "clear_2", "swin"]
    row = told["scores"]["clear_2"]
    assert list(row) == [*TABLES[2].columns, "psnr", "ssim"]
    folders = [out / "pictures" / name for name in ("clear_2", "original")]
    assert row["psnr"]["value"] == pytest.approx(evaluate(*folders, "psnr").scores[0].value)
    assert 3 < row["psnr"]["value"] < 100
    assert row["psnr"]["pictures"] == 2
    assert row["fid_orig"]["value"] > 0
    assert row["dino"]["value"] < 100
    assert "no real images are named" in row["fid_real"]["reason"]
    assert "no alexnet" in row["lpips_orig"]["reason"]

    layout = Layout(8, 6, 8)
    heads_and_channels = told["scores"]["original"]["gflops"]["value"] * 1e9 / (4 * layout.seq_len**2)
    channels = round(heads_and_channels)
    assert heads_and_channels == pytest.approx(channels)
    assert row["gflops"]["value"] * 1e9 == pytest.approx(flops(Disc(2), layout, channels))
    swin = told["scores"]["swin"]["gflops"]["value"] * 1e9
    windows = [flops(SwinAttention(size=4).window(layer), layout, channels) for layer in range(2)]
    assert min(windows) <= swin <= max(windows) < 4 * channels * layout.seq_len**2

    page = (out / "results.md").read_text()
    assert "## In the layout of Table 2" in page
    assert "| " + " | ".join(COLUMNS[name].title for name in TABLES[6].columns) in page
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 3 * 176

    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png") if path.name != "sheet.png"}
    assert len(times) == 6
    missing = out / "pictures" / "clear_2" / "000001.png"
    before = missing.read_bytes()
    missing.unlink()
    again = run(read_eval_config(file))
    assert missing.read_bytes() == before
    assert again.scores["clear_2"]["psnr"].value == row["psnr"]["value"]
    changed = [path for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert changed == [missing]

    file.write_text(file.read_text().replace("steps: 1", "steps: 2"))
    with pytest.raises(ValueError, match=r"holds images with other settings \(base\.steps was 1, is 2\)"):
        run(read_eval_config(file))


def test_a_variant_leaves_the_pipeline_as_it_was(tmp_path):
    import flexclear
    from flexclear.evaluation.config import VariantConfig

    from helpers.models import flux_call, tiny_flux

    model = tiny_flux()
    call = flux_call(6, 5, 4)
    with torch.no_grad():
        before = model(**call).sample
        flexclear.transform(model, r=2, backend="sdpa")
        for parameter in model.transformer_blocks[0].attn.to_q.parameters():
            parameter.add_(0.1)
        flexclear.save_weights(model, tmp_path / "weights.safetensors")
        student = model(**call).sample
        for parameter in model.transformer_blocks[0].attn.to_q.parameters():
            parameter.sub_(0.1)
        flexclear.restore(model)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for options in ({"r": "2"}, {"r": None}):
            variant = VariantConfig("student", weights=tmp_path / "weights.safetensors", **options)
            with as_variant(model, variant, "sdpa"):
                assert (model(**call).sample - student).abs().max() <= 1e-4
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        with as_variant(model, VariantConfig("swin", attention="swin", sizes={"size": 3}), "sdpa"):
            assert (model(**call).sample - before).abs().max() > 1e-3
        assert (model(**call).sample - before).abs().max() <= 1e-5
    assert not model._forward_pre_hooks


def test_pictures_that_were_drawn_elsewhere_are_scored_against_conditions_and_real_ones(tmp_path, networks):
    for name in ("one", "two", "conditions", "real"):
        (tmp_path / name).mkdir()
    for number in range(3):
        image = picture(number, 64, 48)
        image.save(tmp_path / "one" / f"{number}.png")
        disturbed(image, 9 + number).save(tmp_path / "two" / f"{number}.png")
        CONDITIONS["tile"](image).save(tmp_path / "conditions" / f"{number}.png")
        picture(20 + number, 80, 80).save(tmp_path / "real" / f"photo{number}.png")
    text = """
output: out
tables: [5]
columns: [lpips_real, fid_real, gflops]
conditions: conditions
condition: tile
real: real
variants: [{name: one, pictures: one}, {name: two, pictures: two}]
"""
    found = run(read_eval_config(written(tmp_path, text + f"networks: {{lpips: {networks['lpips']}}}\n")))
    assert found.scores["one"]["rmse"].value == 0
    with Image.open(tmp_path / "two" / "1.png") as two, Image.open(tmp_path / "conditions" / "1.png") as condition:
        expected = distance_to_condition(two, condition, "tile")
        own = np.asarray(CONDITIONS["tile"](two), dtype=float) / 255
        difference = own - np.asarray(condition, dtype=float) / 255
    assert found.scores["two"]["rmse"].each["1"] == pytest.approx(expected)
    assert expected == pytest.approx(np.sqrt((difference**2).mean()))
    assert expected > 0.005
    assert found.scores["two"]["lpips_real"].value > 0
    assert found.scores["two"]["lpips_real"].pictures == 3
    assert "do not say what they cost" in found.scores["two"]["gflops"].reason
    assert "carries none" in found.scores["two"]["clip_t"].reason
    assert "psnr" not in found.scores["one"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tables: [2, 6]", "tables: [7]", "tables are .*, got 7"),
        ("columns: [psnr, ssim]", "columns: [psnrr]", "columns are .*, got 'psnrr'"),
        ("steps: 1", "step: 1", r"unknown setting step \(meant steps\?\)"),
        ("prompts: prompts.txt", "", "prompts is missing: original is to be drawn"),
        ("r: dense}", "r: dense, down_factor: 2}", "original: r: dense is the plain model"),
        ("name: clear_2", "name: original", "variants must have different names"),
        ("name: clear_2", "name: ../x", "must be a name of letters"),
        ("attention: swin,", "attention: swim,", "swim"),
        ("r: 2}", "r: 2, weights: nothing.safetensors}", "clear_2: no file"),
        ("attention: swin, sizes", "sizes", "sizes are for attention other"),
        ("attention: swin,", "attention: swin, r: 4,", "r are for attention: clear"),
        ("model: embedded", "model: embedded\nreference: nobody", "reference must be one of the variants"),
        ("model: embedded", "model: embedded\ncondition: grey", "conditions, a folder, and condition"),
        ("model: embedded", "model: embedded\nnetworks: {vgg: x}", "networks are inception"),
        ("sizes: [64x48]", "sizes: [64]", r"sizes\[0\] must be str"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, old, new, message):
    assert old in CONFIG
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        read_eval_config(written(tmp_path, CONFIG.replace(old, new)))


def test_a_cell_has_its_columns_digits_and_never_shows_a_small_cost_as_nothing():
    assert [cell("gflops", value) for value in (260.91, 0.0427, 0.0, None)] == ["260.9", "0.043", "0.0", "-"]
    assert cell("ssim", 0.81234) == "0.8123"


def test_where_a_network_should_lie_is_told_relative_to_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache" / "hub"))
    with pytest.raises(NetworkMissing, match=r"no alexnet-owt-7be5be79\.pth in ~/cache/hub/checkpoints\. Put it there"):
        _ = Networks().lpips
