"""Both packages behind the one interface: against fakes of their modules, and cuda-python's real one without a driver."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Tuple

import numpy as np
import pytest

from models.engines import DeviceLost, EngineError
from models.engines.cuda_python import CudaPythonMemory
from models.engines.device_memory import DeviceMemory, open_device_memory
from models.engines.pycuda_driver import PycudaMemory
from models.engines.tensor_buffer import TensorBuffer


class HostHeap:
    """Memory that both fakes hand out."""

    def __init__(self) -> None:
        self.live: dict[int, Any] = {}

    def take(self, size: int) -> int:
        block = (ctypes.c_uint8 * size)()
        self.live[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def drop(self, address: int) -> None:
        del self.live[address]


class FakeRuntime:
    """The functions of cuda-python's runtime that we call: each answers (error, *results); work is done at once."""

    cudaStreamNonBlocking = 1  # noqa: N815
    cudaHostAllocMapped = 2  # noqa: N815
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrIntegrated=18, cudaDevAttrCanMapHostMemory=19)  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, is_integrated: bool) -> None:
        self.is_integrated = is_integrated
        self.heap = HostHeap()
        self.failing: dict[str, int] = {}
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(found):
            return found
        self.calls.append(name)
        return (lambda *arguments: (self.failing[name],)) if name in self.failing else found

    def cudaSetDevice(self, device: int) -> Any:  # noqa: N802
        return (0,)

    def cudaFree(self, address: int) -> Any:  # noqa: N802
        if address:
            self.heap.drop(address)
        return (0,)

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> Any:  # noqa: N802
        return 0, int(self.is_integrated or attribute == 19)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        return 0, 77

    def cudaMalloc(self, size: int) -> Any:  # noqa: N802
        return 0, self.heap.take(size)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:  # noqa: N802
        assert flags == (2 if self.is_integrated else 0)
        return 0, self.heap.take(size)

    def cudaFreeHost(self, address: int) -> Any:  # noqa: N802
        return self.cudaFree(address)

    def cudaHostGetDevicePointer(self, address: int, flags: int) -> Any:  # noqa: N802
        return 0, address

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> Any:  # noqa: N802
        ctypes.memmove(target, source, size)
        return (0,)

    def cudaMemcpy2DAsync(self, target: int, pitch: int, source: int, other: int, width: int, height: int, kind: int, stream: int) -> Any:  # noqa: N802
        for row in range(height):
            ctypes.memmove(target + row * pitch, source + row * other, width)
        return (0,)

    def cudaMemsetAsync(self, target: int, value: int, size: int, stream: int) -> Any:  # noqa: N802
        ctypes.memset(target, value, size)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> Any:  # noqa: N802
        return (0,)

    def cudaMemGetInfo(self) -> Any:  # noqa: N802
        return 0, 5 << 20, 8 << 20

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:  # noqa: N802
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        return 0, "graph"

    def cudaGraphInstantiateWithFlags(self, graph: str, flags: int) -> Any:  # noqa: N802
        return 0, f"executable {graph}"

    def cudaGraphDestroy(self, graph: str) -> Any:  # noqa: N802
        return (0,)

    def cudaGraphLaunch(self, graph: str, stream: int) -> Any:  # noqa: N802
        return (0,)

    def cudaGraphExecDestroy(self, graph: str) -> Any:  # noqa: N802
        return (0,)

    def cudaStreamDestroy(self, stream: int) -> Any:  # noqa: N802
        return (0,)

    def cudaGetErrorString(self, error: int) -> Any:  # noqa: N802
        return 0, b"words for %d" % error


class FakePycuda:
    """`pycuda.driver`, as far as we use it. Calls without a pushed context fail, as they do there."""

    class Error(Exception):
        pass

    device_attribute = SimpleNamespace(INTEGRATED="integrated", CAN_MAP_HOST_MEMORY="map")
    host_alloc_flags = SimpleNamespace(DEVICEMAP=2)

    def __init__(self, is_integrated: bool) -> None:
        self.is_integrated = is_integrated
        self.heap = HostHeap()
        self.pushed = 0
        self.retained = 0
        self.failing: dict[str, str] = {}

    def check(self, call: str) -> None:
        if call in self.failing:
            raise self.Error(self.failing[call])
        if not self.pushed:
            raise self.Error(f"{call} failed: invalid device context")

    def init(self) -> None:
        if "init" in self.failing:
            raise self.Error(self.failing["init"])

    def Device(self, ordinal: int) -> Any:  # noqa: N802
        return SimpleNamespace(
            retain_primary_context=self.retain,
            get_attribute=lambda name: self.is_integrated or name == "map",
        )

    def retain(self) -> Any:
        self.retained += 1
        return SimpleNamespace(push=self.count("pushed", 1), pop=self.count("pushed", -1), detach=self.count("retained", -1))

    def count(self, name: str, change: int) -> Callable[[], None]:
        return lambda: setattr(self, name, getattr(self, name) + change)

    def Stream(self, flags: int) -> Any:  # noqa: N802
        self.check("cuStreamCreate")
        assert flags == 1
        return SimpleNamespace(handle=77, synchronize=lambda: self.check("cuStreamSynchronize"))

    def mem_alloc(self, size: int) -> Any:
        self.check("cuMemAlloc")
        return FakeAllocation(self.heap, size)

    def pagelocked_empty(self, shape: Any, dtype: Any, order: str, mem_flags: int) -> Any:
        self.check("cuMemHostAlloc")
        assert mem_flags == (2 if self.is_integrated else 0)
        return PageLocked(FakeAllocation(self.heap, shape[0]))

    def memcpy_htod_async(self, target: int, source: Any, stream: Any) -> None:
        self.check("cuMemcpyHtoDAsync")
        ctypes.memmove(target, source.ctypes.data, source.nbytes)

    def memcpy_dtoh_async(self, target: Any, source: int, stream: Any) -> None:
        self.check("cuMemcpyDtoHAsync")
        ctypes.memmove(target.ctypes.data, source, target.nbytes)

    def memset_d8_async(self, target: int, value: int, size: int, stream: Any) -> None:
        ctypes.memset(target, value, size)

    def mem_get_info(self) -> Any:
        return 5 << 20, 8 << 20

    def Memcpy2D(self) -> Any:  # noqa: N802
        return FakeMemcpy2D()


class FakeAllocation:
    def __init__(self, heap: HostHeap, size: int) -> None:
        self.heap, self.size, self.address = heap, size, heap.take(size)

    def __int__(self) -> int:
        return self.address

    def get_device_pointer(self) -> int:
        return self.address

    def free(self) -> None:
        self.heap.drop(self.address)


class PageLocked(np.ndarray):  # Python 3.8 runs these tests too, and has no np.ndarray[…]
    """An array whose `base` is the allocation, which numpy itself would not allow."""

    def __new__(cls, allocation: FakeAllocation) -> PageLocked:
        array = np.ctypeslib.as_array((ctypes.c_uint8 * allocation.size).from_address(allocation.address)).view(cls)
        array.allocation = allocation
        return array

    allocation: FakeAllocation

    @property
    def base(self) -> Any:
        return self.allocation


class FakeMemcpy2D:
    src_pitch = dst_pitch = width_in_bytes = height = source = target = 0

    def set_src_device(self, address: int) -> None:
        self.source = address

    def set_dst_device(self, address: int) -> None:
        self.target = address

    def __call__(self, stream: Any) -> None:
        for row in range(self.height):
            ctypes.memmove(self.target + row * self.dst_pitch, self.source + row * self.src_pitch, self.width_in_bytes)


Made = Tuple[DeviceMemory, Any]


@pytest.fixture(params=["cuda-python", "cuda-python integrated", "pycuda", "pycuda integrated"])
def made(request: pytest.FixtureRequest) -> Made:
    """A memory and the fake module below it."""
    is_integrated = "integrated" in request.param
    fake: Any = FakeRuntime(is_integrated) if "cuda-python" in request.param else FakePycuda(is_integrated)
    memory: DeviceMemory = CudaPythonMemory(fake) if isinstance(fake, FakeRuntime) else PycudaMemory(fake)
    assert memory.is_mapped == is_integrated
    return memory, fake


def test_memory_goes_up_across_and_down_and_is_given_back(made: Made) -> None:
    memory, fake = made
    up, down = TensorBuffer(memory, 12), TensorBuffer(memory, 12)
    up.view("uint8", (12,))[:] = range(12)
    up.upload(12)
    place = memory.allocate(64)
    memory.zero(place, 64)
    memory.copy_rows(place + 1, 32, up.address, 6, 3, 2)
    memory.copy_rows(down.address, 6, place, 32, 6, 2)
    down.download(12)
    memory.synchronize()
    assert down.view("uint8", (12,)).tolist() == [0, 0, 1, 2, 0, 0, 0, 6, 7, 8, 0, 0]
    assert (memory.stream, memory.free_bytes()) == (77, 5 << 20)
    for buffer in (up, down):
        buffer.close()
    memory.free(place)
    assert fake.heap.live == {}
    memory.close()
    if isinstance(fake, FakePycuda):
        assert (fake.pushed, fake.retained) == (0, 0)


def test_a_buffer_that_grows_gives_the_old_memory_back(made: Made) -> None:
    memory, fake = made
    buffer = TensorBuffer(memory)
    for size in (0, 10, 5, 4000):
        buffer.grow(size)
        assert buffer.address
        assert buffer.size >= size
    assert len(fake.heap.live) == (1 if memory.is_mapped else 2)
    with pytest.raises(ValueError, match="4004 bytes of a buffer of 4000"):
        buffer.view("float32", (1001,))


def test_graphs_are_captured_and_forgotten() -> None:
    fake = FakeRuntime(False)
    memory = CudaPythonMemory(fake)
    fake.calls.clear()
    graph = memory.capture(lambda: memory.zero(memory.allocate(4), 4))
    memory.launch(graph)
    memory.forget(graph)
    assert fake.calls == [
        *("cudaStreamBeginCapture", "cudaMalloc", "cudaMemsetAsync", "cudaStreamEndCapture"),
        *("cudaGraphInstantiateWithFlags", "cudaGraphDestroy", "cudaGraphLaunch", "cudaGraphExecDestroy"),
    ]


def test_a_capture_that_fails_leaves_the_stream_usable() -> None:
    fake = FakeRuntime(False)
    memory = CudaPythonMemory(fake)
    fake.failing["cudaMemsetAsync"] = 906
    with pytest.raises(EngineError, match="cudaMemsetAsync failed with error 906"):
        memory.capture(lambda: memory.zero(0, 1))
    assert fake.calls[-2:] == ["cudaGetErrorString", "cudaStreamEndCapture"]


def test_errors_are_told_and_a_lost_context_is_no_error_of_one_request() -> None:
    fake = FakeRuntime(False)
    memory = CudaPythonMemory(fake)
    fake.failing.update(cudaMalloc=2, cudaStreamSynchronize=700)
    with pytest.raises(EngineError, match=r"cudaMalloc failed with error 2 \(words for 2\); free memory"):
        memory.allocate(1)
    with pytest.raises(DeviceLost, match="error 700"):
        memory.synchronize()
    pycuda = FakePycuda(False)
    other = PycudaMemory(pycuda)
    pycuda.failing.update(cuMemAlloc="cuMemAlloc failed: out of memory")
    with pytest.raises(EngineError, match=r"mem_alloc failed with error 2 \(cuMemAlloc failed: out of memory\); free memory"):
        other.allocate(1)
    pycuda.failing.update(cuStreamSynchronize="cuStreamSynchronize failed: an illegal memory access was encountered")
    with pytest.raises(DeviceLost, match="illegal memory access"):
        other.synchronize()
    assert not issubclass(DeviceLost, Exception)


def test_a_driver_that_is_missing_is_told_as_old_versions_tell_it() -> None:
    class Driverless(FakeRuntime):
        def cudaSetDevice(self, device: int) -> Any:  # noqa: N802
            raise RuntimeError("Failed to dlopen libcuda.so.1")

    with pytest.raises(EngineError, match=r"cudaSetDevice cannot be called: Failed to dlopen libcuda.so.1"):
        CudaPythonMemory(Driverless(False))


def test_a_package_that_is_missing_or_unknown_is_named() -> None:
    with pytest.raises(EngineError, match="unknown package 'cupy'"):
        open_device_memory("cupy")
    if importlib.util.find_spec("pycuda") is None:
        with pytest.raises(EngineError, match=r"pycuda \(No module named 'pycuda'\); install cuda-python or pycuda"):
            open_device_memory("pycuda")


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="cuda-python is not installed")
def test_the_real_package_without_a_driver_says_so() -> None:
    script = "from models.engines.device_memory import open_device_memory\nopen_device_memory('cuda-python')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    if done.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert "EngineError: CUDA: cudaSetDevice failed with error 35 (CUDA driver version is insufficient" in done.stderr
