"""Is a converted decoder still the model of its GGUF? The same tokens through a numpy float32 reference and the graph."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from converters.decoder import Decoder
from converters.decoder_graph import Progress
from converters.decoder_session import DecoderSession
from converters.decoder_source import DecoderSource
from converters.gate_inputs import SENTENCES
from converters.onnxruntime_operators import Activations
from converters.quantised_blocks import Float
from converters.reference import ReferenceDecoder
from converters.verdict import Comparison, decide
from models.engines import SlotTokens
from models.engines.free_memory import available_bytes

# With float32 activations the graph computes the same sums in another order; more than this is a defect of the graph, not rounding.
FLOAT32_MEAN_KL = 1e-5
GREEDY_TOKENS = 32
# Of each text of the operator: the reference computes a few hundred tokens a second.
OWN_TOKENS = 256
# Where the reference holds two tokens this close, the order of a sum decides which comes first.
TIE = 1e-3

PROMPTS = (
    "The capital of France is",
    "To put out a small kitchen fire safely, the first thing to do is",
    "def fibonacci(n):\n    ",
)
TEXT = """Lighthouses were built to be seen before anything else was known of the coast. A keeper's day began at dusk: he trimmed
the wick, wound the clockwork that turned the lens, and noted wind, weather and passing ships in the log. On 14 March 1893 the log of one
station reads: "Gale from NW, glass 28.6 in., two windows broken, lamp kept burning." Electric light made the oil store empty and the
clockwork silent, and by 1998 the last of the keepers had gone home. What remains is a timer, a battery and a radio link that reports
faults to an office 120 miles away. Boats now carry satellite receivers; still, when the receiver fails, people look for the light.

Q: Which three figures would you record each hour, and why?
A: Pressure, because it falls before a storm; wind, because it tells where the storm is; and visibility, because it decides who can see
the lamp. Everything else can wait until morning.

{"station": "north head", "lamp": true, "readings": [{"hour": 21, "pressure": 971.2}, {"hour": 22, "pressure": 969.8}]}
"""


class Session(Protocol):
    def step(self, ids: Sequence[Sequence[int]], lengths: Sequence[int], num_logits: int = 1) -> NDArray[np.float32]:
        """Append one row of ids behind so many tokens; logits [1, num_logits, vocabulary] of the last of them."""
        ...


class EngineSession:
    """The first slot of an engine, which gives the logits of last tokens only: all positions are had token by token."""

    def __init__(self, engine: Stepping, adapter: int = 0) -> None:
        self._engine = engine
        self._adapter = adapter

    def step(self, ids: Sequence[Sequence[int]], lengths: Sequence[int], num_logits: int = 1) -> NDArray[np.float32]:
        (tokens,), (held,) = ids, lengths
        self._engine.truncate(0, held)
        pieces = [tokens[: len(tokens) - num_logits + 1], *([token] for token in tokens[len(tokens) - num_logits + 1 :])]
        return np.stack([np.array(self._engine.step([SlotTokens(0, piece, self._adapter)])[0]) for piece in pieces])[None]


class Stepping(Protocol):
    """What is needed of a GenerationEngine."""

    def step(self, batch: Sequence[SlotTokens]) -> NDArray[np.float32]: ...

    def truncate(self, slot: int, length: int) -> None: ...


def verify_generation(
    gguf: DecoderSource,
    decoder: Decoder,
    folder: Path,
    activations: Activations,
    mean_kl: float,
    threads: int,
    progress: Progress,
    own: Sequence[str] = (),
) -> Comparison:
    """Compare a folder of ONNX Runtime: float32 activations must agree token by token, int8 ones within `mean_kl`."""

    def opened(capacity: int) -> Session:
        return DecoderSession(folder, decoder, capacity=capacity, threads=threads)

    return compare_generation(gguf, decoder, folder, opened, mean_kl, activations == "float32", progress, own)


def compare_generation(
    gguf: DecoderSource,
    decoder: Decoder,
    folder: Path,
    opened: Callable[[int], Session],
    mean_kl: float,
    is_exact: bool,
    progress: Progress,
    own: Sequence[str] = (),
) -> Comparison:
    """Compare all positions of some texts, and greedy answers to three prompts. `opened`: the engine, for so many tokens of one sequence.
    `own`: texts of the operator, of which the first OWN_TOKENS tokens count.

    `is_exact`: it computes in float32 with the weights as they are.
    """
    start = time.monotonic()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    longest = max(decoder.context_tokens - GREEDY_TOKENS, 2)

    def encoded(texts: Sequence[str]) -> list[list[int]]:
        return [[min(token, decoder.vocabulary - 1) for token in tokenizer.encode(text).ids[:longest]] for text in texts]

    made_up, prompts = encoded((TEXT, *SENTENCES)), encoded(PROMPTS)
    given = [text[:OWN_TOKENS] for text in encoded(own) if len(text) > 1]
    texts = [*given, *(text for text in made_up if len(text) > 1)]
    capacity = max(map(len, (*texts, *prompts))) + GREEDY_TOKENS
    session = opened(capacity)
    reference = ReferenceDecoder(gguf, decoder, holds_weights=_fits(gguf))

    def logits() -> Iterator[tuple[Float, Float]]:
        for index, text in enumerate(texts):
            progress(0.7 * index / len(texts), f"reference over {len(text)} tokens")
            reference.clear()
            yield reference.step(text), session.step([text], [0], len(text))[0]

    figures = _compare(logits(), texts)
    agreed = 0
    for index, prompt in enumerate(prompts):
        progress(0.7 + 0.3 * index / len(prompts), f"greedy answer {index + 1} of {len(prompts)}")
        agreed += _greedy_agreement(session, reference, prompt)
    figures["greedy_agreement"] = agreed / (len(prompts) * GREEDY_TOKENS)
    tolerance = {"mean_kl": mean_kl}
    if is_exact:
        tolerance = {"mean_kl": min(mean_kl, FLOAT32_MEAN_KL), "greedy_agreement": 1.0}
    reason = decide(figures, tolerance)
    return Comparison(figures, tolerance, len(texts) + len(prompts), round(time.monotonic() - start, 3), reason, len(given))


def _compare(pairs: Iterable[tuple[Float, Float]], texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Figures over all positions of all texts; `pairs`: logits of source and result [tokens, vocabulary]."""
    divergence, agrees, surprise = [], [], []
    for (source, result), tokens in zip(pairs, texts, strict=True):
        expected, found = _log_softmax(source), _log_softmax(result)
        # With a value that is not a number every figure becomes one, which no tolerance lets pass.
        divergence.append(np.sum(np.exp(expected) * (expected - found), axis=-1))
        agrees.append(source.argmax(axis=-1) == result.argmax(axis=-1))
        following, places = np.array(tokens[1:], np.int64), np.arange(len(tokens) - 1)
        surprise.append(np.stack([-expected[places, following], -found[places, following]]))
    kl, perplexity = np.concatenate(divergence), np.exp(np.concatenate(surprise, axis=1).mean(axis=1))
    return {
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "top1_agreement": float(np.mean(np.concatenate(agrees))),
        "perplexity_source": float(perplexity[0]),
        "perplexity_result": float(perplexity[1]),
    }


def _greedy_agreement(session: Session, reference: ReferenceDecoder, prompt: list[int]) -> int:
    """Of 32 tokens that the graph chooses, how many the reference would choose behind the same tokens, up to the first that differs."""
    logits = session.step([prompt], [0])
    chosen: list[int] = []
    for index in range(GREEDY_TOKENS):
        chosen.append(int(logits[0, -1].argmax()))
        logits = session.step([[chosen[-1]]], [len(prompt) + index])
    reference.clear()
    expected = reference.step([*prompt, *chosen[:-1]], GREEDY_TOKENS)
    is_best = expected[np.arange(GREEDY_TOKENS), chosen] >= expected.max(axis=-1) - TIE
    return GREEDY_TOKENS if is_best.all() else int(is_best.argmin())


def _log_softmax(logits: Float) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normed: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normed


def _fits(source: DecoderSource) -> bool:
    """Whether all weights in float32 take at most half of the free memory."""
    free = available_bytes()
    return free is None or sum(4 * math.prod(source.shape(name)) for name in source.tensors) <= free // 2
