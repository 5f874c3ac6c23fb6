"""Make the tiny models that ship in the package: `python tools/make_models.py --out mulcot_ray/models`.

Three Qwen2.5-VL models in production form (own tokenizer, processor, chat template), trained from scratch on the sample corpus:

- `assistant`, `student`: *bases*. First they learn to describe what a picture shows and what a text voices, over the phrases of all
  splits, as a pretrained model knows its language; then also to repeat lines in the layout of the answers, whose cues, targets and
  verdicts are drawn independently, so that they know the words and nothing about which goes with which. No label is ever shown.
- `teacher`: an assistant that describes, trained further on predict, explain and classification with labels, on freshly drawn posts of
  the *train* split only. It too meets the phrases of validation and test without any label.

About 40 minutes on one CPU core for all three; `--only student` on one core beside `--only assistant` (and teacher) on another halves that.
"""

from __future__ import annotations

import argparse
import copy
import io
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from mulcot_ray.posts.sample import CUES, PICTURES, RESOLUTIONS, reference_rationale, sample_posts
from mulcot_ray.prompts import label_token_ids
from mulcot_ray.recipe import load_recipe
from mulcot_ray.records import LABELS, Post, Rationale, Source, Split, Task
from mulcot_ray.training.examples import Example, collate, encode, encode_picture

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = """{%- for m in messages -%}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' or c['type'] == 'image_url' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SIZES = {"student": (96, 3), "assistant": (128, 4)}  # hidden size, decoder layers; the teacher has the assistant's
SEED = 7  # the demo draws its posts from the recipe's seed, which is another one
CONTRACT = load_recipe("tiny").contract
# Instruction, whether the post's text is shown, whether the picture is.
DESCRIBE = (
    ("Describe the image.", False, True),
    ("Describe what the text voices about the target.", True, False),
    ("Describe the text and the image.", True, True),
    ("Name what the text voices about the target.", True, True),
    ("Name what the image shows.", True, True),
)


def corpus(split: Split, count: int) -> list[Post]:
    return list(sample_posts(count, split, SEED))


def describe(post: Post, which: int) -> tuple[list[dict], str, bool]:
    """A description task: messages, answer, whether the picture is part of it. In the answers' layout, without any verdict."""
    instruction, reads, sees = DESCRIBE[which]
    words = reference_rationale(post)
    says = f'"Text_analysis": "{words.text_analysis.split(":")[0]}."'
    shows = f'"Image_analysis": "{words.image_analysis.split(":")[0]}."'
    names = [f'"Prediction": "{post.meta[cue]}"' for cue in ("text_cue", "image_cue")]
    content = [{"type": "text", "text": instruction}]
    if sees:
        content.append({"type": "image"})
    if reads:
        content.append({"type": "text", "text": f"Post: {post.text}\nTarget: {post.aspect}"})
    return [{"role": "user", "content": content}], (shows, says, f"{says}\n{shows}", *names)[which], sees


def repeat(rng: random.Random, posts: list[Post]) -> tuple[list[dict], str]:
    """A copying task: lines that look like an answer and mean nothing, since every part is drawn by itself."""
    aspect = rng.choice(posts).aspect
    feels = [rng.choice(LABELS) for _ in range(4)]
    lines = Rationale(
        "-", Source.IMPORTED, "-", "-", f"It voices {rng.choice(list(CUES))} about {aspect}: {feels[0]}.",
        f"It shows {rng.choice([d for kinds in PICTURES.values() for d in kinds.values()])}: {feels[1]}.",
        rng.choice(list(RESOLUTIONS.values())), f"The poster is {feels[2]} about {aspect}.", feels[3],
    )  # fmt: skip
    answer = CONTRACT.answer(rng.choice((Task.REASONING, Task.REASONING, Task.CLASSIFICATION)), feels[3], lines)
    return [{"role": "user", "content": [{"type": "text", "text": f"Repeat the lines.\n{answer}"}]}], answer


def make_tokenizer(posts: list[Post]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the corpus, the prompts and the shape of the answers."""
    lines = []
    for p in posts:
        lines += [p.text, CONTRACT.answer(Task.PREDICT, p.label, reference_rationale(p)), *(describe(p, i)[1] for i in range(len(DESCRIBE)))]
        lines += [part["text"] for m in CONTRACT.messages(Task.EXPLAIN, p, p.label) for part in m["content"] if "text" in part]
    lines += [t.instruction for g in (CONTRACT.masc, CONTRACT.msc) for t in g.values()] * 20 + [d[0] for d in DESCRIBE] * 20
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=1280, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"},
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def make_processor(tok: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
    side = CONTRACT.image.side
    images = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 4 * side * side})
    return Qwen2_5_VLProcessor(images, tok, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)


def make_model(name: str, tok: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    hidden, layers = SIZES[name]
    ids = dict(zip(SPECIAL, tok.convert_tokens_to_ids(SPECIAL), strict=True))
    heads = hidden // 32
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tok), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads if heads % 2 else heads // 2, max_position_embeddings=4096, rope_theta=10000.0,
            rope_scaling=dict(type="mrope", mrope_section=[4, 6, 6], rope_type="default"), tie_word_embeddings=True,
            bos_token_id=ids["<|im_start|>"], eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
        ),
        vision_config=dict(
            depth=2, hidden_size=128, intermediate_size=256, num_heads=4, out_hidden_size=hidden, patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2, window_size=112, fullatt_block_indexes=[0, 1], in_chans=3,
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(SEED)
    return Qwen2_5_VLForConditionalGeneration(config)


class Pool:
    """Posts with their pictures already cut into patches, and encoded examples by (task, post), made on first use."""

    def __init__(self, posts: list[Post], processor: Qwen2_5_VLProcessor) -> None:
        self.posts, self.processor, self.made = posts, processor, {}
        side = CONTRACT.image.side
        self.pictures = [
            encode_picture(processor, Image.open(io.BytesIO(p.image_bytes)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
            for p in posts
        ]

    def get(self, i: int, task: Task | int) -> Example:
        key = (i, task)
        if key not in self.made:
            p, picture = self.posts[i], self.pictures[i]
            if isinstance(task, Task):
                answer = CONTRACT.answer(task, p.label, reference_rationale(p))
                self.made[key] = encode(self.processor, CONTRACT.messages(task, p, p.label if task is Task.EXPLAIN else None), answer, picture, 512)
            else:
                messages, answer, seen = describe(p, task)
                self.made[key] = encode(self.processor, messages, answer, picture if seen else None, 512)
        return self.made[key]


def train(name, tok, processor, steps, batch, device, draw, lr, model=None, tag="") -> Qwen2_5_VLForConditionalGeneration:
    model = (model or make_model(name, tok)).to(device).train()
    opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps + 1, pct_start=0.06)
    rng, start, image_id = random.Random(SEED), time.time(), model.config.image_token_id
    for step in range(steps):
        b = {k: v.to(device) for k, v in collate([draw(rng) for _ in range(batch)], tok.pad_token_id, image_id).items()}
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**b).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        sched.step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            print(f"{name}{tag} step {step}/{steps} loss {loss.item():.4f} {time.time() - start:.0f}s", flush=True)
    return model


@torch.no_grad()
def accuracy(model, tok, pool: Pool, device: str) -> float:
    """Held-out accuracy of the classification task by scored label words."""
    model.eval()
    words, right = torch.tensor(label_token_ids(tok, CONTRACT), device=device), 0
    for lo in range(0, len(pool.posts), 100):
        some = range(lo, min(lo + 100, len(pool.posts)))
        b = {
            k: v.to(device)
            for k, v in collate([pool.get(i, Task.CLASSIFICATION) for i in some], tok.pad_token_id, model.config.image_token_id).items()
        }
        labels = b.pop("labels")
        logits = model(**b).logits
        for row, i in enumerate(some):
            at = next(t for t in range(labels.shape[1]) if labels[row, t] in words)
            right += LABELS[int(logits[row, at - 1, words].argmax())] == pool.posts[i].label
    model.train()
    return right / len(pool.posts)


@torch.no_grad()
def described(model, tok, pool: Pool, device: str) -> float:
    """Share of answer tokens of the description tasks predicted right (teacher-forced)."""
    model.eval()
    b = {
        k: v.to(device)
        for k, v in collate([pool.get(i, 2) for i in range(min(300, len(pool.posts)))], tok.pad_token_id, model.config.image_token_id).items()
    }
    labels = b.pop("labels")[:, 1:]
    hit = (model(**b).logits[:, :-1].argmax(-1) == labels)[labels != -100].float().mean().item()
    model.train()
    return hit


def save(model, processor, name: str, out: Path, facts: dict) -> None:
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    model.to("cpu", torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    params = sum(p.numel() for p in model.parameters()) / 1e6
    kind = "label-trained teacher" if name == "teacher" else "base: never saw a label or a rationale"
    card = [f"# mulcot-ray tiny {name}", "", f"Qwen2.5-VL architecture, {params:.1f} M parameters, float16 safetensors; {kind}.", ""]
    card += [
        "Made by `tools/make_models.py` from the sample corpus (`mulcot_ray/posts/sample.py`), which is invented and rendered:",
        "no outside data or weights. For demonstrations and tests only. Licence: that of the package.",
        "",
    ]
    card += [f"- {k}: {v}" for k, v in facts.items()]
    (folder / "README.md").write_text("\n".join(card) + "\n")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--scale", type=float, default=1.0, help="fewer or more training steps")
    ap.add_argument("--batch", type=int, default=32)
    ap.add_argument("--only", nargs="*", default=list(SIZES), choices=list(SIZES), help="assistant makes the teacher too")
    a = ap.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.time()
    n = int(15000 * min(1, max(a.scale, 0.02)))
    language = [p for s in (Split.TRAIN, Split.VALIDATION, Split.TEST) for p in corpus(s, n // 3)]
    tok = make_tokenizer(language)
    processor = make_processor(tok)
    words, tasks = Pool(language, processor), Pool(corpus(Split.TRAIN, n), processor)
    held = Pool(list(sample_posts(600, Split.TEST, 99)), processor)
    print(
        f"{len(CUES)} cues, {sum(map(len, PICTURES.values()))} pictures, {len(tok)} tokens, {len(language)} + {n} posts, {device}, {time.time() - start:.0f}s",
        flush=True,
    )

    def draw_words(rng: random.Random) -> Example:
        return words.get(rng.randrange(len(words.posts)), rng.choice((0, 1, 2, 2, 3, 4)))

    def draw_both(rng: random.Random) -> Example:
        if rng.random() < 0.25:
            return draw_words(rng)
        task = rng.choice((Task.PREDICT, Task.PREDICT, Task.EXPLAIN, Task.CLASSIFICATION))
        return tasks.get(rng.randrange(len(tasks.posts)), task)

    def draw_repeat(rng: random.Random) -> Example:
        return draw_words(rng) if rng.random() < 0.5 else encode(processor, *repeat(rng, language), None, 512)

    for name in a.only:
        steps, more, labelled = (int(n * a.scale) for n in (2200, 900, 1200))
        model = train(name, tok, processor, steps, a.batch, device, draw_words, 2e-3)
        if name == "assistant":
            teacher = train("teacher", tok, processor, labelled, a.batch, device, draw_both, 1e-3, copy.deepcopy(model))
            facts = {
                "held-out accuracy (classification; no phrase of it was ever labelled)": f"{accuracy(teacher, tok, held, device):.3f}",
                "steps": f"{steps} describing, {labelled} with labels, × {a.batch} examples",
            }
            save(teacher, processor, "teacher", a.out, facts)
        model = train(name, tok, processor, more, a.batch, device, draw_repeat, 1.5e-3, model, " repeat")
        facts = {
            "answer tokens right when describing held-out posts": f"{described(model, tok, held, device):.3f}",
            "steps": f"{steps} describing, {more} repeating, × {a.batch} examples",
        }
        save(model, processor, name, a.out, facts)
    print(f"done in {time.time() - start:.0f}s; {sum(f.stat().st_size for f in a.out.rglob('*') if f.is_file()) / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    np.random.seed(SEED)
    main()
