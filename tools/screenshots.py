"""Pictures of the pages that results leave under a root, as docs/images has them, by the Chromium on the path (and playwright, of the extra `dev`).

    python tools/screenshots.py ROOT OUT

One of each kind, of the last that was made: `evaluations-report.png` is evaluations/*/report.html, `replay-report.png` evaluations/replay-*/report.html.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT, COLOURS = 1100, 1500, 96  # pixels; a page that is longer is cut


def kind(root: Path, page: Path) -> str:
    """`nights-report` for nights/…/report.html; `report` for the demo's own at the top."""
    stages = page.relative_to(root).parts[:-1]
    stage = ["replay"] if len(stages) > 1 and stages[1].startswith("replay-") else stages[:1]
    return "-".join([*stage, page.stem])


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("root", type=Path)
    ap.add_argument("out", type=Path)
    a = ap.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    pages = {kind(a.root, p): p for p in sorted(a.root.rglob("*.html"), key=lambda p: p.stat().st_mtime)}
    if not pages or not browser:
        ap.error(f"{a.root} has no pages" if browser else "there is no Chromium on the path (Debian: apt install chromium)")
    a.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser)
        view = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        for name, page in pages.items():
            view.goto(page.resolve().as_uri())
            tall = min(HEIGHT, int(view.evaluate("document.documentElement.scrollHeight")))
            shot = Image.open(io.BytesIO(view.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": tall}, full_page=True)))
            shot.convert("RGB").quantize(COLOURS).save(a.out / f"{name}.png", optimize=True)
        chromium.close()


if __name__ == "__main__":
    main()
