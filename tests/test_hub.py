"""Transformed models on the hub: what is uploaded, and the model card. The hub's client alone is faked."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import flexclear
from flexclear.saved.hub import BEGIN, END, model_card

from helpers.models import flux_call, tiny_flux


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Repositories as folders below ``hub.folder``, and the calls that were made."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    faked = SimpleNamespace(folder=tmp_path / "hub", calls=[])

    class Api:
        def __init__(self, token=None):
            faked.calls.append(("token", token))

        def create_repo(self, repo_id, private=None, exist_ok=False):
            faked.calls.append(("create", repo_id, private, exist_ok))
            full = repo_id if "/" in repo_id else f"me/{repo_id}"
            (faked.folder / full).mkdir(parents=True, exist_ok=True)
            return SimpleNamespace(repo_id=full)

        def upload_folder(self, repo_id, folder_path, commit_message, create_pr):
            faked.calls.append(("upload", repo_id, commit_message, create_pr))
            shutil.copytree(folder_path, faked.folder / repo_id, dirs_exist_ok=True)
            return f"commit of {repo_id}"

    def load(repo_id, token=None, ignore_metadata_errors=False):
        card = faked.folder / repo_id / "README.md"
        if not card.exists():
            raise EntryNotFoundError("no card")
        return huggingface_hub.ModelCard(card.read_text(encoding="utf-8"))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", staticmethod(load))
    return faked


def parts(card):
    """Metadata and text of a model card."""
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_pushed_model_comes_back_by_the_code_on_its_card(hub):
    model = flexclear.transform(tiny_flux(), r=3, backend="sdpa")
    model.register_to_config(_name_or_path="black-forest-labs/FLUX.1-dev")
    assert flexclear.push_to_hub(model, "mine", private=True, token="t", create_pr=True) == "commit of me/mine"
    assert hub.calls == [
        ("token", "t"),
        ("create", "mine", True, True),
        ("upload", "me/mine", "Upload FluxTransformer2DModel", True),
    ]
    card = (hub.folder / "me/mine/README.md").read_text(encoding="utf-8")
    metadata, text = parts(card)
    assert metadata == {
        "base_model": "black-forest-labs/FLUX.1-dev",
        "library_name": "diffusers",
        "tags": ["flexclear"],
    }
    assert "- FluxTransformer2DModel: disc_r3 in all" in text
    code = re.search("```python\n(.*?)```", text, re.DOTALL)[1]
    assert "'me/mine'" in code
    names: dict = {}
    exec(code.replace("me/mine", str(hub.folder / "me/mine")), names)
    with torch.no_grad():
        call = flux_call(6, 8, 5)
        assert (names["loaded"].eval()(**call).sample - model(**call).sample).abs().max() <= 1e-5


def test_a_card_that_is_there_keeps_its_metadata_and_its_text(hub):
    model = flexclear.transform(tiny_flux(), r=3)
    folder = hub.folder / "me/mine"
    folder.mkdir(parents=True)
    own = "---\nlicense: mit\nlibrary_name: other\ntags:\n- art\n---\n\n# Mine\n\nHow it came to be.\n"
    (folder / "README.md").write_text(own, encoding="utf-8")
    flexclear.push_to_hub(model, "me/mine")
    flexclear.push_to_hub(flexclear.transform(model, r=5), "me/mine")
    metadata, text = parts((folder / "README.md").read_text(encoding="utf-8"))
    assert metadata == {"license": "mit", "library_name": "other", "tags": ["art", "flexclear"]}
    assert "How it came to be." in text
    assert text.count(BEGIN) == text.count(END) == 1
    assert "disc_r5" in text
    assert "disc_r3" not in text


def test_a_pipeline_s_card_says_what_it_makes():
    from diffusers import WanPipeline

    from helpers.models_video import tiny_wan
    from helpers.pipelines_video import wan_parts

    pipe = WanPipeline(**wan_parts(tiny_wan(), transformer_2=tiny_wan(1), boundary_ratio=0.5))
    metadata, text = parts(model_card(flexclear.transform(pipe, r=3, frame_radius=1), "me/clip"))
    assert metadata["pipeline_tag"] == "text-to-video"
    assert text.count("- WanTransformer3DModel: ") == 2


def test_diffusers_own_push_keeps_the_window_too(hub, monkeypatch):
    import diffusers.utils.hub_utils as hub_utils

    model = flexclear.transform(tiny_flux(), r=3)
    uploaded = []
    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(
        hub_utils, "load_or_create_model_card", lambda *args, **options: SimpleNamespace(save=lambda path: None)
    )
    monkeypatch.setattr(hub_utils, "populate_model_card", lambda card: card)
    monkeypatch.setattr(
        type(model),
        "_upload_folder",
        lambda self, folder, *args, **options: uploaded.append(Path(folder, "config.json").read_text()),
    )
    model.push_to_hub("me/mine")
    assert '"_flexclear"' in uploaded[0]


def test_what_is_dense_is_not_pushed(hub):
    with pytest.raises(ValueError, match="is not transformed, so there is no window to describe"):
        flexclear.push_to_hub(tiny_flux(), "me/mine")
    assert hub.calls == []


def test_a_name_that_the_hub_does_not_take_is_refused_before_anything(hub):
    from huggingface_hub.errors import HFValidationError

    with pytest.raises(HFValidationError):
        flexclear.push_to_hub(flexclear.transform(tiny_flux(), r=3), "a/b/c")
    assert hub.calls == []
