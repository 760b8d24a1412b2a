"""Lease and epoch (rules L1-L5, L10): who may move a node between standby and active, decided on frozen values. Pure.

The lease bounds cost and staleness; it is no mutex. Two active nodes are safe, for requests are stateless (L10).
Times are seconds of a clock that never jumps and counts through suspend (CLOCK_BOOTTIME), never wall clock (L4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from typing_extensions import assert_never

from agent.protocol.messages import Command
from agent.protocol.operations import ActivateArgs, RenewArgs
from agent.protocol.wire import ErrorCode, LeaseKind, Wire

LeaseOp = Literal["activate", "renew", "standby", "drain"]


@dataclass(frozen=True, slots=True)
class LeaseState:
    """`epoch`, `last_id` and `is_drained` are durable before any effect (L2); the lease itself dies with a reboot (L5).

    `kind` None: no lease. `is_drained`: taken out of service until the next accepted order, autonomy included.
    """

    epoch: int = 0
    last_id: str | None = None
    kind: LeaseKind | None = None
    ends_at_s: float = 0.0
    weight: int = 1
    is_drained: bool = False

    def held(self, now_s: float) -> LeaseKind | None:
        return self.kind if now_s < self.ends_at_s else None

    def left_s(self, now_s: float) -> float:
        return max(0.0, self.ends_at_s - now_s) if self.kind is not None else 0.0


@dataclass(frozen=True, slots=True)
class LeaseOrder:
    """A command that moves the lease. `age_s` is how long it was under way, as the broker's expiry counter tells."""

    op: LeaseOp
    id: str
    epoch: int
    lease_s: float = 0.0
    kind: LeaseKind = "full"
    weight: int = 1
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Accept:
    """Store `state` durably, then act."""

    state: LeaseState


@dataclass(frozen=True, slots=True)
class Reject:
    """`current` goes into the result, so that a coordinator restored from an old backup can catch up (L3)."""

    code: ErrorCode
    message: str
    current: int


@dataclass(frozen=True, slots=True)
class Replay:
    """The order that set this epoch came again: no effect, the stored result is sent once more."""


Decision = Accept | Reject | Replay


def order_of(command: Command, args: Wire, age_s: float) -> LeaseOrder | None:
    """None where the command does not move the lease or lacks the epoch that it must carry."""
    if command.epoch is None:
        return None
    match command.op, args:
        case "activate", ActivateArgs():
            return LeaseOrder("activate", command.id, command.epoch, args.lease_s, args.kind, args.weight, max(0.0, age_s))
        case "renew", RenewArgs():
            return LeaseOrder("renew", command.id, command.epoch, args.lease_s, age_s=max(0.0, age_s))
        case ("standby" | "drain") as op, _:
            return LeaseOrder(op, command.id, command.epoch)
        case _:
            return None


def decide(order: LeaseOrder, state: LeaseState, now_s: float) -> Decision:
    """Rule L2: a lower epoch is stale, the same epoch may only be renewed or replayed, a higher one is obeyed.

    A renewal never makes a lease out of nothing: for one that ran out, was given up or was never seen here, the
    coordinator must activate with a new epoch. It learns that from the rejection and heals itself (L3).
    """
    if order.epoch < state.epoch:
        return _stale(order, state)
    if order.epoch == state.epoch and order.id == state.last_id:
        return Replay()
    if order.op == "renew":
        return _renewed(order, state, now_s)
    if order.epoch == state.epoch:
        return _stale(order, state)
    match order.op:
        case "activate":
            ends_at_s = now_s + order.lease_s - order.age_s
            return Accept(LeaseState(order.epoch, order.id, order.kind, ends_at_s, order.weight))
        case "standby":
            return Accept(LeaseState(order.epoch, order.id))
        case "drain":
            return Accept(LeaseState(order.epoch, order.id, is_drained=True))
        case _:
            assert_never(order.op)


def without_lease(state: LeaseState) -> LeaseState:
    """The right to serve is gone, epoch and drain stay: after a reboot (L5), or where the node cannot serve after all."""
    return replace(state, kind=None, ends_at_s=0.0)


def _renewed(order: LeaseOrder, state: LeaseState, now_s: float) -> Accept | Reject:
    if order.epoch != state.epoch:
        return Reject(
            "stale_epoch",
            f"renewal of epoch {order.epoch}, but this node is at {state.epoch}; activate with a higher epoch",
            state.epoch,
        )
    if state.held(now_s) is None:
        return Reject("expired", f"there is no live lease of epoch {state.epoch} to renew; activate with a higher one", state.epoch)
    # A delayed duplicate of an earlier renewal must not shorten what a later one gave.
    ends_at_s = max(state.ends_at_s, now_s + order.lease_s - order.age_s)
    return Accept(replace(state, ends_at_s=ends_at_s))


def _stale(order: LeaseOrder, state: LeaseState) -> Reject:
    return Reject(
        "stale_epoch",
        f"{order.op} carries epoch {order.epoch}, this node is at {state.epoch}; use a higher one",
        state.epoch,
    )
