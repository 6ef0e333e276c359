"""Actors on two nodes: what is lost is done again, what kills or fails is named, and nodes that cannot work are found first."""

from __future__ import annotations

import io
import os
import re
import socket
import threading
from types import SimpleNamespace

import pytest

from flexclear.cluster import connection, probe
from flexclear.cluster.connection import Cluster, Node, check_address
from flexclear.cluster.worker import enter

from helpers.ray_cluster import in_cluster


def calls(*names, key="a", seconds=0.05, happens=""):
    return [(name, key, seconds, happens) for name in names]


def test_what_a_worker_had_when_it_was_killed_is_done_by_another_and_nothing_twice(tmp_path):
    asked = [*calls(*"abcd", key="x"), *calls(*"efgh", key="y"), *calls("i", "j", happens="dies once")]
    [lost] = in_cluster("crews", cases=[({"folder": str(tmp_path / "lost")}, asked)])["cases"]
    assert lost["error"] is None
    assert sorted(name for name, _, _ in lost["results"]) == list("abcdefghij")
    assert len([line for line in lost["lines"] if "was lost" in line and "is done by another actor" in line]) == 2
    for name in "abcdefgh":
        assert len((tmp_path / "lost" / name).read_text().splitlines()) == 1, "done twice"
    assert lost["lines"].count("loaded") == 1


@pytest.mark.kept
def test_a_crew_names_what_it_cannot_do(tmp_path):
    jobs = {
        name: ({"folder": str(tmp_path / name), **options}, asked)
        for name, options, asked in (
            ("deadly", {}, [*calls("a", "b"), *calls("c", happens="dies")]),
            ("failing", {}, [*calls("a", happens="raises")]),
            ("loading", {"load": "dies"}, calls("a", "b")),
            ("refused", {"load": "raises"}, calls("a", "b")),
            ("other files", {"found": ["other"], "files": ["same"]}, calls("a")),
            ("unequal", {"by_process": True}, calls("a", "b")),
        )
    }
    found = dict(zip(jobs, in_cluster("crews", cases=list(jobs.values()))["cases"], strict=True))
    assert "c has lost its actor 5 times and is given up" in found["deadly"]["error"]
    assert re.match(r"RuntimeError: node .*: CUDA out of memory, or so \(MemoryError\)", found["failing"]["error"])
    assert "10 actors were lost one after the other" in found["loading"]["error"]
    assert re.match(r"ValueError: node .*: no such weights here", found["refused"]["error"])
    assert "the same names there as here, but other contents" in found["other files"]["error"]
    assert found["other files"]["error"].count("node ") == 3, "every node is named"
    assert re.search(r"would draw differently from the first: pid was \d+, is \d+", found["unequal"]["error"])


@pytest.mark.kept
@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"flexclear/__init__.py": "raise ImportError('not here')"}, "flexclear cannot be imported by .*: not here"),
        (
            {"diffusers-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: diffusers\nVersion: 0.1\n"},
            r"diffusers 0\.1, here \d",
        ),
    ],
    ids=["no package", "another version"],
)
def test_a_node_that_is_unlike_the_others_is_named_before_work(tmp_path, written, said):
    for name, content in written.items():
        (tmp_path / "path" / name).parent.mkdir(parents=True)
        (tmp_path / "path" / name).write_text(content)
    line = ["generate", "embedded", "--prompt", "a", "--out", str(tmp_path / "out"), "--ray", "ADDRESS"]
    environment = {"PYTHONPATH": str(tmp_path / "path")}
    [[status, out, err]] = in_cluster("runs", commands=[line], environment=environment)["runs"]
    assert (status, out) == (2, "")
    assert re.search(rf"--ray: not every node can do this\. node \S+ \(\w+\): {said}", err)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.kept
def test_a_cluster_without_tokens_is_used_after_one_with_them_or_refused(tmp_path):
    (tmp_path / "home").mkdir()
    line = ["generate", "embedded", "--prompt", "a", "--size", "64x64", "--steps", "1", "--r", "4", "--backend", "sdpa"]
    found = in_cluster("tokens", arguments=line, out=str(tmp_path / "out"), home=str(tmp_path / "home"))
    *served, (status, _, refused) = found["runs"]
    assert [status for status, _, _ in served] == [0, 0], served
    assert found["kept"] == [], "a token is left in the user's folder"
    assert status == 2
    assert refused.count("Ray uses no token there but uses one here") == 2, "not of both nodes"
    assert found["mode"] is None


def test_what_ray_changes_about_its_authentication_ends_with_the_connection(monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    from ray._raylet import Config

    for name in (connection.AUTH_MODE, *connection.AUTH_TOKENS):
        monkeypatch.delenv(name, raising=False)
    with connection._authenticated("local"):
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
        os.environ["RAY_AUTH_MODE"] = "token"  # as ray.init does where it starts a cluster
        Config.initialize("")
        assert probe.needs_token()
    assert not {connection.AUTH_MODE, *connection.AUTH_TOKENS} & set(os.environ)
    assert not probe.needs_token()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with connection._authenticated("local"):
        assert "RAY_AUTH_TOKEN" not in os.environ, "the user has decided"
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_an_address_without_a_cluster_is_said_at_once(monkeypatch):
    monkeypatch.setattr(connection, "require", lambda module, purpose: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(OSError, match=r"--ray 127\.0\.0\.1:\d+: no cluster can be reached there"):
            check_address(f"127.0.0.1:{taken.getsockname()[1]}")
        taken.listen()
        check_address(f"127.0.0.1:{taken.getsockname()[1]}")
    for wrong in ("ray://host:10001", "host", "host:", ":6379", "http://host:80", "host:port", ""):
        with pytest.raises(ValueError, match="--ray must be HOST:PORT of a cluster"):
            check_address(wrong)
    check_address("auto"), check_address("local")


def cluster(*resources, gpus=False):
    nodes = tuple(Node(str(number), "10.0.0.1", cpus, gpu) for number, (cpus, gpu) in enumerate(resources))
    return Cluster(None, nodes, gpus)


def test_there_is_an_actor_for_each_gpu_and_an_equal_share_of_cpus_else():
    assert cluster((8, 4), (8, 2), gpus=True).actors(None) == 6
    assert cluster((8, 4), gpus=True).resources(4) == {"num_gpus": 1, "num_cpus": 0}
    two = cluster((8, 0), (16, 0))
    assert two.actors(None) == 2
    assert two.resources(2) == {"num_cpus": 8}, "what fits on either node"
    assert two.resources(6) == {"num_cpus": 4}
    assert two.resources(100) == {"num_cpus": 1}
    assert two.actors(3) == 3


def test_a_job_goes_to_gpus_where_there_are_some():
    def ray(*resources):
        return SimpleNamespace(
            nodes=lambda: [
                {"Alive": alive, "NodeID": str(number), "NodeManagerAddress": "10.0.0.1", "Resources": found}
                for number, (alive, found) in enumerate(resources)
            ]
        )

    mixed = ray((True, {"CPU": 8}), (True, {"CPU": 8, "GPU": 2}), (False, {"CPU": 8, "GPU": 2}))
    assert [node.id for node in connection.cluster_of(mixed, "auto").nodes] == ["1"]
    assert connection.cluster_of(mixed, "auto").device == "cuda"
    assert [node.id for node in connection.cluster_of(mixed, "cpu").nodes] == ["0", "1"]
    assert connection.cluster_of(mixed, "cpu").device == "cpu"
    with pytest.raises(ValueError, match="no node of this cluster has a GPU"):
        connection.cluster_of(ray((True, {"CPU": 8})), "cuda")
    with pytest.raises(ValueError, match="no node of this cluster has a CPU"):
        connection.cluster_of(ray((True, {})), "auto")


def test_what_ray_prints_is_not_among_the_results():
    stream = io.StringIO()
    aside = connection._WithoutRay(stream)
    raylet = threading.Thread(target=lambda: print("(raylet) log", file=aside), name="ray_listen_error_messages")
    raylet.start(), raylet.join()
    print("a result", file=aside)
    aside.ending = True
    print("(raylet) log", file=aside)
    assert stream.getvalue() == "a result\n"


def test_relative_paths_count_from_the_directory_of_the_command_where_a_node_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    enter(str(tmp_path / "nowhere"))
    enter(str(tmp_path / "there"))
    assert os.getcwd() == str(tmp_path / "there")
