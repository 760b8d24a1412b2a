"""The coordinator's documents on the node: whole or not at all, and what became of them is told once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.desired import DesiredState
from agent.documents import Documents
from agent.known_models import KnownModels
from agent.protocol.messages import Desired, DesiredModel, DesiredPipeline
from agent.protocol.wire import Severity
from agent.state import Desired as Wanted
from models.manifest import manifest_digest

CHAT, DETECTOR = "smollm2-135m-instruct", "conveyor-detr"
BELT = DesiredPipeline(id="belt", source="conveyor:", model=DETECTOR, settings={"fps": 5.0})


class Taker:
    def __init__(self, folder: Path) -> None:
        self.known = KnownModels(folder)
        self.desired = DesiredState(Wanted((CHAT,)), folder)
        self.is_autonomous = False
        self.told: list[tuple[Severity, int, str]] = []
        self.documents = Documents(self.desired, self.known, lambda: self.is_autonomous, lambda *what: self.told.append(what))

    def came(self, rev: int, **parts: Any) -> None:
        self.documents.came(Desired(rev=rev, **parts))

    def digest(self, model: str) -> str:
        return f"sha256:{manifest_digest(self.known.find(model))}"


@pytest.fixture
def taker(tmp_path: Path) -> Taker:
    return Taker(tmp_path)


def test_it_takes_the_place_of_the_configuration_and_is_told_once(taker: Taker, tmp_path: Path) -> None:
    taker.came(3, models=(DesiredModel(name=DETECTOR, digest=taker.digest(DETECTOR)),), pipelines=(BELT,))
    taker.came(3, models=(DesiredModel(name=DETECTOR),))  # again, as after every connect
    taker.came(2)
    wanted = taker.desired.value
    assert (wanted.revision, wanted.models, list(wanted.pipelines)) == (3, (DETECTOR,), ["belt"])
    assert taker.told == [("info", 3, "is taken")]
    assert DesiredState(Wanted((CHAT,)), tmp_path).value == wanted, "it outlives the node"


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"models": (DesiredModel(name=DETECTOR, digest="sha256:" + "0" * 64),)}, "not sha256:0000"),
        ({"models": (DesiredModel(name="nobodys-model", digest="sha256:" + "0" * 64),)}, "nobodys-model"),
        ({"models": (DesiredModel(name=DETECTOR),), "pipelines": (BELT.model_copy(update={"settings": {"fps": -1.0}}),)}, "fps"),
        ({"pipelines": (BELT.model_copy(update={"source": "ftp://x"}),)}, "belt"),
    ],
)
def test_one_bad_part_refuses_it_whole(taker: Taker, parts: dict[str, Any], why: str) -> None:
    for _ in range(2):
        taker.came(1, **parts)
    assert taker.desired.value == Wanted((CHAT,))
    ((severity, revision, text),) = taker.told
    assert (severity, revision) == ("error", 1) and text.startswith("is not taken: ") and why in text


def test_while_the_node_serves_by_itself_the_newest_waits(taker: Taker) -> None:
    taker.is_autonomous = True
    taker.came(1, models=(DesiredModel(name=DETECTOR),))
    taker.came(2)
    assert taker.desired.value == Wanted((CHAT,)) and not taker.told
    taker.is_autonomous = False
    taker.documents.released()
    taker.documents.released()
    assert taker.desired.value == Wanted(revision=2)
    assert taker.told == [("info", 2, "is taken")]


def test_a_full_disk_changes_nothing_and_is_told(taker: Taker, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agent.desired.write_atomically", full)
    taker.came(1)
    assert taker.desired.value == Wanted((CHAT,))
    assert taker.told[0][0] == "error" and "No space left" in taker.told[0][2]
    monkeypatch.undo()
    taker.came(1)
    assert taker.desired.value.revision == 1, "it came again with the next session"
