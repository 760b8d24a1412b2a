"""Unix seconds of moments on a source's own clock."""

from __future__ import annotations

import time

import pytest

from agent.worker.wall_clock import WallClock


def test_a_live_moment_is_now_and_one_of_a_moment_ago_was_then() -> None:
    clock, now_s = WallClock(is_paced=True), time.monotonic()
    assert clock.unix_s(now_s, now_s) == pytest.approx(time.time(), abs=0.2)  # noqa: TID251  # what it is held against
    assert clock.unix_s(now_s - 3, now_s - 3) == pytest.approx(time.time() - 3, abs=0.2)  # noqa: TID251  # as above


def test_a_file_that_is_read_faster_than_filmed_keeps_its_own_distances() -> None:
    clock, now_s = WallClock(is_paced=False), time.monotonic()
    first = clock.unix_s(0.0, now_s)
    assert clock.unix_s(60.0, now_s + 0.1) - first == pytest.approx(60.0)


def test_a_clock_that_is_found_to_be_wrong_is_followed() -> None:
    """The frames' clock against the wall moves by an hour, as after the first answer of a time server; small jitter is not followed."""
    clock, now_s = WallClock(is_paced=True), time.monotonic()
    first = clock.unix_s(100.0, now_s)
    assert clock.unix_s(101.0, now_s + 1.2) - first == pytest.approx(1.0)
    assert clock.unix_s(102.0, now_s + 3602) - first == pytest.approx(3602, abs=0.2)
