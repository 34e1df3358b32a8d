"""Headless Chromium, spoken to over a pipe in the DevTools protocol: no driver, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-quic", "--hide-scrollbars=false", "--remote-debugging-pipe", "about:blank"),
)


class Browser:
    """One page. `events` keeps what the page said since `open`: (method, parameters)."""

    def __enter__(self) -> Browser:
        self.folder = tempfile.mkdtemp(prefix="onestep-browser-")
        # Chromium reads commands from descriptor 3 and answers on 4. Both ends of a named pipe are
        # kept open here, so that opening it waits for nobody.
        pipes = [os.path.join(self.folder, name) for name in ("commands", "answers")]
        for pipe in pipes:
            os.mkfifo(pipe)
        self.writer, self.reader = (os.open(pipe, os.O_RDWR) for pipe in pipes)
        self.process = subprocess.Popen(
            [
                "/bin/sh",
                "-c",
                'exec "$@" 3<"$0/commands" 4>"$0/answers"',
                self.folder,
                CHROMIUM,
                f"--user-data-dir={self.folder}/profile",
                *FLAGS,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.buffer, self.count, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.reader)
        os.close(self.writer)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _message(self, deadline: float) -> dict:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reader], [], [], max(0, deadline - time.monotonic()))
            chunk = os.read(self.reader, 1 << 20) if ready else b""
            if not chunk:
                raise TimeoutError("Chromium does not answer")
            self.buffer += chunk
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def _receive(self, wanted, seconds: float = 30) -> dict:
        deadline = time.monotonic() + seconds
        while True:
            message = self._message(deadline)
            if "method" in message:
                self.events.append((message["method"], message["params"]))
            if wanted(message):
                return message

    def call(self, method: str, **parameters) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        answer = self._receive(lambda m: m.get("id") == self.count)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def open(self, path: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file at this width and wait until it has settled."""
        self.events = []
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        if not any(name == "Page.loadEventFired" for name, _ in self.events):
            self._receive(lambda m: m.get("method") == "Page.loadEventFired")

    def run(self, script: str):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def said(self, *methods: str) -> list[dict]:
        return [parameters for name, parameters in self.events if name in methods]

    def screenshot(self, path: Path, whole: bool = True) -> None:
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        Path(path).write_bytes(base64.b64decode(answer["data"]))

    def pdf(self, path: Path) -> None:
        answer = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        Path(path).write_bytes(base64.b64decode(answer["data"]))
