"""Latency and compiled sizes of ``examples/serve_cluster.py``: its router against those of Ray Serve.

    python -m bench.serving.run             # needs ray[serve]; writes results/serve.*

Each router has replicas of its own, without graphs in memory. All get the same requests, a burst at once, the routers one after
the other, burst by burst. Images of two routers that are not equal end it. All find the kernels that Inductor keeps on disk: run
it twice, and the second run does not count what the first kernels of a machine cost.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.serve.config import RequestRouterConfig

from bench.machine import facts, write_results

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_cluster.py"
SIZES = ("64x64", "96x64", "96x128", "128x128", "160x128")
ROUTERS = ("default", "default with model ids", "size-aware")

Request = tuple[str, int, int, int]


def example() -> Any:
    """The example as a module that workers get by value."""
    spec = importlib.util.spec_from_file_location("serve_cluster", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_cluster"] = module
    spec.loader.exec_module(module)
    ray.cloudpickle.register_pickle_by_value(module)
    return module


def bursts(module: Any, sizes: tuple[str, ...], count: int, repeats: int) -> list[tuple[str, list[Request]]]:
    """The same requests for all routers, in an order that is not that of sizes. The first finds no graphs."""
    chance = random.Random(0)
    even = [sizes[number % len(sizes)] for number in range(count)]
    popular = [sizes[-1] if number % 5 < 3 else sizes[number % len(sizes)] for number in range(count)]
    found = []
    for name, drawn in (("first", even), *[("even", even), ("most of the largest size", popular)] * repeats):
        chance.shuffle(drawn)
        found.append(
            (
                name,
                [
                    (module.PROMPTS[seed % len(module.PROMPTS)], *map(int, size.split("x")), seed)
                    for seed, size in enumerate(drawn)
                ],
            )
        )
    return found


def served(handle: Any, requests: list[Request], with_ids: bool) -> list[tuple[bytes, str, float]]:
    """PNG, replica, and seconds of each of the requests, all made at once."""
    # Made by one thread: several that make a handle's first options at once give each a router of its own.
    painters = [
        handle.options(multiplexed_model_id=f"{height}x{width}" if with_ids else "") for _, height, width, _ in requests
    ]
    begin = time.perf_counter()

    def one(painter: Any, request: Request) -> tuple[bytes, str, float]:
        png, replica = painter.draw.remote(*request).result()
        return png, replica, time.perf_counter() - begin

    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(one, painters, requests))


def deployed(module: Any, router: str, args: argparse.Namespace) -> Any:
    """A handle of new replicas."""
    options: dict[str, Any] = {}
    if router == "size-aware":
        largest = max(height * width for height, width in (map(int, size.split("x")) for size in args.sizes))
        options["request_router_config"] = RequestRouterConfig(
            request_router_class=module.SizeRouter, request_router_kwargs={"compiling": args.compiling * largest}
        )
    resources = {"num_gpus": 1, "num_cpus": 0} if torch.cuda.is_available() else {"num_cpus": 1}
    painter = module.Painter.options(num_replicas=args.replicas, ray_actor_options=resources, **options)
    return serve.run(painter.bind(args), name=router, route_prefix=None)


def quantiles(seconds: list[float]) -> tuple[float, float]:
    """p50 and p95."""
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return cuts[9], cuts[18]


def measure(module: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per kind of burst and router."""
    handles = {router: deployed(module, router, args) for router in ROUTERS}
    traffic = bursts(module, tuple(args.sizes), args.requests, args.repeats)
    has: dict[str, dict[str, set[tuple[int, int]]]] = {router: defaultdict(set) for router in ROUTERS}
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for burst, requests in traffic:
        pictures: list[bytes] = []
        for router, handle in handles.items():
            answers = served(handle, requests, router != "default")
            pictures = pictures or [png for png, _, _ in answers]
            if pictures != [png for png, _, _ in answers]:
                raise RuntimeError(f"{burst}: {router} has drawn other images than {ROUTERS[0]}")
            for (_, height, width, _), (_, replica, _) in zip(requests, answers, strict=True):
                has[router][replica].add((height, width))
            p50, p95 = quantiles([seconds for _, _, seconds in answers])
            sizes = sorted(map(len, has[router].values()), reverse=True)
            found[burst, router].append({"p50 s": p50, "p95 s": p95, "sizes": sizes})
            print(burst, router, found[burst, router][-1], flush=True)
    return [
        {
            "burst": burst,
            "router": router,
            "bursts": len(all_of),
            "p50 s": round(statistics.median(one["p50 s"] for one in all_of), 2),
            "p95 s": round(statistics.median(one["p95 s"] for one in all_of), 2),
            "sizes compiled per replica": all_of[-1]["sizes"],
        }
        for (burst, router), all_of in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Routers of Ray Serve for requests of many sizes.")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="of the bursts that find graphs")
    parser.add_argument("--compiling", type=float, default=20)
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.backend, args.no_compile, args.fp8, args.weights = "auto", False, False, None

    module = example()
    ray.init(log_to_driver=False, num_cpus=len(ROUTERS) * args.replicas)
    rows = measure(module, args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = facts(
        device,
        ray=ray.__version__,
        model=args.model,
        radius=args.r,
        steps=args.steps,
        replicas=args.replicas,
        requests=args.requests,
        sizes=" ".join(args.sizes),
        compiling=args.compiling,
    )
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for one in rows:
        cells = (" + ".join(map(str, one[name])) if isinstance(one[name], list) else str(one[name]) for name in names)
        lines.append("| " + " | ".join(cells) + " |")
    write_results("serve", about, rows, "\n".join(lines) + "\n", **({"out": args.out} if args.out else {}))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
