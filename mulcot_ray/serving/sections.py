"""The sections of a rationale while it is written: what of which section is new. The whole answer is parsed by the contract, not here.

What may yet turn out to be a key or a closing quote is held back until more is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mulcot_ray.prompts import KEYS, PREDICTION

NAMES = {key.lower(): section for section, key in KEYS.items()} | {PREDICTION.lower(): PREDICTION.lower()}
_NAME = "|".join(n.replace("_", "[_ ]") for n in NAMES)
# At the start of a line, plain, quoted or bold, or as a Markdown heading, which needs no colon; or as a quoted key in one-line JSON.
_KEY = re.compile(
    rf"""(?:^[ \t>{{,]*(?P<hash>\#+[ \t]*)?["'*]*(?P<a>{_NAME})["'*]*[ \t]*(?:[:：]["'*]*|(?(hash)(?=\n)|(?!)))
         |(?<=[{{,])[ \t]*["'](?P<b>{_NAME})["'][ \t]*:)""",
    re.MULTILINE | re.IGNORECASE | re.VERBOSE,
)
_FENCE = re.compile(r"^\s*```[a-zA-Z]*\s*$", re.MULTILINE)
_OPENING = re.compile(r"[\s:：]*(?:\*\*)?\s*(\"?)")
_MAYBE_CLOSING = re.compile(r"[\s\"'*,}`]+$")
_MAYBE_KEY = re.compile(r"(?:\n[ \t>{,]*(?:#+[ \t]*)?[\"'*]*|[{,][ \t]*[\"'])([A-Za-z_ ]{0,20})[\"'*]*[ \t]*$")


class Splitter:
    """Fed the answer as far as it is written, again and again; yields (section, what is new of its content)."""

    def __init__(self) -> None:
        self.section = ""
        self.start = self.sent = 0  # where the section's value starts in the answer; how much of the value is out

    def feed(self, text: str, end: bool = False) -> Iterator[tuple[str, str]]:
        """`end`: nothing will follow."""
        while True:
            found = _KEY.search(text, self.start)
            value = text[self.start : found.start() if found else len(text)]
            if self.section:
                value = _content(value, whole=end or found is not None)
                if len(value) > self.sent:
                    yield self.section, value[self.sent :]
                    self.sent = len(value)
            if found is None or (not end and found.end() == len(text)):
                return
            self.section = NAMES[(found["a"] or found["b"]).lower().replace(" ", "_")]
            self.start, self.sent = found.end(), 0


def _content(value: str, whole: bool) -> str:
    """A section's text without the quotes, commas and emphasis around it. Not `whole`: without an end that may yet turn out to be such,
    or the beginning of the next key."""
    value = _FENCE.sub("", value)
    opening = _OPENING.match(value)
    assert opening is not None, "it matches the empty string"
    value = value[opening.end() :]
    if whole:
        value = value.rstrip().rstrip("}").rstrip().rstrip(",").rstrip().removesuffix("**").rstrip()
        return value.removesuffix(opening[1]).rstrip() if opening[1] else value
    maybe = _MAYBE_KEY.search(value)
    if maybe and any(n.startswith(maybe[1].lower().replace(" ", "_")) for n in NAMES):
        value = value[: maybe.start()]
    return _MAYBE_CLOSING.sub("", value)
