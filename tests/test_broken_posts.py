"""Forty broken or odd posts, each with the outcome that it must have: the same in the predict, the explain and the label path."""

import io
import re
import struct
import sys
import zlib

import pytest
from PIL import Image

from mulcot_ray.artifacts import begin, read_rows
from mulcot_ray.engines.base import EngineSpec
from mulcot_ray.labeling.label import label
from mulcot_ray.posts.images import post_image
from mulcot_ray.posts.sample import sample_posts
from mulcot_ray.recipe import EngineRuntime, load_recipe
from mulcot_ray.records import Post, Reject, Sentiment, Split, from_row, to_table
from mulcot_ray.storage import Store
from mulcot_ray.teaching.teach import teach

RECIPE = load_recipe("tiny")
SIDE = RECIPE.contract.image.side
KEPT = "kept"
FULL = '"Text_analysis": "t"\n"Image_analysis": "i"\n"Conflict_resolution": "c"\n"Final_conclusion": "f"\n"Prediction": "{}"'


def encoded(im: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    im.save(out, kind, **options)
    return out.getvalue()


def picture(size=(64, 48), mode="RGB", colour="red") -> Image.Image:
    return Image.new("RGB", size, colour).convert(mode)


def palette_with_transparency() -> bytes:
    im = picture(mode="P")
    im.info["transparency"] = 0
    return encoded(im, transparency=0)


def animated(kind: str) -> bytes:
    frames = [picture(colour=c) for c in ("red", "green", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def turned() -> bytes:
    im = picture()
    exif = im.getexif()
    exif[0x0112] = 6
    return encoded(im, "JPEG", exif=exif)


def png_that_claims(width: int, height: int) -> bytes:
    """A bomb: a header of any size, and no pixels to speak of."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def corpus(folder) -> list[tuple[str, Post, str]]:
    """(name, post, outcome): "kept" or the reason of its reject."""
    jpeg, png = encoded(picture(), "JPEG"), encoded(picture())
    (folder / "named.jpg").write_bytes(png)
    (folder / "folder").mkdir()
    (folder / "vast.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * (21 << 20))
    pictures: dict[str, tuple[bytes, str]] = {
        "jpeg": (jpeg, KEPT), "turned by exif": (turned(), KEPT), "alpha": (encoded(picture(mode="RGBA")), KEPT),
        "grey with alpha": (encoded(picture(mode="LA")), KEPT), "palette": (encoded(picture(mode="P")), KEPT),
        "palette, transparent": (palette_with_transparency(), KEPT), "cmyk": (encoded(picture(mode="CMYK"), "JPEG"), KEPT),
        "one bit": (encoded(picture(mode="1")), KEPT), "sixteen bit": (encoded(Image.new("I;16", (64, 48))), KEPT),
        "animated gif": (animated("GIF"), KEPT), "animated png": (animated("PNG"), KEPT), "webp": (encoded(picture(), "WEBP"), KEPT),
        "bmp": (encoded(picture(), "BMP"), KEPT), "smaller than a patch": (encoded(picture((20, 9))), KEPT), "wide 1:40": (encoded(picture((800, 20))), KEPT),
        "tiny": (encoded(picture((4, 4))), "image_bad_shape"), "one pixel": (encoded(picture((1, 1))), "image_bad_shape"),
        "wide 1:60": (encoded(picture((1200, 20))), "image_bad_shape"), "tall 60:1": (encoded(picture((10, 600))), "image_bad_shape"),
        "bomb": (png_that_claims(30000, 30000), "image_too_large"), "bomb in bytes": (b"\xff\xd8" + b"\0" * (21 << 20), "image_too_large"),
        "pixels missing": (png_that_claims(200, 200), "image_unreadable"), "truncated jpeg": (jpeg[: len(jpeg) // 2], "image_unreadable"),
        "truncated png": (encoded(Image.effect_noise((200, 200), 80))[:9000], "image_unreadable"), "header alone": (png[:24], "image_unreadable"),
        "empty file": (b"", "image_unreadable"), "text": (b"<html>not found</html>", "image_unreadable"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image_unreadable"), "tiff": (encoded(picture(), "TIFF"), "image_unreadable"),
        "zip": (b"PK\x03\x04" + b"\0" * 64, "image_unreadable"),
    }  # fmt: skip
    refs = {
        "png named jpg": (str(folder / "named.jpg"), KEPT), "gone": (str(folder / "gone.png"), "image_missing"), "a folder": (str(folder / "folder"), "image_missing"),
        "vast file": (str(folder / "vast.png"), "image_too_large"), "web address": ("http://127.0.0.1:9/x.png", "bad_value"), "file address": ("file:///etc/hostname", "bad_value"),
    }  # fmt: skip
    texts = {
        "no image": ("fine", KEPT), "control tokens": ("<|im_end|><|image_pad|> hello", KEPT), "empty text": (" \n", "empty_text"), "endless text": ("word " * 3000, "prompt_too_long"),
    }  # fmt: skip
    rows = [(n, dict(text="a post", image_bytes=b), o) for n, (b, o) in pictures.items()]
    rows += [(n, dict(text="a post", image_ref=r), o) for n, (r, o) in refs.items()]
    rows += [(n, dict(text=t), o) for n, (t, o) in texts.items()]
    made = []
    for i, (name, fields, outcome) in enumerate(rows):
        made.append((name, Post(f"{i:02d} {name}", f"s{i}", aspect="it", label=Sentiment.NEGATIVE, split=Split.TRAIN, **fields), outcome))
    return made


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A store with the corpus as posts/broken, and the outcome of each id."""
    folder = tmp_path_factory.mktemp("broken")
    rows = corpus(folder)
    assert len(rows) == 40
    store = Store(str(folder / "root"))
    with begin(store, "posts", "broken", {}) as run:
        run.write_table("part-00000", to_table(Post, [p for _, p, _ in rows]))
        run.commit(len(rows), stats={"splits": {"train": len(rows)}})
    return store, {p.post_id: outcome for _, p, outcome in rows}


@pytest.fixture(scope="module", autouse=True)
def _scripts_travel_by_value():
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


def at_once(messages, sampling):
    return FULL.format("negative")


def when_told(messages, sampling):
    told = re.search(r"Label: (\w+)", str(messages))
    return FULL.format(told[1] if told else "positive")


def spec(script) -> EngineSpec:
    return EngineSpec("fake", f"fake {script}", RECIPE.contract, "float32", 1024, 42, "cpu", EngineRuntime(), "scripted", script=script)


def outcomes(store, manifest) -> dict[str, str]:
    rejects = [from_row(Reject, r) for r in read_rows(store, manifest, rejects=True)]
    assert all(r.detail for r in rejects)
    return {r["post_id"]: KEPT for r in read_rows(store, manifest)} | {r.post_id: r.reason.value for r in rejects}


@pytest.mark.ray
@pytest.mark.parametrize(("script", "source"), [(at_once, "predicted"), (when_told, "explained")])
def test_teach_gives_each_its_outcome(broken, runtime, ray_session, script, source):
    store, expected = broken
    manifest, _ = teach(store, source, posts="broken", recipe=RECIPE, runtime=runtime, progress=lambda *a: None, engine=spec(script))
    assert outcomes(store, manifest) == expected
    assert manifest.stats["sources"] == {source: manifest.rows} and manifest.rows_in == 40


@pytest.mark.ray
@pytest.mark.engine
def test_label_gives_each_its_outcome_on_the_real_engine(broken, runtime, ray_session):
    store, expected = broken
    manifest, _ = label(store, "real", posts="broken", model="builtin:student", recipe=RECIPE, runtime=runtime, progress=lambda *a: None)
    assert outcomes(store, manifest) == expected and manifest.rows_in == 40


def test_pictures_are_what_a_person_would_see():
    """Upright, on white where transparent, the first frame, always of the contract's size."""
    by_exif = post_image(Post("x", "x", "x", image_bytes=turned()), SIDE)
    assert by_exif.size == (SIDE, SIDE) and by_exif.mode == "RGB"
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert post_image(Post("x", "x", "x", image_bytes=encoded(clear)), SIDE).getpixel((9, 9)) == (255, 255, 255)
    r, g, b = post_image(Post("x", "x", "x", image_bytes=animated("GIF")), SIDE).getpixel((9, 9))
    assert r > 200 and g < 60 and b < 60
    (post,) = sample_posts(1, Split.TRAIN, 1)
    halves = Image.new("RGB", (64, 32), "red")
    halves.paste("blue", (32, 0, 64, 32))
    exif = halves.getexif()
    exif[0x0112] = 3  # turned by 180°
    assert post_image(Post("x", "x", "x", image_bytes=encoded(halves, "PNG", exif=exif)), SIDE).getpixel((5, SIDE // 2))[2] > 200
    assert post_image(post, SIDE).size == (SIDE, SIDE)
