"""A headless Chromium, driven over its DevTools protocol through a pipe: pages, scripts, keys, clicks and pictures."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LIMIT = 60  # seconds for anything that is asked of the browser
OFF = ("gpu", "quic", "background-networking", "component-update", "sync", "extensions", "dev-shm-usage")
# The browser reads commands from its descriptor 3 and writes answers to 4; ours have any numbers.
AS_3_AND_4 = """
import fcntl, os, sys
ours = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, theirs in zip(ours, (3, 4)):
    os.dup2(number, theirs)
os.execv(sys.argv[3], sys.argv[3:])
"""
# key -> code and the number that Windows has for it, which Chromium asks for everywhere; what it types
KEYS = {
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
    "End": ("End", 35, ""),
    "Home": ("Home", 36, ""),
    "Tab": ("Tab", 9, ""),
    " ": ("Space", 32, " "),
}


class Failed(AssertionError):
    """The browser answered with an error, too late, or not at all."""


@contextmanager
def browser(folder):
    """A `Page` of a browser of its own, whose profile is in `folder`; whatever happens, no process of it is left."""
    options = ["--headless", "--remote-debugging-pipe", "--no-first-run", *(f"--disable-{what}" for what in OFF)]
    options += [f"--user-data-dir={folder}", "--force-device-scale-factor=1"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []  # which it refuses to have as root
    (read_commands, commands), (answers, write_answers) = os.pipe(), os.pipe()
    try:
        theirs = [str(read_commands), str(write_answers)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", AS_3_AND_4, *theirs, BROWSER, *options],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that all of its processes can be ended at once
        )
        os.close(read_commands)
        os.close(write_answers)
        try:
            yield Page(commands, answers, process.pid)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(LIMIT)
    finally:
        os.close(commands)
        os.close(answers)


class Page:
    """The one page of a browser, whose processes are the group `group`.

    `messages` holds what it said to its console, its exceptions and log entries.
    """

    def __init__(self, commands, answers, group):
        self._commands, self._answers, self.group = commands, answers, group
        self._left, self._last, self._session = b"", 0, None
        self.messages = []
        self._loaded = False
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    def open(self, path, width=1200, height=900):
        """Load a file, with a window of this size; returns when it is loaded, and forgets the messages before."""
        self.resize(width, height)
        self.messages.clear()
        self._loaded = False
        self._ask("Page.navigate", url=path.as_uri())
        end = time.monotonic() + LIMIT
        while not self._loaded:
            self._receive(end)

    def resize(self, width, height=900):
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, script):
        """The value of a JavaScript expression, awaited where it is a promise."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise Failed(f"{script}: {_exception(answer['exceptionDetails'])}")
        return answer["result"].get("value")

    def until(self, script):
        """Wait until an expression is true."""
        end = time.monotonic() + LIMIT
        while not self.evaluate(script):
            if time.monotonic() > end:
                raise Failed(f"not within {LIMIT} s: {script}; messages: {self.messages}")
            time.sleep(0.02)

    def press(self, key, times=1):
        """Press a key of the keyboard, where the focus is."""
        code, number, text = KEYS[key]
        event = dict(key=key, code=code, windowsVirtualKeyCode=number)
        for _ in range(times):
            typed = dict(type="keyDown", text=text) if text else dict(type="rawKeyDown")
            self._ask("Input.dispatchKeyEvent", **event, **typed)
            self._ask("Input.dispatchKeyEvent", **event, type="keyUp")

    def click(self, element, across=0.5, down=0.5):
        """Click on an element, which a JavaScript expression finds, at these shares of its width and height."""
        box = f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect().toJSON()))({element})"
        at = self.evaluate(box)
        where = dict(x=at["x"] + across * at["width"], y=at["y"] + down * at["height"])
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def picture(self, path):
        """Write the whole page, as far as it reaches, as PNG."""
        self.evaluate("scrollTo(0, 0)")  # what sticks to the window would hang in the middle of the page
        answer = self._ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _ask(self, method, **params):
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        end = time.monotonic() + LIMIT
        self._send(json.dumps(message).encode() + b"\0", end)
        while True:
            answer = self._receive(end)
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise Failed(f"{method}: {answer['error']}")
                return answer["result"]

    def _send(self, data, end):
        while data:
            if not select.select([], [self._commands], [], max(0, end - time.monotonic()))[1]:
                raise Failed("the browser does not listen")
            data = data[os.write(self._commands, data[: select.PIPE_BUF]) :]

    def _receive(self, end):
        """The next message, which ends with NUL."""
        while b"\0" not in self._left:
            if not select.select([self._answers], [], [], max(0, end - time.monotonic()))[0]:
                raise Failed(f"the browser does not answer within {LIMIT} s")
            data = os.read(self._answers, 1 << 20)
            if not data:
                raise Failed("the browser has ended")
            self._left += data
        message, _, self._left = self._left.partition(b"\0")
        message = json.loads(message)
        self._note(message)
        return message

    def _note(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.consoleAPICalled":
            values = (str(one.get("value", one.get("description"))) for one in params["args"])
            self.messages.append(f"{params['type']}: {' '.join(values)}")
        elif method == "Runtime.exceptionThrown":
            self.messages.append(_exception(params["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.messages.append(f"{params['entry']['level']}: {params['entry']['text']}")


def _exception(details):
    return details.get("exception", {}).get("description", details["text"])
