"""Suppresses irrelevant output of other libraries: exactly these lines and no others.

Importing diffusers logs lines about parts of torchao, torch, transformers and bitsandbytes that neither flexclear nor its user
has asked for, and loading a pipeline shows progress bars of two libraries. ``hush`` drops log records by logger and text. It
changes no log level and no filter of ``warnings``, so that everything else still gets through.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from flexclear.common.versions import dtype_option


def _built_for_others(record: logging.LogRecord) -> bool:
    """Whether torchao's library cannot load because of its build: for another Python, or for CUDA with a CPU-only torch."""
    text = record.getMessage()
    tag = re.search(r"\.cpython-(\d+)-", text)
    if tag is not None and tag[1] != f"{sys.version_info.major}{sys.version_info.minor}":
        return True
    torch = sys.modules.get("torch")
    return torch is not None and torch.version.cuda is None


def _of_torchao(record: logging.LogRecord) -> bool:
    kinds = record.args if isinstance(record.args, tuple) else ()
    return any(getattr(kind, "__module__", "").startswith("torchao.") for kind in kinds)


KNOWN: tuple[tuple[str, str, Callable[[logging.LogRecord], bool]], ...] = (
    ("torchao", r"Failed to load \S+[/\\]_C\w*[.\w-]*\.so: ", _built_for_others),
    ("torch.utils._pytree", r".* is an Enum subclass and is now natively supported by torch\.compile", _of_torchao),
    (
        "diffusers.quantizers.torchao.torchao_quantizer",
        r"Unable to import `torchao` Tensor objects\.",
        lambda record: True,
    ),
    (
        # diffusers imports bitsandbytes if it is installed; without this kernel bitsandbytes runs its own code.
        "bitsandbytes.backends.cpu.ops",
        r"Failed to load CPU gemm_4bit_forward from kernels-community",
        lambda record: True,
    ),
    (
        # diffusers imports both names for IP-Adapters and safety checkers; PIL's processor gives the same numbers.
        "transformers.utils.import_utils",
        r"`(CLIP|Siglip)ImageProcessor` requires torchvision \(not installed\); falling back to ",
        lambda record: True,
    ),
)
"""What ``hush`` drops: (logger, pattern for the beginning of the text, function that confirms that a record is meant)."""


class _Known(logging.Filter):
    def __init__(self, text: str, meant: Callable[[logging.LogRecord], bool]) -> None:
        super().__init__()
        self._text, self._meant = re.compile(text), meant

    def filter(self, record: logging.LogRecord) -> bool:
        if logging.getLogger("flexclear").isEnabledFor(logging.DEBUG):
            return True
        return self._text.match(record.getMessage()) is None or not self._meant(record)


def hush() -> None:
    """Drop the log records of ``KNOWN`` from now on, wherever the program imports the libraries.

    ``logging.getLogger("flexclear").setLevel(logging.DEBUG)`` brings them back.
    """
    for logger, text, meant in KNOWN:
        filters = logging.getLogger(logger).filters
        if not any(isinstance(present, _Known) for present in filters):
            logging.getLogger(logger).addFilter(_Known(text, meant))


class _Bars(contextlib.ContextDecorator):
    """Switches off the loading progress bars of diffusers and transformers while any thread asks for it."""

    def __init__(self) -> None:
        self._lock, self._depth = threading.Lock(), 0
        self._shown: list[Any] = []

    def __enter__(self) -> None:
        import diffusers.utils.logging
        import transformers.utils.logging

        with self._lock:
            self._depth += 1
            if self._depth == 1:
                modules = (diffusers.utils.logging, transformers.utils.logging)
                self._shown = [module for module in modules if module.is_progress_bar_enabled()]
                with _downloads_as_they_are():
                    for module in self._shown:
                        module.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth:
                with _downloads_as_they_are():
                    for module in self._shown:
                        module.enable_progress_bar()


@contextlib.contextmanager
def _downloads_as_they_are() -> Iterator[None]:
    """Keeps huggingface_hub's download bars, which transformers switches off along with its own; downloads may take hours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = are_progress_bars_disabled()
    yield
    if are_progress_bars_disabled() != hidden:
        (disable_progress_bars if hidden else enable_progress_bars)()


without_bars = _Bars()
"""Context manager or decorator that hides loading bars, but not download bars or the pipeline's own."""


@contextlib.contextmanager
def without_diffusers_warnings() -> Iterator[None]:
    """Context manager or decorator under which diffusers logs only errors: otherwise it warns about every LoRA without weights
    for a text encoder."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def from_pretrained(kind: Any, place: Any, dtype: Any = None, **options: Any) -> Any:
    """diffusers' ``kind.from_pretrained``, without progress bars.

    Args:
        kind: class of a pipeline or a model.
        place: folder or hub id.
        dtype: data type of the weights, passed under the name that the installed diffusers expects; None: as stored.
        options: further arguments.
    """
    if dtype is not None:
        options[dtype_option()] = dtype
    with without_bars:
        return kind.from_pretrained(str(place), **options)
