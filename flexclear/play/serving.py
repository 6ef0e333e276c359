"""Serves the page, only to this machine unless told otherwise, without requests to other machines."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator

from flexclear.play.studio import Studio

LOCALHOST = "localhost"
MOST_WAITING = 64
"""Maximum number of waiting requests, over all visitors."""

UPLOADS = "1kb"
"""Largest file that is accepted: the page takes none, but Gradio's server takes any."""

LAST_STEP = 60.0
"""Seconds that shutting down waits for the current step."""


def check_place(host: str, port: int) -> str | None:
    """Raise unless a server can listen there.

    Args:
        host: an address of this machine, or ``"localhost"``.
        port: a TCP port.

    Returns:
        A warning if other machines can reach it.

    Raises:
        OSError: the port is taken, or not permitted, or the address is not this machine's.
        ValueError: the host is not an address.
    """
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == LOCALHOST else host)
    except ValueError as error:
        raise ValueError(
            f"--host must be an IP address of this machine, such as 127.0.0.1 or 0.0.0.0, or {LOCALHOST!r}; got {host!r}"
        ) from error
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the server: a closed one's connections may linger
        try:
            trial.bind((str(address), port))
        except OSError as error:
            raise OSError(_why_not(host, port, error)) from error
    if address.is_loopback:
        return None
    return (
        f"--host {host} can be reached from other machines. Whoever reaches port {port} draws with this model, without a "
        f"password, and what they send is not encrypted. To use it from elsewhere by yourself, leave --host out and "
        f"forward the port: ssh -L {port}:127.0.0.1:{port} THIS_MACHINE"
    )


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port {port} of {host} is in use already, perhaps by another flexclear play; give another one"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is no address of this machine"
    return f"--port {port} of --host {host} cannot be used: {error.strerror}"


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Set the environment that Gradio reads, for this run only: no analytics, no share link, nothing from the hub, files in a
    folder that is deleted, and no proxy for the loopback."""
    with tempfile.TemporaryDirectory(prefix="flexclear-play-") as folder:
        ours: dict[str, str | None] = {name: None for name in os.environ if name.startswith("GRADIO_")}
        ours |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": folder}
        for name in ("NO_PROXY", "no_proxy"):
            ours[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1", "::1", LOCALHOST)))
        before = {name: os.environ.get(name) for name in ours}
        _put(ours)
        try:
            yield
        finally:
            _put(before)


def _put(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _until_interrupted() -> Iterator[Callable[[], None]]:
    """Yield a function that waits for Ctrl-C, or for SIGTERM, which is treated alike."""

    def wait() -> None:
        threading.Event().wait()

    mine = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if mine:
        signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield wait
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


def serve(
    studio: Studio,
    host: str,
    port: int,
    *,
    describe: Callable[[Exception], str],
    ready: Callable[[str], None],
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        studio: draws the images.
        host, port: checked by ``check_place``.
        describe: turns an error of drawing into words for the visitor.
        ready: called with the page's address once it is up.

    Raises:
        KeyboardInterrupt: at the end, when nothing is being drawn any more.
        OSError: the port was taken in the meantime.
    """
    name = f"[{host}]" if ":" in host else host
    with _environment(), _until_interrupted() as wait:
        import gradio

        from flexclear.play.page import CSS, make_page

        page = make_page(studio, describe)
        page.queue(default_concurrency_limit=1, max_size=MOST_WAITING)
        try:
            page.launch(
                server_name=name,
                server_port=port,
                share=False,
                inbrowser=False,
                quiet=True,
                prevent_thread_lock=True,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                max_file_size=UPLOADS,
                theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css=CSS,
            )
        except OSError:
            check_place(host, port)  # Another process has taken it since.
            raise
        try:
            ready(f"http://{name}:{port}/")
            wait()
        finally:
            studio.stop(LAST_STEP)
            page.close(verbose=False)
