"""The tasks on real weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models.chat_template import ChatTemplate
from models.engines import EngineOptions, open_engine, open_generation_engine
from models.manifest import Embedding
from models.tasks.embedding import embed
from models.tasks.generation.constrain import Grammars
from models.tasks.generation.sampling import Sampling
from models.tasks.generation.scheduler import Scheduler, SchedulerSettings
from models.tasks.generation.sequence import GenerationRequest
from models.tokenizer import Detokenizer, Tokenizer

MINILM = Embedding(dimensions=384, max_tokens=256)


def test_minilm_gives_the_similarities_of_its_documentation(minilm: Path) -> None:
    """https://www.sbert.net/docs/quickstart.html"""
    tokenizer, engine = Tokenizer(minilm), open_engine(minilm, EngineOptions(threads=2))
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    vectors = embed(engine, MINILM, [tokenizer.encode(text) for text in texts]).vectors
    documented = np.array([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]], np.float32)
    np.testing.assert_allclose(vectors @ vectors.T, documented, atol=0.01)  # its weights are rounded to int8


def test_minilm_does_not_mind_its_neighbours_or_padding(minilm: Path) -> None:
    tokenizer, engine = Tokenizer(minilm), open_engine(minilm, EngineOptions(threads=2))
    ids = [tokenizer.encode(text, max_tokens=256) for text in ("cat", "kitten", "income tax", "a long sentence about nothing " * 80)]
    together = embed(engine, MINILM, ids).vectors
    alone = np.concatenate([embed(engine, MINILM, [tokens]).vectors for tokens in ids])
    assert (together * alone).sum(axis=1).min() > 0.9999
    assert together[0] @ together[1] > 0.7 > 0.3 > together[0] @ together[2]


def test_smollm2_answers_and_streams_whole_characters(smollm2: Path) -> None:
    tokenizer = Tokenizer(smollm2)
    template = ChatTemplate.from_folder(smollm2, tokenizer)
    assert template is not None
    prompt = template.render([{"role": "user", "content": "What is the capital of France? Answer in one sentence."}])
    assert prompt.endswith("<|im_start|>assistant\n")
    engine = open_generation_engine(smollm2, EngineOptions(threads=2, slots=1, context_tokens=256))
    scheduler, detokenizer, pieces = Scheduler(engine), Detokenizer(tokenizer), []
    scheduler.add(GenerationRequest(1, tuple(tokenizer.encode(prompt, special=False)), 40, stop_tokens=tokenizer.eos_ids))
    while not scheduler.is_idle:
        for output in scheduler.step():
            pieces.append(detokenizer.feed(output.tokens))
    assert "".join([*pieces, detokenizer.flush()]) == "The capital of France is Paris."
    assert output.finish == "stop"


def test_smollm2_gives_each_of_many_the_tokens_it_has_alone(smollm2: Path) -> None:
    tokenizer = Tokenizer(smollm2)
    engine = open_generation_engine(smollm2, EngineOptions(threads=2, slots=3, context_tokens=256))
    texts = ["The belt moves", "In Zürich, 😀 and", "def count(parcels):\n", "Once upon a time " * 12, "The belt moves slowly because"]
    requests = [
        GenerationRequest(number, tuple(tokenizer.encode(text)), 12, Sampling(temperature=0.8 * (number % 2), seed=number, top_p=0.9))
        for number, text in enumerate(texts)
    ]

    def run(joins: dict[int, int]) -> dict[int, list[int]]:
        scheduler, step = Scheduler(engine, SchedulerSettings(chunk_tokens=16)), 0
        tokens: dict[int, list[int]] = {number: [] for number in joins}
        for slot in range(engine.slots):
            engine.truncate(slot, 0)
        while step <= max(joins.values()) or not scheduler.is_idle:
            for number, joined in joins.items():
                if joined == step:
                    scheduler.add(requests[number])
            for output in scheduler.step():
                tokens[output.number].extend(output.tokens)
            step += 1
        return tokens

    together = run({0: 0, 1: 0, 2: 3, 3: 5, 4: 9})
    for number in range(len(texts)):
        assert together[number] == run({number: 0})[number], texts[number]


def test_smollm2_answers_in_the_form_of_a_schema(smollm2: Path) -> None:
    tokenizer = Tokenizer(smollm2)
    template = ChatTemplate.from_folder(smollm2, tokenizer)
    assert template is not None
    engine = open_generation_engine(smollm2, EngineOptions(threads=2, slots=2, context_tokens=256))
    grammars = Grammars(smollm2 / "tokenizer.json", engine.vocabulary, tokenizer.eos_ids)
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 20}, "is_in_europe": {"type": "boolean"}},
        "required": ["capital", "is_in_europe"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    question = "What is the capital of France? Answer as JSON with capital and is_in_europe."
    prompt = tuple(tokenizer.encode(template.render([{"role": "user", "content": question}]), special=False))
    scheduler = Scheduler(engine, constrain=grammars.start)
    for number in range(2):
        grammar = json.dumps({"grammars": [{"json_schema": schema}]})
        scheduler.add(GenerationRequest(number, prompt, 60, Sampling(1.0 * number, seed=3), tokenizer.eos_ids, grammar=grammar))
    tokens: dict[int, list[int]] = {0: [], 1: []}
    while not scheduler.is_idle:
        for output in scheduler.step():
            tokens[output.number].extend(output.tokens)
            assert output.finish in (None, "stop")
    answers = [json.loads(tokenizer.decode(each)) for each in tokens.values()]
    assert answers[0]["capital"] == "Paris"
    assert all(isinstance(answer["is_in_europe"], bool) for answer in answers)


@pytest.mark.parametrize("text", ["Grüezi 😀 1234 \n\n  x", "नमस्ते 👨‍👩‍👧", "\ttabs and    spaces"])
def test_smollm2s_tokenizer_streams_any_text(smollm2: Path, text: str) -> None:
    tokenizer = Tokenizer(smollm2)
    tokens = tokenizer.encode(text, special=False)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed([token]) for token in tokens]
    assert "".join([*pieces, detokenizer.flush()]) == text
    assert not any("\ufffd" in piece for piece in pieces)
