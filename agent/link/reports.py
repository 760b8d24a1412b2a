"""What a node tells about itself: bodies come from the daemon, envelopes are put on here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agent.link.outbox import OutboxLevel
from agent.protocol.messages import (
    Event,
    Heartbeat,
    HeartbeatBody,
    Meta,
    MetaBody,
    OutboxLoad,
    Presence,
    State,
    StateBody,
    Sync,
    meta_hash,
)
from agent.protocol.ulid import new_ulid
from agent.protocol.wire import Clock, LeaseKind, Mode, wire_now


@dataclass(frozen=True, slots=True)
class Standing:
    """The node's mode and lease at one moment."""

    mode: Mode
    epoch: int
    mode_for_s: float = 0.0
    lease_kind: LeaseKind | None = None
    lease_left_s: float | None = None


@dataclass(frozen=True, slots=True)
class Reports:
    """Questions the link asks whenever it has something to say; each answers at once, from memory."""

    standing: Callable[[], Standing]
    meta: Callable[[], MetaBody]
    state: Callable[[], StateBody]
    heartbeat: Callable[[], HeartbeatBody]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who speaks: the same for all messages of one session."""

    node: str
    boot: str
    sess: int


def birth(who: Identity, standing: Standing) -> Presence:
    return _presence(who, standing, "draining" if standing.mode == "draining" else "online", "birth")


def will(who: Identity, standing: Standing) -> Presence:
    return _presence(who, standing, "offline", "will")


def goodbye(who: Identity, standing: Standing, reason: str) -> Presence:
    """`reason` is shutdown, update or reboot."""
    return _presence(who, standing, "offline", reason)


def _presence(who: Identity, standing: Standing, state: str, reason: str) -> Presence:
    return Presence.model_validate(
        {
            "node": who.node,
            "boot": who.boot,
            "sess": who.sess,
            "state": state,
            "reason": reason,
            "mode": standing.mode,
            "epoch": standing.epoch,
            "mode_for_s": round(standing.mode_for_s, 1),
            "ts": wire_now(),
        }
    )


def meta(who: Identity, body: MetaBody) -> Meta:
    unsigned = Meta(node=who.node, boot=who.boot, **dict(body))
    return unsigned.model_copy(update={"hash": meta_hash(unsigned)})


def state(who: Identity, standing: Standing, body: StateBody, seq: int, clock: Clock) -> State:
    return State(
        node=who.node,
        boot=who.boot,
        seq=seq,
        mode=standing.mode,
        epoch=standing.epoch,
        lease_kind=standing.lease_kind,
        lease_left_s=None if standing.lease_left_s is None else round(standing.lease_left_s, 1),
        clock=clock,
        **dict(body),
    )


def heartbeat(
    who: Identity,
    standing: Standing,
    body: HeartbeatBody,
    seq: int,
    mono_s: float,
    clock: Clock,
    interval_s: float,
    level: OutboxLevel,
) -> Heartbeat:
    return Heartbeat(
        node=who.node,
        boot=who.boot,
        sess=who.sess,
        seq=seq,
        ts=wire_now(),
        mono=round(mono_s, 3),
        clock=clock,
        mode=standing.mode,
        epoch=standing.epoch,
        interval_s=interval_s,
        outbox=OutboxLoad(n=level.count, oldest_s=round(level.oldest_s, 1), dropped=sum(level.dropped.values())),
        **dict(body),
    )


def sync(who: Identity, mono_s: float, epoch: int, desired_rev: int, last_ids: tuple[str, ...], open_ids: tuple[str, ...]) -> Event:
    body = Sync(boot=who.boot, sess=who.sess, epoch=epoch, desired_rev=desired_rev, last_cmd_ids=last_ids, journal_open=open_ids)
    return Event(
        id=new_ulid(),
        node=who.node,
        event_class="sync",
        severity="info",
        ts=wire_now(),
        mono=mono_s,
        data=body.model_dump(mode="json"),
    )
