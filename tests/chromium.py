"A headless Chromium, spoken to over its DevTools protocol; None where there is none."

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium():
    "The path of a browser, or None."
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    "One window of a browser; `requests` are the addresses that it asked for."

    def __init__(self, program):
        import websocket

        self.profile = tempfile.mkdtemp()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-extensions"]
        flags += ["--disable-background-networking", "--no-first-run", "--remote-debugging-port=0"]
        flags += ["--remote-allow-origins=*", f"--user-data-dir={self.profile}", "about:blank"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen([program, *flags], **quiet)
        port = self._read_port()
        with urlopen(f"http://127.0.0.1:{port}/json") as answer:
            page = next(x for x in json.load(answer) if x["type"] == "page")
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=30)
        self.count, self.requests, self.loaded = 0, [], False
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def _read_port(self):
        "The browser writes the port that it listens on into its profile."
        file = Path(self.profile, "DevToolsActivePort")
        for _ in range(300):
            if file.exists() and file.read_text():
                return int(file.read_text().split()[0])
            time.sleep(0.1)
        raise TimeoutError("the browser did not start")

    def _receive(self):
        said = json.loads(self.socket.recv())
        if said.get("method") == "Network.requestWillBeSent":
            self.requests.append(said["params"]["request"]["url"])
        self.loaded |= said.get("method") == "Page.loadEventFired"
        return said

    def call(self, method, **parameters):
        "The result of a command of the protocol."
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=parameters)))
        while (said := self._receive()).get("id") != self.count:
            pass
        assert "error" not in said, said["error"]
        return said["result"]

    def open(self, address):
        "Load a page and wait until it is there."
        self.loaded = False
        self.call("Page.navigate", url=address)
        while not self.loaded:
            self._receive()

    def evaluate(self, script):
        "The value of an expression in the page; a promise is awaited."
        said = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def resize(self, width, height=900):
        "A window of this size, as a phone's or a desk's."
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme):
        "light or dark"
        features = [dict(name="prefers-color-scheme", value=scheme)]
        self.call("Emulation.setEmulatedMedia", features=features)

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(10)
        shutil.rmtree(self.profile, ignore_errors=True)
