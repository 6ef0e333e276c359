"""Pretrained diffusion transformers made linear in image size.

>>> import flexclear
>>> flexclear.transform(pipe, r=16)       # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flexclear.common.foreign import hush as _hush
from flexclear.common.versions import VERSION as _VERSION

if TYPE_CHECKING:
    from flexclear import (
        alternatives,
        analysis,
        compile,
        distill,
        embedded,
        evaluation,
        families,
        highres,
        masks,
        parallel,
        weights,
    )
    from flexclear import testing as testing
    from flexclear.convert import restore, transform
    from flexclear.explanation import explain
    from flexclear.optimization import optimize, save_artifacts
    from flexclear.runtime.switches import override
    from flexclear.saved.described import is_transformed, summary
    from flexclear.saved.hub import push_to_hub
    from flexclear.saved.loading import from_pretrained, transform_from_config
    from flexclear.weights import load_weights, save_weights

__version__ = _VERSION

__all__ = [
    "__version__",
    "alternatives",
    "analysis",
    "compile",
    "distill",
    "embedded",
    "evaluation",
    "explain",
    "families",
    "from_pretrained",
    "highres",
    "is_transformed",
    "load_weights",
    "masks",
    "optimize",
    "override",
    "parallel",
    "push_to_hub",
    "restore",
    "save_artifacts",
    "save_weights",
    "summary",
    "transform",
    "transform_from_config",
    "weights",
]

_HOME = {
    "explain": "flexclear.explanation",
    "from_pretrained": "flexclear.saved.loading",
    "is_transformed": "flexclear.saved.described",
    "push_to_hub": "flexclear.saved.hub",
    "summary": "flexclear.saved.described",
    "transform_from_config": "flexclear.saved.loading",
    "load_weights": "flexclear.weights",
    "optimize": "flexclear.optimization",
    "override": "flexclear.runtime.switches",
    "restore": "flexclear.convert",
    "save_artifacts": "flexclear.optimization",
    "save_weights": "flexclear.weights",
    "transform": "flexclear.convert",
}
# testing needs an extra, so it is not in ``__all__``, and ``from flexclear import *`` works without.
_PACKAGES = frozenset(__all__) - {"__version__", *_HOME} | {"testing"}


_hush()


def __getattr__(name: str) -> Any:
    # Names load on first use: importing flexclear takes almost no time, and touches neither diffusers nor CUDA.
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _PACKAGES:
        return importlib.import_module(f"flexclear.{name}")
    raise AttributeError(f"module 'flexclear' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
