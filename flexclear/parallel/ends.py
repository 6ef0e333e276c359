"""Tells a session how calls, loops and decoding end, including by interrupts, which torch's hooks do not see."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from flexclear.runtime.hooks import entry_hook_of

if TYPE_CHECKING:
    from flexclear.parallel.session import Session


@contextlib.contextmanager
def told(session: Session) -> Iterator[None]:
    """Tell a session about any exception that ends a ``with`` block."""
    try:
        yield
    except BaseException as error:
        session.failed(error)
        raise


def session_of(model: nn.Module) -> Session | None:
    """The session that a model takes part in, or None."""
    entry = entry_hook_of(model)
    return None if entry is None else cast("Session | None", entry.parallel)


class _Call:
    """Replaces a shared model's ``_call_impl``, which runs its hooks and its forward.

    A hook would not do: even with ``always_call``, torch calls hooks only after an ``Exception``, not after an interrupt.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Call:
        model = self._model()
        assert model is not None
        return _Call(memo.get(id(model), model))

    def __reduce__(self) -> Any:
        return getattr, (
            self._model(),
            "_call_impl",
        )  # resolves to the class's own while attributes are not yet restored

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        assert model is not None
        session = session_of(model)
        if session is None:
            return type(model)._call_impl(model, *args, **kwargs)
        with told(session):
            session.start()
            output = type(model)._call_impl(model, *args, **kwargs)
            session.end()
            return output


def watch_calls(model: nn.Module, session: Session) -> None:
    """Tell a session how a model's calls begin and end, until the session is closed."""
    put(model, "_call_impl", _Call(model), session)


def put(owner: Any, name: str, value: Any, session: Session) -> None:
    """Set an instance attribute of an object until a session is closed."""
    before, held = {key: old for key, old in vars(owner).items() if key == name}, weakref.ref(owner)

    def take_back() -> None:
        there = held()
        if there is not None and vars(there).get(name) is value:
            del vars(there)[name]
            vars(there).update(before)

    vars(owner)[name] = value
    session.closing.callback(take_back)


class _Loop:
    """A progress bar, whose ``with`` block is a pipeline's denoising loop."""

    def __init__(self, bar: Any, session: Session) -> None:
        self._bar, self._session = bar, session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def __iter__(self) -> Any:
        return iter(self._bar)

    def __enter__(self) -> Any:
        self._session.enter_loop()
        return self._bar.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> Any:
        try:
            return self._bar.__exit__(kind, error, trace)
        finally:
            self._session.leave_loop(error)


def watch_loop(pipe: Any, session: Session) -> None:
    """Tell a session how a pipeline's denoising loop begins and ends, until the session is closed.

    Every diffusers pipeline runs its loop in ``with self.progress_bar(...)``; other pipelines are left alone.
    """
    if not callable(getattr(type(pipe), "progress_bar", None)):
        return
    held, own = weakref.ref(pipe), vars(pipe).get("progress_bar")

    def progress_bar(*args: Any, **kwargs: Any) -> _Loop:
        there: Any = held()
        bar = type(there).progress_bar(there, *args, **kwargs) if own is None else own(*args, **kwargs)
        return _Loop(bar, session)

    put(pipe, "progress_bar", progress_bar, session)
