"""``examples/serve_cluster.py`` on two replicas: each size stays on one, and images are those of one process."""

from __future__ import annotations

import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import flexclear
from flexclear import embedded

from helpers.generate_calls import pixels
from helpers.ray_cluster import needs_ray, run_alone

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_cluster.py"


@pytest.mark.kept
def test_requests_go_to_the_replica_that_has_their_size_and_images_are_those_of_one_process(tmp_path):
    needs_ray()
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed (ray[serve])")
    options = ["--model", "embedded", "--r", "2", "--steps", "1", "--sizes", "64x64", "48x96", "--backend", "sdpa"]
    with tempfile.TemporaryDirectory(prefix="rc") as folder:
        run = [sys.executable, str(EXAMPLE), *options, "--no-compile", "--requests", "6", "--out", str(tmp_path)]
        done = run_alone(folder, *run)
    assert done.returncode == 0, done.stdout + done.stderr
    drawn = re.findall(r"(\d)\.png: (\d+) x (\d+), \S+ s, (\w+)", done.stdout)
    assert [number for number, *_ in drawn] == list("012345")
    replicas = defaultdict(set)
    for _, height, width, replica in drawn:
        replicas[height, width].add(replica)
    assert [len(which) for which in replicas.values()] == [1, 1], "a size is on more than one replica"
    assert len(set.union(*replicas.values())) == 2, "a replica has nothing to do"
    pipe = flexclear.transform(embedded.pipeline(), r=2, backend="sdpa")
    prompts = ["a red apple on a blue background", "a small blue plane over the sea", "a lighthouse in a thunderstorm"]
    for seed, (prompt, size) in enumerate(zip(prompts * 2, [(64, 64), (48, 96)] * 3, strict=True)):
        call = {"height": size[0], "width": size[1], "num_inference_steps": 1}
        image = pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]
        assert pixels(tmp_path / f"{seed}.png") == (image.size, image.convert("RGB").tobytes())
