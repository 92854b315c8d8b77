"""A headless Chromium, driven over a pipe by the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
"""Programs that are looked for; the variable CHROMIUM comes first."""
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-zygote", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip

_EXEC = """
import os, sys
os.dup2(int(sys.argv[1]), 60)
os.dup2(int(sys.argv[2]), 61)
os.dup2(60, 3)
os.dup2(61, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Runs a program that reads from 3 and writes to 4."""


def program() -> str | None:
    """The browser, if there is one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser.

    Parameters
    ----------
    write, read : binary streams
        Unbuffered.
    """

    def __init__(self, write: IO[bytes], read: IO[bytes]) -> None:
        self._out, self._in = write, read
        self._number, self._rest, self._session = 0, b"", ""
        self.seconds = 0.0
        self.said: list[dict[str, Any]] = []
        """Events that came in."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command, and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while (found := self._next()).get("id") != self._number:
            self.said.append(found)
        if "error" in found:
            raise RuntimeError(found["error"])
        return dict(found["result"])

    def open(self, path: Path) -> None:
        """Load a file, and wait until all of it is there."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.said):
            self.said.append(self._next())

    def value(self, script: str) -> Any:
        """What an expression in the page is."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def screenshot(self, *, scheme: str = "light", media: str = "", width: int = 1200) -> bytes:
        """The whole page as a PNG."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = self._in.read(2**16)
            if not part:
                raise RuntimeError("the browser has gone away")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, ended afterwards."""
    path = program()
    assert path is not None
    to_browser, from_browser = os.pipe(), os.pipe()

    ends = (to_browser[0], from_browser[1])
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _EXEC,
            *map(str, ends),
            path,
            *_FLAGS,
            f"--user-data-dir={profile}",
            "about:blank",
        ],
        pass_fds=ends,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    with (
        os.fdopen(to_browser[1], "wb", buffering=0) as write,
        os.fdopen(from_browser[0], "rb", buffering=0) as read,
    ):
        try:
            yield Browser(write, read)
        finally:
            process.kill()
            process.wait()
