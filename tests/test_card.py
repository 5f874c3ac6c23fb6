"""The card of a table made by hand: its numbers, read back from the HTML, and that what posts and models wrote stays data."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from lxml import html as lxml_html
from PIL import Image

from mulcot_ray.artifacts import Manifest, Run, begin
from mulcot_ray.errors import ConservationError
from mulcot_ray.html import NB, data_uri, number, percent, words
from mulcot_ray.posts.sample import reference_rationale, sample_posts
from mulcot_ray.recipe import load_recipe
from mulcot_ray.records import Post, Rationale, Reason, Reject, Sentiment, Source, Split, to_table
from mulcot_ray.storage import Store
from mulcot_ray.teaching.card import COPIES, REASONS, REJECTS, Draw, card

RECIPE = load_recipe("tiny")
ATTACK = '</pre><script>alert("x")</script><b>bold</b>'
POSTS = [p for p in sample_posts(40, Split.TRAIN, 3)]


def teach_identity(**more: Any) -> dict[str, Any]:
    return {
        "stage": "teach", "posts": "p-print", "split": Split.TRAIN, "model": "m-print", "contract": RECIPE.contract.hash,
        "teach": RECIPE.teach.model_dump(mode="json"), "seed": 42, "dtype": "float32", "max_model_len": 1024, "duplicates": None, "round": 0, **more,
    }  # fmt: skip


def post_table(store: Store, rows: list[Post]) -> Manifest:
    with begin(store, "posts", "p", {}) as run:
        for i in range(0, len(rows), 25):
            run.write_table(f"part-{i:05d}", to_table(Post, rows[i : i + 25]), rows_per_group=8)
        return run.commit(len(rows), stats={"splits": dict(Counter(p.split.value for p in rows))})


def rationale(post: Post, source: Source, attempts: int, **more: Any) -> Rationale:
    return replace(
        reference_rationale(post), source=source, model="big", attempts=attempts, tokens_in=100 * attempts, tokens_out=10 * attempts, **more
    )


def stats_of(kept: list[Rationale], posts: list[Post], copied: int = 0) -> dict[str, Any]:
    return {
        "gold": dict(Counter(p.label.value for p in posts if p.label)),
        "found": dict(Counter(r.prediction.value for r in kept if r.source is not Source.EXPLAINED)),
        "tokens": {"in": 12345, "out": 6789}, "answers": {"asked": 60, "reused": 20, "spared_tokens_in": 4000, "spared_tokens_out": 500},
        "copied": copied,
    }  # fmt: skip


def page_of(
    store: Store, posts: list[Post], kept: list[Rationale], rejects: list[Reject], identity: dict[str, Any] | None = None, **options: Any
) -> Any:
    """The table in parts of 10 rows, and its card, parsed."""
    source = post_table(store, posts)
    run = begin(store, "rationales", "r", identity or teach_identity())
    assert isinstance(run, Run)
    with run:
        for i in range(0, max(len(kept), 1), 10):
            run.write_table(f"part-0-{i:08d}", to_table(Rationale, kept[i : i + 10]))
        if rejects:
            run.write_table("part-0-00000000", to_table(Reject, rejects), rejects=True)
        return Page(card(run, source, RECIPE, stats_of(kept, posts), **options))


class Page:
    def __init__(self, text: str) -> None:
        self.source = text
        self.tree = lxml_html.document_fromstring(text)
        self.text = self.plain(self.tree)

    @staticmethod
    def plain(node: Any) -> str:
        return " ".join(" ".join(node.itertext()).replace(NB, " ").split())

    def rows(self, table: str) -> dict[str, list[str]]:
        """Heading of a row (without its explanation) → its cells."""
        out = {}
        for tr in self.tree.xpath(f"//table[contains(concat(' ', @class, ' '), ' {table} ')]/tbody/tr[th and td]"):
            name = "".join(tr.xpath("th[1]//text()[not(ancestor::small) and not(ancestor::*[@aria-hidden])]")).strip()
            out[name] = [self.plain(td) for td in tr.xpath("td[@class='n']")]
        return out

    def tiles(self) -> dict[str, str]:
        return {self.plain(d.find("dt")): self.plain(d.find("dd")) for d in self.tree.xpath("//dl[@class='tiles']/div")}

    def facts(self) -> dict[str, str]:
        (dl,) = self.tree.xpath("//dl[@class='made']")
        return {self.plain(a): self.plain(b) for a, b in zip(dl.xpath("dt"), dl.xpath("dd"), strict=True)}

    def cards(self, kind: str) -> list[Any]:
        return self.tree.xpath(f"//article[starts-with(@aria-labelledby, '{kind}')]")


@pytest.fixture(scope="module")
def mixed() -> tuple[list[Post], list[Rationale], list[Reject]]:
    """40 posts: 24 predicted, 11 explained (7 at attempt 2, 4 at attempt 3), 5 rejects for two reasons."""
    kept = [rationale(p, Source.PREDICTED, 1) for p in POSTS[:24]]
    kept += [rationale(p, Source.EXPLAINED, 2 if i < 7 else 3) for i, p in enumerate(POSTS[24:35])]
    rejects = [Reject(p.post_id, "teach", Reason.LABEL_MISMATCH, "4 attempts; the last: says neutral", "raw answer", 4) for p in POSTS[35:38]]
    rejects += [Reject(p.post_id, "teach", Reason.LABEL_LEAKED, "an explanation may not say 'as told'", "as told, it is so", 4) for p in POSTS[38:39]]
    rejects += [Reject(POSTS[39].post_id, "teach", Reason.IMAGE_UNREADABLE, "OSError: broken")]
    return POSTS, kept, rejects


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    if request.param == "folder":
        return Store(str(tmp_path / "root"))
    bucket = request.getfixturevalue("s3_bucket")
    return Store(f"s3://{bucket}/{tmp_path.name}")


def test_shows_the_numbers(store, mixed):
    posts, kept, rejects = mixed
    page = page_of(store, posts, kept, rejects)
    assert page.tiles() == {
        "Posts in": "40", "Rationales kept": "35", "Rejects": "5", "Labels found without being told": "60.0 %",
    }  # fmt: skip
    assert page.rows("counts") == {
        "Predicted": ["24", "60.0 %"], "Explained": ["11", "27.5 %"], "Label mismatch": ["3", "7.5 %"], "Image unreadable": ["1", "2.5 %"],
        "Label leaked": ["1", "2.5 %"], "All": ["40", "100.0 %"],
    }  # fmt: skip
    assert REASONS[Reason.LABEL_LEAKED] in page.text
    assert {k: v[0] for k, v in page.rows("attempts").items()} == {"1": "24", "2": "7", "3": "4", "4": "0", "Never": "4", "Not to the end": "1"}
    assert "predict, temperature 0" in page.text and "explain, temperature 0.5, label given" in page.text
    gold, found = Counter(p.label for p in posts), Counter(p.label for p in posts[:24])
    for label in Sentiment:
        cells = page.rows("labels")[label.value]
        assert [c.split()[0] for c in cells] == [str(gold[label]), str(sum(r.prediction is label for r in kept)), str(found[label])]
        assert cells[2] == f"{found[label]} {100 * found[label] / gold[label]:.1f} %"
    assert "Explained rationales are label-conditioned" in page.text


def test_shows_the_tokens(tmp_path, mixed):
    posts, kept, rejects = mixed
    kept = [replace(r, tokens_out=i + 1) if r.attempts == 1 else r for i, r in enumerate(kept)]
    page = page_of(Store(str(tmp_path)), posts, kept, rejects)
    assert page.rows("lengths") == {
        "One answer": ["12", "22", "24", "24"], "Answers per rationale": ["18", "30", "30", "30"], "Prompts per rationale": ["100", "300", "300", "300"],
    }  # fmt: skip
    assert "60 answers were asked of the model, for 12 345 prompt tokens and 6 789 answer tokens" in page.text
    assert "20 more (25.0 % of all that were needed)" in page.text and "spared 4 000 prompt tokens and 500 answer tokens" in page.text


def test_says_how_it_was_made(tmp_path, mixed):
    redone = teach_identity(round=2, redo="earlier-print", duplicates="twins-print")
    page = page_of(Store(str(tmp_path)), *mixed, identity=redone)
    facts = page.facts()
    assert facts["Model"] == "big; fingerprint m-print" and facts["Recipe"] == "tiny" and facts["Prompts"].endswith(RECIPE.contract.hash)
    assert facts["Posts"].startswith("posts/p, split train") and facts["Sampling"] == "temperature 0, 0.5, 0.8, 1; top-p 1; seed 42"
    assert "at most 160 tokens, written freely" in facts["Answers"] and facts["Precision"] == "float32"
    assert "round 2" in facts["Retries"] and "earlier-print" in facts["Retries"] and "twins-print" in facts["Duplicates"]
    assert '"max_model_len": 1024' in page.text and "pyarrow" in page.plain(page.tree.xpath("//footer")[0])
    assert "a model’s opinion, not fact" in page.text and "Round 2 over rejects" in page.text


def test_a_retried_table_may_have_two_models(tmp_path, mixed):
    posts, kept, rejects = mixed
    kept = [replace(r, model="bigger") if r.attempts == 3 else r for r in kept]
    page = page_of(Store(str(tmp_path)), posts, kept, rejects, identity=teach_identity(round=1, redo="before"))
    assert page.facts()["Model"] == "big (31 rationales), bigger (4 rationales); fingerprint m-print"
    assert "in the words of big and bigger :" in page.text


def test_an_assistants_table(tmp_path):
    kept = [rationale(p, Source.AUGMENTED, 1) for p in POSTS[:30]]
    rejects = [Reject(p.post_id, "augment", Reason.LABEL_MISMATCH, "says neutral", "raw", 1) for p in POSTS[30:]]
    identity = {k: v for k, v in teach_identity().items() if k not in ("teach", "duplicates", "round")}
    identity |= {"stage": "augment", "augment": RECIPE.augment.model_dump(mode="json")}
    page = page_of(Store(str(tmp_path)), POSTS, kept, rejects, identity=identity)
    assert page.rows("counts")["Augmented"] == ["30", "75.0 %"] and page.rows("attempts")["1"][0] == "30"
    assert page.facts()["Stage"].startswith("augment") and "reason, temperature 0.7" in page.text
    assert "label-conditioned" not in page.text and "says nothing about the assistant" in page.text


def test_duplicates_are_counted_and_not_shown(tmp_path, mixed):
    """A copy counts as a row, but not among attempts, lengths and examples."""
    posts, kept, rejects = mixed
    copies = [replace(kept[0], post_id=p.post_id, duplicate_of=kept[0].post_id, attempts=0, tokens_in=0, tokens_out=0) for p in posts[1:9]]
    store = Store(str(tmp_path))
    source = post_table(store, posts)
    with begin(store, "rationales", "r", teach_identity(duplicates="twins")) as run:
        run.write_table("part-0", to_table(Rationale, [kept[0], *kept[9:]]))
        run.write_table("part-0", to_table(Reject, rejects[1:]), rejects=True)
        run.write_table(f"{COPIES}0", to_table(Rationale, copies))
        run.write_table(f"{COPIES}0", to_table(Reject, [replace(rejects[0], detail="as another", raw=None, attempts=0)]), rejects=True)
        page = Page(card(run, source, RECIPE, stats_of(kept, posts, 9), examples=40))
    assert "9 of these are duplicates that were not asked: 8 have a copy of their representative’s rationale, 1 share its reject." in page.text
    assert page.rows("counts")["Predicted"][0] == "24" and page.rows("counts")["All"][0] == "40"
    asked = {k: int(v[0]) for k, v in page.rows("attempts").items()}
    assert asked == {"1": 16, "2": 7, "3": 4, "4": 0, "Not asked": 9, "Never": 3, "Not to the end": 1} and sum(asked.values()) == 40
    assert len(page.cards("example")) == 27 and "as another" not in page.text
    assert page.rows("lengths")["Answers per rationale"][0] == "10"


def test_examples_are_balanced_and_whole(tmp_path, mixed):
    posts, kept, rejects = mixed
    page = page_of(Store(str(tmp_path)), posts, kept, rejects)
    by_id, rows = {p.post_id: p for p in posts}, {r.post_id: r for r in kept}
    seen = Counter[tuple[Any, ...]]()
    for e in page.cards("example"):
        post_id = page.plain(e.xpath(".//code")[0])
        r, post = rows[post_id], by_id[post_id]
        seen[r.source, r.prediction] += 1
        said = page.plain(e)
        sections = [r.text_analysis, r.image_analysis, r.conflict_resolution, r.final_conclusion]
        for part in (*sections, post.text, post.aspect, r.source.value, f"attempt {r.attempts}"):
            assert " ".join(str(part).split()) in said, part
        assert page.plain(e.xpath(".//span[starts-with(@class, 'label')]")[0]).endswith(post.label.value)
        (image,) = e.xpath(".//img/@src")
        shown = Image.open(io.BytesIO(base64.b64decode(image.removeprefix("data:image/jpeg;base64,"))))
        assert shown.format == "JPEG" and max(shown.size) <= 320 and not shown.getexif()
    assert len(seen) == 6 and set(seen.values()) == {1}, seen  # 2 sources × 3 classes
    again = page_of(Store(str(tmp_path / "again")), posts, kept, rejects)
    assert again.source == page.source
    refused = page.cards("reject")
    assert len(refused) == REJECTS and {page.plain(e.xpath(".//span[@class='source rejected']")[0]) for e in refused} == {
        "label mismatch", "label leaked", "image unreadable"
    }  # fmt: skip
    assert any(page.plain(pre) == "as told, it is so" for pre in page.tree.xpath("//article//pre"))


def test_pictures_by_reference_large_missing_and_broken(tmp_path):
    """A large photo by path is shown small and without its EXIF; a missing, a broken and an absent one are named, without their paths."""
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    Image.effect_noise((1200, 900), 60).convert("RGB").save(tmp_path / "photo.jpg", exif=exif, comment=b"by the owner")
    bare = [replace(p, image_bytes=None, image_sha256=None) for p in POSTS[:4]]
    posts = [
        replace(bare[0], image_ref=str(tmp_path / "photo.jpg")), replace(bare[1], image_ref=str(tmp_path / "gone.jpg")),
        replace(bare[2], image_bytes=POSTS[2].image_bytes[:60]), bare[3],
    ]  # fmt: skip
    page = page_of(Store(str(tmp_path / "root")), posts, [rationale(p, Source.PREDICTED, 1) for p in posts], [])
    said = {page.plain(e.xpath(".//code")[0]): page.plain(e.xpath(".//div[@class='picture']")[0]) for e in page.cards("example")}
    assert [said[p.post_id] for p in posts] == ["", "picture not shown: image missing", "picture not shown: image unreadable", "no picture"]
    (image,) = page.tree.xpath("//img/@src")
    data = base64.b64decode(image.partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (320, 240) and len(data) < 60_000 and b"taken at home" not in data and b"by the owner" not in data
    assert str(tmp_path) not in page.source


def test_what_others_wrote_stays_data(tmp_path):
    posts = [replace(p, text=ATTACK, aspect=ATTACK, post_id=f"{i}{ATTACK}", image_bytes=None) for i, p in enumerate(POSTS[:2])]
    kept = [replace(rationale(posts[0], Source.PREDICTED, 1), model=ATTACK, text_analysis=ATTACK, final_conclusion=ATTACK)]
    long = ATTACK + "x" * 5000
    rejects = [Reject(posts[1].post_id, "teach", Reason.ANSWER_UNPARSED, f"Prediction is {ATTACK}", long, 4)]
    page = page_of(Store(str(tmp_path)), posts, kept, rejects)
    assert "<script" not in page.source and "<b>" not in page.source and not page.tree.xpath("//script | //b")
    (raw,) = page.tree.xpath("//article//pre")
    assert raw.text_content() == long[:2000] + f"… ({len(long) - 2000} more characters)"
    assert page.tree.xpath("//blockquote")[0].text_content() == ATTACK and page.tree.xpath("//strong")[0].text_content() == ATTACK


def test_is_closed(tmp_path, mixed):
    page = page_of(Store(str(tmp_path)), *mixed)
    bare = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", "", page.source)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", bare)
    links = page.tree.xpath("//@href | //@src")
    assert links and all(link.startswith(("#", "data:image/")) for link in links)
    ids = page.tree.xpath("//@id")
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert {i for value in page.tree.xpath("//@aria-labelledby") for i in value.split()} <= set(ids)
    assert not page.tree.xpath("//script | //iframe | //link | //form | //@onclick | //@onerror")


def test_nothing_kept(tmp_path):
    rejects = [Reject(p.post_id, "teach", Reason.CONCLUSION_CONTRADICTS, "says positive, Prediction negative", None, 4) for p in POSTS]
    page = page_of(Store(str(tmp_path)), POSTS, [], rejects)
    assert page.tiles()["Rationales kept"] == "0" and page.tiles()["Labels found without being told"] == "0.0 %"
    assert page.rows("counts") == {"Conclusion contradicts": ["40", "100.0 %"], "All": ["40", "100.0 %"]}
    assert page.cards("example") == [] and "No row to show." in page.text and len(page.cards("reject")) == REJECTS
    assert page.facts()["Model"].startswith("builtin:teacher") and page.rows("lengths") == {}


def test_nothing_rejected(tmp_path):
    page = page_of(Store(str(tmp_path)), POSTS, [rationale(p, Source.PREDICTED, 1) for p in POSTS], [], examples=2)
    assert page.tiles()["Rejects"] == "0" and page.tiles()["Labels found without being told"] == "100.0 %"
    assert page.cards("reject") == [] and "There are none." in page.text and len(page.cards("example")) == 2


def test_only_the_posts_of_the_split_count_and_each_one_does(tmp_path, mixed):
    posts, kept, rejects = mixed
    others = [replace(p, post_id=f"v-{p.post_id}", split=Split.VALIDATION) for p in posts[:5]]
    assert page_of(Store(str(tmp_path / "a")), posts + others, kept, rejects).tiles()["Posts in"] == "40"
    with pytest.raises(ConservationError, match="40 posts in, 34 kept and 5 rejected"):
        page_of(Store(str(tmp_path / "b")), posts, kept[1:], rejects)


def test_the_draw_does_not_depend_on_the_order():
    rows = [((source, label), f"{source}-{label}-{i}") for source in "ab" for label in "xyz" for i in range(9 if source == "a" else 1)]

    def drawn(order: list[Any], seed: int = 1, size: int = 7) -> list[tuple[str, str]]:
        draw = Draw(seed, size)
        for group, post_id in order:
            draw.add(group, post_id, "f")
        return draw.pick()

    first = drawn(rows)
    assert first == drawn(rows[::-1]) != drawn(rows, seed=2)
    assert Counter(i[:3] for i, _ in first[:6]) == {f"{s}-{c}": 1 for s in "ab" for c in "xyz"} and first[6][0].startswith("a")
    two = [i for i, _ in drawn(rows, size=2)]
    assert {i[0] for i in two} == {"a", "b"} and two[0][2] != two[1][2]
    assert drawn(rows, size=0) == [] and len(drawn(rows, size=99)) == 30


def test_helpers():
    assert [percent(0.1234), number(1234567), words("label_mismatch")] == [f"12.3{NB}%", f"1{NB}234{NB}567", "Label mismatch"]
    assert data_uri(b"\x89PNG..").startswith("data:image/png;") and data_uri(b"\xff\xd8").startswith("data:image/jpeg;")
