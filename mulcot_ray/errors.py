"""Every error that mulcot-ray raises on purpose.

MulcotError
├── ConfigError            a recipe, runtime or option is wrong; the message names the value and what would be right
├── InputError             a file or folder to read is missing, empty or of another format
├── ArtifactError          something under the root
│   ├── ArtifactMissing    a needed table or model is not there (the message says which command makes it)
│   ├── RecipeChanged      the name is taken by a result of other inputs; says what changed
│   ├── Busy               another run holds the name
│   └── Held               a night is not fit to be published; says which gate holds it back
├── EngineError            the engine cannot start or has died
├── ConservationError      rows in ≠ rows out + rejects: a bug, never published
└── TrainingError          training cannot go on (no examples, loss not finite, vocabularies differ)

RowFault                   one row is at fault; becomes a Reject, never reaches the user as an exception
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mulcot_ray.records import Reason


class MulcotError(Exception):
    """Base of all errors that the command line shows as one line, without a traceback."""


class ConfigError(MulcotError):
    pass


class InputError(MulcotError):
    pass


class ArtifactError(MulcotError):
    pass


class ArtifactMissing(ArtifactError):
    pass


class RecipeChanged(ArtifactError):
    pass


class Busy(ArtifactError):
    pass


class Held(ArtifactError):
    pass


class EngineError(MulcotError):
    pass


class ConservationError(MulcotError):
    pass


class TrainingError(MulcotError):
    pass


class RowFault(Exception):
    """One row cannot be processed. `reason` is from the closed list, `detail` is for a person, `raw` the model's answer."""

    def __init__(self, reason: Reason, detail: str, raw: str | None = None, attempts: int = 0) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.raw, self.attempts = reason, detail, raw, attempts

    def __reduce__(self) -> tuple[type[RowFault], tuple[Reason, str, str | None, int]]:
        return RowFault, (self.reason, self.detail, self.raw, self.attempts)
