"""Who should serve: pure decisions on what the coordinator knows of the primary and of the nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from agent.protocol.wire import LeaseKind, Mode


@dataclass(frozen=True, slots=True)
class Hysteresis:
    """The primary's health: down after `failures` failed probes in a row, up again after `passes` good ones in a row."""

    failures: int
    passes: int
    is_down: bool = False
    streak: int = 0
    changed_at_s: float = 0.0

    def after_probe(self, is_good: bool, now_s: float) -> Hysteresis:
        if is_good != self.is_down:  # confirms what holds already
            return replace(self, streak=0)
        streak = self.streak + 1
        if streak < (self.passes if self.is_down else self.failures):
            return replace(self, streak=streak)
        return replace(self, is_down=not self.is_down, streak=0, changed_at_s=now_s)


@dataclass(frozen=True, slots=True)
class Lease:
    """What the node was last given. `until_s` and `renewed_at_s` are the coordinator's clock; a lease is confirmed by the node's result."""

    kind: LeaseKind
    until_s: float
    given_at_s: float
    renewed_at_s: float
    is_confirmed: bool = False


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node as the registry knows it. `retry_at_s`: not to be ordered about before, e.g. while an order is under way."""

    node: str
    is_online: bool
    is_ready: bool
    mode: Mode
    lease: Lease | None = None
    retry_at_s: float = 0.0
    is_drained: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    lease_s: float
    renew_s: float
    contingent: bool
    contingent_s: float
    min_active_s: float


@dataclass(frozen=True, slots=True)
class Activate:
    node: str
    kind: LeaseKind
    lease_s: float


@dataclass(frozen=True, slots=True)
class Renew:
    node: str
    lease_s: float


@dataclass(frozen=True, slots=True)
class StandDown:
    node: str


Order = Activate | Renew | StandDown


def decide(policy: Policy, primary: Hysteresis, nodes: Sequence[NodeView], now_s: float) -> Iterator[Order]:
    """One order at most for each node that is online, not drained by an operator and not in the middle of an earlier order."""
    for node in nodes:
        if not node.is_online or node.is_drained or now_s < node.retry_at_s:
            continue
        order = _while_down(policy, node, now_s) if primary.is_down else _while_up(policy, primary, node, now_s)
        if order is not None:
            yield order


def _while_down(policy: Policy, node: NodeView, now_s: float) -> Order | None:
    lease = _live(node, now_s)
    if lease is not None and lease.kind == "full":
        return Renew(node.node, policy.lease_s) if now_s >= lease.renewed_at_s + policy.renew_s else None
    return Activate(node.node, "full", policy.lease_s) if node.is_ready else None


def _while_up(policy: Policy, primary: Hysteresis, node: NodeView, now_s: float) -> Order | None:
    lease = _live(node, now_s)
    if lease is not None and lease.kind == "full":
        if now_s >= lease.given_at_s + policy.min_active_s:
            return StandDown(node.node)
        return Renew(node.node, policy.lease_s) if now_s >= lease.renewed_at_s + policy.renew_s else None
    if node.mode in ("active", "autonomous"):
        return StandDown(node.node)  # serving by a right that this coordinator does not know of
    if not policy.contingent or not node.is_ready or node.mode == "draining":
        return None
    if lease is None:
        return Activate(node.node, "contingent", policy.contingent_s)
    return Renew(node.node, policy.contingent_s) if now_s >= lease.renewed_at_s + policy.contingent_s / 2 else None


def _live(node: NodeView, now_s: float) -> Lease | None:
    return node.lease if node.lease is not None and now_s < node.lease.until_s else None
