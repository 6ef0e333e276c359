"""The pipeline of ``flexclear generate``: loaded, windowed, quantized, compiled and moved to its device, in this order."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flexclear.generation.check import Setup, check_sizes, loading
from flexclear.generation.clips import check_clip, draws_videos
from flexclear.generation.kinds import load_pipeline
from flexclear.generation.loras import load_loras
from flexclear.generation.memory import offload
from flexclear.generation.settings import DENSE, GenerateSettings

RADIUS = 16
"""Default radius of the window."""

Say = Callable[[str], None]


def load(settings: GenerateSettings, setup: Setup, say: Say = lambda text: None) -> Any:
    """Make the pipeline ready to draw: loaded, transformed, with its weights and LoRA, quantized, moved, compiled, offloaded.

    Raises:
        OSError: it cannot be loaded.
        TypeError, ValueError: the components do not fit together.
    """
    settings = replace(settings, sizes=settings.sizes or setup.sizes)
    with loading(settings.model):
        pipe = load_pipeline(setup.kind, settings, setup.folder, setup.controlnet, setup.dtype)
    check_sizes(pipe, settings)
    if draws_videos(type(pipe)):
        # Wan 2.2's may have only one of the two transformers.
        model = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
        check_clip(pipe, getattr(model, "config", {}), settings)
    pipe.set_progress_bar_config(disable=True)
    if settings.r != DENSE:
        _window(pipe, settings, setup, say)
    load_loras(pipe, settings.loras, say)
    if settings.vae_tiling:
        pipe.vae.enable_tiling()
    if setup.recipe is not None:
        from flexclear.compile import quantize
        from flexclear.families.target import models_of

        try:
            # Before moving the pipeline: the original weights may not fit the device.
            reports = [
                quantize(model, setup.recipe, min_features=min_features_of(settings), device=setup.device)
                for model in models_of(pipe)
            ]
        except ValueError as error:
            hint = (
                f". --min-features (now {min_features_of(settings)}) says what is tiny" if "tiny" in str(error) else ""
            )
            raise ValueError(f"{error}{hint}") from error
        for report in reports:
            say(str(report))
    if settings.offload is None:
        pipe.to(setup.device)
    if settings.parallel:
        from flexclear import parallel

        if settings.r == DENSE:
            parallel.enable_dense(pipe)
        else:
            parallel.enable(pipe, text=settings.text, exchange=settings.exchange)
    if settings.compile:
        from flexclear.optimization import optimize

        optimize(pipe, progress=False)
    if settings.offload is not None:
        offload(pipe, settings.offload, setup.device)
    return pipe


def min_features_of(settings: GenerateSettings) -> int:
    """Number of features below which a linear layer is not quantized."""
    from flexclear.compile.quantize import MIN_FEATURES

    return MIN_FEATURES if settings.min_features is None else settings.min_features


def _window(pipe: Any, settings: GenerateSettings, setup: Setup, say: Say) -> None:
    from flexclear.convert import transform, transform_each
    from flexclear.families.target import models_of
    from flexclear.runtime.hooks import entry_hook_of
    from flexclear.weights import load_weights

    r, down_factor, frame_radius = settings.r, settings.down_factor, settings.frame_radius
    asked = setup.weights is None or r is not None
    options: dict[str, Any] = {"backend": settings.backend, "frame_radius": frame_radius}
    if asked:
        transform(pipe, RADIUS if r is None else r, down_factor=down_factor, **options)  # type: ignore[arg-type]
    if setup.weights is None:
        return
    with warnings.catch_warnings():
        if asked:
            warnings.filterwarnings("ignore", message=".*was trained for another window than the model has")
        loaded = load_weights(pipe, setup.weights)
    say(f"weights {setup.weights.name}: {loaded.tensors} tensors for {window_names(pipe)}")
    if asked:
        # Loading set the file's window; now set the requested one. Pooling weights stay if the factor is the same.
        factor = loaded.down_factor if down_factor is None else down_factor
        transform(pipe, r, down_factor=factor, **options)  # type: ignore[arg-type]
        if loaded.radius is not None and loaded.radius != r:
            say(f"these weights were trained for r = {loaded.radius} and run with r = {r}, as asked")
    elif settings.backend != "auto":
        found = [entry_hook_of(model) for model in models_of(pipe)]
        each = [dict(entry.settings.windows) for entry in found if entry is not None]
        transform_each(pipe, [{"r": windows, "backend": settings.backend} for windows in each])


def windows_of(pipe: Any) -> dict[Any, Any]:
    """The window of each layer; empty if none was requested."""
    from flexclear.families.target import models_of
    from flexclear.runtime.hooks import entry_hook_of

    # A second transformer has the same windows as the first.
    entry = entry_hook_of(models_of(pipe)[0]) if hasattr(pipe, "transformer") else None
    return {} if entry is None else dict(entry.settings.windows)


def window_names(pipe: Any) -> str:
    """Names of the layers' windows."""
    names = dict.fromkeys("dense" if window is None else window.name for window in windows_of(pipe).values())
    return ", ".join(names) or DENSE
