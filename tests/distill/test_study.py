"""The study at the embedded size: what it measures, that it goes on wherever it was cut off, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flexclear import embedded
from flexclear.common.metrics import PACKAGES
from flexclear.distill.calls import pack
from flexclear.distill.model_state import write_weights
from flexclear.distill.samples import CachedSamples
from flexclear.distill.students import trained_parameters
from flexclear.embedded import students
from flexclear.embedded.evaluation import Request, evaluate
from flexclear.embedded.retrieval import Retriever
from flexclear.embedded.vocabulary import read_vocabulary

sys.path.append(str(Path(__file__).parent.parent.parent))
from bench.distillation import data as distillation_data
from bench.distillation import few_steps as distillation_few_steps
from bench.distillation import measure as distillation_measure
from bench.distillation import pieces
from bench.distillation import report as distillation_report
from bench.distillation import study as bench
from bench.distillation.rows import ALL, BEFORE, FLOW, LONG, LONGER, REAL, Comparison, Job

for package in PACKAGES.values():
    pytest.importorskip(package)

SIZE = Comparison(16)
ROWS = SIZE.rows
SETTINGS = pieces.Settings(
    side=16, steps=3, batch_size=2, learning_rate=1e-3, few_rate=5e-4, pictures=6, held_out=1, measured=2, denoising=1,
    few_steps=1, seed=0,
)  # fmt: skip
CHOSEN = ("clear-r2", "few-steps")


def invoke(folder, *rows, **changed):
    """The command as a user gives it."""
    options = {**dataclasses.asdict(SETTINGS), "threads": 1, "device": "cpu", "folder": folder, **changed}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    app = typer.Typer()
    app.command()(bench.main)
    rows = [part for row in rows for part in ("--rows", row)]
    return CliRunner().invoke(app, [*arguments, *rows, "--output", str(folder / "out")])


def without_time(found):
    """A result without the seconds that it took."""
    if isinstance(found, dict):
        return {name: without_time(value) for name, value in found.items() if name != "seconds"}
    return found


@pytest.fixture(scope="module", autouse=True)
def few_at_once():
    """Two batches of images, so that the first can be cut off from the second."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distillation_data, "BATCH", 3)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    done = invoke(folder, *CHOSEN)
    assert done.exit_code == 0, done.exception
    return folder


@pytest.fixture(scope="module")
def vocabulary():
    return read_vocabulary(embedded.model_directory())


def test_a_chosen_row_is_measured_before_and_after_and_the_rest_is_named_as_missing(finished):
    report = json.loads((finished / "out" / "distillation.json").read_text())
    row = report["rows"]["clear-r2"]
    assert set(row) == {BEFORE, FLOW, ALL}
    assert set(report["rows"]) == {"clear-r2"}
    levels = [row[stage]["measured"]["psnr"] for stage in (BEFORE, FLOW, ALL)]
    assert len(set(levels)) == 3
    assert all(5 < level < 40 for level in levels)
    assert set(row[FLOW]["curve"]) == {"step", "loss", "flow"}
    assert set(row[ALL]["curve"]) == {"step", "loss", "flow", "prediction", "attention"}
    assert [record["step"] for record in row[ALL]["held_out"]] == [0, 1, 2, 3]
    everything = {job.title for job in SIZE.jobs()}
    done = {job.title for job in SIZE.jobs(CHOSEN)}
    assert set(report["missing"]) == everything - done
    assert report["machines"] == [f"{report['facts']['hardware']}, torch {torch.__version__}"]
    few = report["few_steps"]
    assert set(few["rows"]) == {"clear-r2"}
    assert few["rows"]["clear-r2"][BEFORE] != few["rows"]["clear-r2"][ALL]
    text = (finished / "out" / "distillation.md").read_text()
    assert f"| CLEAR, r = 2 | {report['flops']['clear-r2'] / 1e6:.1f} |" in text
    assert f"Missing so far ({len(everything - done)}): " in text
    assert "CLEAR, r = 2, the weights distilled for the teacher" in text
    assert "None of these compares with a published LPIPS" in text
    assert str(finished) not in text
    assert (finished / "out" / "distillation-curves.png").stat().st_size > 1000


@pytest.mark.kept
def test_a_study_that_is_cut_off_anywhere_ends_as_the_one_that_is_not(finished, tmp_path, monkeypatch):
    class PowerCut(Exception):
        pass

    cuts = [
        ("the teacher draws", 3),
        ("CLEAR, r = 2: all losses: training", 2),
        ("CLEAR, r = 2: all losses: drawing", 2),
        ("few-step model: training", 2),
        ("few-step model: drawing", 2),
    ]
    monkeypatch.setattr(distillation_few_steps, "EVERY", 1)
    told, left = [], list(cuts)

    def on_item(what, done, total):
        if left and (what, done) == left[0]:
            left.pop(0)
            raise PowerCut

    todo = [job for job in SIZE.jobs(CHOSEN) if job.stage != FLOW]
    for _ in range(len(cuts) + 1):
        study = pieces.Study(tmp_path, SETTINGS, "cpu", tmp_path / "students", on_item, told.append)
        try:
            for job in todo:
                study.run(job)
            break
        except PowerCut:
            continue
    assert not left
    assert any("resuming from step 1" in line for line in told)
    for job in todo:
        name = f"results/{job.name}.json"
        own, whole = (json.loads((folder / name).read_text()) for folder in (tmp_path, finished))
        assert without_time(own) == without_time(whole), job.name
    own, whole = (load_file(folder / "few-steps" / "transformer.safetensors") for folder in (tmp_path, finished))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in own.items())


def test_a_finished_piece_is_not_done_again(finished, monkeypatch):
    monkeypatch.setattr(pieces, "distill", lambda **given: pytest.fail("trained again"))
    stamps = {path: path.stat().st_mtime_ns for path in (finished / "results").iterdir()}
    assert invoke(finished, *CHOSEN).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in (finished / "results").iterdir()} == stamps


def test_another_setting_an_older_teacher_and_an_unknown_row_are_refused(finished, monkeypatch):
    changed = invoke(finished, "clear-r2", steps=4).exception
    assert isinstance(changed, ValueError)
    assert "other settings (steps: 3 then, 4 now)" in str(changed)
    with pytest.raises(ValueError, match="unknown clear; known are clear-r4"):
        SIZE.jobs(["clear"])
    monkeypatch.setattr(pieces, "teacher_fingerprint", lambda: "another")
    with pytest.raises(ValueError, match="another now"):
        pieces.Study(finished, SETTINGS, "cpu", finished, lambda *given: None, print)


def test_the_exported_students_are_the_trained_weights_in_bfloat16_and_name_their_teacher(finished):
    (student,) = students.read_students(finished / "students")
    assert (student.path.name, student.radius, student.down_factor) == ("clear_local_2.safetensors", 2, None)
    report = json.loads((finished / "out" / "distillation.json").read_text())
    (listed,) = report["students"]
    assert listed["psnr"] == max(report["rows"]["clear-r2"][stage]["measured"]["psnr"] for stage in (FLOW, ALL))
    trained = load_file(finished / "runs" / f"clear-r2-{listed['stage']}" / "weights.safetensors")
    written = load_file(student.path)
    assert written.keys() == trained.keys()
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in trained.items())
    assert listed["bytes"] == student.path.stat().st_size < students.LARGEST_BYTES


def test_what_says_most_comes_first_and_every_row_has_its_stages():
    names = [job.name for job in SIZE.jobs()]
    assert names[:2] == ["clear-r4-before", "clear-r4-all"]
    assert len(names) == len(set(names)) == 3 * len(ROWS) + 2 + len(SIZE.long_rows)
    last_clear = max(names.index(f"{row.name}-{ALL}") for row in ROWS if row.is_clear)
    assert last_clear < min(names.index(f"{row.name}-{BEFORE}") for row in ROWS if not row.is_clear)
    assert [job.name for job in SIZE.jobs(["real-pictures"])] == ["clear-r4-before", "clear-r4-all", "clear-r4-real"]
    longer = [job.name for job in SIZE.jobs(["longer"])]
    assert longer == [f"{row}-{stage}" for row in ("clear-r4", "clear-r2-down4") for stage in (BEFORE, ALL, LONG)]


def test_the_longer_runs_take_so_many_times_as_many_steps_and_all_else_alike(finished, monkeypatch):
    taken = {}

    def keep(config, **given):
        taken[config.output.name] = config
        raise FloatingPointError("enough")

    monkeypatch.setattr(pieces, "distill", keep)
    study = pieces.Study(finished, SETTINGS, "cpu", finished / "students", lambda *given: None, lambda text: None)
    for stage in (ALL, LONG):
        with pytest.raises(FloatingPointError):
            study._train(Job(SIZE.long_rows[0], stage), SIZE.long_rows[0])
    usual, longer = taken["clear-r4-all"], taken["clear-r4-long"]
    assert (usual.steps, longer.steps) == (SETTINGS.steps, LONGER * SETTINGS.steps)
    assert (longer.losses, longer.data, longer.seed, longer.optimizer.learning_rate) == (
        usual.losses, usual.data, usual.seed, usual.optimizer.learning_rate,
    )  # fmt: skip


def test_longer_training_has_its_own_table():
    measured = {"ssim": 0.5, "stlpips_alex": 0.1, "fd_lite0": 3.0, "score_lite0": 1.5, "both": 0.25}
    rows = {"clear-r4": {stage: {"measured": {"psnr": p, **measured}} for stage, p in ((ALL, 20.0), (LONG, 23.0))}}
    lines = distillation_report._longer({"rows": rows, "settings": {"side": 16, "steps": 600}})
    assert "| CLEAR, r = 4 | 600 | 20.0 | 0.500 | 0.100 | 3.00 | 1.50 | 25.0 |" in lines
    assert "| CLEAR, r = 4 | 2400 | 23.0 | 0.500 | 0.100 | 3.00 | 1.50 | 25.0 |" in lines
    del rows["clear-r4"][LONG]
    assert distillation_report._longer({"rows": rows, "settings": {"side": 16, "steps": 600}}) == []


@pytest.mark.parametrize("side", [16, 32])
def test_costs_relative_to_dense_attention_are_about_the_published_ones(side):
    config, size = embedded.pipeline().transformer.config, Comparison(side)
    dense = size.dense_flops(config)
    assert dense == 4 * 128 * (side**2 + side**2 // 8) ** 2
    assert size.pixels == 8 * side
    assert len({row.name for row in size.rows}) == len(size.rows) == 11
    shares = [row.flops(config) / dense for row in size.rows]
    titles = [row.title for row in size.rows]
    published = {"CLEAR, r = 8": 63.5, "CLEAR, r = 16": 86.6, "CLEAR, r = 32": 154.1}
    published |= {"Swin": 67.7, "strided": 67.7, "agent": 80.5}
    for name, flops in published.items():
        kind, _, radius = name.partition(" = ")
        own = f"{kind} = {int(radius) * side // 64}" if radius else kind
        (share,) = (
            share
            for title, share in zip(titles, shares, strict=True)
            if title == own or (not radius and title.startswith(own + ","))
        )
        assert share == pytest.approx(flops / 260.9, abs=0.03), name
    by_name = dict(zip((row.name for row in size.rows), shares, strict=True))
    assert by_name["sigmoid"] == 1
    assert by_name["linear"] < 0.2


def test_at_32_x_32_tokens_the_rivals_see_64_keys_of_1024():
    rows = {row.name: row for row in Comparison(32).rows}
    assert [name for name in rows if name.startswith("clear")] == [
        "clear-r8",
        "clear-r4",
        "clear-r4-down4",
        "clear-r16",
    ]
    keys = {
        "pixart": 32**2 // rows["pixart"].mechanism.factor ** 2,
        "neighborhood": rows["neighborhood"].mechanism.kernel ** 2,
    }
    keys["swin"], keys["strided"] = rows["swin"].mechanism.size ** 2, 32**2 // rows["strided"].mechanism.stride ** 2
    keys["agent"] = rows["agent"].mechanism.side ** 2
    assert keys == dict.fromkeys(keys, 64)
    with pytest.raises(ValueError, match=r"--side must be one of \[16, 32, 64\] image tokens, got 24"):
        Comparison(24)


@pytest.mark.parametrize("name", ["swin", "pixart", "linear"])
def test_trained_weights_of_every_kind_come_back(tmp_path, name):
    row = next(row for row in ROWS if row.name == name)
    pipe, again = embedded.pipeline(), embedded.pipeline()
    row.apply(pipe)
    trained = trained_parameters(pipe.transformer)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter))
    write_weights(pipe.transformer, tmp_path / "weights.safetensors")
    row.apply(again, tmp_path / "weights.safetensors")
    for key, parameter in trained_parameters(again.transformer).items():
        assert torch.equal(parameter, trained[key]), key
    if name == "linear":
        save_file({"no.such": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=r"does not fit linear: \['no.such'\]"):
            row.apply(embedded.pipeline(), tmp_path / "other.safetensors")


def test_training_never_shows_a_pair_that_is_measured(vocabulary):
    shown = distillation_data.shown_pairs(vocabulary, 1000, 0)
    assert len(shown) == 1000
    names = list(vocabulary.backgrounds)
    pairs = {(vocabulary.emoji[emoji].name, names[background]) for emoji, background, _ in shown}
    assert len(pairs) == len(vocabulary.emoji) * len(names) - len(vocabulary.held_out_pairs)
    assert not pairs & set(vocabulary.held_out_pairs)
    assert all(vocabulary.emoji[emoji].name in text and names[b] in text for emoji, b, text in shown)
    assert distillation_data.shown_pairs(vocabulary, 10, 0) == shown[:10]


@pytest.fixture
def drawings(vocabulary, tmp_path):
    """A set of emoji as packages have them: files named by code point, some with a variation selector."""
    folder = tmp_path / "assets"
    folder.mkdir()
    for number, (item, bitmap) in enumerate(
        zip(vocabulary.emoji, distillation_data.bitmaps_of(vocabulary), strict=True)
    ):
        form, kind = (("", "webp"), ("-fe0f", "png"))[number % 2]
        bitmap.save(folder / f"{item.code_point:x}{form}.{kind}", lossless=True)
    return folder


def test_real_pictures_show_their_captions(vocabulary, drawings, tmp_path):
    samples = distillation_data.real(tmp_path, vocabulary, SIZE, 4, 0, "cpu", lambda *given: None, drawings)
    shown = distillation_data.shown_pairs(vocabulary, 4, 0)
    assert [entry["caption"] for entry in samples.entries] == [text for _, _, text in shown]
    pixels = [np.array(Image.open(path)) for path in sorted((tmp_path / "pictures").glob("*.png"))]
    pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    requests = [Request(emoji, background, 0) for emoji, background, _ in shown]
    retriever = Retriever(distillation_data.bitmaps_of(vocabulary), list(vocabulary.backgrounds.values()))
    assert evaluate(retriever, requests, pictures).both == 1


def test_real_images_need_a_drawing_of_every_emoji_and_keep_to_one_set(vocabulary, drawings, tmp_path):
    def make():
        distillation_data.real(tmp_path / "real", vocabulary, SIZE, 2, 0, "cpu", lambda *given: None, drawings)

    first = vocabulary.emoji[0]
    file = drawings / f"{first.code_point:x}.webp"
    kept = file.read_bytes()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"no drawing of the {first.name}: none of {file.name}, "):
        make()
    assert not (tmp_path / "real").exists()
    file.write_bytes(kept)
    make()
    Image.new("RGBA", (136, 128), "red").save(file)
    with pytest.raises(ValueError, match="was begun with other settings \\(drawings: "):
        make()


def test_real_pictures_are_refused_without_drawings(tmp_path):
    refused = invoke(tmp_path, "clear-r2", "real-pictures")
    assert refused.exit_code == 2
    assert "real-pictures needs drawings" in refused.output
    assert not (tmp_path / "study.json").exists()


def test_the_noise_of_a_generated_picture_is_what_the_pipeline_began_from(finished):
    samples = CachedSamples(finished / "self-generated" / "cache")
    noise = distillation_data.noise_of(samples, 3)
    pipe = embedded.pipeline()
    generator = torch.Generator().manual_seed(3)
    began, _ = pipe.prepare_latents(1, 8, 128, 128, torch.float32, torch.device("cpu"), generator)
    assert torch.equal(pack(noise[None]), began)
    batch = distillation_few_steps.reflow_batch(samples, [3, 0], "name")
    assert torch.equal(batch.noise[0], noise)
    assert torch.equal(batch.sigmas, distillation_few_steps.reflow_batch(samples, [3, 0], "name").sigmas)
    assert not torch.equal(batch.sigmas, distillation_few_steps.reflow_batch(samples, [3, 0], "other").sigmas)


def test_distances_are_none_for_equal_pictures_and_grow_with_noise(finished, vocabulary):
    pictures = load_file(finished / "teacher.safetensors")["pictures"]
    examiner = distillation_measure.Examiner(vocabulary, SIZE, len(pictures), 1, "cpu")
    noise = torch.randn_like(pictures)
    found = [examiner.compare((pictures + level * noise).clamp(0, 1), pictures) for level in (0.0, 0.02, 0.1)]
    assert (found[0].psnr, found[0].ssim) == (120, pytest.approx(1))
    assert found[0].psnr > found[1].psnr > found[2].psnr
    assert found[0].ssim > found[1].ssim > found[2].ssim > 0
    assert found[0].stlpips_alex == pytest.approx(0, abs=1e-6)
    assert found[0].stlpips_alex < found[1].stlpips_alex < found[2].stlpips_alex
    assert found[0].fd_lite0 == pytest.approx(0, abs=1e-6)
    assert min(found[1].fd_lite0, found[2].fd_lite0) > 1, "of two pictures it need not grow"
    alone = examiner.compare(pictures, None)
    assert alone == dataclasses.replace(found[0], psnr=None, ssim=None, stlpips_alex=None, fd_lite0=None)


def test_a_study_without_the_packages_of_its_metrics_is_refused_before_it_begins(vocabulary, monkeypatch):
    monkeypatch.setitem(sys.modules, "stlpips_pytorch", None)
    with pytest.raises(ImportError, match="scoring by stlpips-alex needs stlpips-pytorch"):
        distillation_measure.Examiner(vocabulary, SIZE, 2, 1, "cpu")


def synthetic(levels):
    """A report with these PSNRs by row and stage; None: the run diverged."""
    rows = {}
    for (row, stage), psnr in levels.items():
        found = {"failed": "not finite"} if psnr is None else {"measured": {"psnr": psnr}}
        rows.setdefault(row, {})[stage] = found
    return {
        "rows": rows,
        "settings": {"side": 16},
        "flops": {row.name: 10.0 + number for number, row in enumerate(ROWS)},
    }


def test_the_papers_expectations_are_decided_by_the_numbers():
    good = {("clear-r2", BEFORE): 10.0, ("clear-r2", FLOW): 15.0, ("clear-r2", ALL): 20.0}
    good |= {("clear-r4", ALL): 22.0, ("clear-r4", REAL): 19.0, ("clear-r8", ALL): 24.0, ("swin", ALL): 18.0}
    said = " ".join(distillation_report.findings(synthetic(good)))
    assert "nearer to the teacher (PSNR): 1 of 1." in said
    assert "A larger radius is nearer to the teacher: yes" in said
    assert "CLEAR leads after distillation (PSNR): yes" in said
    assert "Self-generated images teach more than real ones: yes" in said
    even = " ".join(distillation_report.findings(synthetic({**good, ("clear-r4", REAL): 21.9})))
    assert "Self-generated images teach more than real ones: hardly a difference (CLEAR, r = 4: 22.0 dB" in even
    bad = {**good, ("clear-r2", BEFORE): 30.0, ("clear-r4", ALL): 12.0, ("swin", ALL): 40.0}
    said = " ".join(distillation_report.findings(synthetic(bad)))
    assert "0 of 1; not for CLEAR, r = 2." in said
    assert "A larger radius is nearer to the teacher: NO" in said
    assert "CLEAR leads after distillation (PSNR): NO (Swin, 4 x 4 40.0" in said
    assert "Self-generated images teach more than real ones: NO" in said
    assert distillation_report.findings(synthetic({("linear", ALL): None})) == ["Nothing to say yet."]
