"""Images, captions and caches: what is drawn, what goes on, what is damaged and named."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flexclear
from flexclear.distill import CachedSamples, MemorySamples, Sample
from flexclear.distill.caching import cache
from flexclear.distill.calls import check_samples
from flexclear.distill.models import fingerprint, pipeline_folder
from flexclear.distill.sources import find_items
from flexclear.images.fitting import fitted

from helpers.full_disk import largest_file
from helpers.picture_bombs import bomb


def png(seed=0, side=64):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def pipe():
    return flexclear.embedded.pipeline()


@pytest.fixture
def pictures(tmp_path):
    """A folder of five images with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(png(number))
        (folder / f"{number}.txt").write_text(f"a red apple {number}\n")
    return folder


def tar_of(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_a_cache_holds_the_vaes_moments_and_the_pipelines_embeddings(pipe, pictures, tmp_path):
    done = cache(pictures, "embedded", tmp_path / "cache", text_len=16, shard_size=2, pipe=pipe)
    assert (done.samples, done.skipped) == (5, ())
    samples = CachedSamples(tmp_path / "cache")
    assert sorted(place.name for place in done.folder.iterdir()) == [
        "00000.safetensors",
        "00001.safetensors",
        "00002.safetensors",
        "index.json",
    ]
    sample = samples[3]
    pixels = torch.from_numpy(np.array(Image.open(pictures / "3.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        moments = pipe.vae.encode(pixels).latent_dist
        embeds, pooled, _ = pipe.encode_prompt("a red apple 3", None, max_sequence_length=16)
    assert (sample.mean - moments.mean[0]).abs().max() < 1e-5
    assert (sample.logvar - moments.logvar[0]).abs().max() < 1e-5
    assert torch.equal(sample.prompt_embeds, embeds[0])
    assert torch.equal(sample.pooled, pooled[0])
    assert sample.caption == "a red apple 3"
    assert samples.shape(3) == ((8, 16, 16), (16, 96), (96,))
    assert samples.scaling_factor == pipe.vae.config.scaling_factor
    check_samples(samples, pipe.transformer, fingerprint(pipeline_folder("embedded")))


def test_a_cache_goes_on_with_the_first_shard_that_is_missing(pipe, pictures, tmp_path):
    out = tmp_path / "cache"
    cache(pictures, "embedded", out, text_len=16, shard_size=2, pipe=pipe)
    kept = (out / "00000.safetensors").stat().st_mtime_ns
    expected = (out / "00001.safetensors").read_bytes()
    (out / "index.json").unlink()
    (out / "00001.safetensors").write_bytes(expected[:100])
    with pytest.raises(FileNotFoundError, match="not a finished cache"):
        CachedSamples(out)
    cache(pictures, "embedded", out, text_len=16, shard_size=2, pipe=pipe)
    assert (out / "00000.safetensors").stat().st_mtime_ns == kept
    assert len(CachedSamples(out)) == 5
    assert torch.isfinite(CachedSamples(out)[2].mean).all()
    with pytest.raises(ValueError, match="other images, captions, settings or encoders"):
        cache(pictures, "embedded", out, text_len=24, shard_size=2, pipe=pipe)


def test_a_cache_of_a_picture_that_was_replaced_is_refused(pipe, pictures, tmp_path):
    out = tmp_path / "cache"
    cache(pictures, "embedded", out, text_len=16, shard_size=2, pipe=pipe)
    before = {place.name: place.read_bytes() for place in out.iterdir()}
    times = os.stat(pictures / "3.png")
    (pictures / "3.png").write_bytes(png(33))
    os.utime(pictures / "3.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match="holds a cache of other images"):
        cache(pictures, "embedded", out, text_len=16, shard_size=2, pipe=pipe)
    assert {place.name: place.read_bytes() for place in out.iterdir()} == before
    (out / "index.json").unlink()  # as if it had been killed before its end
    cache(pictures, "embedded", out, text_len=16, shard_size=2, pipe=pipe)
    cache(pictures, "embedded", tmp_path / "anew", text_len=16, shard_size=2, pipe=pipe)
    assert torch.equal(CachedSamples(out)[3].mean, CachedSamples(tmp_path / "anew")[3].mean)
    for damaged in ("{", "[]", '{"work": 1, "work": 2}'):
        (out / "index.json").write_text(damaged)
        with pytest.raises(ValueError, match="is not the index of a cache"):
            cache(pictures, "embedded", out, text_len=16, shard_size=2, pipe=pipe)


def test_a_picture_that_is_replaced_meanwhile_ends_the_run(pipe, pictures, tmp_path):
    def replace(done, total):
        (pictures / "4.png").write_bytes(png(44))

    with pytest.raises(OSError, match=r"4\.png was replaced while it was being encoded"):
        cache(pictures, "embedded", tmp_path / "cache", text_len=16, shard_size=2, pipe=pipe, on_item=replace)
    assert not (tmp_path / "cache" / "index.json").exists()


def test_a_full_disk_leaves_finished_shards_and_no_half_of_one(pipe, pictures, tmp_path):
    out = tmp_path / "cache"
    with contextlib.ExitStack() as disk:
        with pytest.raises(OSError, match=r"File too large.*00001\.safetensors'$"):
            cache(
                pictures,
                "embedded",
                out,
                text_len=16,
                shard_size=2,
                pipe=pipe,
                on_item=lambda done, total: done == 3 and disk.enter_context(largest_file(5000)),
            )
        assert [place.name for place in out.iterdir()] == ["00000.safetensors"]
    kept = (out / "00000.safetensors").stat().st_mtime_ns
    cache(pictures, "embedded", out, text_len=16, shard_size=2, pipe=pipe)
    assert (out / "00000.safetensors").stat().st_mtime_ns == kept
    assert len(CachedSamples(out)) == 5
    content = (out / "index.json").read_bytes()
    (out / "index.json").unlink()
    with largest_file(100), pytest.raises(OSError, match=r"File too large: '.*index\.json'$"):
        cache(pictures, "embedded", out, text_len=16, shard_size=2, pipe=pipe)
    assert not (out / "index.json").exists()
    cache(pictures, "embedded", out, text_len=16, shard_size=2, pipe=pipe)
    assert (out / "index.json").read_bytes() == content


def test_out_of_memory_ends_the_run_and_is_no_damaged_picture(pipe, pictures, tmp_path, monkeypatch):
    def run(**options):
        return cache(pictures, "embedded", tmp_path / "cache", text_len=16, shard_size=2, pipe=pipe, **options)

    def starve(done, total):
        if done == 3:
            monkeypatch.setattr(pipe.vae, "encode", lambda pixels: torch.empty(1 << 60, dtype=torch.uint8))

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        run(on_item=starve)
    assert [place.name for place in (tmp_path / "cache").iterdir()] == ["00000.safetensors"]
    monkeypatch.undo()
    monkeypatch.setattr(Image.Image, "convert", lambda *arguments: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        run()
    monkeypatch.undo()
    assert run().skipped == ()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("mean", lambda t: t.to(torch.int32), r"00000000\.mean is I32 \[8, 16, 16\]; it must be one of .*'F32'"),
        ("mean", lambda t: t[:, :8], r"00000000\.mean is F32 \[8, 8, 16\].*\[8, 16, 16\], as index.json says"),
        ("logvar", lambda t: t[0], r"00000000\.logvar must have 3 dimensions, none of them 0, got \[16, 16\]"),
        ("prompt_embeds", lambda t: t[None], r"00000000\.prompt_embeds must have 2 dimensions"),
        ("pooled", lambda t: t[:5], r"00000000\.pooled is F32 \[5\]"),
        ("pooled", None, r"lacks 00000000\.pooled, which index.json names"),
    ],
)
def test_tensors_of_another_type_or_shape_than_the_index_says_are_refused(
    pipe, cached, tmp_path, part, change, message
):
    out = shutil.copytree(cached, tmp_path / "cache")
    shard, key = out / "00000.safetensors", f"00000000.{part}"
    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    changed = {} if change is None else {key: change(tensors[key]).contiguous()}
    del tensors[key]
    save_file(tensors | changed, shard, metadata)
    with pytest.raises(ValueError, match=message):
        CachedSamples(out)
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"00000\.safetensors is damaged: delete it and cache again"):
        CachedSamples(out)


@pytest.fixture(scope="module")
def cached(pipe, tmp_path_factory):
    """A cache of one image."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "0.png").write_bytes(png())
    (folder / "0.txt").write_text("noise")
    cache(folder, "embedded", folder / "cache", text_len=16, pipe=pipe)
    return folder / "cache"


def test_samples_in_memory_are_checked_too():
    good = Sample(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), torch.zeros(3, 5), torch.zeros(6))
    MemorySamples([good])
    for changed, error, message in (
        (
            {"mean": torch.zeros(2, 4, 4, dtype=torch.int64)},
            TypeError,
            "sample 1: mean must be a floating-point tensor, got",
        ),
        ({"mean": np.zeros((2, 4, 4))}, TypeError, "mean must be a floating-point tensor, got ndarray"),
        ({"mean": torch.zeros(4, 4)}, ValueError, r"mean must have 3 dimensions, none of them 0, got \[4, 4\]"),
        ({"logvar": torch.zeros(2, 4, 6)}, ValueError, r"mean is \[2, 4, 4\] and logvar \[2, 4, 6\]"),
        ({"pooled": torch.full((6,), float("inf"))}, ValueError, "pooled holds numbers that are not finite"),
    ):
        with pytest.raises(error, match=message):
            MemorySamples([good, dataclasses.replace(good, **changed)])


def test_captions_keep_their_unusual_characters_and_unusable_ones_are_named(tmp_path):
    for name in "abcdef":
        (tmp_path / f"{name}.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("\ufeffone\u2028two\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    lines = [
        '{"file_name": "c.png", "text": "one\u2028two\u0085three"}',
        '{"file_name": "d.png", "text": "\\ud800"}',
        '{"file_name": "e.png", "text": "x", "text": "y"}',
        '{"file_name": "c.png", "text": "again"}',
        '{"file_name": "f.png", "text": ' + "[" * 100_000,
    ]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text(lines[0] + "\r\n", encoding="utf-8", newline="")
    items, skipped = find_items(tmp_path)
    assert [(item.name, item.caption) for item in items] == [
        ("a.png", "one\u2028two"),
        ("c.png", "one\u2028two\u0085three"),
    ]
    assert skipped[0].name == "b.png"
    assert "not UTF-8 text" in skipped[0].reason
    messages = ("not valid Unicode", "'text' is given twice", "'c.png' is named twice", "nested too deeply")
    for line, message in zip(lines[1:], messages, strict=True):
        metadata.write_text(f"{lines[0]}\n{line}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=f"metadata.jsonl line 2 must hold .*{message}"):
            find_items(tmp_path)


def test_picture_bombs_are_named_and_left_out(pipe, pictures, tmp_path):
    (pictures / "1.png").write_bytes(bomb())
    stripe = io.BytesIO()
    Image.new("L", (16, 60_000)).save(stripe, format="PNG")
    (pictures / "2.png").write_bytes(stripe.getvalue())
    done = cache(pictures, "embedded", tmp_path / "cache", size=(64, 64), text_len=16, pipe=pipe)
    assert [entry["name"] for entry in CachedSamples(done.folder).entries] == ["0.png", "2.png", "3.png", "4.png"]
    assert "could be decompression bomb" in done.skipped[0].reason
    with pytest.raises(ValueError, match="60000 x 16 pixels scaled to cover 1024 x 1024 are 3840000 x 1024"):
        fitted(Image.new("L", (16, 60_000)), (1024, 1024), 16)


def test_what_is_damaged_is_named_and_left_out(pipe, pictures, tmp_path):
    (pictures / "1.png").write_bytes(png(1)[:500])
    (pictures / "2.txt").unlink()
    (pictures / "4.png").write_bytes(png(4, side=4))
    told = []
    done = cache(pictures, "embedded", tmp_path / "cache", text_len=16, pipe=pipe, say=told.append)
    assert done.samples == 2
    assert [lost.name for lost in done.skipped] == ["2.png", "1.png", "4.png"]
    assert "no caption" in told[0]
    assert "damaged image" in told[1]
    assert "4 x 4 pixels" in told[2]
    assert [entry["name"] for entry in CachedSamples(done.folder).entries] == ["0.png", "3.png"]
    assert len(json.loads((done.folder / "index.json").read_text())["skipped"]) == 3


def test_tar_files_are_read_and_a_damaged_one_is_named(tmp_path):
    jpeg = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(jpeg, format="JPEG")
    files = {"a.jpg": jpeg.getvalue(), "a.txt": b"red ", "b.jpg": jpeg.getvalue(), "b.json": b'{"caption": "again"}'}
    whole = tar_of(tmp_path / "0.tar", files | {"c.png": png(), "d.txt": b"no picture"})
    content = whole.read_bytes()
    (tmp_path / "1.tar").write_bytes(content[: len(content) // 3])
    (tmp_path / "2.tar").write_bytes(content[:1536])  # ends after a whole member
    (tmp_path / "3.tar").write_bytes(b"nonsense" * 200)
    items, skipped = find_items(tmp_path)
    assert [(item.name, item.caption) for item in items] == [("0.tar/a", "red"), ("0.tar/b", "again")]
    assert items[1].picture().size == (32, 32)
    assert [lost.name for lost in skipped] == ["0.tar/c", "0.tar/d", "1.tar", "2.tar", "3.tar"]
    assert all("damaged shard" in lost.reason for lost in skipped[2:])
    assert len(find_items(whole)[0]) == 2


def test_captions_may_be_in_metadata_jsonl(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png())
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text('{"file_name": "sub/a.png", "text": "noise"}\n\n{"file_name": "gone.png", "text": "x"}\n')
    items, skipped = find_items(tmp_path)
    assert [(item.name, item.caption) for item in items] == [("sub/a.png", "noise")]
    assert skipped[0].name == "gone.png"
    metadata.write_text('{"file_name": "sub/a.png"}\n')
    with pytest.raises(ValueError, match="line 1 must hold file_name"):
        find_items(tmp_path)
    with pytest.raises(FileNotFoundError):
        find_items(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither images"):
        find_items(tmp_path / "empty")


def test_pictures_are_scaled_to_cover_and_cut_around_the_middle():
    wide = Image.new("RGB", (100, 40), "black")
    wide.paste("white", (40, 0, 60, 40))
    cut = fitted(wide, (32, 32), 16)
    assert cut.size == (32, 32)
    assert cut.getpixel((16, 16)) == (255, 255, 255)
    assert fitted(wide, None, 16).size == (96, 32)


def test_another_models_cache_is_refused(pipe, pictures, tmp_path):
    cache(pictures, "embedded", tmp_path / "cache", text_len=16, pipe=pipe)
    samples = CachedSamples(tmp_path / "cache")
    with pytest.raises(ValueError, match="encoded by encoders other than"):
        check_samples(samples, pipe.transformer, "another", "the cache")
    index = tmp_path / "cache" / "index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match="not the index of a cache"):
        CachedSamples(tmp_path / "cache")


def test_what_is_transparent_lies_on_white(tmp_path):
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (8, 0, 16, 16))
    clear.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("half of a red square")
    [item], _ = find_items(tmp_path)
    assert item.picture().getpixel((0, 0)) == (255, 0, 0)
    assert item.picture().getpixel((12, 0)) == (255, 255, 255)
