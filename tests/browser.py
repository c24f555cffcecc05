"""A Chromium that tests drive by the DevTools protocol, over its pipe: no port, no driver, no package.

`available()` tells whether there is one. Its network is only listened to: what a page asks for is in `requests`.
"""

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# The browser reads commands from descriptor 3 and writes to 4.
START = "import os,sys; os.dup2(int(sys.argv[1]),3); os.dup2(int(sys.argv[2]),4); os.execv(sys.argv[3], sys.argv[3:])"
SECONDS = 30
KEYS = {
    "Enter": ("\r", 13),
    "Escape": ("", 27),
    "ArrowDown": ("", 40),
    "ArrowUp": ("", 38),
    "ArrowRight": ("", 39),
    "ArrowLeft": ("", 37),
    "End": ("", 35),
}


def available() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page. `requests`: the address of everything that was asked for; `errors`: what went wrong in the page."""

    def __init__(self) -> None:
        program = available()
        assert program is not None
        self.profile = tempfile.mkdtemp(prefix="delib-browser-")
        theirs_in, self.write = os.pipe()
        self.read, theirs_out = os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        start = [sys.executable, "-c", START, *map(str, ends), program, *FLAGS, f"--user-data-dir={self.profile}"]
        self.process = subprocess.Popen(start, pass_fds=ends, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for fd in (theirs_in, theirs_out, *ends):
            os.close(fd)
        self.waiting, self.last, self.session = b"", 0, ""
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.loaded = 0
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)
        shutil.rmtree(self.profile, ignore_errors=True)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command and its result."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self.write, rest) :]
        while True:
            told = self._next()
            if told.get("id") == self.last:
                assert "error" not in told, told
                return told["result"]

    def _next(self) -> dict[str, Any]:
        """The next message; events are noted on the way."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self.waiting:
            ready, _, _ = select.select([self.read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self.read, 1 << 20)
            assert part, "the browser ended"
            self.waiting += part
        line, self.waiting = self.waiting.split(b"\0", 1)
        told: dict[str, Any] = json.loads(line)
        about = told.get("params", {})
        match told.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
            case "Runtime.exceptionThrown":
                self.errors.append(str(about["exceptionDetails"]))
            case "Log.entryAdded":
                self.errors.append(about["entry"]["text"])
            case "Page.javascriptDialogOpening":
                self.errors.append(f"dialog: {about['message']}")
            case "Page.loadEventFired":
                self.loaded += 1
        return told

    def open(self, page: Path, view: str = "") -> None:
        """The page anew, with everything loaded."""
        self._go("about:blank")
        self.requests.clear()
        self._go(page.resolve().as_uri() + view)

    def _go(self, address: str) -> None:
        before = self.loaded
        self.send("Page.navigate", url=address)
        while self.loaded == before:
            self._next()

    def ask(self, expression: str) -> Any:
        """What an expression is in the page; a promise is waited for."""
        told = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, expression: str) -> Any:
        """What an expression becomes once it is true; an element is true, and {} here."""
        end = time.monotonic() + SECONDS
        while (found := self.ask(expression)) in (None, False, "", 0):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)
        return found

    def press(self, key: str) -> None:
        text, code = KEYS.get(key, (key, ord(key[0].upper())))
        about = {"key": key, "windowsVirtualKeyCode": code, "code": key if key in KEYS else ""}
        self.send("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def write_text(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """A click of the mouse on the middle of an element."""
        where = f"const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
        x, y = self.ask(
            f"(() => {{ {where} const r = e.getBoundingClientRect(); "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def size(self, width: int, height: int, dark: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
