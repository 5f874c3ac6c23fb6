"""What the pages for people share: look, numbers, pictures. A page is one HTML file with nothing beside it: no script, no other host.

A page's template starts its style sheet with `{{ css }}` and adds what only it has. Text from posts and models is data: it is escaped.
"""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

NB = "\u202f"  # a number stays with its unit
SHAPES = {"positive": "▲", "neutral": "●", "negative": "▼"}  # so that a label is not told by its colour alone
CSS = """\
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2327; --soft: #59636b; --line: #dcdfe1; --wash: #f0f1f0;
  --c1: #2f6f9f; --c2: #b4611c; --c3: #7a4fa3; --c4: #2b7d55; --good: #1f6b46; --bad: #a8322a; --mix: 60%;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15191c; --card: #1d2327; --ink: #e6e8e8; --soft: #a4adb3; --line: #384147; --wash: #252c31;
    --c1: #6aaede; --c2: #e39a55; --c3: #b792de; --c4: #62be8f; --good: #74cc9d; --bad: #f09088; --mix: 38%;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, header, footer { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: clamp(1.7rem, 5vw, 2.4rem); line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.01em; text-wrap: balance; }
h2 { font-size: 1.35rem; margin: 3rem 0 .75rem; line-height: 1.3; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: 0 0 1rem; max-width: 44rem; text-wrap: pretty; }
.lead { font-size: 1.1rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
a { color: var(--c1); text-underline-offset: .15em; }
a:focus-visible, summary:focus-visible, [tabindex]:focus-visible { outline: 3px solid var(--c1); outline-offset: 2px; border-radius: 4px; }
.skip { position: absolute; left: -999rem; }
.skip:focus { left: 1rem; top: 1rem; background: var(--card); padding: .5rem 1rem; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; padding: 0; margin: 1rem 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0 0; padding: 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.tiles dt { color: var(--soft); font-size: .875rem; line-height: 1.35; }
.tiles dd { margin: 0; font-size: 1.5rem; font-weight: 650; white-space: nowrap; line-height: 1.3; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; font-weight: 600; }
th, td { text-align: left; padding: .45rem .75rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { font-size: .875rem; color: var(--soft); font-weight: 600; }
tbody th { font-weight: 600; }
td.n, th.n { text-align: right; white-space: nowrap; padding-right: .5rem; }
th small, td small { display: block; color: var(--soft); font-weight: 400; line-height: 1.4; font-size: .85rem; }
.label { white-space: nowrap; font-weight: 600; }
.label.positive { color: var(--c4); } .label.negative { color: var(--bad); } .label.neutral { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem; margin: 0 0 1.25rem; break-inside: avoid; }
.card header { all: unset; display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; gap: .25rem 1rem; margin-bottom: .75rem; }
.card h3 { margin: 0; } .card h3 .soft { font-weight: 400; }
.post { display: grid; grid-template-columns: 10.5rem 1fr; gap: 1.1rem; }
.picture img, .blank { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 8px; background: var(--wash); display: grid; place-items: center; }
.post blockquote { margin: 0 0 .6rem; font-size: 1.1rem; line-height: 1.45; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: 0 0 .7rem; }
.facts div { display: flex; gap: .4rem; } .facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.track { height: .6rem; border-radius: .3rem; background: var(--wash); border: 1px solid var(--line); overflow: hidden; }
.track i { display: block; height: 100%; background: var(--c1); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
pre { background: var(--wash); border-radius: 8px; padding: .9rem 1.1rem; overflow-x: auto; margin: 0 0 1rem; }
code { font: .925rem/1.6 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
footer { padding-top: 1rem; padding-bottom: 3rem; }
@media (max-width: 40rem) {
  .post { grid-template-columns: 5.5rem 1fr; }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --wash: #eee;
    --c1: #2f6f9f; --c2: #b4611c; --c3: #7a4fa3; --c4: #2b7d55; --good: #1f6b46; --bad: #a8322a; --mix: 60%; }
  body { font-size: 10pt; } nav, .skip { display: none; } h2 { break-after: avoid; margin-top: 1.5rem; }
  figure, table, .tiles { break-inside: avoid; }
}
"""


def environment(folder: Path) -> Environment:
    """Templates of a folder: escaped, a missing value is an error; filters as the functions below; globals `css`, `shapes`."""
    env = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"percent": percent, "number": number, "duration": duration, "words": words}
    env.globals |= {"css": Markup(CSS), "shapes": SHAPES}
    return env


def percent(share: float) -> str:
    """0.123 → 12.3 %."""
    return f"{100 * share:.1f}{NB}%"


def number(n: float) -> str:
    """1234567 → 1 234 567."""
    return f"{n:,}".replace(",", NB)


def duration(seconds: float) -> str:
    """125 → 2 min 05 s."""
    if seconds < 100:
        return f"{seconds:.1f}{NB}s" if seconds < 10 else f"{seconds:.0f}{NB}s"
    minutes, rest = divmod(round(seconds), 60)
    parts = (minutes, "min", f"{rest:02d}", "s") if minutes < 60 else (minutes // 60, "h", f"{minutes % 60:02d}", "min")
    return NB.join(map(str, parts))


def words(key: str) -> str:
    """label_mismatch → Label mismatch."""
    return key.replace("_", " ").strip().capitalize()


def data_uri(image: bytes) -> Markup:
    """PNG or JPEG bytes as an address that holds them."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return Markup(f"data:image/{kind};base64,{base64.b64encode(image).decode()}")
