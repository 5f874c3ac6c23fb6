"""The sample corpus: invented posts with rendered pictures, small enough to ship as code and hard enough to mean something.

Each post has one or two target aspects. Toward each of them the text carries a cue (gratitude, anger, a schedule, …) and
the picture carries a cue of its own (a frowning face, a rising chart, …). The label follows from both:

    text      image      label
    neutral   any        the image's          a factual text: the picture decides
    any       neutral    the text's
    same      same       that one
    positive  negative   negative             irony
    negative  positive   negative             the complaint outweighs the cheerful picture

so neither modality alone gives it: `best_single_modality` states how far each can get with a perfect reader.
Train, validation and test share no phrase, no aspect, no ending and no background hue: what a model learns on one has to
carry over to words that it never saw labelled. Everything is drawn from one seed.
"""

from __future__ import annotations

import colorsys
import hashlib
import io
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw

from mulcot_ray.records import Post, Rationale, Sentiment, Source, Split

NEG, NEU, POS = Sentiment.NEGATIVE, Sentiment.NEUTRAL, Sentiment.POSITIVE
SIDE = 168  # pixels
TEXT_WEIGHTS = {POS: 0.33, NEU: 0.42, NEG: 0.25}
IMAGE_WEIGHTS = {POS: 0.36, NEU: 0.38, NEG: 0.26}

# cue: (sentiment, phrases of train, of validation, of test)
CUES: dict[str, tuple[Sentiment, list[str], list[str], list[str]]] = {
    "gratitude": (POS, ["thank you", "so grateful to", "many thanks to", "hats off to"], ["big thanks to", "forever thankful for"], ["thanks a lot", "we owe a lot to"]),
    "pride": (POS, ["so proud of", "proud day for", "bragging about", "beaming over"], ["could not be prouder of", "standing tall with"], ["what a triumph for", "taking pride in"]),
    "joy": (POS, ["best day ever with", "having a blast with", "all smiles with", "great night with"], ["such fun with", "loving every minute of"], ["laughing all day with", "pure happiness with"]),
    "hope": (POS, ["can't wait for", "counting the days to", "so excited about", "ready for more of"], ["hyped for", "looking forward to"], ["hopeful about", "eager to see"]),
    "anger": (NEG, ["furious with", "can't stand", "outraged by", "shouting at"], ["raging at", "sick of"], ["angry at", "fuming over"]),
    "regret": (NEG, ["let down by", "expected more from", "disappointed by", "not what we hoped from"], ["so underwhelmed by", "a poor show from"], ["what a letdown from", "saddened by"]),
    "weariness": (NEG, ["so tired of", "worn out by", "bored to tears by", "done waiting for"], ["exhausted by", "over it with"], ["drained by", "had enough of"]),
    "distrust": (NEG, ["lost all trust in", "don't believe", "ashamed of", "cheated by"], ["misled by", "no faith in"], ["lied to by", "betrayed by"]),
    "a report": (NEU, ["news about", "update on", "report from", "statement by"], ["briefing on", "headlines from"], ["notes on", "press release by"]),
    "a schedule": (NEU, ["schedule for", "tickets on sale for", "opening hours of", "doors at eight for"], ["timetable for", "agenda for"], ["start times for", "calendar of"]),
    "a viewing": (NEU, ["watching", "streaming", "reading about", "listening to"], ["following", "tuned in to"], ["viewing", "browsing"]),
    "a record": (NEU, ["photo of", "link to", "map of", "list of"], ["picture of", "file on"], ["snapshot of", "index of"]),
}  # fmt: skip
ASPECTS = {
    Split.TRAIN: ["Mira Voss", "Northgate United", "Lake Orrin", "Juno Air", "the Harbour Fair", "Tobias Renn", "Cafe Lumo", "Vega Motors", "the Old Mill", "Radio Sol", "Ana Petrel", "Port Calder", "the Night Owls", "Brightside", "Nova Bank", "Elm Street"],
    Split.VALIDATION: ["Leo Marchetti", "Southbay Rovers", "Mount Ister", "Orca Phones", "the Spring Parade", "Delta Foods"],
    Split.TEST: ["Ida Holm", "Westlake City", "Cape Merrow", "Zephyr Trains", "the Book Market", "Kite Studios"],
}  # fmt: skip
ENDINGS = {
    Split.TRAIN: ["", "", " today", " tonight", " # monday", " this weekend", " again", " in the city"],
    Split.VALIDATION: ["", " this morning", " # friday", " right now"],
    Split.TEST: ["", " this evening", " # sunday", " once more"],
}
JOINERS = {Split.TRAIN: " , and ", Split.VALIDATION: " ; also ", Split.TEST: " - plus "}
HUES = {Split.TRAIN: (0.0, 0.5), Split.VALIDATION: (0.5, 0.7), Split.TEST: (0.7, 1.0)}
PICTURES = {
    "face": {POS: "a smiling face", NEU: "a blank face", NEG: "a frowning face"},
    "weather": {POS: "a bright sun", NEU: "a plain cloud", NEG: "a dark storm"},
    "chart": {POS: "a rising chart", NEU: "a flat chart", NEG: "a falling chart"},
    "plant": {POS: "a blooming flower", NEU: "a bare twig", NEG: "a wilted flower"},
}
RESOLUTIONS = {
    "agree": "Both say the same.",
    "image decides": "The text is factual, so the image decides.",
    "text decides": "The image is plain, so the text decides.",
    "irony": "The praise clashes with the image: it is irony.",
    "complaint": "The complaint outweighs the cheerful image.",
}


def rule(text: Sentiment, image: Sentiment) -> tuple[Sentiment, str]:
    """Label and relation of the two modalities: the table in the module's docstring."""
    if text is image:
        return text, "agree"
    if text is NEU:
        return image, "image decides"
    if image is NEU:
        return text, "text decides"
    return NEG, "irony" if text is POS else "complaint"


def sample_posts(count: int, split: Split, seed: int) -> Iterator[Post]:
    """`count` labelled posts of one split, with the picture as PNG bytes. One post in five shares its source with another."""
    rng = random.Random(f"{seed}/{split}")
    column = {Split.TRAIN: 1, Split.VALIDATION: 2, Split.TEST: 3}[split]
    made = 0
    for source in range(count):
        aspects = rng.sample(ASPECTS[split], 2 if rng.random() < 1 / 9 else 1)
        feelings = [rng.choices(list(TEXT_WEIGHTS), list(TEXT_WEIGHTS.values()))[0] for _ in aspects]
        cues = [rng.choice([c for c, spec in CUES.items() if spec[0] is f]) for f in feelings]
        text = JOINERS[split].join(f"{rng.choice(CUES[c][column])} {a}" for c, a in zip(cues, aspects, strict=True))
        text = (f"RT @ user{rng.randint(1, 99)} : " if rng.random() < 0.2 else "") + text + rng.choice(ENDINGS[split])
        mood = rng.choices(list(IMAGE_WEIGHTS), list(IMAGE_WEIGHTS.values()))[0]
        kind = rng.choice(list(PICTURES))
        png = render(kind, mood, HUES[split], rng)
        sha = hashlib.sha256(png).hexdigest()
        for i, (aspect, feeling, cue) in enumerate(zip(aspects, feelings, cues, strict=True)):
            if made == count:
                return
            label, relation = rule(feeling, mood)
            meta = {
                "text_cue": cue,
                "text_sentiment": str(feeling),
                "image_cue": PICTURES[kind][mood],
                "image_sentiment": str(mood),
                "relation": relation,
            }
            yield Post(
                f"sample-{split}-{source:05d}-{i}",
                f"sample-{split}-{source:05d}",
                text,
                aspect,
                image_bytes=png,
                image_sha256=sha,
                label=label,
                split=split,
                meta=meta,
            )
            made += 1


def reference_rationale(post: Post, label: Sentiment | None = None) -> Rationale:
    """The rationale that the corpus' rule gives for a sample post (or for another label, when one is forced on it)."""
    m, y = post.meta, label or post.label
    assert y is not None
    return Rationale(
        post.post_id, Source.IMPORTED, "rule", "-",
        f"It voices {m['text_cue']} about {post.aspect}: {m['text_sentiment']}.",
        f"It shows {m['image_cue']}: {m['image_sentiment']}.",
        RESOLUTIONS[m["relation"]],
        f"The poster is {y} about {post.aspect}.",
        y,
    )  # fmt: skip


def best_single_modality(fit: Sequence[Post], test: Sequence[Post]) -> dict[str, float]:
    """Accuracy on `test` of the best classifier that reads one modality perfectly and never sees the other.

    It knows the true cue (no real model can know more of that modality) and answers the cue's most frequent label in
    `fit`. `majority` always answers the most frequent label of all.
    """
    scores = {}
    for name, key in (("text_only", "text_cue"), ("image_only", "image_cue"), ("majority", "")):
        counts: dict[str, Counter[Sentiment | None]] = defaultdict(Counter)
        for p in fit:
            counts[p.meta.get(key, "")][p.label] += 1
        scores[name] = sum(counts[p.meta.get(key, "")].most_common(1)[0][0] == p.label for p in test) / len(test)
    return scores


def render(kind: str, mood: Sentiment, hues: tuple[float, float], rng: random.Random) -> bytes:
    """A picture of SIDE × SIDE pixels as PNG bytes; place, size and colours vary, what it shows does not."""
    r, g, b = colorsys.hsv_to_rgb(rng.uniform(*hues), rng.uniform(0.05, 0.35), rng.uniform(0.75, 1.0))
    im = Image.new("RGB", (SIDE, SIDE), (int(r * 255), int(g * 255), int(b * 255)))
    d = ImageDraw.Draw(im)
    ox, oy, k = rng.randint(-12, 12), rng.randint(-12, 12), rng.uniform(0.9, 1.1) * SIDE / 84

    def at(*xy: float) -> list[float]:
        return [(v - 42) * k + SIDE / 2 + (ox, oy)[i % 2] for i, v in enumerate(xy)]

    pen = max(2, round(2.5 * k))
    ink = (rng.randint(0, 50),) * 3
    if kind == "face":
        d.ellipse(at(14, 14, 70, 70), fill=(250, rng.randint(195, 225), rng.randint(50, 90)), outline=ink)
        d.ellipse(at(29, 31, 36, 38), fill=ink)
        d.ellipse(at(48, 31, 55, 38), fill=ink)
        if mood is POS:
            d.arc(at(26, 34, 58, 62), 20, 160, fill=ink, width=pen)
        elif mood is NEG:
            d.arc(at(26, 52, 58, 76), 200, 340, fill=ink, width=pen)
        else:
            d.line(at(30, 55, 54, 55), fill=ink, width=pen)
    elif kind == "weather":
        if mood is POS:
            d.ellipse(at(26, 26, 58, 58), fill=(255, rng.randint(200, 235), 0))
            for x, y in ((42, 10), (42, 74), (10, 42), (74, 42), (19, 19), (65, 65), (19, 65), (65, 19)):
                d.line(at(42 + (x - 42) * 0.65, 42 + (y - 42) * 0.65, x, y), fill=(255, 190, 0), width=pen)
        else:
            shade = rng.randint(185, 215) if mood is NEU else rng.randint(70, 95)
            for box in ((14, 28, 50, 54), (34, 22, 72, 54), (24, 18, 54, 48)):
                d.ellipse(at(*box), fill=(shade, shade, min(255, shade + 8)))
            if mood is NEG:
                for x in range(22, 70, 9):
                    d.line(at(x, 56, x - 5, 74), fill=(30, 60, 200), width=pen)
    elif kind == "chart":
        d.line(at(12, 10, 12, 74, 76, 74), fill=ink, width=pen)
        ys = {POS: (64, 50, 36, 18), NEG: (20, 34, 52, 66), NEU: (42, 44, 41, 43)}[mood]
        points = [v for i, y in enumerate(ys) for v in (18 + i * 18, y + rng.randint(-3, 3))]
        d.line(at(*points), fill={POS: (20, 140, 40), NEG: (200, 20, 20), NEU: (70, 70, 70)}[mood], width=pen + 3)
    else:
        stem = (60, 130, 50) if mood is POS else (120, 95, 60)
        if mood is NEG:
            d.line(at(42, 76, 42, 46, 50, 36, 58, 44), fill=stem, width=pen + 1)
            d.ellipse(at(50, 42, 68, 60), fill=(110, 75, 50))
            d.line(at(60, 66, 66, 74), fill=(110, 75, 50), width=pen)
        else:
            d.line(at(42, 76, 42, 40 if mood is POS else 16), fill=stem, width=pen + 1)
            if mood is POS:
                petal = (rng.randint(210, 250), rng.randint(60, 130), rng.randint(150, 210))
                for x, y in ((42, 18), (54, 27), (49, 41), (35, 41), (30, 27)):
                    d.ellipse(at(x - 9, y - 9, x + 9, y + 9), fill=petal)
                d.ellipse(at(36, 25, 48, 37), fill=(250, 220, 60))
            else:
                for y, x in ((60, 24), (48, 60), (34, 28)):
                    d.line(at(42, y, x, y - 10), fill=stem, width=pen)
    out = io.BytesIO()
    im.save(out, "PNG")
    return out.getvalue()
