"""What one does with a notebook in JupyterLab, in the words of a user."""

from __future__ import annotations

import re
import time
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

ERROR = '[data-mime-type="application/vnd.jupyter.error"]'
SECOND = 1000  # milliseconds, Playwright's unit


class LabPage:
    """A notebook that is open in JupyterLab."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        page.goto(address)
        self.notebook = page.locator(".jp-Notebook")
        expect(self.notebook).to_be_visible(timeout=60 * SECOND)
        expect(page.locator(".jp-CodeCell").last).to_be_attached(timeout=30 * SECOND)
        expect(page.get_by_role("button", name="| Idle")).to_be_visible(timeout=120 * SECOND)

    def run_all(self, seconds: float = 300) -> None:
        """Run > Run All Cells, and wait until every code cell has its number or one has failed."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_text("Run All Cells", exact=True).click()
        prompts = self.page.locator(".jp-CodeCell .jp-InputPrompt")
        pending = prompts.filter(has_text="[ ]").or_(prompts.filter(has_text="[*]"))
        failed = self.page.locator(ERROR).first
        # A cell whose code is hidden has no number in the page: the first that is seen may be any.
        done = prompts.filter(has_text=re.compile(r"\[\d+\]"))
        # Asked for when the kernel is slow to come.
        choose = self.page.get_by_role("button", name="Select Kernel")
        expect(done.or_(failed).or_(choose).first).to_be_visible(timeout=seconds * SECOND)
        if choose.is_visible():
            choose.click()
            expect(done.or_(failed).first).to_be_visible(timeout=seconds * SECOND)
        end = time.monotonic() + seconds
        while pending.count() and not self.errors():
            assert time.monotonic() < end, f"{pending.count()} cells still wait: {pending.all_inner_texts()}"
            self.page.wait_for_timeout(200)

    def errors(self) -> list[str]:
        """Tracebacks in the notebook."""
        return self.page.locator(ERROR).all_inner_texts()

    def control(self, name: str) -> Locator:
        """The row of a widget, by its description."""
        label = self.page.locator(".widget-label", has_text=name)
        return self.page.locator(".jupyter-widgets").filter(has=label).last

    def slide(self, name: str, steps: int) -> str:
        """Move a slider by its keyboard; returns what it shows."""
        row = self.control(name)
        handle = row.locator(".noUi-handle")
        handle.focus()
        for _ in range(steps):
            handle.press("ArrowRight")
        return row.locator(".widget-readout").inner_text()

    def write(self, name: str, text: str) -> None:
        field = self.control(name).locator("input")
        field.fill(text)
        field.press("Tab")

    def button(self, name: str) -> Locator:
        return self.page.locator("button.jupyter-button", has_text=name)

    def press(self, name: str) -> None:
        self.button(name).click()

    def says(self, text: str, seconds: float = 90) -> None:
        """Wait until the controls say something."""
        expect(self.page.locator(".widget-html").filter(has_text=text).first).to_be_visible(
            timeout=seconds * SECOND
        )

    def shows_picture(self, seconds: float = 120) -> None:
        """Wait until the controls show a figure."""
        expect(self.page.locator(".widget-vbox img.widget-image:visible").first).to_be_visible(
            timeout=seconds * SECOND
        )

    def right_edge_of_controls(self) -> float:
        """The rightmost pixel of any widget."""
        edges = "rows => Math.max(...rows.map(row => row.getBoundingClientRect().right))"
        return self.page.locator(".widget-vbox > .jupyter-widgets:visible").evaluate_all(edges)

    def pictures(self) -> int:
        """How many figures stand in the notebook."""
        return self.page.locator(".jp-RenderedImage img").count()

    def wider_than_the_page(self) -> list[str]:
        """Outputs that are cut off at the right and cannot be scrolled to."""
        cut = """outputs => outputs.filter(output => {
            const room = output.getBoundingClientRect().right;
            return [...output.querySelectorAll('img, table, p, pre')].some(part => {
                for (let box = part; box && box !== output.parentElement; box = box.parentElement)
                    if (['auto', 'scroll'].includes(getComputedStyle(box).overflowX)) return false;
                return part.getBoundingClientRect().right > room + 1;
            });
        }).map(output => output.textContent.slice(0, 60))"""
        return self.page.locator(".jp-OutputArea-output").evaluate_all(cut)

    def screenshot(self, path: Path) -> None:
        """The whole notebook in one tall picture."""
        self.page.locator(".jp-WindowedPanel-outer").first.evaluate("panel => panel.scrollTo(0, 0)")
        size = self.page.viewport_size
        height = self.notebook.evaluate(
            "n => Math.max(...[n, ...n.querySelectorAll('*')].map(e => e.scrollHeight))"
        )
        self.page.set_viewport_size({"width": size["width"], "height": min(int(height) + 200, 16000)})
        self.page.wait_for_timeout(700)
        self.page.screenshot(path=path)
        self.page.set_viewport_size(size)
