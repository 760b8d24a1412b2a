"""Servers of the same weights with 1, half and all clients at once, and beside a process that keeps a core busy."""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

from bench.servers import Load, Server, busy_process, hotspare_node, llama_server, load, summary
from bench.text_weights import CHOICES, Weights, prompts
from bench.timing import Room
from models.tokenizer import Tokenizer

NEW, REPEATED, BESIDE = "new prompts", "repeated prompts", "new prompts beside a busy process"


def _servers(given: argparse.Namespace, source: Weights, room: Room, folder: Path) -> dict[str, AbstractAsyncContextManager[Server]]:
    ends = Tokenizer(source.ours).eos_ids
    servers = {way: hotspare_node(folder, way, source.store, given.model, room, CHOICES[way], ends) for way in source.folders}
    if given.llama_server is not None:
        files = {"llama-server": source.gguf, "llama-server Q4_0": source.q4_0}
        servers |= {way: llama_server(folder, way, given.llama_server, file, room) for way, file in files.items() if file is not None}
    return servers


async def http_level(given: argparse.Namespace, source: Weights) -> list[dict[str, Any]]:
    tokenizer = Tokenizer(source.ours)
    texts = (tokenizer.decode(ids) for ids in prompts(tokenizer, given.prompt_tokens, seed=1))
    clients = sorted({1, max(1, given.batch // 2), given.batch})
    # A decoded prompt may have some tokens more when it is read again.
    room = Room(source.gguf, given.threads, given.batch, max(64, given.prompt_tokens + given.decode_tokens + 32))
    loads: dict[tuple[str, int, str], list[Load]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {name: await stack.enter_async_context(server) for name, server in _servers(given, source, room, folder).items()}
        for server in servers.values():
            await load(server, [next(texts)], 4)

        async def round_of(count: int, kinds: Sequence[str], neighbour: int | None = None) -> None:
            new = [next(texts) for _ in range(count)]
            for name, server in servers.items():
                for kind in kinds:
                    loads[name, count, kind].append(await load(server, new, given.decode_tokens, neighbour))

        for _ in range(given.rounds):
            for count in clients:
                await round_of(count, (NEW, REPEATED))
            async with busy_process() as neighbour:
                for count in sorted({1, given.batch}):
                    await round_of(count, (BESIDE,), neighbour)
    return [
        {"way": name, "clients": count, "prompts": kind, **summary(loads[name, count, kind])}
        for kind, count, name in itertools.product((NEW, REPEATED, BESIDE), clients, servers)
        if (name, count, kind) in loads
    ]
