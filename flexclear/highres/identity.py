"""What the folder of a cascade records about a pipeline, so that no other one resumes there."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from flexclear.parallel.facts import digest


def identity(pipe: Any) -> dict[str, Any]:
    """What a manifest records about a pipeline besides its weights."""
    return {
        "model": str(pipe.config.get("_name_or_path", "")),
        "transformer": _digest(pipe.transformer.config),
        "vae": _digest(pipe.vae.config),
        "scheduler": _digest(pipe.scheduler.config),
        "dtype": str(pipe.transformer.dtype),
    }


def weights_digest(pipe: Any) -> str:
    """Digest of a few numbers per parameter. Parameters that are elsewhere (sequential offload) count by name.

    Pooling weights are left out: they belong to the windows, which each stage names.
    """
    models = (("transformer", pipe.transformer), ("vae", pipe.vae))
    return _digest(
        {
            f"{part}.{name}": digest(parameter)
            for part, model in models
            for name, parameter in model.named_parameters()
            if ".processor." not in name
        }
    )


def _digest(config: Any) -> str:
    return hashlib.sha256(json.dumps(dict(config), sort_keys=True, default=str).encode()).hexdigest()[:16]
