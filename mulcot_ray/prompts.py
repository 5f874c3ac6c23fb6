"""The contract: one immutable, hashed object that turns a post into chat messages and an answer back into sections.

Teacher, training, evaluation, serving and the nightly job all take prompts, image size, label words and parsing from the same
`Contract`; its hash stands in every row and manifest, so two stages that disagree are noticed instead of averaged.

Everything here is pure. The answer has five sections, one a line (METHOD: "The task"):

    "Text_analysis": "…"
    "Image_analysis": "…"
    "Conflict_resolution": "…"
    "Final_conclusion": "…"
    "Prediction": "positive"
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mulcot_ray.errors import ConfigError, RowFault
from mulcot_ray.records import LABELS, SECTIONS, Post, Rationale, Reason, Sentiment, Task

KEYS = {s: s.capitalize() for s in SECTIONS}  # text_analysis -> Text_analysis
PREDICTION = "Prediction"

_SPECIAL = re.compile(r"<\|(?=[^|<>\n]{0,40}\|>)")
_NAMES = "|".join([*KEYS.values(), PREDICTION]).replace("_", "[_ ]")
# A section starts at a line start (plain, quoted, bold or as a Markdown heading), or as a quoted key inside one-line JSON.
_HEADER = re.compile(
    rf"""(?:^[ \t>{{,]*(?P<hash>\#+[ \t]*)?["'*]*(?P<a>{_NAMES})["'*]*[ \t]*(?P<colon>[:：])?(?P<rest>["'*]*)(?=(?P<eol>[ \t]*$))?
         |(?<=[{{,])[ \t]*["'](?P<b>{_NAMES})["'][ \t]*:)""",
    re.MULTILINE | re.IGNORECASE | re.VERBOSE,
)
_FENCE = re.compile(r"^\s*```[a-zA-Z]*\s*$", re.MULTILINE)


class Frozen(BaseModel):
    """Immutable settings: unknown keys are refused, so a misspelt option is an error and not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Template(Frozen):
    """`instruction` is the same for every post (its tokens are shared by all prompts); `post` is filled in."""

    instruction: str
    post: str


class ImagePolicy(Frozen):
    """How the picture enters the prompt.

    side: pixels of the square it is resized to, a multiple of 28 (patch 14 × merge 2): side²/784 visual tokens.
    position: `after_instruction` lets the engine cache the instruction as a shared prefix; `first` is the authors' order.
    missing: what happens to a post without a picture. `note` then stands in its place, or the row is rejected.
    """

    side: int = Field(ge=28, le=1960, multiple_of=28)
    position: Literal["after_instruction", "first"] = "after_instruction"
    missing: Literal["note", "reject"] = "note"
    note: str = "(The post has no image.)"

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture."""
        return self.side**2 // 784


@dataclass(frozen=True, slots=True)
class Answer:
    """A parsed answer: the stated label and the sections found (all four, or fewer)."""

    label: Sentiment
    sections: Mapping[str, str]

    @property
    def missing(self) -> list[str]:
        return [KEYS[s] for s in SECTIONS if not self.sections.get(s)]


class Contract(Frozen):
    """Templates by granularity and task, image policy, label words and model family. See the module's docstring."""

    name: str
    family: Literal["qwen2_5_vl"] = "qwen2_5_vl"
    system: str = ""
    image: ImagePolicy
    label_words: dict[Sentiment, str] = {s: s.value for s in LABELS}
    masc: dict[Task, Template]
    msc: dict[Task, Template]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for granularity in ("masc", "msc"):
            templates: dict[Task, Template] = getattr(self, granularity)
            if missing := set(Task) - set(templates):
                raise ValueError(f"contract {self.name!r}: {granularity} has no template for {sorted(missing)}")
            for task, t in templates.items():
                wanted = {"text"} | ({"aspect"} if granularity == "masc" else set()) | ({"label"} if task is Task.EXPLAIN else set())
                found = set(re.findall(r"{(\w+)}", t.post))
                if found != wanted:
                    raise ValueError(f"contract {self.name!r}: {granularity}.{task}.post names {sorted(found)}, not {sorted(wanted)}")
                if re.search(r"{(text|aspect|label)}", t.instruction):
                    raise ValueError(f"contract {self.name!r}: {granularity}.{task}.instruction must not depend on the post")
        if set(self.label_words) != set(LABELS) or len(set(self.label_words.values())) != len(LABELS):
            raise ValueError(f"contract {self.name!r}: label_words needs one word for each of {[s.value for s in LABELS]}")
        return self

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON."""
        return digest(self.model_dump(mode="json"))

    # --- rendering ---------------------------------------------------------------------------------------------------

    def messages(self, task: Task, post: Post, label: Sentiment | None = None) -> list[dict[str, Any]]:
        """Chat messages for one post; the picture is the part `{"type": "image"}`.

        `label` is required by the explain task and refused by every other: gold has no other way into a prompt.
        Raises RowFault for an empty text and for a missing image where the policy rejects it.
        """
        if (label is not None) != (task is Task.EXPLAIN):
            raise ValueError(f"task {task}: the gold label belongs in the explain prompt, and nowhere else")
        if not post.text.strip():
            raise RowFault(Reason.EMPTY_TEXT, "the text is empty")
        template = (self.masc if post.aspect is not None else self.msc)[task]
        fields = {"text": neutralise(post.text), "aspect": neutralise(post.aspect or ""), "label": self.label_words[label] if label else ""}
        tail = re.sub(r"{(text|aspect|label)}", lambda m: fields[m[1]], template.post)
        if post.has_image:
            picture: dict[str, Any] = {"type": "image"}
        elif self.image.missing == "note":
            picture = {"type": "text", "text": self.image.note}
        else:
            raise RowFault(Reason.IMAGE_MISSING, "the post has no image and the contract's policy is to reject it")
        head, body = {"type": "text", "text": template.instruction}, {"type": "text", "text": tail}
        parts = [head, picture, body] if self.image.position == "after_instruction" else [picture, head, body]
        user = {"role": "user", "content": parts}
        return [{"role": "system", "content": self.system}, user] if self.system else [user]

    @property
    def label_prefix(self) -> str:
        """The answer's beginning up to the label word: what follows it is scored."""
        return f'"{PREDICTION}": "'

    def answer(self, task: Task, label: Sentiment, rationale: Rationale | None = None) -> str:
        """The text that a model should give: five sections, or the label alone for the classification task."""
        verdict = f'{self.label_prefix}{self.label_words[label]}"'
        if task is Task.CLASSIFICATION:
            return verdict
        if rationale is None:
            raise ValueError(f"task {task} needs a rationale")
        # Double quotes delimit the value; inside it they become single ones.
        lines = [f'"{KEYS[s]}": "{_one_line(neutralise(getattr(rationale, s))).replace(chr(34), chr(39))}"' for s in SECTIONS]
        return "\n".join([*lines, verdict])

    # --- parsing -----------------------------------------------------------------------------------------------------

    def parse(self, text: str, *, sections: bool = True) -> Answer:
        """The sections and the label of an answer, in any of the shapes that METHOD.md lists.

        Raises RowFault ANSWER_UNPARSED when no label is stated or two different ones are, and, with `sections`,
        SECTIONS_MISSING when one of the four is absent or empty.
        """
        body = _FENCE.sub("", text)
        found: dict[str, list[str]] = {}
        headers = [m for m in _HEADER.finditer(body) if m["b"] or m["colon"] or (m["hash"] and m["eol"] is not None)]
        for i, m in enumerate(headers):
            end = headers[i + 1].start() if i + 1 < len(headers) else len(body)
            found.setdefault((m["a"] or m["b"]).lower().replace(" ", "_"), []).append(_value(body[m.end() : end]))
        labels = [self._label(v) for v in found.get(PREDICTION.lower(), [])]
        if not labels or None in labels:
            what = "no Prediction in the answer" if not labels else f"Prediction is {found[PREDICTION.lower()][0][:60]!r}"
            raise RowFault(Reason.ANSWER_UNPARSED, f"{what}, not one of {list(self.label_words.values())}", text)
        if len(set(labels)) > 1:
            raise RowFault(Reason.ANSWER_UNPARSED, f"the answer states {' and '.join(dict.fromkeys(str(x) for x in labels))}", text)
        answer = Answer(labels[0], {s: found[s][0] for s in SECTIONS if found.get(s) and found[s][0]})  # type: ignore[arg-type]
        if sections and answer.missing:
            raise RowFault(Reason.SECTIONS_MISSING, f"no {', '.join(answer.missing)}", text)
        return answer

    def contradiction(self, sections: Mapping[str, str], label: Sentiment) -> str | None:
        """The label words of Final_conclusion, where it names others and never that of `label`; else None.

        Most sound conclusions also say what the sentiment is *not* (634 of 1,121 real ones), so naming others is no fault by itself.
        """
        said = [w for w in self.label_words.values() if re.search(rf"(?<!\w){re.escape(w)}(?!\w)", sections.get(SECTIONS[-1], ""), re.IGNORECASE)]
        return " and ".join(said) if said and self.label_words[label] not in said else None

    @property
    def guide(self) -> str:
        """The answer's form as a regular expression, for structured decoding: five lines, and one of the label words."""
        lines = [rf'"{k}": "[^"\n]+"' for k in KEYS.values()]
        words = "|".join(re.escape(w) for w in self.label_words.values())
        return r"\n".join([*lines, f'{self.label_prefix}({words})"'])

    def _label(self, value: str) -> Sentiment | None:
        """The label word that the value starts with ("positive", "**Neutral**.", "negative, because …")."""
        for label, word in self.label_words.items():
            if re.match(rf"\W*{re.escape(word)}(?!\w)", value, re.IGNORECASE):
                return label
        return None


def neutralise(text: str) -> str:
    """Text of a post with the model's control tokens broken up: `<|im_end|>` in a post is an attack, not a turn."""
    return _SPECIAL.sub("< |", text)


def digest(value: Any, length: int = 16) -> str:
    """First `length` hex digits of the SHA-256 of a JSON value, keys sorted."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def render_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """The prompt as text, by the model's own chat template, up to where the assistant's answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the model's tokenizer has no chat template: use an instruction-tuned model of the Qwen2.5-VL family")
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def label_token_ids(tokenizer: Any, contract: Contract) -> list[int]:
    """The first token of each label word after the answer's prefix, in the order of LABELS.

    Raises ConfigError when two words start with the same token, or one merges with the prefix: such words cannot be scored
    with one token.
    """
    prefix = tokenizer(contract.label_prefix, add_special_tokens=False)["input_ids"]
    first = []
    for label in LABELS:
        ids = tokenizer(contract.label_prefix + contract.label_words[label], add_special_tokens=False)["input_ids"]
        if ids[: len(prefix)] != prefix:
            raise ConfigError(f"label word {contract.label_words[label]!r} merges with the text before it")
        first.append(ids[len(prefix)])
    if len(set(first)) < len(first):
        raise ConfigError(f"label words {list(contract.label_words.values())} start with the same token")
    return first


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _value(raw: str) -> str:
    """A section's text without the quotes, commas, braces and emphasis around it."""
    text = raw.strip().lstrip(":：").strip().rstrip("}").rstrip().rstrip(",").rstrip()
    text = text.removeprefix("**").removesuffix("**").strip()
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    elif text[:1] == '"' and text.count('"') % 2:
        text = text[1:]
    return text.strip()
