"""Who may ask: bearer tokens from a secret file or the environment, kept as digests, and revocable while the endpoint runs.

    MULCOT_TOKENS_FILE   one token a line; a line that starts with # is a comment
    MULCOT_TOKENS        tokens, separated by commas

In place of a token either may hold its digest, `sha256:` and 64 hex digits, so that the secret is known to its user alone:
`printf %s "$TOKEN" | sha256sum`.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mulcot_ray.errors import ConfigError

MIN_TOKEN = 16  # characters; only the digests are kept, so a short token could be guessed from them
LOOK_S = 1.0  # between two looks at the file: a token that was taken out of it is refused so many seconds later
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.IGNORECASE)

log = logging.getLogger("ray.serve")


def token_digest(token: str) -> str:
    """What is kept of a token: tokens are long and random, so a plain SHA-256 tells nothing about them."""
    return hashlib.sha256(token.encode()).hexdigest()


def configured_tokens(environ: Mapping[str, str]) -> list[str]:
    """Tokens, or digests in their place, from MULCOT_TOKENS_FILE and MULCOT_TOKENS.

    Raises ConfigError for a file that cannot be read, a variable that names no token, and a token that is short or not printable ASCII.
    """
    found: list[str] = []
    if path := environ.get("MULCOT_TOKENS_FILE"):
        try:
            found += _checked(_lines(Path(path)), f"MULCOT_TOKENS_FILE {path!r}")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"MULCOT_TOKENS_FILE {path!r} cannot be read: {e}") from e
    if listed := environ.get("MULCOT_TOKENS"):
        found += _checked([x.strip() for x in listed.split(",") if x.strip()], "MULCOT_TOKENS")
    return found


def plain(tokens: list[str]) -> str | None:
    """The first that is a token and not a digest."""
    return next((t for t in tokens if not _DIGEST.fullmatch(t)), None)


@dataclass
class Tokens(Collection[str]):
    """The digests that are known now: `fixed` ones, and those of the file, which is read again when it changes.

    Pickles with what was read; a process that does not see the file keeps that. After a process has seen it, a file that is gone or cannot
    be read stands for no token at all, and a line that is no token for nothing: when in doubt, refuse.
    """

    path: str | None = None
    fixed: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
    _stamp: tuple[int, ...] | None = field(default=None, init=False)
    _next_look: float = field(default=0.0, init=False)

    def __iter__(self) -> Iterator[str]:
        self._look()
        return iter(self.fixed | self.read)

    def __len__(self) -> int:
        self._look()
        return len(self.fixed | self.read)

    def __contains__(self, x: object) -> bool:
        self._look()
        return x in self.fixed or x in self.read

    def __reduce__(self) -> tuple[type[Tokens], tuple[str | None, frozenset[str], frozenset[str]]]:
        return Tokens, (self.path, self.fixed, self.read)

    def _look(self) -> None:
        now = time.monotonic()
        if self.path is None or now < self._next_look:
            return
        self._next_look = now + LOOK_S
        try:
            s = Path(self.path).stat()  # follows links: a mounted secret is a link that is turned over
            stamp = (s.st_mtime_ns, s.st_size, s.st_ino)
            if stamp == self._stamp:
                return
            lines = _lines(Path(self.path))
        except (OSError, UnicodeDecodeError) as e:
            if self._stamp is not None and self.read:
                log.error("tokens: %s cannot be read any more (%s): its tokens are refused", self.path, e)
                self.read, self._stamp = frozenset(), ()
            return
        good = [x for x in lines if _fault(x) is None]
        if len(good) < len(lines):
            log.error("tokens: %d of %d lines of %s are no tokens", len(lines) - len(good), len(lines), self.path)
        self.read, self._stamp = frozenset(map(_digest, good)), stamp


def known_tokens(environ: Mapping[str, str]) -> Tokens:
    """What `configured_tokens` finds, to be kept by a process that answers requests. Same faults."""
    path, listed = environ.get("MULCOT_TOKENS_FILE"), environ.get("MULCOT_TOKENS")
    fixed = configured_tokens({"MULCOT_TOKENS": listed}) if listed else []
    read = configured_tokens({"MULCOT_TOKENS_FILE": path}) if path else []
    return Tokens(str(Path(path).absolute()) if path else None, frozenset(map(_digest, fixed)), frozenset(map(_digest, read)))


def _lines(path: Path) -> list[str]:
    lines = (x.strip() for x in path.read_text(encoding="utf-8").splitlines())
    return [x for x in lines if x and not x.startswith("#")]


def _digest(entry: str) -> str:
    given = _DIGEST.fullmatch(entry)
    return given[1].lower() if given else token_digest(entry)


def _fault(token: str) -> str | None:
    if token.lower().startswith("sha256:") and not _DIGEST.fullmatch(token):
        return "is no digest: sha256: and 64 hex digits"
    fine = len(token) >= MIN_TOKEN and all("!" <= c <= "~" for c in token)
    return None if fine else f"needs at least {MIN_TOKEN} characters, all printable ASCII, without spaces"


def _checked(tokens: list[str], where: str) -> list[str]:
    if not tokens:
        raise ConfigError(f"{where} holds no token: one of at least {MIN_TOKEN} characters is wanted, or unset it")
    for i, token in enumerate(tokens, 1):
        if why := _fault(token):
            raise ConfigError(f"{where}: token {i} {why}")
    return tokens
