"""Answers of the primary in one piece: waited for as long as it lives, and looked at before a client gets them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from agent.gateway.classify import FAILED_FINISHES, Failure, PrimaryFailed
from agent.gateway.sse import total_tokens

Found = TypeVar("Found")
IsSuspect = Callable[[], Awaitable[Failure | None]]


def check_whole(body: bytes, key: str) -> int:
    """The tokens that an answer says it took. Raises PrimaryFailed where a body with status 200 is none. `key`: the field that every answer
    of the endpoint has."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise PrimaryFailed(Failure("malformed", "a body that is no JSON")) from error
    if not isinstance(answer, dict) or not isinstance(answer.get(key), list) or not answer[key]:
        raise PrimaryFailed(Failure("malformed", f"a body without {key}"))
    if any(isinstance(choice, dict) and choice.get("finish_reason") in FAILED_FINISHES for choice in answer[key]):
        raise PrimaryFailed(Failure("server_error", "insufficient_system_resource"))
    return total_tokens(answer)


async def unless_suspect(wait: Callable[[], Awaitable[Found]], is_suspect: IsSuspect, look_s: float, answer_s: float) -> Found:
    """What `wait` gives, but each `look_s` the primary is asked for one token: a long answer and a dead primary are silent alike.

    Raises PrimaryFailed when that token does not come, or the answer is not complete after `answer_s`.
    """
    found: list[Found] = []
    failure: Failure | None = None
    ended = anyio.Event()

    async def read() -> None:
        nonlocal failure
        try:
            found.append(await wait())
        except PrimaryFailed as failed:
            failure = failed.failure
        ended.set()

    ends_s = anyio.current_time() + answer_s
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        while not ended.is_set():
            with anyio.move_on_after(min(look_s, ends_s - anyio.current_time())):
                await ended.wait()
            if ended.is_set():
                break
            if anyio.current_time() >= ends_s:
                failure = Failure("too_long", f"{answer_s:g} s")
                break
            if suspicion := await is_suspect():
                failure = Failure("first_byte_timeout", f"no answer in {look_s:g} s, and its probe failed: {suspicion.kind}")
                break
        tasks.cancel_scope.cancel()
    if found:
        return found[0]
    raise PrimaryFailed(failure or Failure("closed"))
