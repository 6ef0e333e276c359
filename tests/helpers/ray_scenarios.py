"""What tests do with a Ray cluster; runs in the cluster's namespaces, see ``helpers.ray_cluster``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


class Nodes:
    """A cluster of two nodes: the head, and ``second`` with its own environment variables."""

    def __init__(self, **environment):
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        self.second = self.add(**environment)
        self.address = self.cluster.address

    def add(self, **env):
        return self.cluster.add_node(**NODE, **({"env_vars": env} if env else {}))

    def remove(self, node):
        self.cluster.remove_node(node, allow_graceful=False)

    def processor_seconds(self):
        import psutil

        return sum(sum(one.cpu_times()[:4]) for one in psutil.process_iter())


def command(*arguments):
    """Status, standard output and standard error of ``flexclear``."""
    from flexclear.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def actors():
    """Processes of actors of flexclear."""
    import psutil

    return [one.pid for one in psutil.process_iter() if "ray::Worker" in " ".join(one.cmdline())]


class Disturbed:
    """Acts as soon as a folder holds a certain number of images: in a thread, while a command runs."""

    def __init__(self, folder, **steps):
        import threading

        self.folder, self.did, self._over = Path(folder), [], False
        self._thread = threading.Thread(target=self._run, args=(steps,))

    def _run(self, steps):
        for name, (count, act) in steps.items():
            while len(list(self.folder.glob("*.png"))) < count:
                if self._over:
                    return
                time.sleep(0.01)
            self.did.append([name, act()])

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._over = True
        self._thread.join()


def kill_one():
    [pid, *_] = actors()
    os.kill(pid, signal.SIGKILL)
    return pid


def images(nodes, arguments, out, alone, removed_after, killed_after=None):
    """``flexclear generate --ray``, during which first an actor is killed and then a node removed; then without a cluster."""
    steps = {} if killed_after is None else {"killed": (killed_after, kill_one)}
    steps["removed"] = removed_after, lambda: nodes.remove(nodes.second)
    with Disturbed(out, **steps) as disturbed:
        status, told, said = command(*arguments, "--out", out, "--ray", nodes.address)
    alone = command(*arguments, "--out", alone)
    return {"status": [status, alone[0]], "out": told, "err": said, "did": [name for name, _ in disturbed.did]}


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def interrupted(nodes, arguments, out, alone, after):
    """``flexclear generate --ray`` until Ctrl-C; the actors that remain afterwards; the same command with ``--resume``."""
    with Disturbed(out, interrupted=(after, interrupt)):
        first = command(*arguments, "--out", out, "--ray", nodes.address)
    kept = sorted(path.name for path in Path(out).iterdir())
    end = time.monotonic() + 120
    while left := actors():
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    resumed = command(*arguments, "--out", out, "--resume", "--ray", nodes.address)
    return {
        "first": first,
        "kept": kept,
        "actors": left,
        "resumed": resumed,
        "alone": command(*arguments, "--out", alone),
    }


def crews(nodes, cases):
    """What crews do: for each case (job, calls as (text, key, seconds, what happens)), the results, lines, and error, if any."""
    from flexclear.cluster.connection import cluster_at
    from flexclear.cluster.crew import crew_for
    from flexclear.cluster.queue import Call

    from helpers.ray_jobs import Note

    found = []
    for options, calls in cases:
        told = {"results": [], "lines": [], "error": None}
        os.makedirs(options["folder"])
        try:
            with (
                cluster_at(nodes.address, "auto") as cluster,
                crew_for(Note(**options), cluster, None, len(calls), told["lines"].append) as (crew, _),
            ):
                asked = [Call(text, key, 1, (text, seconds, happens)) for text, key, seconds, happens in calls]
                for call, (_, pid) in crew.run(asked):
                    told["results"].append((call.name, call.key, pid))
        except (OSError, ValueError, RuntimeError) as error:
            told["error"] = f"{type(error).__name__}: {error}"
        found.append(told)
    return {"cases": found}


def runs(nodes, commands):
    """The outcomes of commands that run one after the other; ``ADDRESS`` stands for the cluster's address."""
    return {"runs": [command(*(nodes.address if part == "ADDRESS" else part for part in one)) for one in commands]}


def tokens(nodes, arguments, out, home):
    """A command with a cluster of this process, which has a token, then with this one, which has none; what was kept at home;
    the command with this one, found where a token is kept at home."""
    os.environ["HOME"] = home
    del os.environ["RAY_AUTH_MODE"]  # as of a user who knows nothing of it
    found = [command(*arguments, "--out", f"{out}{at}", "--ray", at) for at in ("local", nodes.address)]
    kept = os.listdir(home)
    token = Path(home, ".ray", "auth_token")
    token.parent.mkdir(exist_ok=True)
    token.write_text("0" * 64, encoding="utf-8")
    found.append(command(*arguments, "--out", f"{out}auto", "--ray", "auto"))
    return {"runs": found, "kept": kept, "mode": os.environ.get("RAY_AUTH_MODE")}


if __name__ == "__main__":
    name, given, result = sys.argv[1:]
    given = json.loads(given)
    cluster = Nodes(**given.pop("environment", {}))
    found = globals()[name](cluster, **given)
    found["processor seconds"] = cluster.processor_seconds()
    Path(result).write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)  # the kernel ends the rest of the namespace
