"""A headless Chromium on a demo, and hands for it: what the browser tests share."""

from __future__ import annotations

import contextlib
import shutil
from contextlib import contextmanager

TABS = ("Chat", "Vote", "Data", "Train", "Adapters")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def chromium():
    """The system's browser; none is downloaded."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


def playwright_timeout():
    """The error of a wait that was too long."""
    from playwright.sync_api import TimeoutError as TooLong

    return TooLong


class Visitor:
    """One person at the page: notes what goes wrong while they use it."""

    def __init__(self, browser, address, *, width=1280, height=800, dark=False):
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            accept_downloads=True,
        )
        self.page = self.context.new_page()
        self.errors, self.elsewhere = [], []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(f"page error: {error}"))
        self.page.on("dialog", lambda dialog: (self.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self._request(request, address))
        self.page.on("response", self._response)
        self.page.set_default_timeout(90_000)  # tests share a busy machine
        self.page.goto(address)
        self.page.wait_for_selector("#chat-box textarea")
        self.page.wait_for_function("document.querySelector('#chat-left input')?.value")

    def _console(self, message):
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.type}: {message.text}")

    def _request(self, request, address):
        if not request.url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def _response(self, response):
        if response.status >= 400:
            self.errors.append(f"status {response.status}: {response.url}")

    def tab(self, name):
        self.page.get_by_role("tab", name=name, exact=True).click()
        self.page.wait_for_timeout(300)

    def choose(self, place, value):
        """Pick a value of a dropdown."""
        self.page.click(f"#{place} input")
        self.page.locator(f"#{place}").get_by_role("option", name=value, exact=True).click()

    def open(self, label):
        """Unfold an accordion of the tab that is shown."""
        self.page.locator("button.label-wrap:visible", has_text=label).first.click()

    def say(self, text, seconds=120):
        """Send a chat message and wait for the whole answer."""
        self.page.fill("#chat-box textarea", text)
        for _ in range(4):  # on a busy machine the box can be typed into before the page listens to it
            self.page.press("#chat-box textarea", "Enter")
            with contextlib.suppress(playwright_timeout()):
                self.page.wait_for_function("document.querySelector('#chat-box textarea').value === ''", timeout=20_000)
                break
        else:
            raise AssertionError("the message was never sent")
        self.answered(seconds)

    def answered(self, seconds=120):
        """Wait for the whole answer to what was just sent."""
        self.page.wait_for_function("document.querySelector('#chat-0 .user')")
        self.page.get_by_role("button", name="Send", exact=True).wait_for(timeout=1000 * seconds)
        self.page.wait_for_timeout(200)

    def answers(self, side):
        """Texts of one side's answers."""
        return [text.strip() for text in self.page.locator(f"#chat-{side} .bot .message-content").all_inner_texts()]

    def text(self, place):
        return self.page.inner_text(f"#{place}")

    def wait_for(self, place, part, seconds=180):
        try:
            self.page.wait_for_function(
                "([place, part]) => document.getElementById(place)?.innerText.includes(part)",
                arg=[place, part],
                timeout=1000 * seconds,
            )
        except playwright_timeout():
            shown = self.text(place).strip()
            raise AssertionError(f"{part!r} did not come to #{place} in {seconds} s; it shows {shown!r}") from None

    def too_wide(self):
        """Visible elements that reach beyond the window, but those inside something that scrolls."""
        return self.page.evaluate(
            """() => {
              const out = [];
              const wide = document.documentElement.clientWidth;
              if (document.documentElement.scrollWidth > wide) out.push("page " + document.documentElement.scrollWidth);
              for (const at of document.querySelectorAll(".gradio-container *")) {
                const box = at.getBoundingClientRect();
                if (box.width === 0 || box.height === 0 || box.right <= wide + 1) continue;
                let up = at, scrolls = false;
                while ((up = up.parentElement)) {
                  const style = getComputedStyle(up);
                  if (/(auto|scroll|hidden|clip)/.test(style.overflowX)) { scrolls = true; break; }
                }
                if (!scrolls) out.push(at.tagName + "#" + at.id + "." + String(at.className).slice(0, 60));
              }
              return out.slice(0, 5);
            }"""
        )

    def picture(self, path, *, whole=False):
        self.page.screenshot(path=path, full_page=whole, animations="disabled")
