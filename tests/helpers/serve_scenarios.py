"""``examples/serve_cluster.py`` with a replica that is killed; runs in namespaces of its own, see ``helpers.ray_cluster``."""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
import urllib.error
from pathlib import Path


def loaded(file):
    """The example as a module that workers get by value."""
    import ray

    spec = importlib.util.spec_from_file_location("serve_cluster", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_cluster"] = module
    spec.loader.exec_module(module)
    for name in ("serve_cluster", __name__):
        ray.cloudpickle.register_pickle_by_value(sys.modules[name])
    return module


def told(answers):
    """Digest of the image, and replica, of each answer."""
    return [(hashlib.sha256(png).hexdigest(), replica) for png, replica, _ in answers]


def replicas():
    """Processes of replicas that draw."""
    import psutil

    return [one.pid for one in psutil.process_iter() if "ray::ServeReplica:default:Painter" in " ".join(one.cmdline())]


def application(module, args, sizes):
    """The example's application. Its ingress also reports what the router keeps, and some prompts kill a replica or seem to."""
    from ray.exceptions import OutOfMemoryError
    from ray.serve import get_replica_context

    class Front(module.Front.func_or_class):
        def kept(self):
            [router] = [one for one in gc.get_objects() if type(one).__name__ == "SizeRouter"]
            replicas = {one.unique_id for one in router.curr_replicas}
            return replicas, len(router._unfinished), {one.unique_id for one in router._given}

    class Painter(module.Painter.func_or_class):
        def _png(self, prompt, *rest):
            if prompt == "ends its replica":
                os._exit(1)
            if prompt == f"not on {get_replica_context().replica_id.unique_id}":
                raise OutOfMemoryError("as Ray's monitor has it")
            return super()._png(prompt, *rest)

    names = {"Front": Front, "Painter": Painter}
    for name, kind in names.items():
        kind.__module__, kind.__qualname__ = __name__, name
        setattr(module, name, getattr(module, name).options(func_or_class=kind))
    return module.application(args, sizes)


def killed(file, seeds):
    """Send requests; again while a replica that has some of them is killed; and until the new replica has answered. Then send
    requests that seem to kill a replica, and one that kills each replica that draws it."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    module = loaded(file)
    sizes = [(64, 64), (48, 96)]
    args = argparse.Namespace(
        model="embedded",
        r=2,
        weights=None,
        fp8=False,
        steps=4,
        backend="sdpa",
        no_compile=True,
        replicas=2,
        compiling=1,
    )
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=8000))
    handle = serve.run(application(module, args, sizes))
    requests = [(module.PROMPTS[0], *sizes[seed % 2], seed) for seed in range(seeds)]
    undisturbed = told(module.ask_at_once(requests))
    gone = replicas()[0]

    with module.ThreadPoolExecutor(len(requests)) as threads:
        asked = [threads.submit(module.ask, *request) for request in requests]
        while not any(one.done() for one in asked):
            time.sleep(0.01)
        waiting = sum(not one.done() for one in asked)
        os.kill(gone, signal.SIGKILL)
        disturbed = told(one.result() for one in asked)
    before = {replica for _, replica in undisturbed}
    end = time.monotonic() + 120
    again, new = disturbed, set()
    while not new and time.monotonic() < end:
        again = told(module.ask_at_once(requests))
        new = {replica for _, replica in again} - before
    avoided = [(one, module.ask(f"not on {one}", *size, 0)[1]) for one in {*before, *new} for size in sizes]
    try:
        ended = [200, str(module.ask("ends its replica", *sizes[0], 0))]
    except urllib.error.HTTPError as error:
        ended = [error.code, error.read().decode()]
    after = told(module.ask_at_once(requests))
    kept = handle.kept.remote().result()
    return {
        "avoided": avoided,
        "ended": ended,
        "after": after,
        "waiting": waiting,
        "undisturbed": undisturbed,
        "disturbed": disturbed,
        "again": again,
        "new": sorted(new),
        "kept": [sorted(kept[0]), kept[1], sorted(kept[2])],
    }


if __name__ == "__main__":
    name, given, result = sys.argv[1:]
    Path(result).write_text(json.dumps(globals()[name](**json.loads(given))), encoding="utf-8")
    os._exit(0)  # the kernel ends the rest of the namespace
