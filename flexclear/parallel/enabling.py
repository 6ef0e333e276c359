"""``enable`` and ``disable``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from flexclear.common.choices import EXCHANGES, TEXTS
from flexclear.families.target import model_of, models_of
from flexclear.parallel.decoding import split_decoding
from flexclear.parallel.dense import disable_dense, refuse_other_parallelism
from flexclear.parallel.ends import session_of, watch_calls
from flexclear.parallel.group import ranks_of
from flexclear.parallel.links import Links
from flexclear.parallel.planning import TOO_SMALL, check_shares
from flexclear.parallel.session import Options, Session, refuse_unshared
from flexclear.runtime.exchange import all_or_nothing, put_hooks
from flexclear.runtime.hooks import EntryHook, entry_hook_of
from flexclear.runtime.steps import StepCounter

Target = TypeVar("Target")

_numbers = itertools.count(1)
"""Numbers that name this process's sessions, the same on all ranks, which create sessions in the same order."""


def enable(
    model_or_pipe: Target,
    mesh: Any = None,
    text: str = "exact",
    exchange: str = "sync",
    *,
    warmup_steps: int = 4,
    shares: Sequence[float] | None = None,
    too_small: str = "raise",
    timeout: float = 300.0,
    split_vae: bool = True,
) -> Target:
    """Share each image among the ranks of a group. Call this on every rank, after ``flexclear.transform``.

    The token grid is cut along its longer side into bands of a multiple of 8 lines. A video is cut along rows, columns or frames,
    so that layers exchange as few keys as possible. In each attention layer a rank's image queries see its own keys, all text,
    and border keys that its neighbours send, as far as the layer's window reaches: from several neighbours if bands are thinner
    than that. Text is computed on every rank. Outside the transformer every rank does the same work, and the resulting image is
    the same everywhere.

    Args:
        model_or_pipe: a transformed model, or a pipeline with one.
        mesh: a one-dimensional ``DeviceMesh``, or None for all ranks. Under torchrun the default process group is created if
            there is none yet (NCCL on CUDA, gloo elsewhere).
        text: how text queries, which see the whole image, are computed. ``"exact"``: each rank attends to its band, and
            partial results are merged by their log-sum-exp, with two small sums per layer; equal to one process's result up to
            rounding. ``"average"``: the average over the ranks' own bands (paper Eq. 7), with one sum per layer.
        exchange: ``"sync"``: a layer waits for its borders. ``"stale"``: after ``warmup_steps``, it uses the borders of the
            previous denoising step while the current ones are sent (DistriFusion, arXiv 2402.19481). Needs a pipeline.
        warmup_steps: number of first steps of a run that are synchronous with ``"stale"``.
        shares: each rank's share of the image, as proportions, for ranks of unequal speed; equal by default.
        too_small: for images with fewer runs of 8 lines than ranks: ``"raise"``, or ``"fewer"``: the last ranks are idle.
        timeout: seconds without an answer after which a rank counts as gone. A rank that stops because of an interrupt or an
            error, also in a callback, is reported at once.
        split_vae: also share the tiles if the pipeline's VAE decodes in tiles (``pipe.vae.enable_tiling()``).

    Returns:
        ``model_or_pipe``.

    Raises:
        TypeError: neither a model nor a pipeline with one, or ``mesh`` is not a DeviceMesh.
        ValueError: the model cannot run on several ranks, an argument is invalid, or there is no process group.
        ParallelError: the process group had to be created, and ranks are missing.
    """
    model = model_of(model_or_pipe)
    entry = entry_hook_of(model)
    if text not in TEXTS:
        raise ValueError(f"text must be one of {list(TEXTS)}, got {text!r}")
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {list(EXCHANGES)}, got {exchange!r}")
    if too_small not in TOO_SMALL:
        raise ValueError(f"too_small must be one of {list(TOO_SMALL)}, got {too_small!r}")
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 1:
        raise ValueError(f"warmup_steps must be a number of steps >= 1, got {warmup_steps!r}")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
    if entry is None:
        refuse_other_parallelism(model)
        raise ValueError(
            f"this {type(model).__name__} is dense and has no window whose borders could be exchanged: call "
            "flexclear.transform(model, r=...) first. flexclear.parallel.enable_dense runs the dense model on several ranks"
        )
    refuse_unshared(model, entry.family, entry.settings)
    pipe = None if model_or_pipe is model else model_or_pipe
    if exchange == "stale" and (pipe is None or not hasattr(getattr(pipe, "scheduler", None), "step_index")):
        raise ValueError(
            "exchange='stale' needs to know the denoising step: pass the pipeline, whose scheduler counts steps "
            "(step_index)"
        )
    ranks = ranks_of(mesh, float(timeout))
    options = Options(
        text=text,
        exchange=exchange,
        warmup_steps=warmup_steps,
        shares=None if shares is None else check_shares(shares, len(ranks)),
        too_small=too_small,
        timeout=float(timeout),
    )
    disable(model_or_pipe)
    session = Session(Links(ranks, options.timeout, str(next(_numbers))), options, StepCounter(pipe))
    try:
        attach(model, session)
        watch_calls(model, session)
        if pipe is not None:
            session.watch(pipe)
            if split_vae:
                split_decoding(pipe, session)
    except BaseException:
        disable(model_or_pipe)
        session.close()
        raise
    return model_or_pipe


def attach(model: nn.Module, session: Session) -> None:
    """Make a transformed model take part in a session.

    Raises:
        ValueError: it cannot.
    """
    entry = entry_hook_of(model)
    assert entry is not None
    refuse_unshared(model, entry.family, entry.settings)
    _let(model, entry, session)


def _let(model: nn.Module, entry: EntryHook, session: Session | None) -> None:
    """Replace a model's hooks by hooks with the same settings that take part in ``session``, or in none."""
    with all_or_nothing(model):
        put_hooks(model, EntryHook(entry.family, entry.settings, session))


def disable(model_or_pipe: Target) -> Target:
    """Undo ``enable`` or ``enable_dense``: this rank computes whole images again. Other models are left alone.

    Returns:
        ``model_or_pipe``.
    """
    for model in models_of(model_or_pipe):
        entry = entry_hook_of(model)
        if entry is not None and entry.parallel is not None:
            _let(model, entry, None)
            entry.parallel.close()
        disable_dense(model)
    return model_or_pipe


def sent_bytes(model_or_pipe: Any) -> dict[str, int]:
    """Bytes that this rank has sent since ``enable``, by kind: ``border``, ``text``, ``pooled``, ``output``, ``vae``,
    ``control``. Sums and gathers count with this rank's contribution.

    Raises:
        ValueError: the model does not run on several ranks.
    """
    session = session_of(model_of(model_or_pipe))
    if session is None:
        raise ValueError("this model does not run on several ranks; call flexclear.parallel.enable(pipe) first")
    return dict(session.links.sent)
