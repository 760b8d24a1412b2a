"""Prometheus figures of the HTTP side and, read at the moment of a scrape, of the node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from agent.http.collaborators import NodeSnapshot
from agent.http.outcome import Outcome

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MODES = ("starting", "standby", "active", "autonomous", "draining", "degraded")
LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """All figures of one node, in the registry that the constructor was given."""

    def __init__(self, registry: CollectorRegistry, snapshot: Callable[[], NodeSnapshot]) -> None:
        self._registry = registry
        self.requests = Counter("hotspare_http_requests", "Answered requests.", ["endpoint", "method", "status"], registry=registry)
        self.latency_s = Histogram(
            "hotspare_http_request_seconds", "Seconds from the request's head to the end of the answer.", ["endpoint"],
            buckets=LATENCY_S, registry=registry,
        )  # fmt: skip
        self.first_token_s = Histogram(
            "hotspare_first_token_seconds", "Seconds from the start of generation to its first text.", ["model"],
            buckets=LATENCY_S, registry=registry,
        )  # fmt: skip
        self.queue_s = Histogram("hotspare_queue_seconds", "Seconds that a sequence waited for a slot of its model.", ["model"],
                                 buckets=LATENCY_S, registry=registry)  # fmt: skip
        self.tokens = Counter("hotspare_tokens", "Tokens read (prompt), taken from the cache (cached), written (completion).",
                              ["model", "kind"], registry=registry)  # fmt: skip
        self.in_flight = Gauge("hotspare_inference_in_flight", "Inference requests being answered.", registry=registry)
        self.refusals = Counter("hotspare_gate_refusals", "Inference requests refused with 503.", ["mode"], registry=registry)
        self.disconnects = Counter("hotspare_client_disconnects", "Clients that left before the answer was complete.", registry=registry)
        self.outcomes = Counter("hotspare_answers", "Inference requests by who answered; cause: why not the primary.",
                                ["backend", "outcome", "cause"], registry=registry)  # fmt: skip
        self.cloud_calls = Counter("hotspare_cloud_calls", "Requests sent to the primary for clients.", registry=registry)
        self.saved_calls = Counter("hotspare_saved_cloud_calls", "Requests answered well without one to the primary.", registry=registry)
        self.answer_s = Histogram("hotspare_answer_seconds", "Seconds from an inference request's head to the end of its answer.",
                                  ["backend"], buckets=LATENCY_S, registry=registry)  # fmt: skip
        self.first_byte_s = Histogram("hotspare_answer_first_seconds", "Seconds to the first byte of an answer's body.", ["backend"],
                                      buckets=LATENCY_S, registry=registry)  # fmt: skip
        registry.register(NodeCollector(snapshot))

    def told(self, outcome: Outcome) -> None:
        self.outcomes.labels(outcome.backend, "good" if outcome.is_good else "failed", outcome.cause).inc()
        self.cloud_calls.inc(outcome.cloud_calls)
        self.saved_calls.inc(outcome.is_good and outcome.cloud_calls == 0)
        self.answer_s.labels(outcome.backend).observe(outcome.latency_ms / 1000)
        if outcome.first_ms is not None:
            self.first_byte_s.labels(outcome.backend).observe(outcome.first_ms / 1000)

    def exposition(self) -> bytes:
        return generate_latest(self._registry)


class NodeCollector:
    def __init__(self, snapshot: Callable[[], NodeSnapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        """Empty: registering must not ask a node that is still starting."""
        return ()

    def collect(self) -> Iterable[Metric]:
        now = self._snapshot()
        yield GaugeMetricFamily("hotspare_uptime_seconds", "Seconds since the agent started.", now.uptime_s)
        yield GaugeMetricFamily("hotspare_epoch", "Epoch of the last accepted order.", now.epoch)
        yield GaugeMetricFamily("hotspare_lease_left_seconds", "Seconds until the lease ends; 0 without one.", now.lease_left_s or 0)
        yield GaugeMetricFamily("hotspare_uplink_connected", "1 while the coordinator's broker is connected.", now.uplink == "connected")
        yield _labelled("hotspare_info", "Version of the agent.", ["node", "version"], [((now.node, now.version), 1)])
        yield _labelled("hotspare_mode", "1 for the mode the node is in.", ["mode"], [((mode,), now.mode == mode) for mode in MODES])
        yield _labelled("hotspare_model_serving", "1 while the model serves.", ["model", "task"],
                        [((model.name, model.task), model.status == "serving") for model in now.models])  # fmt: skip
        yield _labelled("hotspare_model_current", "1 while the engine that is wanted serves, 0 while an earlier one does.", ["model"],
                        [((model.name,), model.is_current) for model in now.models if model.status == "serving"])  # fmt: skip
        yield _labelled("hotspare_model_asleep", "1 while the model is out of memory, to be loaded when somebody asks.", ["model"],
                        [((model.name,), bool(model.asleep)) for model in now.models if model.status == "serving"])  # fmt: skip
        yield _counted("hotspare_model_unloads", "Times a model was taken out of memory.", ["model", "reason"],
                       [((model.name, reason), count) for model in now.models for reason, count in model.unloads.items()])  # fmt: skip
        yield _counted("hotspare_model_reloads", "Times a model was loaded again because somebody asked.", ["model"],
                       [((model.name,), model.reloads) for model in now.models])  # fmt: skip
        yield _labelled("hotspare_model_build_failed", "1 while the last build of the model's engine has failed.", ["model"],
                        [((model.name,), model.build is not None and model.build.status == "failed") for model in now.models])  # fmt: skip
        yield _labelled("hotspare_model_build_progress", "Share of a build that is done, while there is one.", ["model"],
                        [((model.name,), model.build.progress) for model in now.models
                         if model.build is not None and model.build.progress is not None])  # fmt: skip
        yield _labelled("hotspare_worker_restarts", "Restarts of a worker since the agent started.", ["worker"],
                        [((worker.name,), worker.restarts) for worker in now.workers])  # fmt: skip
        yield _labelled("hotspare_worker_memory_bytes", "Resident memory of a worker.", ["worker"],
                        [((worker.name,), worker.memory_bytes) for worker in now.workers])  # fmt: skip
        yield _labelled("hotspare_pipeline_fps", "Frames inferred each second.", ["pipeline"],
                        [((pipeline.id,), pipeline.fps) for pipeline in now.pipelines])  # fmt: skip
        yield _labelled("hotspare_pipeline_latency_ms", "Milliseconds from capture to result.", ["pipeline"],
                        [((pipeline.id,), pipeline.latency_ms) for pipeline in now.pipelines])  # fmt: skip
        crossings = [((pipeline.id, label), count) for pipeline in now.pipelines for label, count in pipeline.counts.items()]
        yield _counted("hotspare_pipeline_crossings", "Objects that crossed the line.", ["pipeline", "label"], crossings)


def _counted(name: str, words: str, labels: list[str], rows: Sequence[tuple[tuple[str, ...], float]]) -> Metric:
    family = CounterMetricFamily(name, words, labels=labels)
    for values, count in rows:
        family.add_metric(values, count)
    return family


def _labelled(name: str, words: str, labels: list[str], rows: Sequence[tuple[tuple[str, ...], float]]) -> Metric:
    family = GaugeMetricFamily(name, words, labels=labels)
    for values, figure in rows:
        family.add_metric(values, figure)
    return family
