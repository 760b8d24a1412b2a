"""The life of a command: checked, journaled, acknowledged, run in its lane, ended with exactly one final result.

received -> journal -> MQTT ack -> accepted -> executing (progress, at most 1/s) -> succeeded | failed | timed_out | cancelled,
or rejected, and then nothing was done. A killed node finishes the story at its next start (R7).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import anyio
import anyio.lowlevel
from anyio import to_thread
from anyio.abc import TaskGroup

from agent.link.broker import Received
from agent.link.journal import Entry, Journal, replayed
from agent.link.outcome import CommandFailed, CommandRejected, Handler, LeaseHolder, Output
from agent.link.store import StoreError
from agent.protocol.lease import Accept, LeaseOrder, LeaseState, Reject, order_of
from agent.protocol.messages import Command, Failure, Result
from agent.protocol.operations import OPS, CancelArgs, Operation, arguments
from agent.protocol.ulid import is_ulid
from agent.protocol.wire import FINAL_STATUSES, ErrorCode, MessageError, Status, Wire, decode, encode, wire_now

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 1.0
QUEUED_WORK = 32
ROUTINE = frozenset({"renew", "ping"})  # come every few seconds for as long as a lease lasts, and change nothing
RUNNING_CONTROL = 16
# Steps of before a power cut may be lost here yet known to the coordinator; a week's deadline has fewer than this.
SEQ_AFTER_REBOOT = 1_000_000


@dataclass(slots=True)
class _Job:
    command: Command
    args: Wire
    order: LeaseOrder | None
    operation: Operation
    ends_at_s: float  # event loop's clock
    seq: int
    scope: anyio.CancelScope
    is_cancelled: bool = False


class Commands:
    """`run()` finishes what an earlier life left open, then serves both lanes. `receive()` is for the session's reader.

    Control ops run at once, each in its own task; work runs one by one. Both are bounded: beyond, `rejected(busy)`.
    `cancellers`: what a cancelled command of an op leaves behind that its handler does not end by being cancelled.
    `outgoing` carries steps to the session; what it cannot hold, and what no broker got, `Journal.unsent` still knows.
    """

    def __init__(
        self,
        *,
        node: str,
        journal: Journal,
        handlers: Mapping[str, Handler],
        lease: LeaseHolder,
        clock: Callable[[], float],
        clock_is_synced: Callable[[], bool],
        report_fault: Callable[[str, str], Awaitable[None]],
        cancellers: Mapping[str, Callable[[Any], None]] | None = None,
    ) -> None:
        self._cancellers = cancellers or {}
        self._node = node
        self._journal = journal
        self._handlers = handlers
        self._lease = lease
        self._clock = clock
        self._clock_is_synced = clock_is_synced
        self._report_fault = report_fault
        self._jobs: dict[str, _Job] = {}
        self._tasks: TaskGroup | None = None
        self._is_recovered = anyio.Event()
        self._turn = anyio.Lock()
        self.outgoing: asyncio.Queue[Result] = asyncio.Queue(256)
        self.overflowed = 0

    @property
    def ops(self) -> tuple[str, ...]:
        """What this node can do, for `meta.ops`."""
        return tuple(op for op, operation in OPS.items() if operation.moves_lease or op in self._handlers or op == "cancel")

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
                for entry in await to_thread.run_sync(self._journal.open_entries, self._clock()):
                    await self._resume(entry)
                self._is_recovered.set()
                await anyio.sleep_forever()
            finally:
                self._tasks = None  # what is journaled from now on is for the next start

    async def receive(self, message: Received, op: str, acknowledge: Callable[[], None]) -> None:
        """One publication on `cmd/{op}`. Acknowledged once it is in the journal, or can never get there."""
        await self._is_recovered.wait()
        try:
            command = decode(Command, message.payload)
            if command.node != self._node or command.op != op:
                raise MessageError(f"command is for op {command.op} of node {command.node}, but came on {message.topic}")
        except MessageError as error:
            acknowledge()
            await self._report_fault(str(error), message.topic)
            if (command_id := _salvaged_id(message.payload)) is not None:
                self._send(self._first(command_id, op, "rejected", "invalid", str(error)))
            return
        if (known := await to_thread.run_sync(self._journal.last_result, command.id)) is not None:
            acknowledge()
            self._send(replayed(known))
            return
        first, job, lease = self._judge(command, message.expiry_left_s)
        age_s = age_of(command, message.expiry_left_s, None)
        with anyio.CancelScope(shield=True):  # what is in the journal is also done
            try:
                await to_thread.run_sync(self._journal.receive, command, first, self._clock(), age_s, lease)
            except StoreError as error:
                logger.error("command %s (%s) could not be journaled: %s", command.id, op, error)  # noqa: TRY400 - the trace adds nothing
                first = self._first(command.id, op, "rejected", "no_space", f"the journal does not take it: {error}")
                lease = job = None
        acknowledge()
        self._send(first)
        if lease is not None:
            self._lease.adopt(lease)
        if job is not None:
            self._start(job)

    def _judge(self, command: Command, expiry_left_s: int | None) -> tuple[Result, _Job | None, LeaseState | None]:
        operation = OPS.get(command.op)
        if operation is None or command.op not in self.ops:
            return self._refusal(command, "unsupported", f"this node has no op {command.op!r}; it has {', '.join(self.ops)}"), None, None
        try:
            args = arguments(command)
        except MessageError as error:
            return self._refusal(command, "invalid", str(error)), None, None
        age_s = age_of(command, expiry_left_s, wire_now() if self._clock_is_synced() else None)
        if age_s >= command.deadline_s:
            return self._refusal(command, "expired", f"{age_s:.0f} s old, deadline {command.deadline_s:g} s"), None, None
        if self._is_busy(operation):
            return self._refusal(command, "busy", "too many commands are open on this node; try again later", True), None, None
        order = order_of(command, args, age_s) if operation.moves_lease else None
        lease: LeaseState | None = None
        if operation.moves_lease:
            if order is None:
                return self._refusal(command, "invalid", f"{command.op} must carry an epoch"), None, None
            match self._lease.decide(order):
                case Accept(state=accepted):
                    lease = accepted
                case Reject(code=code, message=text, current=current):
                    return self._refusal(command, code, text, output={"current": current}), None, None
                case _:
                    return self._refusal(command, "stale_epoch", "its result is no longer stored; use a higher epoch"), None, None
        first = self._first(command.id, command.op, "accepted", epoch=lease.epoch if lease else None)
        return first, self._job(command, args, order, operation, command.deadline_s - age_s, first.seq), lease

    def _is_busy(self, operation: Operation) -> bool:
        open_jobs = sum(job.operation.lane == operation.lane for job in self._jobs.values())
        return open_jobs >= (QUEUED_WORK if operation.lane == "work" else RUNNING_CONTROL)

    async def _resume(self, entry: Entry) -> None:
        command, last = entry.command, entry.last
        seq = last.seq + (SEQ_AFTER_REBOOT if entry.elapsed_s is None else 0)
        operation = OPS.get(command.op)
        left_s = command.deadline_s - (entry.elapsed_s or 0.0)
        ended: tuple[Status, ErrorCode | None, str] | None = None
        if operation is None or command.op not in self.ops:
            ended = ("failed", "unsupported", f"this node no longer has the op {command.op!r}")
        elif last.status == "executing" and operation.after_restart == "succeeded":
            ended = ("succeeded", None, "")
        elif left_s <= 0:
            ended = ("timed_out", "expired", "the node was away when the deadline passed")
        elif operation.after_restart != "resume" and (last.status == "executing" or entry.elapsed_s is None):
            ended = ("failed", "interrupted", "the node stopped while this was under way; it was not tried again")
        if ended is None and operation is not None:
            args = arguments(command)
            logger.info("command %s (%s) is resumed after a restart", command.id, command.op)
            self._start(self._job(command, args, order_of(command, args, 0.0), operation, left_s, seq))
        elif ended is not None:
            logger.warning("command %s (%s) was open at start and ends as %s", command.id, command.op, ended[0])
            await self._record(self._result(command.id, command.op, seq + 1, *ended))

    def _job(self, command: Command, args: Wire, order: LeaseOrder | None, operation: Operation, left_s: float, seq: int) -> _Job:
        ends_at_s = anyio.current_time() + left_s
        return _Job(command, args, order, operation, ends_at_s, seq, anyio.CancelScope(deadline=ends_at_s))

    def _start(self, job: _Job) -> None:
        self._jobs[job.command.id] = job
        if self._tasks is not None:
            self._tasks.start_soon(self._execute, job)

    async def _execute(self, job: _Job) -> None:
        command = job.command
        final: Result | None = None
        with job.scope:
            try:
                async with self._turn if job.operation.lane == "work" else nullcontext():
                    await anyio.lowlevel.checkpoint()  # cancelled or too late while it waited: then nothing is begun
                    await self._advance(job, "executing")
                    output = await self._handle(job)
                final = self._result(command.id, command.op, job.seq + 1, "succeeded", output=output, progress=1.0)
                encode(final)
            except CommandFailed as error:
                status: Status = "rejected" if isinstance(error, CommandRejected) else "failed"
                final = self._ended(job, status, error.code, str(error), error.is_retryable, error.output)
            except Exception as error:  # one handler's bug, an output too big to send: it ends one command, not the node
                logger.exception("command %s (%s) failed", command.id, command.op)
                final = self._ended(job, "failed", "internal", f"{type(error).__name__}: {error}")
        if final is None and job.is_cancelled:
            final = self._ended(job, "cancelled", None, "")
        elif final is None:
            final = self._ended(job, "timed_out", "expired", f"not done within its deadline of {command.deadline_s:g} s")
        await self._record(final.model_copy(update={"seq": job.seq + 1}))
        del self._jobs[command.id]

    def _ended(
        self, job: _Job, status: Status, code: ErrorCode | None, text: str, is_retryable: bool = False, output: Output | None = None
    ) -> Result:
        return self._result(job.command.id, job.command.op, job.seq + 1, status, code, text, is_retryable, output)

    async def _handle(self, job: _Job) -> Output:
        last_s = anyio.current_time()

        async def progress(fraction: float | None = None, step: str | None = None) -> None:
            nonlocal last_s
            if anyio.current_time() - last_s >= PROGRESS_INTERVAL_S:
                last_s = anyio.current_time()
                await self._advance(job, "executing", fraction, step)

        if job.order is not None:
            return await self._lease.carry_out(job.order, progress)
        if isinstance(job.args, CancelArgs):
            return self._cancel(job.args.id)
        return await self._handlers[job.command.op](job.args, progress)

    def _cancel(self, command_id: str) -> Output:
        job = self._jobs.get(command_id)
        if job is None:
            return {"cancelled": False}
        job.is_cancelled = True
        job.scope.cancel()
        if job.command.op in self._cancellers:
            self._cancellers[job.command.op](job.args)
        return {"cancelled": True}

    async def _advance(self, job: _Job, status: Status, fraction: float | None = None, step: str | None = None) -> None:
        job.seq += 1
        result = self._result(job.command.id, job.command.op, job.seq, status, progress=fraction, step=step)
        await self._record(result, survives_power_cut=job.operation.after_restart != "resume")

    async def _record(self, result: Result, survives_power_cut: bool = True) -> None:
        with anyio.CancelScope(shield=True):
            try:
                is_new = await to_thread.run_sync(self._journal.step, result, survives_power_cut)
            except StoreError as error:
                logger.error("step %s of command %s could not be journaled: %s", result.status, result.id, error)  # noqa: TRY400 - the trace adds nothing
                is_new = True  # better told and forgotten than never told
        if is_new:
            self._send(result)

    def _send(self, result: Result) -> None:
        if result.status in FINAL_STATUSES and not result.replayed:
            is_routine = result.op in ROUTINE and result.status == "succeeded"
            logger.log(logging.DEBUG if is_routine else logging.INFO, "command %s (%s): %s", result.id, result.op, result.status)
        try:
            self.outgoing.put_nowait(result)
        except asyncio.QueueFull:
            self.overflowed += 1

    def _first(
        self, command_id: str, op: str, status: Status, code: ErrorCode | None = None, text: str = "", epoch: int | None = None
    ) -> Result:
        result = self._result(command_id, op, 1, status, code, text)
        return result if epoch is None else result.model_copy(update={"epoch": epoch})

    def _refusal(self, command: Command, code: ErrorCode, text: str, is_retryable: bool = False, output: Output | None = None) -> Result:
        return self._result(command.id, command.op, 1, "rejected", code, text, is_retryable, output)

    def _result(
        self,
        command_id: str,
        op: str,
        seq: int,
        status: Status,
        code: ErrorCode | None = None,
        text: str = "",
        is_retryable: bool = False,
        output: Output | None = None,
        progress: float | None = None,
        step: str | None = None,
    ) -> Result:
        error = Failure(code=code, message=text[:2000], retryable=is_retryable) if code else None
        fraction = None if progress is None else min(1.0, max(0.0, progress))
        return Result(
            id=command_id, op=op[:128], node=self._node, seq=seq, status=status, progress=fraction, step=step[:128] if step else None,
            epoch=self._lease.lease.epoch, error=error, output=output or {},
        )  # fmt: skip


def age_of(command: Command, expiry_left_s: int | None, now: datetime | None) -> float:
    """Seconds since it was sent (R6): by what the broker left of its expiry, else by the clocks if ours is right, else 0."""
    if expiry_left_s is not None:
        return max(0.0, command.deadline_s - expiry_left_s)
    return max(0.0, (now - command.issued_at).total_seconds()) if now is not None else 0.0


def _salvaged_id(payload: bytes) -> str | None:
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    found = document.get("id") if isinstance(document, dict) else None
    return found if isinstance(found, str) and is_ulid(found) else None
