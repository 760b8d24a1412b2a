from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.device import Device
from models.engines.device_memory import DeviceMemory
from models.engines.tensor_buffer import TensorBuffer


def test_memory_goes_up_across_and_down(memory: DeviceMemory) -> None:
    count = 1 << 20
    up, down = TensorBuffer(memory, count), TensorBuffer(memory, count)
    between = memory.allocate(count)
    free = memory.free_bytes()
    assert free > 0
    assert between % 256 == 0
    assert up.address % 256 == 0
    for seed in range(3):
        values = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
        up.view("uint8", (count,))[:] = values
        up.upload(count)
        memory.zero(between, count)
        memory.copy_rows(between, 2048, up.address, 1024, 1024, 512)  # the first half, spread out
        memory.copy_rows(down.address, 1024, between, 2048, 1024, 512)
        memory.copy_rows(down.address + count // 2, 1024, between + 1024, 2048, 1024, 511)  # what was left zero
        down.download(count)
        memory.synchronize()
        found = down.view("uint8", (count,))
        np.testing.assert_array_equal(found[: count // 2], values[: count // 2])
        assert not found[count // 2 : -1024].any()
    for buffer in (up, down):
        buffer.close()
    memory.free(between)


def test_a_graph_repeats_its_copies_with_new_values(memory: DeviceMemory) -> None:
    if not memory.can_capture:
        pytest.skip(f"{memory.name} has no graphs")
    up, down = TensorBuffer(memory, 4096), TensorBuffer(memory, 4096)

    def work() -> None:
        up.upload(4096)
        memory.copy_rows(down.address, 1024, up.address, 1024, 1024, 4)
        down.download(4096)

    graph = memory.capture(work)
    for value in (1, 2, 3):
        up.view("uint8", (4096,))[:] = value
        memory.launch(graph)
        memory.synchronize()
        assert (down.view("uint8", (4096,)) == value).all()
    memory.forget(graph)
    for buffer in (up, down):
        buffer.close()


def test_a_fault_on_the_device_ends_the_process_that_made_it_and_no_other(memory: DeviceMemory, gpu: Device) -> None:
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.cuda_fault", memory.name], capture_output=True, text=True, timeout=120, cwd=root
    )
    assert done.returncode != 0
    assert "DeviceLost" in done.stderr
    assert "taken for" not in done.stderr
    test_memory_goes_up_across_and_down(memory)
