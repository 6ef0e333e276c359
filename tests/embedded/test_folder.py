"""The model folder: its size, its parts, its notices, and what importing the package costs."""

from __future__ import annotations

import json
import subprocess
import sys

import diffusers
import pytest
import transformers

from flexclear import embedded
from flexclear.embedded import loading

LARGEST_WEIGHTS_BYTES = 15_000_000


def test_weights_are_small_and_readable():
    weights = list(embedded.model_directory().rglob("*.safetensors"))
    assert len(weights) == 4
    assert sum(path.stat().st_size for path in weights) <= LARGEST_WEIGHTS_BYTES
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in weights)


def test_every_part_is_the_real_class(pipe):
    assert type(pipe) is diffusers.FluxPipeline
    assert type(pipe.transformer) is diffusers.FluxTransformer2DModel
    assert type(pipe.vae) is diffusers.AutoencoderKL
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert type(pipe.text_encoder) is transformers.CLIPTextModel
    assert type(pipe.text_encoder_2) is transformers.T5EncoderModel
    assert isinstance(pipe.tokenizer, transformers.CLIPTokenizer)
    assert isinstance(pipe.tokenizer_2, transformers.T5TokenizerFast)


def test_folder_names_the_licence_of_its_pictures():
    notice = (embedded.model_directory() / "NOTICE.txt").read_text(encoding="utf-8")
    assert "Noto Color Emoji" in notice
    licence = (embedded.model_directory() / "OFL-1.1.txt").read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence


def test_folder_holds_no_local_paths():
    for path in embedded.model_directory().rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            named = content.get("_name_or_path", "")
            assert "/" not in named, f"{path} names {named}"


def test_import_stays_light():
    code = (
        "import sys, flexclear.embedded; "
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_missing_model_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "model_directory", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="reinstall the package"):
        loading.pipeline()
