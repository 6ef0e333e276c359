"""``examples/serve_cluster.py`` on two replicas: each size stays on one, and images are those of one process."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flexclear
from flexclear import embedded

from helpers.generate_calls import pixels
from helpers.ray_cluster import needs_ray, run_alone

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_cluster.py"


def needs_serve():
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed (ray[serve])")


@pytest.mark.kept
def test_requests_go_to_the_replica_that_has_their_size_and_images_are_those_of_one_process(tmp_path):
    needs_ray()
    needs_serve()
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


@pytest.mark.kept
def test_what_a_killed_replica_had_is_drawn_by_another():
    needs_ray()
    needs_serve()
    with tempfile.TemporaryDirectory(prefix="rc") as folder:
        result = Path(folder) / "result.json"
        given = json.dumps({"file": str(EXAMPLE), "seeds": 12})
        done = run_alone(folder, sys.executable, "-m", "helpers.serve_scenarios", "killed", given, str(result))
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(result.read_text(encoding="utf-8"))
    images = [digest for digest, _ in found["undisturbed"]]
    assert len(set(images)) == 12, "seeds make no difference"
    assert found["waiting"] >= 6, "the replica that was killed had nothing to do"
    for burst in ("disturbed", "again", "after"):
        assert [digest for digest, _ in found[burst]] == images, burst
    killed = {replica for _, replica in found["undisturbed"]} - {replica for _, replica in found["again"]}
    assert len(killed) == len(found["new"]) == 1
    assert all(replica != other for replica, other in found["avoided"]), "sent again to where it was lost"
    status, said = found["ended"]
    assert status == 503, said
    assert re.match(
        r"the replica was lost in each of 3 tries; the last error: Actor\w+Error: ", json.loads(said)["error"]
    )
    replicas, unfinished, given = found["kept"]
    assert replicas
    assert unfinished == 0
    assert set(given) <= set(replicas), "the router keeps replicas that are gone"


def test_only_what_a_lost_replica_had_is_sent_again(monkeypatch):
    needs_serve()
    from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, OutOfMemoryError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    spec = importlib.util.spec_from_file_location("serve_cluster", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serve_cluster", module)
    spec.loader.exec_module(module)

    def answer(*happens):
        """Of one request whose tries come to these, and how many of them were made."""
        left = list(happens)

        async def draw(*_):
            result = left.pop(0)
            if isinstance(result, Exception):
                raise result
            return result

        async def body():
            return {"prompt": "a", "height": 64, "width": 64}

        painters = SimpleNamespace(options=lambda **_: SimpleNamespace(draw=SimpleNamespace(remote=draw)))
        front = module.Front.func_or_class(painters, [(64, 64)])
        found = asyncio.run(front(SimpleNamespace(json=body)))
        return found.status_code, found.body, len(happens) - len(left)

    died, away, image = ActorDiedError(), ActorUnavailableError("no network", None), (b"png", "some replica")
    assert answer(died, away, image) == (200, b"png", 3)
    for other in (ObjectLostError("0" * 56, None, ""), OutOfMemoryError("of the node")):
        assert answer(other, image) == (200, b"png", 2)
    status, said, tries = answer(died, died, away, image)
    assert (status, tries) == (503, 3)
    assert b"the replica was lost in each of 3 tries; the last error: ActorUnavailableError" in said
    status, said, tries = answer(DeploymentUnavailableError("Painter"), image)
    assert (status, tries) == (503, 1)
    assert b"failed to deploy" in said
    for other in (BackPressureError(2, 1), MemoryError("of a pipeline")):
        with pytest.raises(type(other)):
            answer(other, image)
