"""Pictures, captions and caches: what is drawn, what goes on, what is damaged and named."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import flexclear
from flexclear.distill import CachedSamples
from flexclear.distill.caching import _fitted, cache
from flexclear.distill.models import fingerprint, pipeline_folder
from flexclear.distill.samples import check_samples
from flexclear.distill.sources import find_items


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
    """A folder of five pictures with captions."""
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
    with pytest.raises(FileNotFoundError, match="no finished cache"):
        CachedSamples(out)
    cache(pictures, "embedded", out, text_len=16, shard_size=2, pipe=pipe)
    assert (out / "00000.safetensors").stat().st_mtime_ns == kept
    assert len(CachedSamples(out)) == 5
    assert torch.isfinite(CachedSamples(out)[2].mean).all()
    with pytest.raises(ValueError, match="other pictures, settings or encoders"):
        cache(pictures, "embedded", out, text_len=24, shard_size=2, pipe=pipe)


def test_what_is_damaged_is_named_and_left_out(pipe, pictures, tmp_path):
    (pictures / "1.png").write_bytes(png(1)[:500])
    (pictures / "2.txt").unlink()
    (pictures / "4.png").write_bytes(png(4, side=4))
    told = []
    done = cache(pictures, "embedded", tmp_path / "cache", text_len=16, pipe=pipe, say=told.append)
    assert done.samples == 2
    assert [lost.name for lost in done.skipped] == ["2.png", "1.png", "4.png"]
    assert "no caption" in told[0]
    assert "damaged picture" in told[1]
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
    with pytest.raises(ValueError, match="neither pictures"):
        find_items(tmp_path / "empty")


def test_pictures_are_scaled_to_cover_and_cut_around_the_middle():
    wide = Image.new("RGB", (100, 40), "black")
    wide.paste("white", (40, 0, 60, 40))
    fitted = _fitted(wide, (32, 32), 16)
    assert fitted.size == (32, 32)
    assert fitted.getpixel((16, 16)) == (255, 255, 255)
    assert _fitted(wide, None, 16).size == (96, 32)


def test_another_models_cache_is_refused(pipe, pictures, tmp_path):
    cache(pictures, "embedded", tmp_path / "cache", text_len=16, pipe=pipe)
    samples = CachedSamples(tmp_path / "cache")
    with pytest.raises(ValueError, match="encoded by other encoders"):
        check_samples(samples, pipe.transformer, "another", "the cache")
    index = tmp_path / "cache" / "index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match="no index of a cache"):
        CachedSamples(tmp_path / "cache")
