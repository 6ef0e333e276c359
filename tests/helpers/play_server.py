"""``flexclear play`` in a separate process, as users start it, and a browser that visits it. Both log the hosts they contact."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

PYTHON = Path(__file__).parents[2] / ".venv" / "play" / "bin" / "python"
"""Python of the environment with Gradio, which the Makefile sets up."""

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

NEEDED = {
    "the environment .venv/play (make test sets it up)": PYTHON.exists(),
    "Chromium": BROWSER is not None,
    "chromedriver": DRIVER is not None,
    "selenium": importlib.util.find_spec("selenium") is not None,
}
MISSING = [name for name, there in NEEDED.items() if not there]

LONG = 240
"""Seconds to wait for an event before it counts as not happening."""

# Logs every connection and every host name that Python code looks up; the file is opened before anything can connect.
NOTES = """
import os, sys
notes = os.open({path!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def note(event, arguments):
    if event == "socket.getaddrinfo":
        os.write(notes, f"{{arguments[0]}}\\n".encode())
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        os.write(notes, f"{{arguments[1][0]}}\\n".encode())

sys.addaudithook(note)
"""


def until(happened: Callable[[], Any], what: str) -> Any:
    """Wait until ``happened`` returns something true, and return it."""
    end = time.monotonic() + LONG
    while not (found := happened()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)
    return found


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


class Server:
    """A running ``flexclear play``.

    Attributes:
        address: address of the page.
        process: the server's process.
        temporary: folder in which it puts temporary files.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.temporary, self._notes, self._said = folder / "tmp", folder / "asked", folder / "said"
        self.temporary.mkdir(parents=True)
        (folder / "sitecustomize.py").write_text(NOTES.format(path=str(self._notes)))
        self.address = f"http://127.0.0.1:{(port := free_port())}/"
        proxy = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"), "http://192.0.2.1:9")
        # By default torch keeps its cache for later processes in the folder of temporary files.
        places = {"TMPDIR": str(self.temporary), "TORCHINDUCTOR_CACHE_DIR": str(folder / "kernels")}
        environment = {"PYTHONPATH": str(folder), **places, "GRADIO_SHARE": "True", **proxy}
        command = [str(PYTHON), "-m", "flexclear", "play", "--port", str(port), *options]
        with self._said.open("w") as said:
            self.process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=said, text=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == f"{self.address}\n", (line, self.said)

    @property
    def said(self) -> str:
        """Standard error so far."""
        return self._said.read_text()

    @property
    def asked(self) -> set[str]:
        """Hosts that its Python code has looked up or connected to."""
        return set(self._notes.read_text().split())

    def interrupt(self) -> int:
        """Press Ctrl-C; returns the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(LONG)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def begin(self, *values: Any) -> str:
        """Request images through the queue, as the page does; returns the request's address."""
        content = json.dumps({"data": values}).encode()
        request = urllib.request.Request(
            f"{self.address}gradio_api/call/draw", content, {"Content-Type": "application/json"}
        )
        with _open(request) as answer:
            return f"{self.address}gradio_api/call/draw/{json.load(answer)['event_id']}"

    def result(self, address: str) -> list[Any]:
        """The result of a request.

        Raises:
            RuntimeError: an error.
        """
        event = ""
        with _open(address) as lines:
            for line in lines:
                name, _, text = line.decode().strip().partition(": ")
                event = text if name == "event" else event
                if name == "data" and event == "complete":
                    return json.loads(text)
                if name == "data" and event == "error":
                    raise RuntimeError(text)
        raise RuntimeError("no result")

    def image(self, address: str) -> Image.Image:
        """The image at an address of the page."""
        with _open(address) as answer:
            return Image.open(io.BytesIO(answer.read())).convert("RGB")


def _open(request: Any) -> Any:
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=LONG)


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Any]:
    """A headless Chromium that keeps a log of its requests."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-proxy-server",
        "--window-size=1280,1060",
        "--force-prefers-reduced-motion",
        f"--user-data-dir={folder / 'profile'}",
    ):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def requests_of(driver: Any) -> list[str]:
    """Addresses that the browser has requested from other processes since the last call."""
    found = []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.append(message["params"]["request"]["url"])
        elif message["method"] == "Network.webSocketCreated":
            found.append(message["params"]["url"])
    return [address for address in found if urlsplit(address).scheme in ("http", "https", "ws", "wss")]
