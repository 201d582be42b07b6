"""A headless Chromium that opens pages, driven by its DevTools protocol over a pipe."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")
MAX_SECONDS = 120  # for an answer or an event
COMMANDS, EVENTS = 3, 4  # the file descriptors that Chromium reads and writes


class Page:
    """One page.

    Attributes:
        events: everything that the browser has reported so far, as dictionaries with "method" and "params".
    """

    def __init__(self, commands: int, events: int):
        self._commands, self._events = commands, events
        self._rest, self._session, self._number = b"", None, 0
        self.events: list[dict] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._rest:
            assert select.select([self._events], [], [], MAX_SECONDS)[0], "Chromium does not answer"
            received = os.read(self._events, 1 << 20)
            assert received, "Chromium has ended"
            self._rest += received
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path) -> None:
        """Opens a file and waits until it is loaded with its images."""
        self.events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not self.named("Page.loadEventFired"):
            self.events.append(self._receive())

    def named(self, method: str) -> list[dict]:
        """The parameters of the events of that name."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def resize(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def prefer(self, color_scheme: str) -> None:
        """ "light" or "dark"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": color_scheme}])

    def screenshot(self, path: Path) -> None:
        """The whole page, as a PNG."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def browsing() -> Iterator[Page]:
    """Starts Chromium, which must be there, with an empty profile."""
    to_read, commands = os.pipe()
    events, to_write = os.pipe()

    def connect() -> None:
        copies = os.dup(to_read), os.dup(to_write)
        os.dup2(copies[0], COMMANDS)
        os.dup2(copies[1], EVENTS)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        root = ["--no-sandbox"] * (os.geteuid() == 0)
        process = subprocess.Popen(
            [CHROMIUM, *FLAGS, *root, f"--user-data-dir={profile}"],
            preexec_fn=connect,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        try:
            yield Page(commands, events)
        finally:
            process.kill()
            process.wait()
            os.close(commands)
            os.close(events)


def check_page(page: Page, path: Path, num_images: int) -> None:
    """Opens a file narrow and wide, light and dark: all pictures are shown, it fits, and loads and runs nothing."""
    backgrounds = set()
    for width, scheme in ((390, "light"), (1400, "dark")):
        page.prefer(scheme)
        page.resize(width)
        page.open(path)
        widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert len(widths) == num_images and all(widths)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        requested = [event["request"]["url"] for event in page.named("Network.requestWillBeSent")]
        assert [url for url in requested if not url.startswith("data:")] == [path.as_uri()]
        for problem in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            assert not page.named(problem)
    assert len(backgrounds) == 2
    assert page.evaluate("document.scripts.length") == 0
