"""A page in headless Chromium, with the pointer and the keys of a reader, over Chromium's debugging pipe."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
         "ArrowDown": 40, " ": 32}  # fmt: skip
# Chromium reads commands from descriptor 3 and writes answers to 4; either number may be that of the other pipe now.
_LAUNCH = """
import fcntl, os, sys
reader, writer = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(reader, 3)
os.dup2(writer, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_TEXTS = {"Enter": "\r", " ": " "}


class Page:
    """One tab of the browser.

    Attributes:
        errors: what the page reported: exceptions, errors and warnings of the console, refusals of the policy.
        requests: addresses that it asked for.
    """

    def __init__(self, writer: int, reader: int) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._writer, self._reader, self._session = writer, reader, ""
        self._pending, self._last_id = b"", 0
        self._loaded = False
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Open a file in a window of this size; what was reported about an earlier one is forgotten."""
        self.visit(path.resolve().as_uri(), width=width, height=height, scheme=scheme)

    def visit(self, address: str, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """The same for an address."""
        self.resize(width, height)
        self._send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.errors.clear()
        self.requests.clear()
        # Another fragment alone would not load the page anew.
        for target in ["about:blank", address] if "#" in address else [address]:
            self._loaded = False
            self._send("Page.navigate", url=target)
            while not self._loaded:
                self._receive()
        self.settle()

    def resize(self, width: int, height: int) -> None:
        self._send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, or of what it promises."""
        answer = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def settle(self) -> None:
        """Wait until what the last event led to is drawn."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def wait_for(self, expression: str, seconds: float = 30.0) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"After {seconds:g} s, {expression} was not true.")
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """What a reader sees of an element."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def move(self, x: float, y: float, *, pressed: bool = False) -> None:
        self._mouse("mouseMoved", x, y, buttons=int(pressed), button="left" if pressed else "none")
        self.settle()

    def press(self, x: float, y: float) -> None:
        self.move(x, y)
        self._mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)

    def release(self, x: float, y: float) -> None:
        self._mouse("mouseReleased", x, y, button="left", clickCount=1)
        self.settle()

    def click(self, x: float, y: float) -> None:
        self.press(x, y)
        self.release(x, y)

    def click_on(self, selector: str) -> None:
        """Click the middle of an element."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{found}.scrollIntoView({{block: 'nearest'}})")
        x, y, width, height = self.evaluate(
            f"(({{x, y, width, height}}) => [x, y, width, height])({found}.getBoundingClientRect())"
        )
        self.click(x + width / 2, y + height / 2)

    def wheel(self, x: float, y: float, delta: float) -> None:
        self._mouse("mouseWheel", x, y, deltaX=0, deltaY=delta)
        self.settle()

    def key(self, key: str, *, times: int = 1, shift: bool = False) -> None:
        """Press and release a key, a named one or a character."""
        text = _TEXTS.get(key, key if len(key) == 1 else "")
        event = {"key": key, "windowsVirtualKeyCode": _KEYS.get(key, ord(key[0])), "modifiers": 8 * shift}
        for _ in range(times):
            self._send("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
            self._send("Input.dispatchKeyEvent", type="keyUp", **event)
        self.settle()

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot")["data"]))
        return path

    def _mouse(self, kind: str, x: float, y: float, **details: Any) -> None:
        self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **details)

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._last_id:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self, timeout: float = 60.0) -> dict[str, Any]:
        """The next message, its event noted."""
        deadline = time.monotonic() + timeout
        while b"\0" not in self._pending:
            if not select.select([self._reader], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium said nothing for {timeout:g} s.")
            received = os.read(self._reader, 1 << 16)
            if not received:
                raise RuntimeError("Chromium has ended.")
            self._pending += received
        raw, _, self._pending = self._pending.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif (
            method == "Runtime.exceptionThrown"
            or (method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"))
            or (method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"))
        ):
            self.errors.append(json.dumps(parameters))
        return message


@contextlib.contextmanager
def browser_page(profile: Path) -> Iterator[Page]:
    """A page of a browser that ends with the block.

    Args:
        profile: an empty folder for the browser's files.
    """
    assert CHROMIUM is not None
    command_reader, command_writer = os.pipe()
    answer_reader, answer_writer = os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={profile}"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-ISc", _LAUNCH, str(command_reader), str(answer_writer), CHROMIUM, *options],
        pass_fds=(command_reader, answer_writer),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(command_reader)
    os.close(answer_writer)
    try:
        yield Page(command_writer, answer_reader)
    finally:
        os.close(command_writer)  # Chromium ends with its pipe.
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(answer_reader)
