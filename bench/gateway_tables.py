"""What bench/gateway.py found, for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from bench.cloud import WORDS
from bench.report import table


def tables_of(figures: dict[str, Any]) -> list[Table]:
    tables = []
    if "overhead" in figures:
        direct = figures["overhead"]["direct"]["first_ms"]["p50"]
        ways = [
            (way, f"{one['first_ms']['p50']:.2f}", f"{one['first_ms']['p50'] - direct:+.2f}", f"{one['stream_ms']['p50']:.1f}",
             f"{one['answers_per_s']:.0f}", *(f"{figures['bare'][way][name]['p50']:.2f}" for name in ("first_ms", "all_ms")))
            for way, one in figures["overhead"].items()
        ]  # fmt: skip
        heads = ("way", "first event ms", "added", f"stream of {WORDS} ms", "answers/s, 16 clients", "first, bare socket", "stream, bare")
        tables.append(table("A primary that is well", heads, ways))
    if "faults" in figures:
        broken = [(fault, f"{one['p50']:.0f}", f"{one['p95']:.0f}", one["backend"]) for fault, one in figures["faults"].items()]
        tables.append(table(f"First local word, budgets of {figures['budget_s']:g} s", ("fault", "p50 ms", "p95 ms", "header"), broken))
    if "kept" in figures:
        one = figures["kept"]
        direct = one["bare"]["direct"]["p50"]
        rows = [(f"{way}, bare socket", f"{each['p50']:.2f}", f"{each['p95']:.2f}", f"{each['p50'] / direct:.2f}",
                 *((f"{one['crowd'][way]['answers_per_s']:.0f}", f"{one['crowd'][way]['hits']:.1%}") if way in one["crowd"] else ("", "")))
                for way, each in one["bare"].items()]  # fmt: skip
        rows.append(("gateway, httpx", f"{one['httpx']['p50']:.2f}", f"{one['httpx']['p95']:.2f}", "", "", ""))
        heads = ("way", "p50 ms", "p95 ms", "of direct", "answers/s, 16 clients", "of them hits")
        tables.append(table("A kept answer (direct: the stand-in's own)", heads, rows))
    if "refused" in figures:
        rows = [
            (case, way, f"{each['p50']:.2f}", f"{each['p95']:.2f}")
            for case, ways in figures["refused"].items()
            for way, each in ways.items()
        ]
        tables.append(table("Refused, for there is no room", ("while", "way", "p50 ms", "p95 ms"), rows))
    return tables
