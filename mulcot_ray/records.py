"""The nouns: Post, Rationale, Prediction, Labelled, Reject, each with its Arrow schema. The unit is one (post, aspect) pair.

Tables are Parquet with exactly these columns; `to_table` and `from_row` are the only way in and out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, TypeVar

import pyarrow as pa


class Sentiment(StrEnum):
    """The three classes, in the order of every probability vector and of the TomBERT label numbers (0, 1, 2)."""

    NEGATIVE = "negative"
    NEUTRAL = "neutral"
    POSITIVE = "positive"


class Split(StrEnum):
    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"
    UNLABELED = "unlabeled"


class Task(StrEnum):
    """What a prompt asks for. Predict and explain are the teacher's, reasoning and classification the student's."""

    PREDICT = "predict"
    EXPLAIN = "explain"
    REASONING = "reasoning"
    CLASSIFICATION = "classification"


class Source(StrEnum):
    """Where a rationale comes from."""

    PREDICTED = "predicted"  # the teacher found the gold label by itself
    EXPLAINED = "explained"  # the teacher was given the gold label
    AUGMENTED = "augmented"  # sampled from the assistant
    IMPORTED = "imported"  # came with the data


class Reason(StrEnum):
    """The closed list of reasons for a Reject. A count of rejects by reason is a complete account of what is missing."""

    BAD_LINE = "bad_line"  # not a row of the format: wrong number of columns, not JSON
    BAD_ENCODING = "bad_encoding"
    MISSING_FIELD = "missing_field"
    BAD_LABEL = "bad_label"
    BAD_VALUE = "bad_value"
    EMPTY_TEXT = "empty_text"
    DUPLICATE_ID = "duplicate_id"
    NO_MAJORITY = "no_majority"  # MVSA: the annotators disagree
    OPPOSED_MODALITIES = "opposed_modalities"  # MVSA: text positive, image negative, or the reverse
    IMAGE_MISSING = "image_missing"
    IMAGE_UNREADABLE = "image_unreadable"
    IMAGE_TOO_LARGE = "image_too_large"  # bytes or pixels
    IMAGE_BAD_SHAPE = "image_bad_shape"  # too small, or too far from square
    NO_LABEL = "no_label"  # a stage that needs gold met a post without it
    PROMPT_TOO_LONG = "prompt_too_long"
    ANSWER_TRUNCATED = "answer_truncated"  # cut by the token limit
    ANSWER_UNPARSED = "answer_unparsed"  # no prediction in it
    SECTIONS_MISSING = "sections_missing"
    LABEL_MISMATCH = "label_mismatch"  # never ended on the gold label
    CONCLUSION_CONTRADICTS = "conclusion_contradicts"  # Final_conclusion names another label than Prediction
    LABEL_LEAKED = "label_leaked"  # an explanation that says it was given the label
    ENGINE_ERROR = "engine_error"


LABELS = tuple(Sentiment)
SECTIONS = ("text_analysis", "image_analysis", "conflict_resolution", "final_conclusion")


class _Record:
    schema: ClassVar[pa.Schema]

    def row(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


def _schema(**columns: pa.DataType | str) -> pa.Schema:
    return pa.schema([pa.field(k, v if isinstance(v, pa.DataType) else pa.type_for_alias(v)) for k, v in columns.items()])


@dataclass(frozen=True, slots=True)
class Post(_Record):
    """One post and, for aspect-level data, one target aspect.

    `post_id` is unique in its table; rows that share `source_id` (one picture, one original post) stay in one split.
    The image is `image_bytes` (compressed, as published) or else `image_ref` (a path or `s3://` key), or absent.
    `label` is gold and goes into no prompt but the teacher's *explain*. `meta` is carried, never rendered.
    """

    post_id: str
    source_id: str
    text: str
    aspect: str | None = None
    image_ref: str | None = None
    image_bytes: bytes | None = None
    image_sha256: str | None = None
    label: Sentiment | None = None
    split: Split = Split.UNLABELED
    meta: Mapping[str, str] = field(default_factory=dict)

    schema: ClassVar[pa.Schema] = _schema(
        post_id="string", source_id="string", text="string", aspect="string", image_ref="string", image_bytes=pa.binary(),
        image_sha256="string", label="string", split="string", meta=pa.map_(pa.string(), pa.string()),
    )  # fmt: skip

    @property
    def content(self) -> str:
        """What a model is asked about (text, aspect, picture) as the first 32 hex digits of a SHA-256; ids, labels and splits are no part of it."""
        picture = self.image_sha256 or (hashlib.sha256(self.image_bytes).hexdigest() if self.image_bytes is not None else self.image_ref)
        parts = (repr(x).encode() for x in (self.text, self.aspect, picture))
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]

    @property
    def has_image(self) -> bool:
        return self.image_bytes is not None or self.image_ref is not None


@dataclass(frozen=True, slots=True)
class Rationale(_Record):
    """A five-section answer that ends on the gold label, and how it was obtained (METHOD: D_rea)."""

    post_id: str
    source: Source
    model: str
    contract: str
    text_analysis: str
    image_analysis: str
    conflict_resolution: str
    final_conclusion: str
    prediction: Sentiment
    attempts: int = 1
    finish_reason: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    duplicate_of: str | None = None  # the post that was asked in this one's place

    schema: ClassVar[pa.Schema] = _schema(
        post_id="string", source="string", model="string", contract="string", text_analysis="string", image_analysis="string",
        conflict_resolution="string", final_conclusion="string", prediction="string", attempts="int32", finish_reason="string",
        tokens_in="int32", tokens_out="int32", duplicate_of="string",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prediction(_Record):
    """A label, with probabilities where label words were scored, and the rationale where one was asked for.

    `probabilities` sum to 1 over the three labels; `label_mass` is the share of the whole vocabulary that they had.
    `stated` is the label on which the rationale ends; it may differ from `label` (a measure of faithfulness).
    """

    post_id: str
    label: Sentiment
    model: str
    contract: str
    negative: float | None = None
    neutral: float | None = None
    positive: float | None = None
    label_mass: float | None = None
    text_analysis: str | None = None
    image_analysis: str | None = None
    conflict_resolution: str | None = None
    final_conclusion: str | None = None
    stated: Sentiment | None = None
    rationale_fault: str | None = None
    finish_reason: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0

    schema: ClassVar[pa.Schema] = _schema(
        post_id="string", label="string", model="string", contract="string", negative="float64", neutral="float64",
        positive="float64", label_mass="float64", text_analysis="string", image_analysis="string", conflict_resolution="string",
        final_conclusion="string", stated="string", rationale_fault="string", finish_reason="string", tokens_in="int32",
        tokens_out="int32",
    )  # fmt: skip


class Fate(StrEnum):
    """What becomes of a row of a night's dump. A night's rows in = the sum over these."""

    SCORED = "scored"  # asked tonight
    CARRIED = "carried"  # the same content was asked on an earlier night
    COPIED = "copied"  # another post of the dump has the same content, and was asked in this one's place
    REPEATED = "repeated"  # the same post came before in the dump, word for word: the earlier row stands
    DEFERRED = "deferred"  # there was no time or money for it; a later night asks
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Labelled(_Record):
    """A row of a night's labels. (post_id, aspect) is unique in a night.

    `answered_by` is the role whose label it is (student, or who was asked after it), `scored_on` the date of the dump for which it was asked,
    `content` the digest of text, aspect and picture. `negative`, `neutral` and `positive` are calibrated and sum to 1.
    """

    post_id: str
    aspect: str | None
    label: Sentiment
    negative: float | None
    neutral: float | None
    positive: float | None
    label_mass: float | None
    answered_by: str
    fate: Fate
    scored_on: str
    copied_of: str | None
    content: str
    model: str
    contract: str
    text_analysis: str | None = None
    image_analysis: str | None = None
    conflict_resolution: str | None = None
    final_conclusion: str | None = None
    stated: Sentiment | None = None
    rationale_fault: str | None = None

    schema: ClassVar[pa.Schema] = _schema(
        post_id="string", aspect="string", label="string", negative="float64", neutral="float64", positive="float64", label_mass="float64",
        answered_by="string", fate="string", scored_on="string", copied_of="string", content="string", model="string", contract="string",
        text_analysis="string", image_analysis="string", conflict_resolution="string", final_conclusion="string", stated="string",
        rationale_fault="string",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reject(_Record):
    """A row that did not come through: where, why, and what the model said, if it was asked."""

    post_id: str
    stage: str
    reason: Reason
    detail: str
    raw: str | None = None
    attempts: int = 0

    schema: ClassVar[pa.Schema] = _schema(
        post_id="string", stage="string", reason="string", detail="string", raw="string", attempts="int32"
    )  # fmt: skip


R = TypeVar("R", Post, Rationale, Prediction, Labelled, Reject)
_ENUMS: dict[str, type[StrEnum]] = {
    "label": Sentiment, "prediction": Sentiment, "stated": Sentiment, "split": Split, "source": Source, "reason": Reason,
    "fate": Fate,
}  # fmt: skip


def to_table(kind: type[R], rows: Iterable[R]) -> pa.Table:
    """Rows as an Arrow table with the schema of `kind`; an empty iterable gives an empty table."""
    data = [r.row() for r in rows]
    for d in data:
        if "meta" in d:
            d["meta"] = list(d["meta"].items())
    return pa.Table.from_pylist(data, schema=kind.schema)


def from_row(kind: type[R], row: Mapping[str, Any]) -> R:
    """One record from a row of its table. Columns that the record does not have are ignored."""
    names = {f.name for f in fields(kind)}
    values: dict[str, Any] = {k: _ENUMS[k](v) if k in _ENUMS and v is not None else v for k, v in row.items() if k in names}
    if "meta" in values:
        values["meta"] = dict(values["meta"] or ())
    return kind(**values)
