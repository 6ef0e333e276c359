"""Serve requests of many sizes from several GPUs with Ray Serve. Each goes to a replica that has compiled its size.

    pip install 'ray[serve]'
    python examples/serve_cluster.py --replicas 4 --weights clear_local_16.safetensors --fp8    # FLUX.1-dev, until Ctrl-C
    curl -d '{"prompt": "a red apple", "height": 1024, "width": 1024}' -o apple.png http://127.0.0.1:8000/
    python examples/serve_cluster.py --model embedded --r 4 --steps 4 --sizes 64x64 96x64 128x128 --requests 50

Replicas are Ray actors on the GPUs of this machine, or of the cluster that RAY_ADDRESS names, each with a windowed pipeline. At
first each size is compiled by one replica, and by another only when that one is overloaded. If a replica is lost, another one
takes its requests. ``--requests`` sends some requests.
"""

import argparse
import asyncio
import io
import itertools
import json
import logging
import math
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flexclear
import ray
import torch
from diffusers import DiffusionPipeline
from ray import serve
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.request_router import MultiplexMixin, RequestRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

logger = logging.getLogger("ray.serve")

# The process or node is lost, Ray's memory monitor has killed it, or the finished image is lost with its node.
LOST = RayActorError, OutOfMemoryError, ObjectLostError
TRIES = 3  # not more, since the request may be what kills its replica
PROMPTS = ["a red apple on a blue background", "a small blue plane over the sea", "a lighthouse in a thunderstorm"]


class SizeRouter(MultiplexMixin, RequestRouter):
    """Sends a request to the replica that has compiled its size; of several, to the one with the fewest pixels waiting. It
    chooses another one if so many fewer pixels wait there that compiling is worth it. A new size goes where the fewest wait. A
    request that has lost its replica goes to another one.

    A size is a multiplexed model id of Serve, which reports what each replica has. What waits there is known from the requests
    that this router has sent, those of one ingress.
    """

    queue_len_response_deadline_s = 1  # seconds; while it compiles, a replica answers late

    def initialize_state(self, compiling: float) -> None:
        """``compiling``: cost of making a size's masks and graphs, in pixels that could be drawn in that time."""
        self._compiling = compiling
        self._unfinished = {}  # by request's id: the request, its replica, its pixels
        self._given = {}  # by replica: sizes given to it, before Serve reports them
        self._tries = {}  # by request's id, which all its tries share: the replica of each try

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # if the chosen one does not take it
        request_id = pending_request.metadata.internal_request_id
        size = pending_request.metadata.multiplexed_model_id
        self._unfinished.pop(request_id, None)
        waiting = Counter()
        for other, (request, replica_id, pixels) in list(self._unfinished.items()):  # another thread removes some
            if request.future.cancelled():
                self._unfinished.pop(other, None)
            else:
                waiting[replica_id] += pixels

        def cost(replica):
            known = size in replica.multiplexed_model_ids or size in self._given.get(replica.replica_id, ())
            return waiting[replica.replica_id] + (0 if known else self._compiling)

        tries = self._tries.setdefault(request_id, {})
        lost = {replica_id for begun, replica_id in tries.items() if begun != pending_request.created_at}
        best = min(candidate_replicas, key=lambda replica: (replica.replica_id in lost, cost(replica)))
        tries[pending_request.created_at] = best.replica_id
        while len(self._tries) > 1000:
            del self._tries[next(iter(self._tries))]
        self._unfinished[request_id] = pending_request, best.replica_id, math.prod(map(int, size.split("x")))
        self._given.setdefault(best.replica_id, set()).add(size)
        return [[best]]

    def on_request_completed(self, replica_id, internal_request_id):
        _, latest, _ = self._unfinished.get(internal_request_id, (None, None, None))
        if latest == replica_id:  # otherwise this is a late notice of an earlier try
            self._unfinished.pop(internal_request_id, None)

    def on_replica_actor_died(self, replica_id):
        super().on_replica_actor_died(replica_id)
        self._forget_the_gone()

    def update_replicas(self, replicas):
        super().update_replicas(replicas)
        self._forget_the_gone()

    def _forget_the_gone(self) -> None:
        for request_id, (_, replica_id, _) in list(self._unfinished.items()):
            if replica_id not in self.curr_replicas:
                self._unfinished.pop(request_id, None)
        for replica_id in list(self._given):
            if replica_id not in self.curr_replicas:
                self._given.pop(replica_id, None)


@serve.deployment(max_ongoing_requests=1000)  # a request waits at its size's replica
class Painter:
    """A pipeline, which draws one image at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        on_gpu = torch.cuda.is_available()
        folder = flexclear.embedded.model_directory() if args.model == "embedded" else args.model
        self._pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16 if on_gpu else torch.float32)
        self._pipe.to("cuda" if on_gpu else "cpu")
        self._pipe.set_progress_bar_config(disable=True)
        flexclear.transform(self._pipe, r=args.r, backend=args.backend)
        if args.weights:
            flexclear.load_weights(self._pipe, args.weights)
        flexclear.optimize(self._pipe, fp8=args.fp8, compile=not args.no_compile)
        self._steps = args.steps
        self._thread = ThreadPoolExecutor(1)  # separate from Serve's own, which must keep answering

    async def draw(self, prompt: str, height: int, width: int, seed: int) -> tuple[bytes, str]:
        """Draw an image; return its PNG and the replica's name."""
        await self._have(f"{height}x{width}")
        png = await self._call(prompt, height, width, self._steps, seed)
        return png, serve.get_replica_context().replica_id.unique_id

    @serve.multiplexed(max_num_models_per_replica=-1)
    async def _have(self, size: str) -> str:
        """Make a size's masks and graphs once; Serve then tells routers that this replica has it."""
        await self._call(PROMPTS[0], *map(int, size.split("x")), 1, 0)
        return size

    async def _call(self, *call) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._png, *call)

    def _png(self, prompt: str, height: int, width: int, steps: int, seed: int) -> bytes:
        generator = torch.Generator().manual_seed(seed)
        call = {"height": height, "width": width, "num_inference_steps": steps, "generator": generator}
        file = io.BytesIO()
        self._pipe(prompt, **call).images[0].save(file, "png")
        return file.getvalue()


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
class Front:
    """Takes JSON over HTTP: ``prompt``, ``height``, ``width``, and optionally ``seed``. Answers with a PNG.

    If a replica is lost, its requests are sent again, with at most ``TRIES`` tries each: an image depends on its request alone.
    Other errors, such as those of the pipeline or Serve's back-pressure, are raised at once.
    """

    def __init__(self, painters, sizes: list[tuple[int, int]]) -> None:
        self._painters, self._sizes = painters, sizes

    async def __call__(self, request: Request) -> Response:
        try:
            wanted = await request.json()
            prompt, size, seed = str(wanted["prompt"]), (wanted["height"], wanted["width"]), int(wanted.get("seed", 0))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return JSONResponse({"error": f"not a request: {error!r}"}, 400)
        if size not in self._sizes:  # otherwise anyone could have any number of sizes compiled
            return JSONResponse({"error": f"size {size} is not served; sizes are {self._sizes}"}, 400)
        painters = self._painters.options(multiplexed_model_id="{}x{}".format(*size))
        for number in range(1, TRIES + 1):
            try:
                png, replica = await painters.draw.remote(prompt, *size, seed)
                return Response(png, media_type="image/png", headers={"x-replica": replica})
            except LOST as error:
                lost = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                logger.warning(f"try {number} of {TRIES} lost its replica: {lost}")
            except DeploymentUnavailableError as error:  # no replica can be started
                return JSONResponse({"error": error.message}, 503)
        return JSONResponse({"error": f"the replica was lost in each of {TRIES} tries; the last error: {lost}"}, 503)


def application(args: argparse.Namespace, sizes: list[tuple[int, int]]) -> serve.Application:
    largest = max(map(math.prod, sizes))
    router = RequestRouterConfig(
        request_router_class=SizeRouter, request_router_kwargs={"compiling": args.compiling * largest}
    )
    resources = {"num_gpus": 1, "num_cpus": 0} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
    painters = Painter.options(
        num_replicas=args.replicas, ray_actor_options=resources, request_router_config=router
    ).bind(args)
    return Front.bind(painters, sizes)


def ask(prompt: str, height: int, width: int, seed: int) -> tuple[bytes, str, float]:
    """Request an image over HTTP; return PNG, replica, and seconds."""
    body = json.dumps({"prompt": prompt, "height": height, "width": width, "seed": seed})
    begin = time.perf_counter()
    with urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:8000/", body.encode())) as answer:
        return answer.read(), answer.headers["x-replica"], time.perf_counter() - begin


def ask_at_once(requests: list[tuple[str, int, int, int]]) -> list[tuple[bytes, str, float]]:
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(lambda request: ask(*request), requests))


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve requests of many sizes from several GPUs.")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="hub id, pipeline folder or 'embedded'")
    parser.add_argument("--sizes", nargs="+", default=["1024x1024", "1536x1024", "2048x2048"], help="HEIGHTxWIDTH")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument(
        "--compiling", type=float, default=10, help="cost of compiling a size, in images of the largest size"
    )
    parser.add_argument("--r", type=int, default=16, help="window radius in tokens")
    parser.add_argument("--weights", help="safetensors file distilled for this radius")
    parser.add_argument("--fp8", action="store_true", help="run the linear layers in FP8")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--backend", default="auto", choices=["auto", "flex", "sdpa"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--requests", type=int, help="send this many at once, then exit")
    parser.add_argument("--out", type=Path, default=Path("served"))
    args = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]

    ray.init(log_to_driver=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=8000))
    try:
        serve.run(application(args, sizes))
        started = time.perf_counter()
        ask_at_once([(PROMPTS[0], *size, 0) for size in sorted(sizes, key=math.prod, reverse=True)])
        print(f"{len(sizes)} sizes compiled in {time.perf_counter() - started:.1f} s")
        if args.requests is None:
            print("http://127.0.0.1:8000/ takes requests")
            threading.Event().wait()
        args.out.mkdir(parents=True, exist_ok=True)
        pairs = zip(itertools.cycle(PROMPTS), itertools.cycle(sizes))
        requests = [(prompt, *size, seed) for seed, (prompt, size) in zip(range(args.requests), pairs, strict=False)]
        drawn = defaultdict(Counter)
        for (_, height, width, seed), (png, replica, seconds) in zip(requests, ask_at_once(requests), strict=True):
            (args.out / f"{seed}.png").write_bytes(png)
            print(f"{seed}.png: {height} x {width}, {seconds:.2f} s, {replica}")
            drawn[replica][f"{height} x {width}"] += 1
        for replica, counts in drawn.items():
            print(f"{replica} has drawn {', '.join(f'{count} of {size}' for size, count in counts.items())}")
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
