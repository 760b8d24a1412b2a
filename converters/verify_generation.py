"""Is a converted decoder still the model of its GGUF? The same tokens through a numpy float32 reference and the graph."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from converters.decoder import Decoder
from converters.decoder_graph import Progress
from converters.decoder_session import DecoderSession
from converters.gguf import GgufFile
from converters.onnxruntime_operators import Activations
from converters.quantised_blocks import Float
from converters.reference import ReferenceDecoder
from converters.verdict import Verdict, decide
from models.engines.onnx import available_bytes

# With float32 activations the graph computes the same sums in another order; more than this is a defect of the graph, not rounding.
FLOAT32_MEAN_KL = 1e-5
GREEDY_TOKENS = 32
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


def verify_generation(
    gguf: GgufFile, decoder: Decoder, folder: Path, activations: Activations, mean_kl: float, threads: int, progress: Progress
) -> Verdict:
    """Compare all positions of one text, and greedy answers to three prompts."""
    start = time.monotonic()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    longest = max(decoder.context_tokens - GREEDY_TOKENS, 2)
    sequences = [[min(token, decoder.vocabulary - 1) for token in tokenizer.encode(text).ids[:longest]] for text in (TEXT, *PROMPTS)]
    capacity = max(map(len, sequences)) + GREEDY_TOKENS
    session = DecoderSession(folder, decoder, capacity=capacity, threads=threads)
    reference = ReferenceDecoder(gguf, decoder, holds_weights=_fits(gguf))
    text, prompts = sequences[0], sequences[1:]
    progress(0.0, f"reference over {len(text)} tokens")
    figures = _compare(reference.step(text), session.step([text], [0], len(text))[0], text)
    agreed = 0
    for index, prompt in enumerate(prompts):
        progress((index + 1) / (len(prompts) + 1), f"greedy answer {index + 1} of {len(prompts)}")
        agreed += _greedy_agreement(session, reference, prompt)
    figures["greedy_agreement"] = agreed / (len(prompts) * GREEDY_TOKENS)
    tolerance = {"mean_kl": mean_kl}
    if activations == "float32":
        tolerance = {"mean_kl": min(mean_kl, FLOAT32_MEAN_KL), "greedy_agreement": 1.0}
    reason = decide(figures, tolerance)
    return Verdict(not reason, "generation", figures, tolerance, len(sequences), round(time.monotonic() - start, 3), reason)


def _compare(source: Float, result: Float, tokens: list[int]) -> dict[str, float]:
    expected, found = _log_softmax(source), _log_softmax(result)
    # With a value that is not a number every figure becomes one, which no tolerance lets pass.
    divergence = np.sum(np.exp(expected) * (expected - found), axis=-1)
    following = np.array(tokens[1:], np.int64)
    places = np.arange(len(following))
    return {
        "mean_kl": float(divergence.mean()),
        "max_kl": float(divergence.max()),
        "top1_agreement": float(np.mean(source.argmax(axis=-1) == result.argmax(axis=-1))),
        "perplexity_source": float(np.exp(-expected[places, following].mean())),
        "perplexity_result": float(np.exp(-found[places, following].mean())),
    }


def _greedy_agreement(session: DecoderSession, reference: ReferenceDecoder, prompt: list[int]) -> int:
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


def _fits(gguf: GgufFile) -> bool:
    """Whether all weights in float32 take at most half of the free memory."""
    free = available_bytes()
    needed = 4 * sum(tensor.size_bytes // tensor.layout.bytes * tensor.layout.values for tensor in gguf.tensors.values())
    return free is None or needed <= free // 2
