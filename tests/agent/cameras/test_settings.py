"""What may be ordered of a camera, and that a refusal names the field as it was written."""

from __future__ import annotations

from typing import Any

import pytest

from agent.cameras.health import words
from agent.cameras.settings import SettingsRefused, checked, merged, redacted, with_credentials

SQUARE = [[0.1, 0.1], [0.9, 0.1], [0.9, 0.9], [0.1, 0.9]]
DOOR = {"source": "rtsp://admin:s3cret@10.0.0.20/stream", "model": "rtdetr"}


def test_what_was_given_is_kept_and_nothing_is_added() -> None:
    given = {
        **DOOR, "fps": 5, "zones": [{"name": "gate", "points": SQUARE, "loitering_s": {"person": 3}}],
        "lines": [{"name": "kerb", "start": [0, 0.5], "end": [1, 0.5]}], "masks": [{"name": "street", "points": SQUARE[:3]}],
        "record": {"enabled": True}, "something_new": [1, 2],
    }  # fmt: skip
    kept = checked("door", given)
    assert kept == {**given, "id": "door"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"fps": 0}, "fps"),
        ({"fps": "fast"}, "fps"),
        ({"source": "ftp://host/x"}, "source"),
        ({"source": None}, "source"),
        ({"threshold": 1.5}, "threshold"),
        (
            {"zones": [{"name": "a", "points": SQUARE}, {"name": "b", "points": [[0.1, 0.1], [1.2, 0.1], [0.5, 0.5]]}]},
            "zones[1].points[1][0]",
        ),
        ({"zones": [{"name": "a", "points": SQUARE[:2]}]}, "zones[0].points"),
        ({"zones": [{"name": "a", "points": [[0.1, 0.1]] * 3}]}, "zones[0].points"),
        ({"zones": [{"name": "a", "points": [[0.1, 0.1], [float("nan"), 0.2], [0.5, 0.5]]}]}, "zones[0].points[1][0]"),
        ({"zones": [{"name": "a/b", "points": SQUARE}]}, "zones[0].name"),
        ({"zones": [{"points": SQUARE}]}, "zones[0].name"),
        ({"zones": [{"name": "a", "points": SQUARE}, {"name": "a", "points": SQUARE}]}, "zones[1].name"),
        ({"zones": {"name": "a"}}, "zones"),
        ({"masks": [{"name": "m", "points": "all"}]}, "masks[0].points"),
        ({"lines": [{"end": [0.5, 7]}]}, "lines[0].end[1]"),
        ({"lines": [{"anchor": "head"}]}, "lines[0].anchor"),
        ({"record": {"pre_s": -1}}, "record.pre_s"),
        ({"labels": [""]}, "labels[0]"),
        ({"media": "/etc"}, "media"),
        ({"id": "other"}, "id"),
        ({"remarks": "x" * 100_000}, "settings"),
    ],
)
def test_a_refusal_names_the_field(changes: dict[str, Any], field: str) -> None:
    given = {name: value for name, value in {**DOOR, **changes}.items() if value is not None}
    with pytest.raises(SettingsRefused) as refusal:
        checked("door", given)
    assert refusal.value.field == field
    assert field in str(refusal.value)
    assert "s3cret" not in str(refusal.value)


def test_a_patch_changes_what_it_names() -> None:
    before = {"fps": 5, "record": {"enabled": True, "pre_s": 3}, "zones": [1], "labels": ["a"]}
    assert merged(before, {"record": {"pre_s": 9}, "zones": [2, 3], "labels": None, "threshold": 0.4}) == {
        "fps": 5, "record": {"enabled": True, "pre_s": 9}, "zones": [2, 3], "threshold": 0.4,
    }  # fmt: skip
    assert before["record"] == {"enabled": True, "pre_s": 3}


def test_a_password_is_hidden_and_comes_back_where_the_rest_is_the_same() -> None:
    shown = redacted(DOOR["source"])
    assert shown == "rtsp://…@10.0.0.20/stream"
    assert with_credentials({"source": shown}, DOOR)["source"] == DOOR["source"]
    assert with_credentials({"source": "rtsp://…@evil/stream"}, DOOR)["source"] == "rtsp://…@evil/stream"


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ({"state": "streaming", "fps": 12.04, "age_ms_p50": 80.0}, "12.0 frames/s, seen 80 ms after the fact"),
        ({"state": "streaming", "fps": 1, "age_ms_p50": 2500, "is_slowed": True},
         "1.0 frames/s, seen 2.5 s after the fact, slowed down while requests for text run"),
        ({"state": "backing_off", "silent_s": 12.3, "retry_in_s": 8.2}, "no frames for 12 s, next try in 8 s"),
        ({"state": "backing_off", "source": "rtsp://…@h/x", "message": "rtsp://…@h/x: [Errno 111] Connection refused: 'rtsp://…@h/x'"},
         "no frames yet, tries again soon (connection refused)"),
        ({"state": "stalled", "silent_s": 200}, "no frames for 3 min"),
        ({"state": "failed", "message": "Model x does not serve"}, "failed: model x does not serve"),
        ({}, "starting"),
    ],
)  # fmt: skip
def test_health_is_said_in_words(report: dict[str, Any], told: str) -> None:
    assert words("cam2", report) == f"cam2: {told}"
