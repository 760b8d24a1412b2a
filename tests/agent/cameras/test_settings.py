"""What may be ordered of a camera, and that a refusal names the field as it was written."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.cameras.health import words
from agent.cameras.settings import SettingsRefused, checked, merged, with_credentials
from agent.config import CameraSettings
from agent.worker.addresses import redacted
from agent.worker.sources import parse_source

SQUARE = [[0.1, 0.1], [0.9, 0.1], [0.9, 0.9], [0.1, 0.9]]
DOOR = {"source": "rtsp://admin:s3cret@10.0.0.20/stream", "model": "rtdetr"}


def test_what_was_given_is_kept_and_nothing_is_added() -> None:
    given = {
        **DOOR, "fps": 5, "zones": [{"name": "gate", "points": SQUARE, "loitering_s": {"person": 3}}],
        "lines": [{"name": "kerb", "start": [0, 0.5], "end": [1, 0.5]}], "masks": [{"name": "street", "points": SQUARE[:3]}],
        "record": {"enabled": True}, "motion": {"enabled": True, "forced_s": 5.0},
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
        ({"colour": "red"}, "colour"),
        ({"motion": {"speed": 3}}, "motion.speed"),
        ({"motion": {"min_share": "all"}}, "motion.min_share"),
        ({"motion": {"forced_s": 0}}, "motion.forced_s"),
        ({"decoder": "mpv"}, "decoder"),
        ({"decoder": "gstreamer", "source": "file:/srv/a.mp4"}, "decoder"),
        ({"mode": "every_frame"}, "mode"),
        ({"source": "conveyor:?colour=red"}, "source"),
        ({"record": {"max_s": 1}}, "record.max_s"),
        ({"lines": [{"start": [0.1, 0.1], "end": [0.1, 0.1]}]}, "lines[0].end"),
        ({"zones": [{"name": "a", "points": SQUARE, "colour": "red"}]}, "zones[0].colour"),
        ({"zones": [{"name": "a", "points": [[0.1, 0.1], [0.5, 0.5], [0.9, 0.9]]}]}, "zones[0].points"),
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
    with pytest.raises(SettingsRefused, match="give the whole address"):
        checked("door", {**DOOR, "source": "rtsp://…@evil/stream"})


FORMS = ("rtsp://admin:{}@cam/live", "http://cam/a?user=a&pwd={}", "rtsp://cam/user=a_password={}", "rtsp://cam;pwd={}", "rtsp:{}@cam")


@given(st.sampled_from(FORMS), st.text("aZ09!$#%&@:+=~?/; '\"").map(lambda text: f"{text}QQ{text}"))
def test_what_is_shown_can_be_sent_back_and_no_refusal_shows_more(form: str, secret: str) -> None:
    source = form.format(secret)
    shown = redacted(source)
    assert "QQ" not in shown
    assert with_credentials({"source": shown}, {"source": source})["source"] == source
    for changes in ({}, {"fps": -1}, {"zones": [{"name": source}]}, {"mode": "every_frame"}, {"decoder": "gstreamer"}):
        try:
            checked("door", {**DOOR, "source": source, **changes})
        except SettingsRefused as error:
            assert "QQ" not in str(error) + error.field


@pytest.mark.parametrize(
    ("source", "is_taken"),
    [
        ("csi:0", True), ("csi:", False), ("csi:left", False), ("v4l2:/dev/video12", True), ("v4l2:/dev/video0/../sda", False),
        ("v4l2:/etc/passwd", False), ("rtsp://u:p@cam/live", True), ("rtsps://cam/a", True), ("http://cam/a?b=c", True),
        ("https://cam", True), ("rtsp://u:my password@cam", False), ("rtsp:/cam", False), ("rtsp://cam\n", False), ("ftp://cam/x", False),
        ("file:/srv/a b.mp4", True), ("file:a.mp4", False), ("conveyor:", True), ("conveyor:?seed=3&fps=9", True), ("", False),
    ],
)  # fmt: skip
def test_a_source_is_taken_by_file_order_and_worker_alike(source: str, is_taken: bool) -> None:
    def by_file() -> object:
        return CameraSettings.model_validate({**DOOR, "id": "door", "source": source})

    for take in (by_file, lambda: checked("door", {**DOOR, "source": source}), lambda: parse_source(source, 640, 360, 5.0)):
        if is_taken:
            take()
        else:
            with pytest.raises((ValidationError, SettingsRefused, ValueError)):
                take()


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
