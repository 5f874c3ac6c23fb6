import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq

from mulcot_ray.records import LABELS, Post, Prediction, Rationale, Reason, Reject, Sentiment, Source, Split, from_row, to_table

POST = Post("p1", "s1", "hello", "NASA", None, b"\x89PNG", "ab", Sentiment.POSITIVE, Split.TRAIN, {"k": "v"})
RATIONALE = Rationale("p1", Source.EXPLAINED, "m", "c", "t", "i", "r", "f", Sentiment.NEGATIVE, 2, "stop", 10, 20)
PREDICTION = Prediction("p1", Sentiment.NEUTRAL, "m", "c", 0.2, 0.5, 0.3, 0.9, "t", "i", "r", "f", Sentiment.NEUTRAL, None, "stop", 5, 6)
REJECT = Reject("p1", "teach", Reason.LABEL_MISMATCH, "says positive", "raw", 4)


def test_every_record_survives_parquet(tmp_path):
    for record in (POST, RATIONALE, PREDICTION, REJECT):
        kind = type(record)
        pq.write_table(to_table(kind, [record]), tmp_path / "t.parquet")
        (row,) = pq.read_table(tmp_path / "t.parquet").to_pylist()
        back = from_row(kind, row)
        assert back == record
        assert all(type(getattr(back, f.name)) is type(getattr(record, f.name)) for f in dataclasses.fields(record))


def test_schema_names_are_the_fields_in_order():
    for kind in (Post, Rationale, Prediction, Reject):
        assert kind.schema.names == [f.name for f in dataclasses.fields(kind)]
        assert to_table(kind, []).schema == kind.schema


def test_label_order_is_that_of_the_tombert_numbers():
    assert [str(x) for x in LABELS] == ["negative", "neutral", "positive"]


def test_unknown_columns_are_ignored():
    row = {**POST.row(), "meta": [("k", "v")], "extra": 1}
    assert from_row(Post, row) == POST
    assert isinstance(to_table(Post, [POST]), pa.Table)
