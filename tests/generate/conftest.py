"""The command line in this process, and a saved pipeline for it."""

from __future__ import annotations

import json

import pytest
import torch

import flexclear
from flexclear import cli

from helpers.generate_calls import FAST


@pytest.fixture
def command(capsys):
    """Runs the command line in this process: exit status, standard output, standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def generate(command, tmp_path):
    """Draws into a folder, and gives the timing lines."""

    def run(*arguments, model="embedded", out="out", options=FAST):
        status, output, error = command("generate", model, *options, "--json", "--out", tmp_path / out, *arguments)
        assert status == 0, error
        return [json.loads(line) for line in output.splitlines()]

    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The embedded pipeline as save_pretrained writes it, and a weights file of it for r = 3."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = flexclear.embedded.pipeline()
    pipe.save_pretrained(folder / "pipe")
    flexclear.transform(pipe, r=3)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if name.endswith("attn.to_v.weight"):
                parameter.mul_(0.5)
    flexclear.save_weights(pipe, folder / "local.safetensors")
    return folder
