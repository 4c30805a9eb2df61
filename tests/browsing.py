"""A page of a real browser, with everything that it complains of; the site and the report are looked at through it."""

from urllib.parse import urlsplit

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {390: 844, 1440: 900}

LOOK = """() => {
  const problems = [], root = document.documentElement;
  if (root.scrollWidth > innerWidth) problems.push(`${root.scrollWidth} px wide in a window of ${innerWidth}`);
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth) problems.push(`image ${image.getAttribute("src").slice(0, 80)}`);
  return problems;
}"""


class Watch:
    "A page of the browser, with everything that it complains of or asks for elsewhere."

    def __init__(self, browser, width: int):
        self.context = browser.new_context(viewport={"width": width, "height": WIDTHS[width]})
        self.page = self.context.new_page()
        self.problems = []
        self.page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        self.page.on("requestfailed", lambda request: self.problems.append(f"failed: {request.url[:80]}"))
        self.page.on("request", self.asked)

    def asked(self, request):
        parts = urlsplit(request.url)
        if parts.scheme not in ("file", "data", "blob") and parts.hostname != "127.0.0.1":
            self.problems.append(f"asked {request.url[:80]}")

    def resize(self, width: int):
        self.page.set_viewport_size({"width": width, "height": WIDTHS[width]})

    def look(self, url: str) -> list[str]:
        "Open an address and say what is wrong there."
        self.problems.clear()
        self.page.goto(url, wait_until="load")
        return [*self.problems, *self.page.evaluate(LOOK)]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.close()
