"""A real JupyterLab, driven through a real Chromium."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import nbformat

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--js-flags=--expose-gc",
]
SETUP = f"""import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import mixlens as ml
from show_samples import make_trace
trace = make_trace(documents=2)"""
LIVE = ".jp-OutputArea-output .mixlens[data-ready='1']"
_SETTINGS = {
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "@jupyter-widgets/jupyterlab-manager/plugin": {"saveState": False},
}
_KERNEL = "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel"


class Lab:
    """A server over the folder `root`; what is under `home` is all it knows of its user."""

    def __init__(self, root: Path, home: Path) -> None:
        self.root, self.home = root, home
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for name, value in _SETTINGS.items():
            file = home / "settings" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(value))
        folders = {"HOME": "", "JUPYTER_CONFIG_DIR": "c", "JUPYTER_DATA_DIR": "d", "JUPYTER_RUNTIME_DIR": "r"}
        self.environment = {
            **os.environ,
            **{name: str(home / folder) for name, folder in folders.items()},
            "JUPYTER_PREFER_ENV_PATH": "1",
        }
        options = {
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.port": self.port,
            "ServerApp.port_retries": 0,
            "IdentityProvider.token": "",
            "ServerApp.password": "",
            "ServerApp.disable_check_xsrf": True,
            "ServerApp.root_dir": root,
            "LabApp.expose_app_in_browser": True,
            "LabApp.news_url": "",
            "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
            "LabApp.extension_manager": "readonly",
            "LabApp.user_settings_dir": home / "settings",
            "LabApp.workspaces_dir": home / "ws",
        }
        self.log = (home / "server.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
            + [f"--{name}={value}" for name, value in options.items()],
            env=self.environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:  # it waits for a kernel that is still starting
            self.process.kill()
            self.process.wait()
        self.log.close()

    def wait(self, page) -> None:
        """Until the server answers; the browser's clock does the waiting."""
        for _ in range(300):
            assert self.process.poll() is None, (self.home / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/status", timeout=5):
                    return
            except OSError:
                page.wait_for_timeout(200)
        raise AssertionError((self.home / "server.log").read_text())

    def write(self, name: str, *cells: str) -> Path:
        book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
        book.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
        nbformat.write(book, self.root / name)
        return self.root / name


def watched(page) -> SimpleNamespace:
    """What a page logs, throws and asks of anybody but its own server, from now on."""
    seen = SimpleNamespace(page=page, log=[], errors=[], requests=[])
    page.on("console", lambda said: seen.log.append(f"{said.type}: {said.text}"))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("dialog", lambda dialog: (seen.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def gate(route):
        if route.request.url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "file:", "blob:", "data:")):
            return route.continue_()
        seen.requests.append(route.request.url)
        return route.abort()

    page.route("**/*", gate)
    return seen


def open_notebook(lab: Lab, page, name: str, *, kernel: bool = True) -> None:
    page.goto("about:blank")
    page.goto(f"http://127.0.0.1:{lab.port}/doc/tree/{name}?reset")
    page.wait_for_function("window.jupyterapp")
    page.evaluate("window.jupyterapp.restored.then(() => 0)")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    if kernel:
        ready = f"{_KERNEL}?.connectionStatus === 'connected' && {_KERNEL}?.status === 'idle'"
        page.wait_for_function(ready, timeout=90_000)


def run(page, command: str = "notebook:run-all-cells") -> None:
    """Start a notebook command without waiting for what it starts."""
    page.evaluate("name => void window.jupyterapp.commands.execute(name)", command)


def run_all(page) -> None:
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')", None)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=120_000)


def save(page) -> None:
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")


def shut_down_kernels(page) -> None:
    page.evaluate("window.jupyterapp.serviceManager.sessions.shutdownAll()")


def ours(log: list[str]) -> list[str]:
    """What was logged by a view, or is an error; JupyterLab's own one when its kernel is shut down left out."""
    return [line for line in log if ("mixlens" in line or line.startswith("error")) and "debugger state" not in line]


# Ratio of contrast, text and class of every text in a frame, the lowest first.
CONTRAST = """frame => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255);
    };
    const over = (top, ground) => top.slice(0, 3).map((v, i) => v * top[3] + ground[i] * (1 - top[3]));
    const luminance = (c) => {
        const [r, g, b] = c.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const groundOf = (node) => {
        const colours = [];
        for (let at = node; at && at !== frame.parentNode; at = at.parentElement)
            colours.unshift(rgba(getComputedStyle(at).backgroundColor));
        return colours.reduce((ground, top) => over(top, ground), [1, 1, 1]);
    };
    const found = [];
    for (const node of frame.querySelectorAll("*")) {
        if (![...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
        if (!node.checkVisibility()) continue;
        const ground = groundOf(node);
        const style = getComputedStyle(node);
        const text = over(rgba(node.namespaceURI.endsWith("svg") ? style.fill : style.color), ground);
        const [a, b] = [luminance(text), luminance(ground)].sort((x, y) => y - x);
        found.push([(a + 0.05) / (b + 0.05), node.textContent.slice(0, 30), node.className]);
    }
    return found.sort((x, y) => x[0] - y[0]);
}"""
