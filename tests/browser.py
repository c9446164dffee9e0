"""Headless Chromium, as far as a test of a page needs it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --allow-file-access-from-files --hide-scrollbars"
).split()

_CATCH = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(String(event.message)), true);
addEventListener("securitypolicyviolation", (event) => problems.push(event.blockedURI));
for (const name of ["error", "warn"]) console[name] = (...words) => problems.push(words.join(" "));
</script>"""


def ask(page: Path, code: str, profile: Path, *, width: int = 1200, dark: bool = False) -> Any:
    """Opens a copy of `page`, runs the body of a JavaScript function in it, returns its result.

    The result is an object; the page's errors and warnings are added to it as `problems`, and what
    it loaded from elsewhere as `loaded`.
    """
    probe = f"""<script>
const answer = (() => {{ {code} }})();
answer.loaded = performance.getEntriesByType("resource").map((entry) => entry.name)
    .filter((name) => !name.startsWith("data:"));
answer.problems = window.problems;
const out = document.createElement("pre");
out.id = "answer-of-the-test";
out.textContent = JSON.stringify(answer);
document.body.append(out);
</script>"""
    # Headless Chromium has no window narrower than 500 pixels: a frame of the width holds the page.
    text = page.read_text(encoding="utf-8").replace("<head>", f"<head>{_CATCH}", 1)
    text = text.replace("</body>", f"{probe}</body>")
    copy = page.with_name(f"probe-{page.name}")
    copy.write_text(text, encoding="utf-8")
    frame = page.with_name(f"frame-{page.name}")
    frame.write_text(
        f"<!doctype html><title>waiting</title><iframe id=f src={copy.name!r} "
        f"style='width:{width}px;height:900px;border:0'></iframe><script>f.onload = () => {{"
        "const out = document.createElement('pre'); out.id = 'result';"
        "out.textContent = f.contentDocument.getElementById('answer-of-the-test').textContent;"
        "document.body.append(out)}</script>"
    )
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [
        CHROMIUM,
        *_FLAGS,
        *scheme,
        f"--user-data-dir={profile}",
        f"--window-size={max(width, 500)},900",
    ]
    command += ["--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))
