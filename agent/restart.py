"""`agent.restart`: the node ends as on SIGTERM, and whoever started it starts it again."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping

import anyio

from agent.link.outcome import CommandRejected, Handler, Output, Progress
from agent.protocol.operations import AgentRestartArgs

logger = logging.getLogger(__name__)

# systemd sets the first for services of Type=notify, such as ours; INVOCATION_ID would not do, for a desktop's terminals inherit one. The
# second is for other supervisors.
SIGNS = ("NOTIFY_SOCKET", "HOTSPARE_SUPERVISED")


class Restart:
    """`environment` tells whether somebody would start the node again; it is not ended otherwise."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._is_supervised = any(environment.get(sign) for sign in SIGNS)

    def handlers(self) -> dict[str, Handler]:
        return {"agent.restart": self._restart}

    async def _restart(self, args: AgentRestartArgs, _progress: Progress) -> Output:
        """Never returns: the journal has the command as `executing`, and the next start ends it as `succeeded` (R7)."""
        if not self._is_supervised:
            raise CommandRejected(
                "unsupported",
                f"nobody would start this node again: it runs under no systemd; set {SIGNS[-1]}=1 where another supervisor starts it",
            )
        logger.warning("restart ordered: %s", args.reason or "no reason given")
        os.kill(os.getpid(), signal.SIGTERM)
        await anyio.sleep_forever()
        raise AssertionError("unreachable")
