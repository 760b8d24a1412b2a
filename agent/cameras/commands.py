"""The coordinator's commands about cameras: the same orders as over HTTP, in the results of MQTT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agent.cameras.orders import CameraOrders, CameraRefused
from agent.link.outcome import CommandRejected, Handler, Output, Progress
from agent.protocol.operations import CameraRemoveArgs, CameraResetArgs, CameraSetArgs
from agent.protocol.wire import ErrorCode

FOR_EVER_S = float("inf")  # the command's own deadline ends the waiting
CODES: dict[str, ErrorCode] = {"invalid": "invalid", "unknown_camera": "invalid", "busy": "busy", "no_space": "no_space"}


def camera_handlers(orders: CameraOrders) -> dict[str, Handler]:
    async def set_camera(args: CameraSetArgs, _: Progress) -> Output:
        """Succeeds once the worker has taken it; its source may still be out of reach."""
        with _rejected():
            await orders.change(args.id, args.settings, FOR_EVER_S)
        return {"camera": args.id}

    async def remove(args: CameraRemoveArgs, _: Progress) -> Output:
        with _rejected():
            await orders.remove(args.id)
        return {"camera": args.id}

    async def reset(args: CameraResetArgs, _: Progress) -> Output:
        with _rejected():
            return {"camera": args.id, "changed": await orders.reset(args.id)}

    return {"camera.set": set_camera, "camera.remove": remove, "camera.reset": reset}


@contextmanager
def _rejected() -> Iterator[None]:
    try:
        yield
    except CameraRefused as error:
        output = {} if error.field is None else {"field": error.field}
        raise CommandRejected(CODES.get(error.reason, "invalid"), str(error), output=output) from error
