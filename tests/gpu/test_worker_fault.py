"""A fault of CUDA in a supervised worker: that worker ends and starts again, the one beside it goes on."""

from __future__ import annotations

import pytest

from agent.errors import WorkerLost, WorkerRefused
from models.engines.device_memory import DeviceMemory
from tests.agent.supervision.running import chaos, open_chaos
from tests.agent.supervision.test_worker import pid_of, tokens_of

pytestmark = pytest.mark.anyio


async def test_a_fault_ends_its_worker_and_no_other(memory: DeviceMemory) -> None:
    async with chaos() as (worker, _), chaos() as (other, _):
        pid, others = pid_of(worker), pid_of(other)
        for each in (worker, other):
            with pytest.raises(WorkerRefused, match="the device answers"):
                await tokens_of(each, "cuda")
        with pytest.raises(WorkerLost) as lost:
            await tokens_of(worker, "cuda fault")
        assert lost.value.cause.kind in ("exit", "aborted")
        assert any("DeviceLost" in line for line in lost.value.cause.evidence)
        await open_chaos(worker)
        assert pid_of(worker) != pid
        for each in (worker, other):
            with pytest.raises(WorkerRefused, match="the device answers"):
                await tokens_of(each, "cuda")
        assert pid_of(other) == others
