"""Figures of batches and their files for Prometheus, read at the moment of a scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric

from agent.batches.record import STATUSES
from agent.batches.retention import taken_bytes
from agent.batches.store import BatchStore


class BatchCollector:
    def __init__(self, store: BatchStore) -> None:
        self._store = store

    def describe(self) -> Iterable[Metric]:
        """Empty: registering must not ask a node that is still starting."""
        return ()

    def collect(self) -> Iterable[Metric]:
        batches = list(self._store.batches.values())
        states = Counter(batch.status for batch in batches)
        family = GaugeMetricFamily("hotspare_batches", "Batches that this node keeps, by their state.", labels=["status"])
        for status in STATUSES:
            family.add_metric([status], states[status])
        yield family
        waiting = sum(batch.total - self._store.counts(batch).answered for batch in batches if batch.status == "in_progress")
        yield GaugeMetricFamily("hotspare_batch_lines_waiting", "Requests of batches that have no answer yet.", waiting)
        taken = taken_bytes(list(self._store.files.values()))
        yield GaugeMetricFamily("hotspare_batch_files_bytes", "What the files of batches take of their budget.", taken)
