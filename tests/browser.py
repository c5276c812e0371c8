"""A page in headless Chromium, over the pipe of its debugging protocol: what it asks for, says, and looks like."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def found() -> str:
    """The browser's program; empty where there is none."""
    return os.environ.get("ROBEVAL_BROWSER", "") or next((p for n in NAMES if (p := shutil.which(n))), "")


class Tab:
    """One open tab.

    Attributes:
        requested: Addresses of every request.
        said: Errors and warnings of the console, and violations of the page's policy.
    """

    def __init__(self, to: Any, back: Any):
        self.to, self.back, self.number, self.session = to, back, 0, ""
        self.requested: list[str] = []
        self.said: list[str] = []
        self.loaded = False

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the browser, and take in everything that it reports until it answers."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        while (said := self._read()).get("id") != self.number:
            self._take(said)
        assert "error" not in said, said
        result: dict[str, Any] = said["result"]
        return result

    def _read(self) -> dict[str, Any]:
        raw = bytearray()
        while (byte := self.back.read(1)) != b"\0":
            assert byte, "the browser went away"
            raw += byte
        message: dict[str, Any] = json.loads(raw)
        return message

    def _take(self, message: dict[str, Any]) -> None:
        name, params = message.get("method"), message.get("params", {})
        if name == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif name == "Log.entryAdded":
            self.said.append(params["entry"]["text"])
        elif name in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.said.append(json.dumps(params)[:300])
        elif name == "Page.loadEventFired":
            self.loaded = True

    def open(self, page: Path, width: int, *, dark: bool = False) -> None:
        """Load a file at a width in CSS pixels, and wait until it has settled."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.requested, self.said, self.loaded = [], [], False
        self.send("Page.navigate", url=page.resolve().as_uri())
        while not self.loaded:
            self._take(self._read())
        self.value("document.fonts.ready.then(() => 1)")

    def value(self, expression: str) -> Any:
        """What an expression gives, promises awaited. The debugger may run it although the page may run nothing."""
        said = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return said["result"].get("value")

    def shot(self, height: int) -> bytes:
        """The top of the page as PNG."""
        width = self.value("window.innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        said = self.send("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(said["data"])


@contextmanager
def tab(program: str, profile: Path) -> Iterator[Tab]:
    """A fresh browser with one tab; it ends with the block."""
    child_in, to = os.pipe()
    back, child_out = os.pipe()

    def wire() -> None:
        high_in, high_out = os.dup(child_in), os.dup(child_out)  # 3 and 4 may be taken by the pipes themselves
        os.dup2(high_in, 3)
        os.dup2(high_out, 4)

    command = [
        program, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-background-networking", "--disable-component-update",
        f"--user-data-dir={profile}", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, close_fds=False, preexec_fn=wire, pass_fds=(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(child_in)
    os.close(child_out)
    with os.fdopen(to, "wb") as sink, os.fdopen(back, "rb") as source:
        try:
            one = Tab(sink, source)
            targets = one.send("Target.getTargets")["targetInfos"]
            target = next(t["targetId"] for t in targets if t["type"] == "page")
            session = one.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            one.session = session
            for domain in ("Page", "Network", "Log", "Runtime"):
                one.send(f"{domain}.enable")
            yield one
            with suppress(Exception):
                one.session = ""
                one.send("Browser.close")
        finally:
            process.kill()
            process.wait()
