"""``flexclear data generate`` and ``data cache`` with ``--ray`` write what one process writes."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle

import pytest
import torch
from PIL import Image

from flexclear.cluster import data as cluster_data
from flexclear.cluster.connection import Cluster, Node
from flexclear.cluster.data import CachingJob
from flexclear.distill.caching import Part, cache
from flexclear.distill.drawing import DataPlan, draw_data
from flexclear.distill.models import fingerprint, pipeline_folder
from flexclear.distill.sources import find_items
from flexclear.generation.settings import GenerateSettings

from helpers.ray_cluster import in_cluster


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.kept
def test_data_of_a_cluster_is_that_of_one_process_and_goes_on_there(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\na blue book\n")
    for name in ("half", "five"):
        (tmp_path / name).mkdir()
    draw = [
        "data",
        "generate",
        "embedded",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--steps",
        "2",
        "--size",
        "64x64",
    ]
    encode = ["data", "cache", "--model", "embedded", "--text-len", "16", "--shard-size", "2"]
    both, alone = str(tmp_path / "both"), str(tmp_path / "alone")
    commands = [
        [*draw, "--count", "2", "--out", both],  # begun by one process,
        [*draw, "--count", "5", "--out", both, "--ray", "ADDRESS"],  # gone on with by a cluster,
        [*draw, "--count", "6", "--out", both],  # and completed by one process
        [*draw, "--count", "6", "--out", alone],
        [*encode, both, "--out", str(tmp_path / "cached"), "--ray", "ADDRESS"],
        [*encode, alone, "--out", str(tmp_path / "cached alone")],
        [*draw, "--count", "7", "--shard", "0/2", "--out", both, "--ray", "ADDRESS"],
        [*draw, "--count", "7", "--guidance", "2", "--out", both, "--ray", "ADDRESS"],
    ]
    found = in_cluster("runs", commands=commands)["runs"]
    assert [status for status, _, _ in found] == [0] * 6 + [2] * 2, found
    assert "both: 3 images drawn, 2 were there already" in found[1][1]
    assert "both: 1 images drawn, 5 were there already" in found[2][1]
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")
    assert contents(tmp_path / "cached") == contents(tmp_path / "cached alone")
    assert "--ray shares them out by itself" in found[6][2]
    assert "guidance was null, is 2.0" in found[7][2]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (64, 64), (40 * number, 0, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red apple\n")
    (folder / "3.png").write_bytes(b"no image")
    return folder


def job_for(images):
    files = (fingerprint(pipeline_folder("embedded")),)
    job = CachingJob(str(images), "embedded", None, 16, "cpu", torch.float32, files)
    return pickle.loads(pickle.dumps(job))


def test_parts_that_others_encode_are_those_that_one_process_encodes(tmp_path, images):
    job = job_for(images)
    assert job.look() == job.files
    work = job.open()
    asked = []

    def elsewhere(parts):
        asked.append([part.name for part in parts])
        for part in reversed(parts):  # they come back in any order
            yield part, work.run(pickle.loads(pickle.dumps(part)))

    seen, options = [], {"text_len": 16, "shard_size": 2}
    done = cache(
        images, "embedded", tmp_path / "a", elsewhere=elsewhere, on_item=lambda *item: seen.append(item), **options
    )
    assert cache(images, "embedded", tmp_path / "b", **options).skipped == done.skipped
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert done.samples == 4
    assert max(seen) == (5, 5)
    (tmp_path / "a" / "00001.safetensors").unlink()
    cache(images, "embedded", tmp_path / "a", elsewhere=elsewhere, **options)
    assert asked == [["00000.safetensors", "00001.safetensors", "00002.safetensors"], ["00001.safetensors"]]


def test_an_image_that_a_node_does_not_have_is_not_taken_for_a_damaged_one(images):
    work = job_for(images).open()
    [item] = [item for item in find_items(images)[0] if item.name == "0.png"]
    part = Part("00000.safetensors", 0, (item,), (item.digest(),), "work")
    (images / "0.png").unlink()
    with pytest.raises(OSError, match=r"0\.png is not the same image here"):
        work.run(part)
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        dataclasses.replace(job_for(images), source="nowhere").look()


class Alone:
    """A crew in this process, which does the last call first."""

    def __init__(self, work):
        self._work = work

    def run(self, calls):
        for call in reversed(calls):
            yield call, self._work.run(pickle.loads(pickle.dumps(call.payload)))


@pytest.fixture
def without_ray(monkeypatch):
    @contextlib.contextmanager
    def crew_for(job, cluster, actors, count, say):
        work = pickle.loads(pickle.dumps(job)).open()
        yield Alone(work), work.told

    @contextlib.contextmanager
    def cluster_at(address, device):
        yield Cluster(None, (Node("0", "10.0.0.1", 1, 0),), False)

    monkeypatch.setattr("flexclear.cluster.data.crew_for", crew_for)
    monkeypatch.setattr("flexclear.cluster.data.cluster_at", cluster_at)


def test_images_that_others_draw_are_those_that_one_process_draws(tmp_path, without_ray):
    fast = {"prompts": ("a red apple", "a blue book"), "sizes": ((64, 64),), "steps": 1, "text_len": 16}
    plans = {
        name: DataPlan(GenerateSettings("embedded", out=tmp_path / name, r="dense", device="cpu", **fast), 3)
        for name in ("a", "b")
    }
    names = [drawn.path.name for drawn in cluster_data.draw_data(plans["a"], "auto")]
    assert names == ["000002.png", "000001.png", "000000.png"]
    list(draw_data(plans["b"]))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert list(cluster_data.draw_data(plans["a"], "auto")) == [], "nothing is drawn again"
    with pytest.raises(ValueError, match=r"--shard 0/2 .* --ray shares them out by itself"):
        list(cluster_data.draw_data(dataclasses.replace(plans["a"], shard=(0, 2)), "auto"))
