"""The same weights behind several runtimes, each in a process of its own: our scheduler and engine, transformers, llama.cpp.

Each decoder has `prefill(prompt)` and `decode(prompts, steps)`, which return a Timing; sequences never end before their time.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from bench.report import busy_s
from converters.decoder import Decoder as Facts
from converters.decoder_from_gguf import decoder_from_gguf
from converters.gguf import GgufFile, read_gguf

Prompt = Sequence[int]
START_S, ANSWER_S = 300.0, 600.0


@dataclass(frozen=True)
class Room:
    """What a decoder is opened for. `path`: an engine folder for ours, the GGUF for the others."""

    path: Path
    threads: int
    slots: int
    context_tokens: int


@dataclass(frozen=True)
class Timing:
    """`tokens` were read or written in `seconds`; `first` are those of the first sequence."""

    tokens: int
    seconds: float
    first: tuple[int, ...] = ()

    @property
    def per_s(self) -> float:
        return self.tokens / self.seconds


class Decoder(Protocol):
    def prefill(self, prompt: Prompt) -> Timing: ...

    def decode(self, prompts: Sequence[Prompt], steps: int) -> Timing: ...


class Ours:
    """Scheduler and engine as the worker runs them; its pieces of prompts and its sampling are in the times."""

    def __init__(self, room: Room, spinning: bool = False) -> None:
        from models.engines import EngineOptions, open_generation_engine

        options = EngineOptions(threads=room.threads, spinning=spinning, slots=room.slots, context_tokens=room.context_tokens)
        self._engine = open_generation_engine(room.path, options)
        self._numbers = itertools.count()
        self._most = room.context_tokens
        self._start(speculates=False)

    def prefill(self, prompt: Prompt) -> Timing:
        self._add(prompt, 1)
        began_s = time.perf_counter()
        outputs: list[Any] = []
        while not self._scheduler.is_idle:
            outputs += self._scheduler.step()
        seconds = time.perf_counter() - began_s
        if outputs[-1].cached_tokens:
            raise RuntimeError(f"{outputs[-1].cached_tokens} tokens of the prompt were remembered: this is not the time of a new prompt")
        return Timing(len(prompt), seconds)

    def echo(self, prompt: Prompt, tokens: int, speculates: bool) -> Timing:
        """Tokens after the first, with guesses of what the text repeats or without."""
        self._start(speculates)
        self._add(prompt, tokens)
        said: list[int] = []
        began_s = 0.0
        while not self._scheduler.is_idle:
            for output in self._scheduler.step():
                began_s = began_s or time.perf_counter()
                said += output.tokens
        seconds = time.perf_counter() - began_s
        self._start(speculates=False)
        return Timing(len(said) - 1, seconds, tuple(said))

    def first_again(self, prompt: Prompt, shared: int) -> Timing:
        """The first token of `prompt` after one that begins with the same `shared` tokens."""
        self._start(speculates=False)
        self._until_first(self._add([*prompt[:shared], *reversed(prompt[shared:])], 1))
        return self._until_first(self._add(prompt, 1))

    def first_beside(self, prompt: Prompt, long: Prompt) -> Timing:
        """The first token of `prompt` while `long` is being read; without `long`, alone."""
        self._start(speculates=False)
        if long:
            self._add(long, 1)
            self._scheduler.step()
        timing = self._until_first(self._add(prompt, 1))
        self._start(speculates=False)
        return timing

    def _start(self, speculates: bool) -> None:
        """A scheduler that remembers nothing."""
        from models.tasks.generation.scheduler import Scheduler, SchedulerSettings

        for slot in range(self._engine.slots):
            self._engine.truncate(slot, 0)
        self._scheduler = Scheduler(self._engine, SchedulerSettings(speculates=speculates))

    def _until_first(self, number: int) -> Timing:
        began_s = time.perf_counter()
        while all(output.number != number for output in self._scheduler.step()):
            pass
        return Timing(1, time.perf_counter() - began_s)

    def decode(self, prompts: Sequence[Prompt], steps: int) -> Timing:
        numbers = [self._add(prompt, self._most) for prompt in prompts]
        waiting, first, count = set(numbers), [], 0
        while waiting:
            outputs = self._scheduler.step()
            waiting -= {output.number for output in outputs if output.tokens}
            first += [token for output in outputs for token in output.tokens if output.number == numbers[0]]
        began_s = time.perf_counter()
        for _ in range(steps):
            for output in self._scheduler.step():
                count += len(output.tokens)
                if output.number == numbers[0]:
                    first += output.tokens
        seconds = time.perf_counter() - began_s
        for number in numbers:
            self._scheduler.cancel(number)
        while not self._scheduler.is_idle:
            self._scheduler.step()
        return Timing(count, seconds, tuple(first[:steps]))

    def _add(self, prompt: Prompt, max_tokens: int) -> int:
        from models.tasks.generation.sequence import GenerationRequest

        number = next(self._numbers)
        self._scheduler.add(GenerationRequest(number, tuple(prompt), max_tokens))
        return number


class Transformers:
    """LlamaForCausalLM in float32 with the dequantised weights of the GGUF; a bare loop around it, which is faster than `generate`."""

    def __init__(self, room: Room) -> None:
        import torch

        torch.set_num_threads(room.threads)
        self._torch = torch
        self._model = llama(read_gguf(room.path))

    def prefill(self, prompt: Prompt) -> Timing:
        began_s = time.perf_counter()
        self._step([prompt], None)
        return Timing(len(prompt), time.perf_counter() - began_s)

    def decode(self, prompts: Sequence[Prompt], steps: int) -> Timing:
        chosen, cache = self._step(prompts, None)
        first = [chosen[0]]
        began_s = time.perf_counter()
        for _ in range(steps):
            chosen, cache = self._step([[token] for token in chosen], cache)
            first.append(chosen[0])
        return Timing(steps * len(prompts), time.perf_counter() - began_s, tuple(first[:steps]))

    def _step(self, tokens: Sequence[Prompt], cache: Any) -> tuple[list[int], Any]:
        with self._torch.inference_mode():
            answer = self._model(input_ids=self._torch.tensor(tokens), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return answer.logits[:, -1].argmax(-1).tolist(), answer.past_key_values


class LlamaCpp:
    """llama.cpp through llama-cpp-python's plain bindings: one llama_decode per step, each sequence with a cache of its own."""

    def __init__(self, room: Room) -> None:
        import llama_cpp

        self._c = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, None)
        llama_cpp.llama_backend_init()
        described = llama_cpp.llama_model_default_params()
        described.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(room.path).encode(), described)
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = room.context_tokens * room.slots, room.slots
        wanted.n_threads = wanted.n_threads_batch = room.threads
        self._context = llama_cpp.llama_init_from_model(model, wanted)
        self._batch = llama_cpp.llama_batch_init(max(room.context_tokens, room.slots), 0, 1)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def prefill(self, prompt: Prompt) -> Timing:
        self._clear()
        began_s = time.perf_counter()
        self._step({0: prompt}, 0)
        return Timing(len(prompt), time.perf_counter() - began_s)

    def decode(self, prompts: Sequence[Prompt], steps: int) -> Timing:
        self._clear()
        chosen = [self._step({index: prompt}, 0)[0] for index, prompt in enumerate(prompts)]
        first = [chosen[0]]
        began_s = time.perf_counter()
        for step in range(steps):
            chosen = self._step({index: [token] for index, token in enumerate(chosen)}, len(prompts[0]) + step)
            first.append(chosen[0])
        return Timing(steps * len(prompts), time.perf_counter() - began_s, tuple(first[:steps]))

    def _clear(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def _step(self, tokens: dict[int, Prompt], start: int) -> list[int]:
        """The likeliest next token of each sequence."""
        batch, last = self._batch, []
        batch.n_tokens = 0
        for sequence, pieces in tokens.items():
            for offset, token in enumerate(pieces):
                index = batch.n_tokens
                batch.token[index], batch.pos[index] = token, start + offset
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = offset == len(pieces) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        if self._c.llama_decode(self._context, batch) != 0:
            raise RuntimeError(f"llama_decode refused {batch.n_tokens} tokens")
        rows = (self._c.llama_get_logits_ith(self._context, index) for index in last)
        return [int(np.ctypeslib.as_array(row, (self._vocabulary,)).argmax()) for row in rows]


def llama(gguf: GgufFile) -> Any:
    """A LlamaForCausalLM in float32 with the weights of a `llama` GGUF."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    facts = decoder_from_gguf(gguf)
    config = LlamaConfig(
        vocab_size=facts.vocabulary,
        hidden_size=facts.hidden,
        intermediate_size=facts.feed_forward,
        num_hidden_layers=facts.layers,
        num_attention_heads=facts.heads,
        num_key_value_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        max_position_embeddings=facts.context_tokens,
        rms_norm_eps=facts.rms_epsilon,
        rope_theta=facts.rope_base,
        tie_word_embeddings=facts.tied_head,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {name: torch.from_numpy(weight) for name, weight in _published(gguf, facts).items()}
    model = model.to_empty(device="cpu")
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its tables are no weights: to_empty left them unset
    return model.eval().requires_grad_(False)


def _published(gguf: GgufFile, facts: Facts) -> dict[str, Any]:
    """The tensors under the names and in the row order of the published model; llama.cpp interleaves the two RoPE halves of a head."""
    parts = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    weights = {"model.embed_tokens.weight": gguf.float32("token_embd.weight"), "model.norm.weight": gguf.float32("output_norm.weight")}
    if not facts.tied_head:
        weights["lm_head.weight"] = gguf.float32("output.weight")
    for layer in range(facts.layers):
        for stored, published in parts.items():
            weight = gguf.float32(f"blk.{layer}.{stored}.weight")
            if stored in ("attn_q", "attn_k") and facts.has_interleaved_rows:
                heads = facts.heads if stored == "attn_q" else facts.kv_heads
                weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            weights[f"model.layers.{layer}.{published}.weight"] = np.ascontiguousarray(weight)
    return weights


OPEN: dict[str, Callable[[Room], Decoder]] = {
    "hotspare native": Ours,
    "hotspare native spinning": lambda room: Ours(room, spinning=True),
    "hotspare native, 8 bits": Ours,
    "hotspare onnxruntime": Ours,
    "hotspare, long context": Ours,
    "transformers float32": Transformers,
    "llama.cpp": LlamaCpp,
    "llama.cpp Q4_0": LlamaCpp,
}


@dataclass(frozen=True)
class Turn:
    """A timing and what happened beside it. neighbours: cores that other processes used meanwhile."""

    timing: Timing
    neighbours: float
    peak_mb: float


class Child:
    """A decoder in a process of its own, so that no runtime's waiting threads or memory count for another's. A context manager."""

    def __init__(self, way: str, room: Room) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._ours, theirs = spawn.Pipe()
        self._way = way
        self._process = spawn.Process(target=_serve, args=(theirs, way, room), daemon=True)

    def __enter__(self) -> Child:
        self._process.start()
        self._receive(START_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        self._process.join()

    def ask(self, method: str, *arguments: object) -> Turn:
        """Run one method of the decoder. Raises RuntimeError with the child's words."""
        before_s, began_s = busy_s(), time.perf_counter()
        self._ours.send((method, arguments))
        timing, cpu_s, peak_mb = self._receive(ANSWER_S)
        others_s = busy_s() - before_s - cpu_s
        return Turn(timing, max(0.0, others_s / (time.perf_counter() - began_s)), peak_mb)

    def _receive(self, timeout_s: float) -> Any:
        try:
            answer = self._ours.recv() if self._ours.poll(timeout_s) else f"no answer within {timeout_s:g} s"
        except EOFError:
            answer = "its process has ended"
        if isinstance(answer, str):
            raise RuntimeError(f"{self._way}: {answer}")
        return answer


def _serve(connection: Connection, way: str, room: Room) -> None:
    os.environ["OMP_NUM_THREADS"] = str(room.threads)
    try:
        decoder = OPEN[way](room)
        connection.send(())
        while True:
            method, arguments = connection.recv()
            before_s = time.process_time()
            timing = getattr(decoder, method)(*arguments)
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            connection.send((timing, time.process_time() - before_s, peak_mb))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001  # whatever a runtime raises is told to the parent, which ends
        connection.send(f"{type(error).__name__}: {error}")
