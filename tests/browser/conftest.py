"""JupyterLab and headless Chromium, driven by Playwright. Screenshots go to $BKLM_SCREENSHOTS, else to pytest's folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from bklm.notebook.form import FORM_IDS

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    # Every cell in the page, not only those in view: what is looked for need not be scrolled to.
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path."""
    pytest.importorskip("playwright", reason="playwright is not installed: bash colab_setup.sh browser does it")
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: bash colab_setup.sh browser does it")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    return found


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("BKLM_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"screenshots: {folder}")
    return folder


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A checkout to work in: links to this one, copies of the notebooks, results of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("colab_setup.sh", "pyproject.toml", "bklm", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "notebooks").mkdir()
    return folder


@pytest.fixture(scope="session")
def lab(checkout, chromium, tmp_path_factory) -> Iterator[str]:
    """Address of a JupyterLab that serves the checkout."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("jupyter")
    for name, values in SETTINGS.items():
        path = home / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    environment = {
        **os.environ,
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "OMP_NUM_THREADS": "1",
    }
    options = [f"--ServerApp.root_dir={checkout}", f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1"]
    options += [
        "--IdentityProvider.token=",
        "--ServerApp.disable_check_xsrf=True",
        "--allow-root",
        "--no-browser",
    ]
    with (home / "log").open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            _wait_for(f"http://127.0.0.1:{port}/api", server, home / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(timeout=15)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_for(address: str, server: subprocess.Popen, output: Path) -> None:
    for _ in range(240):
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    pytest.fail(f"JupyterLab did not start:\n{output.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_notebook(lab, browser, checkout, screenshots):
    """open_notebook(name, width, **values) -> a Lab page that shows a copy of the notebook with the form's values set."""
    from lab import LabPage

    pages = []

    def open_it(name: str, width: int = 1280, **values) -> LabPage:
        notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        forms = [c for c in notebook.cells if c.id in FORM_IDS]
        for field, value in values.items():
            (form,) = [c for c in forms if f"\n{field} = " in c.source]
            form.source = re.sub(rf"(?m)^{field} = .*$", f"{field} = {value!r}", form.source)
        nbformat.write(notebook, checkout / "notebooks" / name)
        page = browser.new_page(viewport={"width": width, "height": 1000})
        pages.append((name, page))
        return LabPage(page, f"{lab}/doc/tree/notebooks/{name}?reset")

    yield open_it
    for name, page in pages:
        page.screenshot(path=screenshots / f"{name.removesuffix('.ipynb')}_last.png")
        page.close()
