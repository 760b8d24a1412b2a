"""Grammars on a small tokenizer and an engine that babbles: whatever the model wants, the answer matches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from models.engines.fake import FakeGenerationEngine
from models.tasks.generation.constrain import GrammarError, Grammars
from models.tasks.generation.sampling import Sampling
from models.tasks.generation.scheduler import Scheduler, SchedulerSettings
from models.tasks.generation.sequence import GenerationRequest, Output, Refused

pytest.importorskip("llguidance", reason="its wheels begin with Python 3.9")

END = 0
PAIRS = ["in", "er", "on", "na", "me", "nam", "name", '":', ' "', '",', "tr", "tru", "true", "fa", "fal", "se", "false", "12", "00"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer: every byte, some longer pieces, one mark that ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [piece.replace(" ", "Ġ") for piece in PAIRS]
    vocabulary = {"<end>": END, **{piece: index + 1 for index, piece in enumerate([*letters, *pieces])}}
    merges = []
    for piece in pieces:
        cut = next(at for at in range(len(piece) - 1, 0, -1) if piece[:at] in vocabulary and piece[at:] in vocabulary)
        merges.append((piece[:cut], piece[cut:]))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def text(file: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(file))


@pytest.fixture(scope="module")
def grammars(file: Path, text: tokenizers.Tokenizer) -> Grammars:
    # More logits than tokens, as models have whose vocabulary is padded.
    return Grammars(file, text.get_vocab_size() + 7, [END])


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "is_open": {"type": "boolean"},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "count", "is_open", "colours"],
    "additionalProperties": False,
}


def json_grammar(schema: Any) -> str:
    compact = {"x-guidance": {"whitespace_flexible": False}} if isinstance(schema, dict) else {}
    return json.dumps({"grammars": [{"json_schema": {**schema, **compact}}]})


def regex(pattern: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": f"start: /{pattern}/"}]})


def asked(number: int, grammar: str, temperature: float = 1.0, tokens: int = 200, **extras: Any) -> GenerationRequest:
    prompt = tuple(np.random.default_rng(number).integers(1, 200, 12).tolist())
    return GenerationRequest(number, prompt, tokens, Sampling(temperature, seed=number, **extras), (END,), grammar=grammar)


def answers(grammars: Grammars, requests: list[GenerationRequest], speculates: bool = True) -> tuple[dict[int, list[Output]], int]:
    """The outputs of each, and the steps that the engine took."""
    engine = FakeGenerationEngine(grammars._vocabulary, 4, 256)
    scheduler = Scheduler(engine, SchedulerSettings(waiting=300, speculates=speculates), constrain=grammars.start)
    for request in requests:
        scheduler.add(request)
    outputs: dict[int, list[Output]] = {}
    while not scheduler.is_idle:
        for output in scheduler.step():
            outputs.setdefault(output.number, []).append(output)
    return outputs, len(engine.steps)


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


def test_answers_to_a_schema_are_valid_200_of_200(grammars: Grammars, text: tokenizers.Tokenizer) -> None:
    outputs, _ = answers(grammars, [asked(number, json_grammar(SCHEMA)) for number in range(200)])
    for each in outputs.values():
        assert each[-1].finish == "stop"
        value = json.loads(text.decode(tokens_of(each)))
        assert list(value) == ["name", "count", "is_open", "colours"]
        assert len(value["name"]) <= 12
        assert 0 <= value["count"] <= 999
        assert isinstance(value["is_open"], bool)
        assert 1 <= len(value["colours"]) <= 3
        assert set(value["colours"]) <= {"red", "green", "blue"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guessing_what_must_come_changes_no_token_and_saves_steps(grammars: Grammars, temperature: float) -> None:
    requests = [asked(number, json_grammar(SCHEMA), temperature, top_logprobs=1) for number in range(8)]
    plain, slow = answers(grammars, requests, speculates=False)
    guessed, fast = answers(grammars, requests)
    assert {number: tokens_of(each) for number, each in guessed.items()} == {number: tokens_of(each) for number, each in plain.items()}
    assert fast < 0.8 * slow


def test_it_ends_where_the_grammar_does_and_the_last_token_is_given(grammars: Grammars, text: tokenizers.Tokenizer) -> None:
    outputs, _ = answers(grammars, [asked(1, regex("[0-9]{3}-[0-9]{4}"))])
    said = text.decode(tokens_of(outputs[1]))
    assert len(said) == 8
    assert said[3] == "-"
    assert outputs[1][-1].finish == "stop"


def test_where_it_may_end_the_model_decides(grammars: Grammars, text: tokenizers.Tokenizer) -> None:
    wish = Sampling(temperature=0.0, logit_bias=((END, 100.0),))
    outputs, _ = answers(grammars, [GenerationRequest(1, (5, 6), 50, wish, (END,), grammar=regex("ab*"))])
    assert text.decode(tokens_of(outputs[1])) == "a"
    assert outputs[1][-1].finish == "stop"


def test_neighbours_with_and_without_grammars_keep_their_tokens(grammars: Grammars) -> None:
    requests = [asked(number, json_grammar(SCHEMA) if number % 2 else "", tokens=40) for number in range(6)]
    together, _ = answers(grammars, requests)
    for request in requests:
        alone, _ = answers(grammars, [request])
        assert tokens_of(alone[request.number]) == tokens_of(together[request.number])


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("nonsense", "Expected token"),
        ('{"grammars":[]}', "empty grammars"),
        ('{"grammars":[{"json_schema":{"type":"nonsense"}}]}', "Invalid type: nonsense"),
        ('{"grammars":[{"lark_grammar":"start: foo"}]}', "unknown name"),
        (" " * 300_000, "has 300000 characters, more than"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused_in_words(grammars: Grammars, grammar: str, reason: str) -> None:
    scheduler = Scheduler(FakeGenerationEngine(300, 1, 64), constrain=grammars.start)
    with pytest.raises(Refused, match=reason) as refused:
        scheduler.add(asked(1, grammar))
    assert refused.value.code == "invalid"
    assert scheduler.is_idle


def test_a_grammar_too_complex_to_follow_ends_its_sequence_and_no_other(grammars: Grammars) -> None:
    hard = json.dumps({"grammars": [{"lark_grammar": "start: /(.*[ab].{400}[cd].{400}|.*[ef].{500})+/"}]})
    try:
        outputs, _ = answers(grammars, [asked(1, hard, tokens=230), asked(2, "", tokens=20)])
    except Refused:
        pytest.skip("this version refuses it at once")
    assert outputs[1][-1].finish in ("grammar", "length")
    assert outputs[2][-1].finish in ("length", "stop")


def test_without_the_package_grammars_are_refused_with_the_remedy(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=r"Python 3\.\d+\.\d+ of this worker does not have .* pip install llguidance"):
        Grammars(file, 300, [END]).start(json_grammar(SCHEMA))


def test_without_a_tokenizer_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GrammarError, match=r"tokenizer\.json cannot be used"):
        Grammars(tmp_path / "tokenizer.json", 300, [END]).start(json_grammar(SCHEMA))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(GrammarError, match=r"tokenizer\.json cannot be used"):
        Grammars(tmp_path / "tokenizer.json", 300, [END]).start(json_grammar(SCHEMA))


def test_a_model_that_takes_no_grammars_says_so() -> None:
    with pytest.raises(Refused, match="takes no grammar"):
        Scheduler(FakeGenerationEngine(300)).add(asked(1, json_grammar(SCHEMA)))
