"""``flexclear generate`` with a video model: frames, windows over them, files that carry their settings, and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from flexclear.images.files import FRAME, Target, read_settings
from flexclear.images.videos import gif_delays, video_content

from helpers.models_video import tiny_wan
from helpers.pipelines_video import TEXT, wan_parts, without_ftfy

PROMPT = "a red apple that rolls"
SMALL = ("--steps", 1, "--size", "32x48", "--text-len", 16, "--device", "cpu", "--backend", "sdpa")
CLIP = (*SMALL, "--prompt", PROMPT, "--num-frames", 9)
has_av = importlib.util.find_spec("av") is not None


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A pipeline as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("wan")
    WanPipeline(**wan_parts(tiny_wan(text_dim=TEXT))).save_pretrained(folder)
    return folder


@pytest.fixture
def generate(command, tmp_path, wan):
    """Draws into a folder, and gives the lines."""

    def run(*arguments, out="out"):
        status, output, error = command("generate", wan, *CLIP, "--json", "--out", tmp_path / out, *arguments)
        assert status == 0, error
        return [json.loads(line) for line in output.splitlines()]

    return run


def frames_of(path):
    """Frames of a GIF, RGB, and how long each is shown, in milliseconds."""
    with Image.open(path) as opened:
        found = []
        for number in range(opened.n_frames):
            opened.seek(number)
            found.append((opened.convert("RGB").tobytes(), opened.info["duration"]))
    return found


def test_a_clip_is_a_gif_of_all_its_frames_that_says_how_it_was_drawn(generate, tmp_path):
    [line] = generate("--r", 2, "--frame-radius", 1, "--fps", 12, "--seed", 3)
    assert line["path"].endswith("out/0001_a-red-apple-that-rolls.gif")
    assert (line["frames"], line["height"], line["width"]) == (9, 32, 48)
    shown = frames_of(line["path"])
    assert sum(duration for _, duration in shown) == 750
    assert len({pixels for pixels, _ in shown}) > 4
    settings = read_settings(line["path"])["settings"]
    said = {name: settings[name] for name in ("prompt", "seed", "num_frames", "frame_radius", "fps", "format", "r")}
    assert said == {
        "prompt": PROMPT, "seed": 3, "num_frames": 9, "frame_radius": 1, "fps": 12.0, "format": "gif", "r": 2,
    }  # fmt: skip
    assert settings["pipeline"] == "WanPipeline"
    assert "2" in settings["window"]


def test_the_frame_radius_reaches_the_model_and_dense_is_the_plain_one(generate):
    seen = {
        name: generate("--format", "png", *options, out=name)[0]["path"]
        for name, options in {
            "dense": ("--r", "dense"),
            "whole": ("--r", 9, "--frame-radius", "all"),
            "own frame": ("--r", 9, "--frame-radius", 0),
            "small": ("--r", 1, "--frame-radius", "all"),
        }.items()
    }
    pictures = {}
    for name, path in seen.items():
        with Image.open(f"{path}/{FRAME.format(9)}") as frame:
            pictures[name] = torch.tensor(list(frame.convert("RGB").tobytes()), dtype=torch.int16)
    # A window over every token of every frame is dense attention, to a rounding of one in 255.
    assert (pictures["whole"] - pictures["dense"]).abs().max() <= 1
    assert (pictures["own frame"] - pictures["dense"]).abs().max() > 1
    assert (pictures["small"] - pictures["dense"]).abs().max() > 1


def test_frames_may_be_a_folder_of_images(generate):
    [line] = generate("--r", 2, "--frame-radius", "all", "--format", "png")
    assert line["path"].endswith("out/0001_a-red-apple-that-rolls")
    folder = Path(line["path"])
    assert sorted(file.name for file in folder.iterdir()) == [FRAME.format(number) for number in range(1, 10)]
    assert read_settings(folder)["settings"]["frame"] == 1
    assert read_settings(folder / FRAME.format(9))["settings"]["frame"] == 9


@pytest.mark.skipif(not has_av, reason="PyAV is not installed (extra video)")
def test_an_mp4_has_every_frame_at_its_pace_and_its_settings(generate):
    import av

    [line] = generate("--r", 2, "--frame-radius", "all", "--fps", 24, out="clip.mp4")
    with av.open(line["path"]) as container:
        [video] = container.streams.video
        frames = list(container.decode(video))
        assert (len(frames), video.average_rate, video.codec_context.pix_fmt) == (9, 24, "yuv420p")
    assert read_settings(line["path"])["settings"]["num_frames"] == 9


@pytest.mark.skipif(not has_av, reason="PyAV is not installed (extra video)")
def test_odd_sides_of_an_mp4_are_continued_by_a_copy():
    import av

    frames = [Image.effect_noise((31, 17), 60).convert("RGB") for _ in range(3)]
    content = video_content("mp4", frames, 30000 / 1001, {"prompt": "p"}, {})
    with av.open(io.BytesIO(content)) as container:
        [video] = container.streams.video
        assert (video.width, video.height) == (32, 18)
        assert float(video.average_rate) == pytest.approx(29.97, abs=1e-3)


def test_a_set_of_clips_is_completed(generate):
    options = ("--r", 2, "--frame-radius", "all", "--seed", 1, "--seed", 2)
    first = generate(*options)
    removed = Path(first[1]["path"])
    before = removed.read_bytes()
    removed.unlink()
    [again] = generate(*options, "--resume")
    assert again["path"] == str(removed)
    assert removed.read_bytes() == before, "the same seed, the same clip, byte for byte"


@pytest.mark.parametrize(("frames", "fps"), [(9, 16), (81, 24), (5, 7.5), (2, 50), (1, 16)])
def test_delays_of_a_gif_add_up_to_the_clip_s_length(frames, fps):
    delays = gif_delays(frames, fps)
    assert len(delays) == frames
    assert all(delay >= 20 and delay % 10 == 0 for delay in delays)
    assert abs(sum(delays) - 1000 * frames / fps) <= 5


def test_a_folder_of_frames_appears_whole_or_not_at_all(tmp_path):
    target = Target.of(tmp_path, 1, overwrite=False, suffix="")
    frames = {FRAME.format(1): b"1", FRAME.format(2): b"2"}
    path = target.write(1, "p", frames)
    assert sorted(file.name for file in path.iterdir()) == sorted(frames)
    assert target.write(1, "p", frames).name == "0002_p", "numbers go on"
    with pytest.raises(TypeError):
        target.write(3, "broken", {FRAME.format(1): b"1", FRAME.format(2): None})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["0001_p", "0002_p"]
    replaced = Target.of(tmp_path, 1, overwrite=True, suffix="").write(1, "p", {FRAME.format(1): b"new"})
    assert [file.read_bytes() for file in replaced.iterdir()] == [b"new"], "none of the longer clip is left"


BAD = {
    "no frame radius": (("--r", 2), "--frame-radius is missing: WanPipeline draws videos"),
    "a number that the VAE does not take": (
        ("--num-frames", 10, "--frame-radius", 1),
        "--num-frames 10: the VAE of WanPipeline makes one frame of the first and one of every 4 after it, so that there are "
        "4 n + 1; near it: 9 and 13",
    ),
    "a window deeper than the clip": (
        ("--frame-radius", 3),
        "--frame-radius 3: 9 frames are 3 after the VAE, so that a window would see all of them; 'all' says so",
    ),
    "a frame radius that is none": (("--frame-radius", "some"), "0 or more, or 'all'; got 'some'"),
    "a frame radius of the plain model": (
        ("--r", "dense", "--frame-radius", 1),
        "--frame-radius 1 is for windowed attention, --r dense is the plain model",
    ),
    "pooled cells": (("--frame-radius", 1, "--down-factor", 2), "--down-factor pools cells of images"),
    "a cascade": (("--frame-radius", 1, "--highres", "64,128"), "--highres"),
    "no pace": (("--frame-radius", 1, "--fps", 0), "--fps must be above 0"),
    "a pace that a GIF has not": (("--frame-radius", 1, "--fps", 60), "a GIF has at most 50 frames per second"),
    "a format": (
        ("--frame-radius", 1, "--format", "webm"),
        "--format must be one of ['gif', 'mp4', 'png'], got 'webm'",
    ),
    "a file of another format": (("--frame-radius", 1, "--out", "a.webm"), "--out must end in .gif, or be a folder"),
    "a frame's file": (("--frame-radius", 1, "--out", "a.png"), "--out must end in .gif, or be a folder"),
    "a size": (("--frame-radius", 1, "--size", "32x40"), "multiples of 16"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_what_makes_no_sense_of_a_clip_is_named_before_anything_is_loaded(
    command, tmp_path, monkeypatch, wan, arguments, message
):
    def load(*args, **kwargs):
        pytest.fail("weights were read")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", load)
    given = [part for part in CLIP if "--highres" not in arguments or part not in ("--size", "32x48")]
    status, output, error = command("generate", wan, *given, *arguments)
    assert (status, output) == (2, "")
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [("--num-frames", 9), ("--frame-radius", 1), ("--fps", 8), ("--format", "gif")])
def test_a_model_of_images_has_no_frames(command, tmp_path, option):
    status, _, error = command("generate", "embedded", "--prompt", PROMPT, *option, "--out", tmp_path / "out")
    assert status == 2
    assert f"{option[0]} {option[1]}" in error
    assert "FluxPipeline draws images, which have no frames; leave it out" in error


def test_an_mp4_without_its_package_says_what_to_install(command, tmp_path, monkeypatch, wan):
    monkeypatch.setattr("flexclear.common.extras.is_installed", lambda module: module != "av")
    options = ("--frame-radius", 1, "--out", tmp_path / "clip.mp4")
    status, _, error = command("generate", wan, *CLIP, *options)
    assert status != 0
    assert "an MP4 file needs av: pip install av (flexclear's extra video has it)" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "generate", "{wan}", "--prompts", "{prompts}", "--count", "1", "--out", "{out}"),
        ("analyze", "attention", "{wan}", "--prompt", "a", "--out", "{out}"),
    ],
    ids=["data generate", "analyze"],
)
def test_commands_for_images_refuse_a_model_of_videos(command, tmp_path, wan, arguments):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPT)
    places = {"wan": wan, "prompts": prompts, "out": tmp_path / "out"}
    status, _, error = command(*(part.format(**places) for part in arguments))
    assert status == 2
    assert f"{wan} draws videos (WanPipeline), and this command is for images" in error


def test_a_video_begins_with_an_image_that_is_cut_to_its_size(command, tmp_path, monkeypatch):
    from diffusers import WanImageToVideoPipeline

    model = tiny_wan(in_channels=12, text_dim=TEXT, image_dim=None)
    parts = wan_parts(model, image_encoder=None, image_processor=None)
    WanImageToVideoPipeline(**parts).save_pretrained(tmp_path / "i2v")
    Image.linear_gradient("L").resize((80, 80)).save(tmp_path / "first.png")
    arguments = ("generate", tmp_path / "i2v", *CLIP, "--r", 2, "--frame-radius", 1, "--out", tmp_path / "out")
    status, _, error = command(*arguments)
    assert status == 2
    assert "WanImageToVideoPipeline draws from an image: give --image FILE" in error
    image = ("--image", tmp_path / "first.png", "--seed", 1, "--seed", 2)
    module = importlib.import_module(WanImageToVideoPipeline.__module__)
    if not hasattr(module, "ftfy"):
        status, _, error = command(*arguments, *image)
        assert status == 2
        assert "WanImageToVideoPipeline of diffusers needs ftfy: pip install ftfy" in error
    without_ftfy(monkeypatch, WanImageToVideoPipeline)
    status, _, error = command(*arguments, *image, "--batch", 2)
    assert status == 2
    assert "--batch: WanImageToVideoPipeline draws from the image of one at a time; leave it or --image out" in error
    status, output, error = command(*arguments, *image, "--json")
    assert status == 0, error
    lines = [json.loads(line) for line in output.splitlines()]
    assert [(line["frames"], line["height"], line["width"]) for line in lines] == [(9, 32, 48)] * 2
    assert frames_of(lines[0]["path"]) != frames_of(lines[1]["path"])
    settings = read_settings(lines[0]["path"])["settings"]
    assert (settings["pipeline"], settings["image"]) == ("WanImageToVideoPipeline", str(tmp_path / "first.png"))
    status, _, error = command("generate", "--config", lines[1]["path"], "--out", tmp_path / "again.gif")
    assert status == 0, error
    assert frames_of(tmp_path / "again.gif") == frames_of(lines[1]["path"])


def test_a_batch_of_clips_is_each_clip_to_rounding(command, wan, tmp_path):
    arguments = ("generate", wan, *CLIP, "--r", 2, "--frame-radius", 1, "--format", "png", "--seed", 1, "--seed", 2)
    frames = {}
    for name, batch in (("alone", 1), ("together", 2)):
        status, output, error = command(*arguments, "--batch", batch, "--json", "--out", tmp_path / name)
        assert status == 0, error
        lines = [json.loads(line) for line in output.splitlines()]
        assert [(line["frames"], line["batch"]) for line in lines] == [(9, batch)] * 2
        for line in lines:
            with Image.open(f"{line['path']}/{FRAME.format(9)}") as frame:
                frames[name, line["seed"]] = torch.tensor(list(frame.convert("RGB").tobytes()), dtype=torch.int16)
    for seed in (1, 2):
        assert (frames["alone", seed] - frames["together", seed]).abs().max() <= 1
    assert (frames["alone", 1] - frames["alone", 2]).abs().max() > 1
