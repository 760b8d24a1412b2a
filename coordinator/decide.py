"""Who should serve: pure decisions on what the coordinator knows of the primary and of the nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from agent.protocol.wire import LeaseKind, Mode


@dataclass(frozen=True, slots=True)
class Hysteresis:
    """The primary's health: down after `failures` failed probes in a row, up again after `passes` good ones in a row.

    A coordinator that has just started takes the primary for up, but is not certain of it before `passes` good probes: nobody who
    serves is sent home on a guess.
    """

    failures: int
    passes: int
    is_down: bool = False
    is_certain: bool = False
    streak: int = 0

    def after_probe(self, is_good: bool) -> Hysteresis:
        confirms = is_good != self.is_down
        if confirms and self.is_certain:
            return replace(self, streak=0)
        # Below zero: good ones in a row while it is not certain that the primary is up.
        streak = min(self.streak, 0) - 1 if confirms else max(self.streak, 0) + 1
        if confirms:
            return replace(self, streak=0, is_certain=True) if -streak >= self.passes else replace(self, streak=streak)
        if streak < (self.passes if self.is_down else self.failures):
            return replace(self, streak=streak)
        return replace(self, is_down=not self.is_down, is_certain=True, streak=0)


@dataclass(frozen=True, slots=True)
class Lease:
    """What the node holds, by its own word. Times are the coordinator's clock."""

    kind: LeaseKind
    until_s: float
    given_at_s: float


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
        return _renewal(node, lease, policy.lease_s, policy.renew_s, now_s)
    return Activate(node.node, "full", policy.lease_s) if node.is_ready else None


def _while_up(policy: Policy, primary: Hysteresis, node: NodeView, now_s: float) -> Order | None:
    lease = _live(node, now_s)
    if lease is not None and lease.kind == "full":
        if primary.is_certain and now_s >= lease.given_at_s + policy.min_active_s:
            return StandDown(node.node)
        return _renewal(node, lease, policy.lease_s, policy.renew_s, now_s)
    if node.mode in ("active", "autonomous"):  # serving by a right that this coordinator did not give
        return StandDown(node.node) if primary.is_certain else None
    if not policy.contingent or not node.is_ready or node.mode != "standby":
        return None
    if lease is None:
        return Activate(node.node, "contingent", policy.contingent_s)
    return _renewal(node, lease, policy.contingent_s, policy.contingent_s / 2, now_s)


def _renewal(node: NodeView, lease: Lease, lease_s: float, every_s: float, now_s: float) -> Renew | None:
    """Due by what is left: a lease whose beginning this process has not seen does not run out meanwhile."""
    return Renew(node.node, lease_s) if lease.until_s - now_s <= lease_s - every_s else None


def _live(node: NodeView, now_s: float) -> Lease | None:
    return node.lease if node.lease is not None and now_s < node.lease.until_s else None
