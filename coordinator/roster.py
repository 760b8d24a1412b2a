"""The nodes as they look now: durable rows joined with what only this process can know, namely when each was last heard of."""

from __future__ import annotations

from dataclasses import dataclass, replace

from agent.protocol.messages import Command, Presence, Result, State
from agent.protocol.operations import ActivateArgs, RenewArgs, arguments
from agent.protocol.topics import POLICIES
from coordinator.decide import Lease, NodeView
from coordinator.nginx import Backup
from coordinator.registry import NodeRow, Registry

HEARTBEAT_S = 30.0  # assumed of a node that has not sent one yet
MISSED_HEARTBEATS = 3
FAILED_ORDER_PAUSE_S = 10.0
SETTLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Impression:
    """What this process knows of a node. Times are its monotonic clock."""

    heard_at_s: float
    lease: Lease | None = None
    retry_at_s: float = 0.0


class Roster:
    """Keeps one Impression a node and turns row and impression into the view that `decide` judges."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._impressions: dict[str, Impression] = {}

    def heard(self, node: str, now_s: float) -> None:
        self._impressions[node] = replace(self._of(node), heard_at_s=now_s)

    def forget(self, node: str) -> None:
        self._impressions.pop(node, None)

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
            known = seen.lease if seen.lease is not None and seen.lease.kind == state.lease_kind else None
            lease = replace(known, until_s=until_s) if known else Lease(state.lease_kind, until_s, now_s, now_s, is_confirmed=True)
        self._impressions[state.node] = replace(seen, lease=lease)

    def ordered(self, command: Command, now_s: float) -> None:
        """An order is under way: no other before its deadline or its result."""
        self._impressions[command.node] = replace(self._of(command.node), retry_at_s=now_s + command.deadline_s)

    def ended(self, command: Command, result: Result, now_s: float) -> None:
        """Take note of a final result of an order about the lease."""
        seen = self._of(command.node)
        if result.status != "succeeded":
            if result.error is not None and result.error.code == "stale_epoch":
                self._registry.raise_epoch(command.node, result.epoch)  # L3: heals a record that was restored from a backup
                self._impressions[command.node] = replace(seen, lease=None, retry_at_s=now_s)
            else:
                self._impressions[command.node] = replace(seen, retry_at_s=now_s + FAILED_ORDER_PAUSE_S)
            return
        match arguments(command):
            case ActivateArgs() as given:
                lease: Lease | None = Lease(given.kind, now_s + given.lease_s, now_s, now_s, is_confirmed=True)
            case RenewArgs() as given if seen.lease is not None:
                lease = replace(seen.lease, until_s=now_s + given.lease_s, renewed_at_s=now_s)
            case _:
                lease = None
        pause_s = 0.0 if lease is not None else SETTLE_S
        self._impressions[command.node] = replace(seen, lease=lease, retry_at_s=now_s + pause_s)

    def views(self, now_s: float) -> list[NodeView]:
        return [self._view(row, now_s) for row in self._registry.nodes()]

    def backups(self, now_s: float) -> list[Backup]:
        """Nodes that the balancer may try: there, registered with an address, a chat model loaded. Their gate has the last word."""
        rows = {row.node: row for row in self._registry.nodes()}
        usable = [rows[view.node] for view in self.views(now_s) if view.is_online and view.is_ready and not view.is_drained]
        return [
            Backup(row.node, row.meta.endpoint.host, row.meta.endpoint.port, row.meta.backup.weight if row.meta.backup else 1)
            for row in usable
            if row.meta is not None and row.meta.endpoint is not None
        ]

    def _view(self, row: NodeRow, now_s: float) -> NodeView:
        seen = self._of(row.node)
        interval_s = (row.heartbeat.interval_s if row.heartbeat else None) or HEARTBEAT_S
        is_online = (
            row.presence is not None and row.presence.state != "offline" and now_s < seen.heard_at_s + MISSED_HEARTBEATS * interval_s
        )
        latest = row.state or row.presence
        models = row.state.models if row.state else ()
        is_ready = any(model.status == "serving" and model.task in (None, "generation") for model in models)
        mode = latest.mode if latest else "starting"
        return NodeView(row.node, is_online, is_ready, mode, seen.lease, seen.retry_at_s, row.is_drained)

    def _of(self, node: str) -> Impression:
        return self._impressions.get(node, Impression(heard_at_s=-float("inf")))
