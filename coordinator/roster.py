"""The nodes as they look now: durable rows joined with what only this process can know, namely when each was last heard of."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from agent.protocol.messages import Presence, Result, State
from agent.protocol.operations import ActivateArgs, RenewArgs, arguments
from agent.protocol.topics import POLICIES
from coordinator.decide import Lease, NodeView
from coordinator.nginx import Backup
from coordinator.registry import CommandRow, NodeRow, Registry

logger = logging.getLogger(__name__)

HEARTBEAT_S = 30.0  # assumed of a node that has not sent one yet
LONGEST_HEARTBEAT_S = 300.0
MISSED_HEARTBEATS = 3
RETRY_CAP_S = 60.0
SETTLE_S = 5.0  # a node that gave its lease up gets this long to report its new mode
NEVER = -float("inf")


@dataclass(frozen=True, slots=True)
class Impression:
    """What this process knows of a node. Times are its monotonic clock; `order_id` is the latest order about the lease."""

    heard_at_s: float = NEVER
    lease: Lease | None = None
    order_id: str = ""
    ordered_at_s: float = 0.0
    retry_at_s: float = 0.0
    failures: int = 0
    is_settling: bool = False


class Roster:
    """Keeps one Impression a node and turns row and impression into the view that `decide` judges."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._impressions: dict[str, Impression] = {}
        self._listens_since_s = NEVER
        self._seen_online: dict[str, bool] = {}

    def listens(self, now_s: float) -> None:
        """The broker is (again) connected: silence counts from now on, for nobody could be heard before (R1)."""
        self._listens_since_s = now_s

    def heard(self, node: str, now_s: float) -> None:
        self._impressions[node] = replace(self._of(node), heard_at_s=now_s)
        if (row := self._registry.node(node)) is not None and row.is_silent:
            self._registry.set_silent(node, False)

    def forget(self, node: str) -> None:
        self._impressions.pop(node, None)
        self._seen_online.pop(node, None)

    def is_death(self, presence: Presence) -> bool:
        """R1: an offline message counts only if its (boot, sess) is that of the latest birth."""
        row = self._registry.node(presence.node)
        known = row.presence if row else None
        return known is None or (known.boot, known.sess) == (presence.boot, presence.sess)

    def state_came(self, state: State, expiry_left_s: int | None, now_s: float) -> None:
        """The node's own word on its lease is the truth, less the time that the message lay at the broker."""
        policy_s = POLICIES["state"].expiry_s or 0
        age_s = max(0, policy_s - expiry_left_s) if expiry_left_s is not None else 0
        seen = self._of(state.node)
        lease = None
        if state.lease_kind is not None and state.lease_left_s is not None:
            until_s = now_s + state.lease_left_s - age_s
            is_known = seen.lease is not None and seen.lease.kind == state.lease_kind
            lease = replace(seen.lease, until_s=until_s) if seen.lease and is_known else Lease(state.lease_kind, until_s, now_s)
        has_settled = seen.is_settling and lease is None and _has_settled(state)
        retry_at_s = now_s if has_settled else seen.retry_at_s
        self._impressions[state.node] = replace(seen, lease=lease, retry_at_s=retry_at_s, is_settling=seen.is_settling and not has_settled)

    def ordered(self, row: CommandRow, now_s: float, wall_s: float) -> None:
        """An order about the lease is under way: no other before its result, or its deadline."""
        ordered_at_s = now_s - max(0.0, wall_s - row.issued_s)
        retry_at_s = ordered_at_s + row.command.deadline_s
        self._impressions[row.command.node] = replace(
            self._of(row.command.node), order_id=row.command.id, ordered_at_s=ordered_at_s, retry_at_s=retry_at_s, is_settling=False
        )

    def ended(self, row: CommandRow, result: Result, now_s: float) -> None:
        """Take note of the final result of an order about the lease; one that a newer order has overtaken says nothing any more."""
        seen = self._of(row.command.node)
        if row.command.id != seen.order_id:
            return
        if result.status != "succeeded":
            failures = seen.failures + 1
            # Whatever the node has now, this order did not bring it: a renewal is not worth trying again, a new lease is (L2).
            lease = None if row.command.op == "renew" or (result.error and result.error.code == "stale_epoch") else seen.lease
            pause_s = min(RETRY_CAP_S, 2.0 ** (failures - 1))
            self._impressions[row.command.node] = replace(seen, lease=lease, failures=failures, retry_at_s=now_s + pause_s)
            return
        match arguments(row.command):
            case ActivateArgs() as given:
                lease = Lease(given.kind, seen.ordered_at_s + given.lease_s, now_s)
            case RenewArgs() as given if seen.lease is not None:
                lease = replace(seen.lease, until_s=max(seen.lease.until_s, seen.ordered_at_s + given.lease_s))
            case _:
                lease = None
        known = self._registry.node(row.command.node)
        is_settling = lease is None and not (known and known.state and _has_settled(known.state, row.command.epoch or 0))
        pause_s = SETTLE_S if is_settling else 0.0
        self._impressions[row.command.node] = replace(seen, lease=lease, failures=0, retry_at_s=now_s + pause_s, is_settling=lease is None)

    def watch(self, now_s: float) -> None:
        """Record who fell silent, and tell who came and went."""
        for row in self._registry.nodes():
            is_online = self._is_online(row, now_s)
            if not is_online and not row.is_silent and row.presence is not None and row.presence.state != "offline":
                self._registry.set_silent(row.node, True)
            if is_online != self._seen_online.get(row.node, False):
                self._seen_online[row.node] = is_online
                logger.log(logging.INFO if is_online else logging.WARNING, "node %s came or went: %s", row.node, self.why(row, now_s))

    def why(self, row: NodeRow, now_s: float) -> str:
        """`online`, or what took the node away: `will`, `shutdown`, `update`, `reboot`, `silent`, `unknown`."""
        if self._is_online(row, now_s):
            return "online"
        if row.presence is None:
            return "unknown"
        return row.presence.reason if row.presence.state == "offline" else "silent"

    def silence_s(self, node: str, now_s: float) -> float | None:
        heard_at_s = self._of(node).heard_at_s
        return None if heard_at_s == NEVER else now_s - heard_at_s

    def views(self, now_s: float) -> list[NodeView]:
        return [self.view(row, now_s) for row in self._registry.nodes()]

    def view(self, row: NodeRow, now_s: float) -> NodeView:
        seen = self._of(row.node)
        latest = row.state or row.presence
        models = row.state.models if row.state else ()
        is_ready = any(model.status == "serving" and model.task in (None, "generation") for model in models)
        mode = latest.mode if latest else "starting"
        return NodeView(row.node, self._is_online(row, now_s), is_ready, mode, seen.lease, seen.retry_at_s, row.is_drained)

    def backups(self, now_s: float) -> list[Backup]:
        """Nodes that the balancer may try: there, registered with an address, a chat model loaded. Their gate has the last word.

        A weight of 0 asks for no traffic; a TLS endpoint cannot share an upstream with plain ones.
        """
        found: list[Backup] = []
        for row in self._registry.nodes():
            endpoint = row.meta.endpoint if row.meta else None
            weight = row.meta.backup.weight if row.meta and row.meta.backup else 1
            view = self.view(row, now_s)
            if endpoint and not endpoint.tls and weight > 0 and view.is_online and view.is_ready and not view.is_drained:
                leads = view.mode == "active" and view.lease is not None and view.lease.kind == "full" and now_s < view.lease.until_s
                found.append(Backup(row.node, endpoint.host, endpoint.port, weight, leads))
        return found

    def _is_online(self, row: NodeRow, now_s: float) -> bool:
        if row.presence is None or row.presence.state == "offline" or row.is_silent:
            return False
        interval_s = (row.heartbeat.interval_s if row.heartbeat else None) or HEARTBEAT_S
        silent_s = now_s - max(self._of(row.node).heard_at_s, self._listens_since_s)
        return silent_s < MISSED_HEARTBEATS * min(max(interval_s, 0.05), LONGEST_HEARTBEAT_S)

    def _of(self, node: str) -> Impression:
        return self._impressions.get(node, Impression())


def _has_settled(state: State, epoch: int = 0) -> bool:
    return state.epoch >= epoch and state.mode not in ("active", "autonomous", "draining")
