"""The worker's encoder service on ONNX Runtime with an encoder that is a lookup."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.worker.encoder import WAITING, EncoderService, pieces
from agent.worker.loop import Refusal
from agent.worker_protocol import Cancel, CloseModel, Done, Encode, Failed, OpenModel
from models.manifest import ManifestError
from tests.models.tasks.tiny_encoder import DIMENSIONS, TABLE, write_tiny_encoder

COMMON: dict[str, Any] = {
    "name": "tiny",
    "format": "onnx",
    "licence": "Apache-2.0",
    "summary": "",
    "files": {"model": {"source": "file:/nowhere"}},
}
EMBEDS = {**COMMON, "task": "embedding", "embedding": {"dimensions": DIMENSIONS, "max_tokens": 8, "normalise": False}}
CLASSIFIES = {**COMMON, "task": "classification", "classification": {"labels": list("abcdef"), "max_tokens": 8}}


class Served:
    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.reports: list[tuple[Any, bytes]] = []
        self.service = EncoderService(lambda report, payload=b"": self.reports.append((report, payload)), lambda: None)
        self.service.handle(OpenModel(1, "tiny", manifest, str(write_tiny_encoder(folder)), {"threads": 1}), b"")
        assert self.reports.pop()[0] == Done(1, {"provider": "cpu", "columns": DIMENSIONS})

    def ask(self, number: int, sequences: list[list[int]], deadline_s: float = 60.0) -> None:
        payload = np.array(list(chain(*sequences)), "<i4").tobytes()
        self.service.handle(Encode(number, "tiny", tuple(map(len, sequences)), deadline_s), payload)

    def settle(self) -> None:
        while self.service.step():
            pass


def rows(payload: bytes) -> np.ndarray:
    return np.frombuffer(payload, "<f4").reshape(-1, DIMENSIONS)


def test_rows_come_in_the_order_of_the_sequences(tmp_path: Path) -> None:
    served = Served(tmp_path, EMBEDS)
    sequences = [[1, 2, 3], [4], [5, 6]]
    served.ask(2, sequences)
    served.settle()
    ((done, payload),) = served.reports
    assert done == Done(2, {"columns": DIMENSIONS, "truncated": []})
    np.testing.assert_allclose(rows(payload), [TABLE[tokens].mean(axis=0) for tokens in sequences], atol=1e-6)


def test_classes_and_what_was_cut(tmp_path: Path) -> None:
    served = Served(tmp_path, CLASSIFIES)
    served.ask(2, [[1, 2], list(range(20)), [3]])
    served.settle()
    ((done, payload),) = served.reports
    assert done.result["truncated"] == [1]
    np.testing.assert_allclose(rows(payload)[[0, 2]], [TABLE[[1, 2]].sum(axis=0), TABLE[3]], atol=1e-5)


def test_a_short_request_passes_a_long_one(tmp_path: Path) -> None:
    served = Served(tmp_path, EMBEDS)
    served.ask(2, [[1] * 8] * 1000)
    served.ask(3, [[1]])
    served.settle()
    assert [report.request for report, _ in served.reports] == [3, 2]
    assert len(rows(served.reports[1][1])) == 1000


def test_cancel_deadline_close_and_a_bad_token(tmp_path: Path) -> None:
    served = Served(tmp_path, EMBEDS)
    served.ask(2, [[1]] * 5000)
    served.ask(3, [[1]], deadline_s=-1.0)
    served.ask(4, [[999]])
    served.ask(5, [[1]] * 5000)
    served.service.step()
    served.service.handle(Cancel(9, 2), b"")
    for _ in range(3):
        served.service.step()
    served.service.handle(CloseModel(6, "tiny"), b"")
    ends = [(report.request, getattr(report, "code", "done")) for report, _ in served.reports]
    assert ends == [(2, "cancelled"), (3, "deadline"), (4, "engine"), (5, "cancelled"), (6, "done")]
    assert not served.service.step()


def test_refusals(tmp_path: Path) -> None:
    served = Served(tmp_path, EMBEDS)
    for message, payload, code in [
        (Encode(2, "other", (1,)), bytes(4), "unknown_model"),
        (Encode(2, "tiny", ()), b"", "invalid"),
        (Encode(2, "tiny", (0, 1)), bytes(4), "invalid"),
        (Encode(2, "tiny", (2,)), bytes(4), "invalid"),
    ]:
        with pytest.raises(Refusal) as refusal:
            served.service.handle(message, payload)
        assert refusal.value.code == code
    for number in range(WAITING):
        served.ask(10 + number, [[1]])
    with pytest.raises(Refusal) as refusal:
        served.ask(2, [[1]])
    assert refusal.value.code == "busy"
    with pytest.raises(ManifestError):
        served.service.handle(OpenModel(3, "x", {"task": "embedding"}, "/"), b"")
    assert not any(isinstance(report, Failed) for report, _ in served.reports)


@given(st.lists(st.integers(1, 600), max_size=80), st.integers(1, 8), st.integers(1, 1024))
def test_pieces_hold_every_sequence_once_and_stay_small(lengths: list[int], rows_max: int, step_tokens: int) -> None:
    groups = pieces(lengths, rows_max, step_tokens)
    assert max(map(len, groups), default=0) <= rows_max
    assert sorted(chain(*groups)) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[index] for index in group) <= step_tokens for group in groups)
