"""A headless Chromium with one page, over its DevTools protocol: what a page asks for, complains of and looks like."""

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """The first of `BROWSERS` that is installed."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


class Page:
    """One page.

    Attributes:
        requests: addresses that were asked for, the page's own among them.
        complaints: what the console has as errors, and uncaught exceptions.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._loaded = False
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; what happens meanwhile is noted."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = self._receive()
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]

    def _receive(self, timeout: float = 30.0) -> dict[str, Any]:
        message = json.loads(self._connection.recv(timeout))
        match message.get("method"), message.get("params", {}):
            case "Network.requestWillBeSent", about:
                self.requests.append(about["request"]["url"])
            case "Runtime.exceptionThrown", about:
                self.complaints.append(json.dumps(about["exceptionDetails"]))
            case "Log.entryAdded", about if about["entry"]["level"] == "error":
                self.complaints.append(about["entry"]["text"])
            case "Runtime.consoleAPICalled", about if about["type"] in ("error", "assert"):
                self.complaints.append(json.dumps(about["args"]))
            case "Page.loadEventFired", _:
                self._loaded = True
        return message

    def open(self, file: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file in a window of this size, in light or in dark, and wait for it."""
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not self._loaded:
            self._receive()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression comes to; JSON-ready."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def hover(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, file: Path) -> None:
        """The window as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def page(folder: Path) -> Iterator[Page]:
    """A page of a browser of its own, which ends with it.

    Args:
        folder: empty; for the browser's profile.
    """
    browser = find_browser()
    assert browser is not None
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    words += [
        "--disable-background-networking",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
        "about:blank",
    ]
    silent = subprocess.DEVNULL
    process = subprocess.Popen([browser, *words], stdout=silent, stderr=silent, stdin=silent, start_new_session=True)
    try:
        target = _target(folder / "DevToolsActivePort", process)
        with connect(target, max_size=None, open_timeout=30, proxy=None) as connection:
            yield Page(connection)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _target(port_file: Path, process: subprocess.Popen, limit_s: float = 30.0) -> str:
    """The address of the browser's first page."""
    import urllib.request

    end = time.monotonic() + limit_s
    while time.monotonic() < end and process.poll() is None:
        if port_file.exists() and (lines := port_file.read_text().split()):
            with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=10) as answer:
                pages = [target for target in json.load(answer) if target["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
        time.sleep(0.05)
    raise TimeoutError(f"the browser did not start within {limit_s} s")
