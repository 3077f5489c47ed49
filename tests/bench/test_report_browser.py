"""The page as a browser shows it: nothing cut, nothing hidden, no complaint, on a phone and on screens."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from bench import report, results
from tests.bench.made import all_devices

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# The page lies in a frame, which is its window: browsers refuse windows as narrow as a phone's.
FRAME = """<!doctype html><meta charset="utf-8">
<iframe id="frame" width="{width}" height="900" style="border:0" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
addEventListener("load", () => {{
  const page = document.getElementById("frame").contentWindow.document, faults = []
  const fault = (what, element) => faults.push(what + ": " + element.textContent.slice(0, 60))
  const shown = element => element.getClientRects().length > 0
  for (const element of [page.documentElement, ...page.querySelectorAll("main *")]) {{
    if (!shown(element) || element.closest("svg") && element.tagName != "svg") continue
    if (element.getBoundingClientRect().right > {width} + 0.5) fault("outside", element)
    if (element.tagName != "svg" && element.clientWidth && element.scrollWidth > element.clientWidth + 1)
      fault("cut " + element.tagName, element)
  }}
  for (const figure of page.querySelectorAll("figure")) {{
    const pictures = [...figure.querySelectorAll("svg")].filter(shown)
    if (pictures.length != 1 || !shown(figure.querySelector("figcaption"))) fault("hidden", figure)
    for (const picture of pictures) {{
      const edge = picture.getBoundingClientRect()
      if (13 * edge.width / picture.viewBox.baseVal.width < 9) fault("unreadably small", figure)
      for (const words of picture.querySelectorAll("text")) {{
        const box = words.getBoundingClientRect()
        if (box.left < edge.left - 1 || box.right > edge.right + 1 || box.top < edge.top - 1
            || box.bottom > edge.bottom + 1) fault("cut in " + figure.id, words)
      }}
    }}
  }}
  document.getElementById("found").textContent = JSON.stringify(faults)
}})
</script>"""


@pytest.mark.slow
def test_every_figure_is_seen_and_nothing_is_cut(tmp_path: Path) -> None:
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    made = {f"measured-on-a-machine-with-a-long-name-{name}": each for name, each in all_devices().items()}
    for name, each in made.items():
        results.write(tmp_path / name, each)
    report.main([*(str(tmp_path / name) for name in made), f"--out={tmp_path}"])
    page = (tmp_path / "report.html").read_text()
    for width in (400, 821, 1081):
        (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=escape(page)))
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1600,1000", "--dump-dom"]
        done = subprocess.run(
            [*command, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=120
        )
        found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
        if not found:
            pytest.skip(f"{browser} shows no local page: a confined or broken browser")
        assert json.loads(unescape(found[1])) == [], f"at {width} pixels"
        assert "CONSOLE" not in done.stderr
