"""What `mulcot plan` found, on the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mulcot_ray.plan import Plan, between
from mulcot_ray.prices import dollars
from mulcot_ray.records import LABELS


def show(p: Plan) -> RenderableType:
    """Counts, tokens, rejects to expect, time and money, notes, and the prompts."""
    parts: list[RenderableType] = [_counts(p), _prompts(p)]
    if p.faults:
        faults = Table("would be rejected", "sampled", "expected", "example", title=None)
        for reason, n in p.faults.items():
            faults.add_row(reason, f"{n['sampled']} of {p.sampled}", f"about {n['expected']:,}", Text(n["example"]))
        parts.append(faults)
    total = Table(show_header=False)
    total.add_row(
        "rows", f"{p.rows:,} in {p.done.of:,} chunks" + (f"; {p.done.rows:,} rows in {p.done.chunks:,} chunks are done" if p.done.chunks else "")
    )
    total.add_row("tokens", f"{p.tokens_in:,} in, {p.tokens_out:,} out{' (estimated)' if p.tokens_estimated else ''}")
    total.add_row("time", "not known" if p.seconds is None else between(*(_duration(x) for x in p.seconds)))
    total.add_row("price", "not known" if p.usd is None else between(*(dollars(x) for x in p.usd)))
    parts += [total, Text(p.basis, style="dim"), *(Text(n, style="yellow") for n in p.notes)]
    for prompt in p.shown:
        parts += [Text(f"a prompt for {p.prompts[0].question.task}, as the model sees it:", style="bold"), Text(prompt)]
    return Group(*parts)


def _counts(p: Plan) -> Table:
    labels = [x for x in (*LABELS, "no label") if any(x in c for c in p.counts.values())]
    table = Table("split", title=f"{p.stage} {p.name}: {p.model} on posts/{p.posts}, {p.split or 'all splits'}")
    for header in ("rows", *labels, "with aspect", "with picture"):
        table.add_column(header, justify="right")
    for split, c in p.counts.items():
        style = None if p.split in (None, split) else "dim"
        table.add_row(split, *(f"{c.get(k, 0):,}" for k in ("rows", *labels, "with aspect", "with picture")), style=style)
    if p.import_rejects:
        table.caption = f"rejected by the import: {', '.join(f'{k} {n}' for k, n in p.import_rejects.items())}"
    return table


def _prompts(p: Plan) -> Table:
    table = Table("asked", title=f"tokens of {p.sampled} sampled posts{', estimated' if p.tokens_estimated else ''}; the context has {p.context:,}")
    for header in ("times a row", "p50", "p90", "p99", "max", "shared", "answer", "at most"):
        table.add_column(header, justify="right")
    for x in p.prompts:
        q = x.question
        table.add_row(
            q.task, f"{q.times:.2f}", *map(str, (x.p50, x.p90, x.p99, x.max, x.shared)), f"{q.answer:.0f}" if q.limit else "-", str(q.limit or "-")
        )
    return table


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
