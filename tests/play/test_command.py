"""``flexclear play`` before it serves: what cannot work is one line, and nothing is loaded; who can reach the page is said."""

from __future__ import annotations

import os
import socket

import pytest

from flexclear import cli
from flexclear.play import serving
from flexclear.play.serving import check_place
from flexclear.play.settings import PlaySettings, check_play

STUDENT = "embedded:clear_local_4.safetensors"


@pytest.fixture(autouse=True)
def with_gradio(monkeypatch):
    """Gradio has an environment of its own; nothing here gets as far as to need it, and no weight is read."""
    monkeypatch.setattr("flexclear.commands.play.require", lambda *needed: None)
    monkeypatch.setattr("diffusers.FluxPipeline.from_pretrained", lambda *a, **k: pytest.fail("weights were read"))


def refused(capsys, *arguments):
    """The line that a command line is refused with."""
    with pytest.raises(SystemExit) as end:
        cli.main(["play", *map(str, arguments)])
    output, error = capsys.readouterr()
    assert (end.value.code, output) == (2, "")
    assert error.count("\n") == 1
    return error


@pytest.fixture
def taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_that_is_in_use_is_said_before_anything_is_loaded(capsys, taken):
    line = refused(capsys, "--port", taken)
    assert line == (
        f"flexclear: --port {taken} of 127.0.0.1 is in use already, perhaps by another flexclear play; give another one\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere/at/all",), "no folder nowhere/at/all"),
        (("{tmp}",), "no model_index.json"),
        (("{tmp}/a.txt",), "is a file"),
        (("owner/name",), "downloads nothing: hf download owner/name"),
        (("--size", "100x30"), "multiples of 8 pixels, got 100x30; near it: 96x32"),
        (("--weights", "{tmp}/none.safetensors"), "--weights"),
        (("--weights", STUDENT, "--weights", STUDENT), "give each once"),
        (("--text-len", "4096"), "--text-len 4096"),
        (("--host", "example.org"), "--host must be an IP address"),
        (("--host", "192.0.2.77"), "--host 192.0.2.77 is no address of this machine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_cannot_work_is_one_line(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("")
    assert said in refused(capsys, *(part.format(tmp=tmp_path) for part in arguments))


KINDS = {
    "FluxFillPipeline": "draws from an image, and flexclear play from a prompt alone",
    "FluxImg2ImgPipeline": "draws from an image, and flexclear play from a prompt alone",
    "FluxControlPipeline": "draws from an image, and flexclear play from a prompt alone",
    "QwenImageEditPipeline": "draws from an image, and flexclear play from a prompt alone",
    "WanPipeline": "draws videos",
    "NoSuchPipeline": "not a diffusers pipeline",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_that_takes_more_than_a_prompt_is_refused(tmp_path, kind):
    (tmp_path / "model_index.json").write_text(
        f'{{"_class_name": "{kind}", "transformer": ["diffusers", "FluxTransformer2DModel"]}}'
    )
    with pytest.raises(TypeError, match=KINDS[kind]):
        check_play(PlaySettings(str(tmp_path), device="cpu"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_the_loopback_needs_no_warning(host):
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        assert check_place(host, free_port()) is None
    except OSError as error:
        if host != "::1":
            raise
        pytest.skip(f"no IPv6 here: {error}")


def free_port():
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def test_another_host_is_allowed_when_it_is_said_with_a_warning_of_what_it_means():
    warning = check_place("0.0.0.0", port := free_port())
    assert warning.startswith("--host 0.0.0.0 can be reached from other machines")
    for part in (f"port {port}", "without a password", "not encrypted", f"ssh -L {port}:127.0.0.1:{port}"):
        assert part in warning


def test_the_warning_is_printed_even_if_nothing_else_is(capsys, monkeypatch):
    monkeypatch.setattr("flexclear.play.settings.load_play", lambda ready: None)
    monkeypatch.setattr("flexclear.play.studio.Studio", lambda ready, pipe: None)
    served = []
    monkeypatch.setattr(serving, "serve", lambda studio, *place, **options: served.append(place))
    with pytest.raises(SystemExit) as end:
        cli.main(["play", "--quiet", "--host", "0.0.0.0", "--port", str(port := free_port())])
    assert (end.value.code, served) == (0, [("0.0.0.0", port)])
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("flexclear: warning: --host 0.0.0.0 can be reached from other machines")


def test_the_environment_is_changed_for_the_run_only(monkeypatch):
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.setenv("NO_PROXY", "intranet")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    before = dict(os.environ)
    with serving._environment():
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        assert "GRADIO_SHARE" not in os.environ
        assert os.environ["NO_PROXY"] == "intranet,127.0.0.1,::1,localhost"
        folder = os.environ["GRADIO_TEMP_DIR"]
        assert os.path.isdir(folder)
    assert dict(os.environ) == before
    assert not os.path.exists(folder)
