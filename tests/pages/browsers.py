"""A headless browser for tests of pages; they are skipped by name where there is none."""

import contextlib
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextlib.contextmanager
def started():
    """A browser of playwright's: the one that is installed, or the one that playwright has brought."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    with driver.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        except driver.Error as error:
            if path is not None:
                raise
            pytest.skip(f"no browser is installed: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


class Opened:
    """A page in a browser, with all that it complains of, and all that it asks the network for."""

    def __init__(self, page):
        self.page, self.errors, self.requests = page, [], []
        page.on("console", lambda message: self.errors.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path):
        self.errors.clear()
        self.requests.clear()
        self.page.goto(path.as_uri())
        return self

    def shown(self):
        """The texts of the sites that aren't filtered out, whether or not their modules are open."""
        return self.page.eval_on_selector_all(".site:not([hidden])", "all => all.map(one => one.textContent)")

    def visible(self):
        """How many sites can be seen."""
        return self.page.locator(".site:visible").count()

    @property
    def count(self):
        return self.page.locator("output").text_content()
