"""Workflows on ComfyUI's own executor: what it draws with the embedded model is what diffusers draws."""

from __future__ import annotations

import json

import pytest

from helpers import comfyui_workflow as workflow


@pytest.mark.kept("sdpa")
@pytest.mark.parametrize("by", ["sdpa", "flex"])
def test_a_workflow_draws_what_diffusers_draws(comfyui, tmp_path, by):
    found = comfyui(workflow.pictures, str(tmp_path), by)
    assert "failed" not in found, found["failed"]
    for kind in ("windowed", "dense"):
        off = abs(found[kind]["saved"] - found[kind]["expected"])
        # Both cut to eight bits, where a last digit of float32 may be another level.
        assert off.max() <= 1
        assert (off > 0).mean() < 0.01
        assert "execution_success" in found[kind]["messages"]
    assert abs(found["windowed"]["saved"] - found["dense"]["saved"]).mean() > 1


@pytest.mark.parametrize("path", workflow.SHIPPED, ids=lambda path: path.stem)
def test_comfyui_accepts_the_workflows_that_are_shipped(comfyui, tmp_path, path):
    valid, errors = comfyui(workflow.checked, str(path), str(tmp_path))
    assert valid, errors


@pytest.mark.parametrize("path", workflow.SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_workflow_samples_the_windowed_model(path):
    prompt = json.loads(path.read_text(encoding="utf-8"))
    (sampler,) = (node for node in prompt.values() if node["class_type"] == "KSampler")
    classes, number = [], sampler["inputs"]["model"][0]
    while number is not None:
        classes.append(prompt[number]["class_type"])
        number = prompt[number]["inputs"].get("model", [None])[0]
    assert classes[-1] == "UNETLoader"
    assert f"Flexclear{'Video' if path.stem == 'wan' else 'Image'}Window" in classes
