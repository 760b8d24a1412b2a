"""Runtimes without a server: prompt and decoding, and what the loop above our engine brings."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from bench.decoders import Child, Turn
from bench.report import Peer, percentile, undisturbed
from bench.text_weights import ROOM_TOKENS, Weights, echo_prompt, prompts
from bench.timing import Room
from models.tokenizer import Tokenizer


def engine_level(
    given: argparse.Namespace, source: Weights, installed: Mapping[str, Peer]
) -> tuple[list[dict[str, Any]], dict[str, float | str]]:
    """Rows of the table of engines; figures of the loop."""
    # While the last of a batch reads its prompt, the first ones of ours write already.
    steps = given.decode_tokens + given.batch * (given.prompt_tokens // 128 + 1) + 16
    theirs = Room(source.gguf, given.threads, given.batch, 2 * given.prompt_tokens + steps)
    rooms = {way: dataclasses.replace(theirs, path=folder) for way, folder in source.folders.items()}
    if "hotspare native" in rooms:
        rooms["hotspare native spinning"] = rooms["hotspare native"]
    rooms |= {name: theirs for name in ("transformers float32", "llama.cpp") if installed[name].version}
    if source.q4_0 is not None and installed["llama.cpp"].version:
        rooms["llama.cpp Q4_0"] = dataclasses.replace(theirs, path=source.q4_0)
    if source.genai is not None:
        rooms["onnxruntime-genai int4"] = dataclasses.replace(theirs, path=source.genai)
    turns: dict[str, dict[str, list[Turn]]] = {name: defaultdict(list) for name in rooms}
    loops: dict[str, list[Turn]] = defaultdict(list)
    tokenizer = Tokenizer(source.ours)
    texts = prompts(tokenizer, given.prompt_tokens, seed=0)
    fixed = list(itertools.islice(texts, given.batch))
    ours = next(iter(rooms))
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
            _ask_loop(children[ours], given, tokenizer, next(texts), loops)
    if source.long is not None:
        _ask_long(given, source, tokenizer, loops)
    yardstick = turns[ours]["decode_1"][0].timing.first
    return [_engine_row(name, turns[name], yardstick) for name in rooms], _loop_figures(given, loops)


def _ask_loop(child: Child, given: argparse.Namespace, tokenizer: Tokenizer, new: Sequence[int], loops: dict[str, list[Turn]]) -> None:
    echo = echo_prompt(tokenizer, given.prompt_tokens, seed=5)
    for speculates in (False, True):
        loops["echo guessed" if speculates else "echo plain"].append(child.ask("echo", echo, given.decode_tokens, speculates))
    loops["first"].append(child.ask("first_beside", new, ()))
    loops["first again"].append(child.ask("first_again", new, len(new) * 15 // 16))


def _ask_long(given: argparse.Namespace, source: Weights, tokenizer: Tokenizer, loops: dict[str, list[Turn]]) -> None:
    if source.long is None:
        return
    room = Room(source.long, given.threads, 2, given.long_tokens + ROOM_TOKENS)
    short = next(prompts(tokenizer, 64, seed=7))
    long = next(prompts(tokenizer, given.long_tokens, seed=8))
    with Child("hotspare, long context", room) as child:
        child.ask("first_beside", short, ())
        for _ in range(given.rounds):
            loops["short alone"].append(child.ask("first_beside", short, ()))
            loops["short beside"].append(child.ask("first_beside", short, long))


def _loop_figures(given: argparse.Namespace, loops: Mapping[str, Sequence[Turn]]) -> dict[str, float | str]:
    def median_s(name: str) -> float:
        return percentile([turn.timing.seconds for turn in undisturbed(loops[name])], 0.5)

    plain, guessed = loops["echo plain"][0].timing, loops["echo guessed"][0].timing
    figures: dict[str, float | str] = {
        "an answer that repeats its prompt, tokens a second without guessing": plain.tokens / median_s("echo plain"),
        "with guessing": guessed.tokens / median_s("echo guessed"),
        "gain, times": median_s("echo plain") / median_s("echo guessed"),
        "the same tokens": "yes" if plain.first == guessed.first else "NO",
        f"first token of {given.prompt_tokens} new tokens, ms": 1000 * median_s("first"),
        "of the same with 15/16 of them remembered, ms": 1000 * median_s("first again"),
        "share": median_s("first again") / median_s("first"),
    }
    if "short beside" in loops:
        figures["first token of 64 new tokens, ms"] = 1000 * median_s("short alone")
        figures[f"while a prompt of {given.long_tokens} tokens is read, ms"] = 1000 * median_s("short beside")
        figures["times"] = median_s("short beside") / median_s("short alone")
    return figures


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
