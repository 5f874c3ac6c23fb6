"""The page of any finished result says what the manifest says, and is safe to open."""

from lxml import html

from mulcot_ray.artifacts import begin, find
from mulcot_ray.records import Reason, Reject, to_table
from mulcot_ray.run_page import page, write_page
from mulcot_ray.storage import Store


def test_page(tmp_path):
    store = Store(str(tmp_path))
    run = begin(store, "predictions", "some", {"stage": "label", "note": "<script>alert(1)</script>"})
    with run:
        run.write_table("part-0", to_table(Reject, [Reject("a", "label", Reason.IMAGE_MISSING, "gone")] * 3), rejects=True)
        m = run.commit(3, stats={"labels": {"positive": 1, "negative": 2}, "rate": 0.123456, "nothing": None})
    key = write_page(store, m)
    text = store.read(key).decode()
    root = html.document_fromstring(text)
    said = " ".join(" ".join(root.itertext()).split())
    assert "predictions/some" in said and "Image missing 3" in said and "positive 1, negative 2" in said and "0.1235" in said and "100.0" in said
    assert not root.xpath("//script") and "alert(1)" in said and not root.xpath("//*[@src]")
    assert find(store, "predictions", "some") == m and "run.html" not in m.files, "the page is no part of the result"


def test_a_training_has_curves(tmp_path):
    store = Store(str(tmp_path))
    run = begin(store, "models", "m", {"stage": "train"})
    with run:
        m = run.commit(10, stats={"accuracy": 0.8})
    history = {"steps": [{"step": i, "loss": 2 - i / 10, "ce_cls": 1.0} for i in range(1, 9)], "validation": [{"step": 8, "accuracy": 0.8}]}
    assert "<svg" in page(m, history) and "<svg" not in page(m)
