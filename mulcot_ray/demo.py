"""The whole way in one script, in order, on the sample corpus: what `mulcot demo` runs. Read it to see how the stages fit together."""

from __future__ import annotations

import base64
import json
from functools import partial
from typing import Any

import httpx
from rich.table import Table

from mulcot_ray.artifacts import Manifest, begin, need, read_rows, versions
from mulcot_ray.cluster import session
from mulcot_ray.console import console, counter, quiet_libraries, rows, training
from mulcot_ray.errors import EngineError
from mulcot_ray.evaluation.evaluate import evaluate
from mulcot_ray.evaluation.pages import model_files
from mulcot_ray.evaluation.report import demo_report
from mulcot_ray.labeling.label import label
from mulcot_ray.posts.importing import import_sample
from mulcot_ray.posts.sample import best_single_modality
from mulcot_ray.recipe import Recipe, Runtime
from mulcot_ray.records import LABELS, SECTIONS, Post, Prediction, Split, from_row
from mulcot_ray.run_page import write_page
from mulcot_ray.storage import Store
from mulcot_ray.teaching.augment import augment
from mulcot_ray.teaching.teach import teach
from mulcot_ray.training.stages import assistant, labels_only, student

TEST, VALIDATION = 400, 150  # posts
ENDPOINT_POSTS = 20


def run_demo(store: Store, recipe: Recipe, runtime: Runtime, train: int) -> None:
    """Every stage on the sample corpus; each is skipped where it is done. Ends with a table and the next command to type."""
    seconds: dict[str, float] = {}

    def note(stage: str, done: tuple[Manifest, bool]) -> Manifest:
        manifest, fresh = done
        seconds[stage] = round(seconds.get(stage, 0.0) + manifest.seconds, 1)
        what = f"{manifest.seconds:6.1f} s" if fresh else "already done"
        console.print(f"[green]✓[/] {manifest.kind}/{manifest.name:<22} {what:>12}   {_line(manifest)}", soft_wrap=True)
        if fresh:
            write_page(store, manifest)
        return manifest

    common: dict[str, Any] = {"recipe": recipe, "runtime": runtime}
    console.print(f"[bold]mulcot demo[/]: recipe {recipe.name}, runtime {runtime.name}, results under {store.root}")
    with counter("import") as c:
        note("import", import_sample(store, "sample", train=train, validation=VALIDATION, test=TEST, seed=recipe.seed, progress=c))
    with session(runtime):
        quiet_libraries()
        with rows("teach") as p:
            note("teach", teach(store, "taught", posts="sample", progress=p, **common))
        with training("assistant") as t:
            note("assistant", assistant(store, "assistant", posts="sample", rationales=["taught"], progress=t, **common))
        with rows("augment") as p:
            note("augment", augment(store, "augmented", posts="sample", model="assistant", progress=p, **common))
        with training("student") as t:
            note(
                "student", student(store, "student", posts="sample", rationales=["taught", "augmented"], assistant="assistant", progress=t, **common)
            )
        with training("labels only") as t:
            note("labels_only", labels_only(store, "labels-only", posts="sample", progress=t, **common))
        reports = {}
        for who, model, mode, role in (
            ("teacher", recipe.models.teacher, "generate", "teacher"),
            ("assistant", "assistant", "score", "assistant"),
            ("student_before", recipe.models.student, "score", "student"),
            ("student", "student", "explain", "student"),
            ("labels_only", "labels-only", "score", "student"),
        ):
            name = who.replace("_", "-")
            with rows(f"label by {name}") as p:
                made = label(store, name, posts="sample", split=Split.TEST, model=model, mode=mode, role=role, progress=p, **common)  # type: ignore[arg-type]
            note("label" if who == "student" else "evaluate", made)
            # The reference rationales of test posts are the teacher's, written without gold.
            references = "teacher" if who == "student" else None
            manifest, reports[who], fresh = evaluate(
                store,
                name,
                posts="sample",
                answers=name,
                answers_kind="predictions",
                references=references,
                split=Split.TEST,
                contract=recipe.contract,
                runtime=runtime,
                pages=partial(model_files, teacher="teacher") if who == "student" else None,
            )
            note("evaluate", (manifest, fresh))
        note("serve", _endpoint(store, recipe, runtime))
    summary = _summary(store, recipe, reports, seconds)
    _write(store, summary, reports, recipe)
    _show(store, summary)


def _endpoint(store: Store, recipe: Recipe, runtime: Runtime) -> tuple[Manifest, bool]:
    """Start the endpoint, send it test posts, and compare its labels with those of the bulk labeler."""
    from mulcot_ray.serving.run import serving

    bulk = need(store, "predictions", "student")
    run = begin(store, "evaluations", "endpoint", {"stage": "endpoint", "predictions": bulk.fingerprint, "posts": ENDPOINT_POSTS})
    if isinstance(run, Manifest):
        return run, False
    expected = {p.post_id: p for p in (from_row(Prediction, r) for r in read_rows(store, bulk))}
    posts = [p for p in _posts(store) if p.post_id in expected][:ENDPOINT_POSTS]
    with run, rows("serve") as progress, serving(store, "student", recipe, runtime) as endpoint:
        same, took = 0, []
        with httpx.Client(base_url=endpoint.url, headers=endpoint.headers, timeout=60, trust_env=False) as client:
            for i, post in enumerate(posts):
                body = {"id": post.post_id, "text": post.text, "aspect": post.aspect, "image": base64.b64encode(post.image_bytes or b"").decode()}
                answer = client.post("/v1/sentiment", json=body)
                if answer.status_code != 200:
                    raise EngineError(f"the endpoint answered {answer.status_code} to post {post.post_id}: {answer.text[:200]}")
                same += answer.json()["label"] == expected[post.post_id].label
                took.append(answer.elapsed.total_seconds())
                progress(i + 1, len(posts), 0)
        stats = {"posts": len(posts), "same_label": same, "median_ms": round(sorted(took)[len(took) // 2] * 1000, 1)}
        if same != len(posts):
            raise EngineError(f"the endpoint gave another label than the bulk labeler for {len(posts) - same} of {len(posts)} posts")
        run.store.create(f"{run.prefix}/report.json", json.dumps(stats).encode())
        return run.commit(len(posts), stats=stats), True


def _posts(store: Store) -> list[Post]:
    return [from_row(Post, r) for r in read_rows(store, need(store, "posts", "sample"))]


def _summary(store: Store, recipe: Recipe, reports: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    posts = _posts(store)
    single = best_single_modality([p for p in posts if p.split is Split.TRAIN], [p for p in posts if p.split is Split.TEST])
    taught, augmented = need(store, "rationales", "taught"), need(store, "rationales", "augmented")
    return {
        "accuracy": {
            **{who: reports[who]["labels"]["accuracy"] for who in ("teacher", "assistant", "student_before", "student", "labels_only")},
            **single,
        },
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "counts": {
            "posts": need(store, "posts", "sample").stats["splits"],
            "rationales": {**taught.stats["sources"], **augmented.stats["sources"]},
            "rejects": {"teach": taught.rejects_by_reason, "augment": augmented.rejects_by_reason},
            "endpoint": need(store, "evaluations", "endpoint").stats,
        },
        "versions": versions(),
        "recipe": recipe.name,
        "contract": recipe.contract.hash,
    }


def _write(store: Store, summary: dict[str, Any], reports: dict[str, Any], recipe: Recipe) -> None:
    curves = {
        k: json.loads(store.read(f"models/{m}/history.json") or b"{}")
        for k, m in (("assistant", "assistant"), ("student", "student"), ("labels_only", "labels-only"))
    }
    confusions = {k: r["labels"]["confusion"] for k, r in reports.items()}
    html = demo_report(summary, curves, confusions, _examples(store))
    store.write("report.html", html.encode())
    store.write("summary.json", json.dumps(summary, indent=1).encode())


def _examples(store: Store, wanted: int = 12) -> list[dict[str, Any]]:
    """Test posts with the student's answer and the teacher's, the wrong ones first, one of each relation at least."""
    answers = {p.post_id: p for p in (from_row(Prediction, r) for r in read_rows(store, need(store, "predictions", "student")))}
    teacher = {p.post_id: p for p in (from_row(Prediction, r) for r in read_rows(store, need(store, "predictions", "teacher")))}
    posts = [p for p in _posts(store) if p.post_id in answers]
    wrong = [p for p in posts if answers[p.post_id].label is not p.label][: wanted // 3]
    chosen, seen = list(wrong), {p.meta["relation"] for p in wrong}
    for p in posts:
        if len(chosen) < wanted and p not in chosen and (p.meta["relation"] not in seen or len(seen) >= 5):
            chosen.append(p)
            seen.add(p.meta["relation"])
    made = []
    for p in chosen:
        a, t = answers[p.post_id], teacher.get(p.post_id)
        made.append(
            {
                "image": p.image_bytes, "text": p.text, "aspect": p.aspect, "gold": str(p.label), "label": str(a.label),
                "probabilities": {str(x): getattr(a, x) for x in LABELS}, "relation": p.meta["relation"], "sections": _sections(a), "teacher": _sections(t),
            }
        )  # fmt: skip
    return made


def _sections(p: Prediction | None) -> dict[str, str] | None:
    if p is None or p.text_analysis is None:
        return None
    return {**{s.capitalize(): getattr(p, s) or "" for s in SECTIONS}, "Prediction": str(p.stated)}


def _line(m: Manifest) -> str:
    if m.kind == "models":
        return f"validation accuracy {m.stats.get('accuracy', float('nan')):.3f} (epoch {m.stats['epoch']}), {m.stats['rows']} rows"
    if m.kind == "evaluations":
        return ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in m.stats.items() if isinstance(v, int | float))[:100]
    return f"{m.rows} rows, {m.rejects} rejected" + (f" {m.rejects_by_reason}" if m.rejects else "")


def _show(store: Store, summary: dict[str, Any]) -> None:
    a = summary["accuracy"]
    table = Table(title="Held-out accuracy (sample corpus, test split)", title_justify="left")
    table.add_column("who")
    table.add_column("accuracy", justify="right")
    table.add_column("")
    for key, name, remark in (
        ("teacher", "teacher", "writes the whole answer"),
        ("assistant", "assistant", "trained on labels and the teacher's rationales"),
        ("student", "student", "trained on labels, both rationales, soft labels"),
        ("labels_only", "student, labels only", "the same base and epochs, without rationales"),
        ("student_before", "student before training", "the base as it ships"),
        ("image_only", "image only", "the best possible with one modality"),
        ("text_only", "text only", "the best possible with one modality"),
        ("majority", "majority class", ""),
    ):
        table.add_row(name, f"{a[key]:.3f}", remark, style="bold" if key == "student" else None)
    console.print(table)
    console.print(
        f"{summary['seconds']['total']:.0f} s in all; report: {store.root}/report.html, the student's own: {store.root}/evaluations/student/report.html, figures: {store.root}/summary.json",
        soft_wrap=True,
    )
    console.print(
        f"Next: [bold]mulcot serve --root {store.root} --model student[/], or your own posts: [bold]mulcot import POSTS.jsonl --format jsonl --name mine --root {store.root}[/]",
        soft_wrap=True,
    )
