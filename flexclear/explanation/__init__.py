"""``explain``: what a window costs at an image size, or what every layer of a model does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

from flexclear.explanation.window import FRAMES_PER_TOKEN, PX_PER_TOKEN, Explanation, explain_window

if TYPE_CHECKING:
    from flexclear.explanation.model import ModelExplanation


OF_A_MODEL = ("height", "width", "num_frames", "text_len")
"""Arguments of ``explain(model)``."""


@overload
def explain(
    height: int,
    width: int,
    r: int = 16,
    *,
    num_frames: int | None = None,
    frame_radius: int | str | None = None,
    frames_per_token: int = FRAMES_PER_TOKEN,
    text_len: int | None = None,
    text_first: bool = True,
    px_per_token: int = PX_PER_TOKEN,
    channels: int = 3072,
    block_size: int | tuple[int, int] | None = None,
) -> Explanation: ...


@overload
def explain(
    model_or_pipe: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    text_len: int = 512,
) -> ModelExplanation: ...


def explain(*args: Any, **kwargs: Any) -> Explanation | ModelExplanation:
    """Describe what will happen before anything runs. ``print`` the result.

    ``explain(height, width, r)``: what a window of radius r costs for an image of that many pixels, or for a video with
    ``num_frames=`` and ``frame_radius=``. For the arguments, see ``flexclear.explanation.window.explain_window``.

    ``explain(model_or_pipe)``: what each attention layer of a model does, transformed or not; with ``height=`` and
    ``width=`` in pixels (and ``text_len=``, 512 by default) also what that costs. The size of a token in pixels comes from a
    pipeline's VAE, or for a bare model from the VAE that its family was published with (16 pixels a side). For a video model,
    costs also need ``num_frames=``. If a pipeline has two transformers, both are explained.

    >>> print(explain(1024, 1024, r=16))                            # doctest: +ELLIPSIS
    64 x 64 image tokens and 512 of text (text first), window radius 16, tiled order, blocks 128 x 64
    density             33.21%  of 2.12e+07 pairs
    ...
    >>> print(explain(pipe, height=4096, width=4096))                              # doctest: +SKIP
    FluxTransformer2DModel, 57 attention layers
    ...

    Raises:
        TypeError: neither sizes nor a model that flexclear supports.
        ValueError: a size is invalid; the message names it.
    """
    model_or_pipe = args[0] if args else kwargs.pop("model_or_pipe", None)
    if model_or_pipe is None or isinstance(model_or_pipe, int | float | str):
        return explain_window(*args, **kwargs)
    unknown = [repr(arg) for arg in args[1:]]
    unknown += [f"{name}={value!r}" for name, value in kwargs.items() if name not in OF_A_MODEL]
    if unknown:
        raise TypeError(
            f"explain(model) takes {', '.join(OF_A_MODEL)} by name, got {', '.join(unknown)}. It explains the windows that the "
            "model has: transform it first, or see explain(height, width, r) for a window alone"
        )
    return _explain_model(model_or_pipe, **kwargs)


def _explain_model(
    model_or_pipe: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    text_len: int = 512,
) -> ModelExplanation:
    from flexclear.explanation.model import explain_model
    from flexclear.families import family_of
    from flexclear.families.target import latent_frames, models_of, px_per_token
    from flexclear.runtime.hooks import entry_hook_of

    px = px_per_token(model_or_pipe)
    frames = None if num_frames is None else latent_frames(model_or_pipe, num_frames)
    found = [
        explain_model(model, family_of(model), entry_hook_of(model), height, width, text_len, px, num_frames, frames)
        for model in models_of(model_or_pipe)
    ]
    return replace(found[0], others=tuple(found[1:]))
