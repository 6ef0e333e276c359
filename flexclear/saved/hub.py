"""Uploads a transformed model to the hub, with a model card that says what was done to it."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from flexclear.common.choices import HUB_ID
from flexclear.common.versions import versions
from flexclear.families import family_of
from flexclear.families.target import models_of
from flexclear.saved.described import is_transformed, summary

BEGIN, END = "<!-- flexclear -->", "<!-- /flexclear -->"
"""Markers around our part of a model card; the rest of the card is kept."""


def model_card(model_or_pipe: Any, repo_id: str, existing: str = "") -> str:
    """The README.md of a transformed model: metadata, what was done, and how to load it.

    Args:
        model_or_pipe: transformed.
        repo_id: repository that the card's code loads.
        existing: the current card. Its metadata takes precedence, and only our part of its text is replaced.

    Raises:
        TypeError: neither a model nor a pipeline with a transformer.
        ValueError: it is not transformed.
    """
    from huggingface_hub import ModelCard

    if not is_transformed(model_or_pipe):
        raise ValueError(
            f"this {type(model_or_pipe).__name__} is not transformed, so there is no window to describe. "
            "Call flexclear.transform first, or push it with its own push_to_hub"
        )
    models = models_of(model_or_pipe)
    card = ModelCard(existing or "---\n---\n", ignore_metadata_errors=True)
    base = str(getattr(getattr(models[0], "config", None), "_name_or_path", ""))
    if card.data.get("base_model") is None and HUB_ID.fullmatch(base) and not Path(base).exists():
        card.data["base_model"] = base
    if card.data.get("library_name") is None:
        card.data["library_name"] = "diffusers"
    if card.data.get("pipeline_tag") is None and not isinstance(model_or_pipe, nn.Module):
        card.data["pipeline_tag"] = "text-to-video" if family_of(models[0]).video else "text-to-image"
    card.data["tags"] = [*(card.data.get("tags") or []), *({"flexclear"} - set(card.data.get("tags") or []))]
    ours = f"{BEGIN}\n{_described(model_or_pipe, repo_id)}\n{END}"
    text = card.text.strip()
    part = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    text = part.sub(lambda _: ours, text) if part.search(text) else f"{text}\n\n{ours}".strip()
    return f"---\n{card.data.to_yaml()}\n---\n\n{text}\n"


def _described(model_or_pipe: Any, repo_id: str) -> str:
    kind = type(model_or_pipe).__name__
    models = "\n".join(f"- {each!r}" for each in summary(model_or_pipe).models)
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"""## Linear attention

The image tokens of this model attend to the tokens around them and to the text, as in
[CLEAR](https://arxiv.org/abs/2412.16112):

{models}

Load it with flexclear, which brings the window back:

```python
import flexclear
from diffusers import {kind}

loaded = flexclear.from_pretrained({kind}, {repo_id!r})
```

`{kind}.from_pretrained` loads the same weights with dense attention. Saved with {made}."""


def push_to_hub(
    model_or_pipe: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    variant: str | None = None,
) -> str:
    """Upload a transformed model or pipeline with its window, and a model card that describes it.

    ``flexclear.from_pretrained`` also loads what diffusers' ``push_to_hub`` uploads, but that card does not mention the window.
    A card that is already on the hub keeps its metadata and text; only the part about the window is replaced.

    Args:
        model_or_pipe: transformed.
        repo_id: ``"owner/name"``; created if it does not exist.
        commit_message, private, token, create_pr: as in diffusers' ``push_to_hub``.
        variant: variant in the weights' file names, as in ``save_pretrained``.

    Returns:
        The address of the commit.

    Raises:
        TypeError: neither a model nor a pipeline with a transformer.
        ValueError: it is not transformed, or ``repo_id`` is not ``"owner/name"`` or a name.
        huggingface_hub.errors: the hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    model_card(model_or_pipe, repo_id)  # raises before anything is uploaded
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    try:
        existing = ModelCard.load(repo_id, token=token, ignore_metadata_errors=True).content
    except EntryNotFoundError:
        existing = ""
    with tempfile.TemporaryDirectory() as folder:
        model_or_pipe.save_pretrained(folder, variant=variant)
        Path(folder, "README.md").write_text(model_card(model_or_pipe, repo_id, existing), encoding="utf-8")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {type(model_or_pipe).__name__}",
            create_pr=create_pr,
        )
