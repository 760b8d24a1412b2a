"""The chart of answers and the two promises, in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from agent.gateway.sla import HOUR_S, SlaRecord
from agent.http.app import Application, create_app
from agent.http.collaborators import Services
from agent.http.outcome import Backend, Outcome
from tests.agent.http.browser import browser, missing
from tests.agent.http.conftest import House

NOW_S = 1_700_049_600.0


@dataclass
class HouseWithRecord(House):
    report: Callable[[], Mapping[str, Any]] = field(default=dict)

    def app(self) -> Application:
        services = Services("spare-1", self.node, self.node.gate, self.text, self.vision, sla=self.report)
        return create_app(services, CollectorRegistry(), self.limits)


@pytest.mark.skipif(bool(missing()), reason="chromium and chromium-driver are not installed")
def test_the_page_draws_who_answered_and_says_whether_the_promises_are_kept(serve: Callable[[House], str], tmp_path: Path) -> None:
    now_s = NOW_S
    record = SlaRecord(tmp_path / "sla.sqlite", lambda: now_s, lambda: {"state": "open", "cause": "it failed", "since_s": 5, "retry_s": 1})
    answers: list[tuple[int, Backend, int]] = [(-2, "primary", 50), (-1, "local", 30), (0, "cache", 19), (0, "continued", 1)]
    for hour, backend, count in answers:
        now_s = NOW_S + hour * HOUR_S
        for _ in range(count):
            record.told(Outcome(backend, True, 100.0, 40.0, int(backend in ("primary", "continued")), ""))
    with browser(tmp_path / "profile") as page:
        page.open(serve(HouseWithRecord(report=record.report)) + "/")
        page.until(lambda: page.run("return document.querySelectorAll('#sla-chart rect').length") == 4, "no chart")
        assert "100.000 %target 99.99 %, met" in page.text('[data-sla="Availability, 24 hours"]').replace(" target", "target")
        assert "49.0 %" in page.text('[data-sla="Cloud calls saved, 31 days"]')
        assert "met" in page.text('[data-sla="Cloud calls saved, 31 days"]')
        assert page.text("#sla-primary") == "The primary is not asked: it failed."
        assert "local 30" in page.text("#sla-legend")
        left, right = (
            page.run("return +document.querySelectorAll('#sla-chart rect')[arguments[0]].getAttribute('x')", at) for at in (0, 3)
        )
        assert right - left == pytest.approx(20), "two hours later is two bars to the right"
        assert page.errors() == []
