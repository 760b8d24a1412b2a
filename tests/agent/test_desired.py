"""Orders outlive a restart and do not hide the configuration."""

from __future__ import annotations

from pathlib import Path

from agent.desired import DesiredState
from agent.state import Desired

CONFIGURED = Desired(("chat",), {"belt": {"model": "eyes"}})


def test_orders_are_kept_as_differences(tmp_path: Path) -> None:
    state = DesiredState(CONFIGURED, tmp_path)
    state.want_model("embed", True)
    state.want_model("chat", False)
    state.want_pipeline("belt", None)
    again = DesiredState(Desired(("chat", "new"), CONFIGURED.pipelines), tmp_path).value
    assert again.models == ("new", "embed")
    assert again.pipelines == {}


def test_a_stopped_pipeline_is_still_known_by_its_id(tmp_path: Path) -> None:
    state = DesiredState(CONFIGURED, tmp_path)
    state.want_pipeline("belt", None)
    assert state.known_pipeline("belt") == {"model": "eyes"}
    assert state.known_pipeline("other") is None


def test_a_whole_document_replaces_and_an_older_one_is_refused(tmp_path: Path) -> None:
    state = DesiredState(CONFIGURED, tmp_path)
    assert state.take(4, ("embed",), {"gate": {"model": "eyes"}})
    assert not state.take(4, (), {})
    assert DesiredState(CONFIGURED, tmp_path).value == Desired(("embed",), {"gate": {"model": "eyes"}}, 4)


def test_a_damaged_file_is_put_aside_not_lost(tmp_path: Path) -> None:
    (tmp_path / "desired.json").write_text('{"revision": ')
    assert DesiredState(CONFIGURED, tmp_path).value == CONFIGURED
    assert (tmp_path / "desired.damaged").read_text() == '{"revision": '


def test_every_change_is_announced(tmp_path: Path) -> None:
    told: list[str] = []
    state = DesiredState(CONFIGURED, tmp_path, lambda: told.append("changed"))
    state.want_model("embed", True)
    assert told == ["changed"]
