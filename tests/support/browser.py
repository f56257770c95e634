"""Opens a page in headless Chromium, without a driver: a probe in a copy of the page writes its findings there."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
DEADLINE_S = 100
_QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
)
# The first script collects errors; the last one runs the probe when the page has loaded.
_FIRST = """<script>window.failures = [];
addEventListener("error", (e) => failures.push(String(e.message || e.target)), true);
addEventListener("securitypolicyviolation", (e) => failures.push(e.violatedDirective + " forbids " + e.blockedURI));
const log = console.error; console.error = (...all) => { failures.push(all.join(" ")); log(...all); };</script>"""
_LAST = """<script>addEventListener("load", () => {
let found; try { found = (() => { %s })(); } catch (e) { failures.push("probe: " + e); }
const out = document.createElement("pre"); out.id = "findings";
out.textContent = JSON.stringify({failures, found}); document.body.append(out);
});</script>"""


def find() -> str | None:
    """Path of Chromium: the variable CLIPO_BROWSER, or the first one in PATH; None if there is none."""
    return os.environ.get("CLIPO_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


def look(page: Path, probe: str, *, width: int = 1440, height: int = 1000) -> tuple[list[str], Any]:
    """Open a page and run `probe`, the body of a JavaScript function, when it has loaded.

    Returns:
        The errors on the page and in the browser's log, and the value that the probe returned.
    """
    text = page.read_text()
    assert "<head>" in text and "</body>" in text
    text = text.replace("<head>", f"<head>{_FIRST}", 1)
    before, _, after = text.rpartition("</body>")
    copy = page.with_name(f"{page.stem}-probed.html")
    copy.write_text(f"{before}{_LAST % probe}</body>{after}")
    profile = page.with_name(f"{page.stem}-profile")
    done = subprocess.run(
        [
            find(),
            *_QUIET,
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            "--enable-logging=stderr",
            "--dump-dom",
            copy.resolve().as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    shutil.rmtree(profile, ignore_errors=True)
    logged = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    answer = re.search(r'<pre id="findings">(.*?)</pre>', done.stdout, re.DOTALL)
    assert answer, f"the page did not load: {done.stderr[-2000:]}"
    facts = json.loads(html.unescape(answer[1]))
    return facts["failures"] + logged, facts.get("found")
