"""The page as a browser shows it: nothing cut, nothing hidden, no complaint, narrow and wide, by day and by night."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from bench import report
from bench.digest import Run
from tests.bench.made import all_devices
from train.plot import SCHEME

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# The page lies in a frame, which is its window: browsers refuse windows as narrow as a phone's.
FRAME = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<iframe id="frame" width="{width}" height="900" style="border:0" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
addEventListener("load", () => {{
  const frame = document.getElementById("frame").contentWindow, page = frame.document
  const found = {{width: frame.innerWidth, background: frame.getComputedStyle(page.body).backgroundColor, faults: []}}
  const fault = (what, element) => found.faults.push(what + ": " + element.textContent.slice(0, 60))
  if (page.documentElement.scrollWidth > page.documentElement.clientWidth) found.faults.push("the page is too wide")
  const shown = element => element.getClientRects().length > 0
  for (const element of page.querySelectorAll("main *")) {{
    if (!shown(element) || element.closest("svg") && element.tagName != "svg") continue
    const box = element.getBoundingClientRect()
    if (box.left < -0.5 || box.right > found.width + 0.5) fault("outside", element)
    if (element.tagName == "svg" || !element.clientWidth) continue
    if (element.scrollWidth > element.clientWidth + 1) fault("cut " + element.tagName, element)
  }}
  found.figures = [...page.querySelectorAll("figure")].map(figure => {{
    const pictures = [...figure.querySelectorAll("svg")].filter(shown)
    for (const picture of pictures) for (const words of picture.querySelectorAll("text")) {{
      const box = words.getBoundingClientRect(), edge = picture.getBoundingClientRect()
      if (box.left < edge.left - 1 || box.right > edge.right + 1 || box.top < edge.top - 1
          || box.bottom > edge.bottom + 1) fault("cut in " + figure.id, words)
    }}
    const scale = pictures[0] ? pictures[0].getBoundingClientRect().width / pictures[0].viewBox.baseVal.width : 0
    const caption = shown(figure.querySelector("figcaption"))
    return {{id: figure.id, pictures: pictures.length, letters: 13 * scale, caption}}
  }})
  found.figures.forEach(figure => {{ if (figure.letters < 9) found.faults.push("unreadably small: " + figure.id) }})
  document.getElementById("found").textContent = JSON.stringify(found)
}})
</script>"""


def show(browser: str, folder: Path, page: str, width: int, *, dark: bool = False) -> tuple[dict, str]:
    """What the frame's script found of the page, and what the browser's console said."""
    (folder / "frame.html").write_text(FRAME.format(width=width, page=escape(page)))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1600,1000", "--dump-dom"]
    command += ["--blink-settings=preferredColorScheme=0"] * dark + [(folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(unescape(found[1])) if found else {}, console


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    if not show(path, tmp_path_factory.mktemp("probe"), "<body><main>a page</main></body>", 400)[0]:
        pytest.skip(f"{path} shows no local page: a confined or broken browser")
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, name = tmp_path_factory.mktemp("report"), "measured-on-a-machine-with-a-long-name-{}"
    report.write(folder, [Run(Path(name.format(file)), each) for file, each in all_devices().items()])
    return (folder / "report.html").read_text()


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(400, False), (400, True), (821, False), (1081, False)])
def test_every_figure_is_seen_and_nothing_is_cut(
    browser: str, page: str, tmp_path: Path, width: int, dark: bool
) -> None:
    found, console = show(browser, tmp_path, page, width, dark=dark)
    assert found["width"] == width
    assert found["faults"] == []
    assert console == ""
    assert found["background"] == rgb(SCHEME["paper"][dark])
    assert len(found["figures"]) == page.count("<figure")
    for figure in found["figures"]:
        assert (figure["pictures"], figure["caption"]) == (1, True), figure["id"]
