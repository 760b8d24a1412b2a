"""One plan from one ONNX file: parse, configure, build, publish. Nothing of the plan is visible before it is whole and on the disk."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional

from converters.tensorrt_from_onnx import network as networks
from converters.tensorrt_from_onnx.accelerator import Placed, layers_on_dla
from converters.tensorrt_from_onnx.callbacks import Messages, new_logger, new_monitor
from converters.tensorrt_from_onnx.errors import PlanError, build_error
from converters.tensorrt_from_onnx.module import Capabilities, capabilities_of, load_module, open_builder
from converters.tensorrt_from_onnx.progress import BUILT, PARSED, Progress
from converters.tensorrt_from_onnx.request import PlanRequest
from converters.tensorrt_from_onnx.timing_cache import keep_timing_cache, use_timing_cache
from models.durable import write_atomically

TELL_EACH_S = 0.25
# Also without anything new: who waits sees that the process lives.
TELL_AGAIN_S = 5.0

log = logging.getLogger(__name__)

Report = Callable[[str, float, str], None]


@dataclass(frozen=True)
class PlanResult:
    """layers: of the network, before TensorRT fused them. dla_layers: those that run on the DLA; None without one, or where the plan
    does not tell. dla_candidates: those that could. seconds: of all of it. fp32_layers: how many the patterns pinned."""

    tensorrt: str
    layers: int
    dla_layers: Optional[int]
    dla_candidates: Optional[int]
    fp32_layers: int
    seconds: float
    size_bytes: int

    def to_json(self) -> Dict[str, Any]:
        return asdict(self)


def build_plan(request: PlanRequest, report: Report, is_cancelled: Callable[[], bool] = lambda: False) -> PlanResult:
    """Blocks for seconds to tens of minutes; once in a process, for TensorRT keeps the first logger that it is given.

    `report` gets phase, fraction of the whole, message, from another thread while TensorRT works. Raises PlanError, and OSError when
    the plan cannot be written.
    """
    start = time.monotonic()
    report("load", 0.0, request.module)
    trt = load_module(request.module)
    capabilities = capabilities_of(trt)
    progress, messages, placed = Progress(), Messages(), Placed()
    # Nobody listens any more: the process that asked is gone.
    abandoned = threading.Event()

    def is_ended() -> bool:
        return abandoned.is_set() or is_cancelled()

    # Everything that TensorRT holds a pointer to stays in a variable of this function: it counts no references, and would crash.
    logger = new_logger(trt, messages, placed.read if capabilities.has_progress else _both(progress.read, placed.read))
    builder = open_builder(trt, logger)
    trt.init_libnvinfer_plugins(logger, "")
    report("parse", 0.01, f"{request.onnx.name} with {capabilities.name}")
    network = networks.create_network(trt, capabilities, request, builder)
    parser = networks.parse(trt, request, network, logger, messages)
    _check(is_ended)
    config = builder.create_builder_config()
    monitor = new_monitor(trt, progress, is_ended) if capabilities.has_progress else None
    if monitor is not None:
        config.progress_monitor = monitor
    _configure(trt, capabilities, request, config)
    profiles = networks.add_profiles(request, builder, network, config, messages)
    pinned = networks.set_precision(trt, capabilities, request, network, config)
    dla_layers = candidates = None
    if request.dla_core >= 0:
        candidates, layers = networks.use_accelerator(trt, request, builder, network, config)
        report("parse", PARSED, f"{candidates} of {layers} layers can run on DLA core {request.dla_core}, the rest runs on the GPU")
    cache = request.timing_cache if capabilities.has_timing_cache else None
    used = None if cache is None else use_timing_cache(config, cache, capabilities.version)
    messages.forget()
    report("build", PARSED, _memory_note(request))
    with _telling(progress, report, start, abandoned):
        host_memory = builder.build_serialized_network(network, config)
    _check(is_ended)
    if host_memory is None:
        raise build_error(messages.errors(), "TensorRT built nothing and gave no reason")
    if cache is not None and used is not None:
        keep_timing_cache(config, cache, capabilities.version)
    report("write", BUILT, f"{host_memory.nbytes / 1e6:.1f} MB")
    write_atomically(request.plan, memoryview(host_memory))
    if request.dla_core >= 0:
        names = [network.get_layer(index).name for index in range(network.num_layers)]
        dla_layers = layers_on_dla(trt, logger, host_memory, names, placed)
    log.debug("kept until here: %s %s %s", parser, monitor, profiles)
    seconds = round(time.monotonic() - start, 3)
    return PlanResult(capabilities.version, network.num_layers, dla_layers, candidates, pinned, seconds, host_memory.nbytes)


def _configure(trt: Any, capabilities: Capabilities, request: PlanRequest, config: Any) -> None:
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if capabilities.has_level:
        config.builder_optimization_level = request.optimization_level
    elif request.optimization_level != 3:
        log.info("%s has no optimization levels", capabilities.name)
    if request.version_compatible:
        _require(capabilities, capabilities.has_version_compatible, "version-compatible plans")
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if request.hardware_compatible:
        _require(capabilities, capabilities.has_hardware_compatible, "a choice of hardware compatibility")
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _both(*readers: Callable[[str], None]) -> Callable[[str], None]:
    def read(message: str) -> None:
        for reader in readers:
            reader(message)

    return read


def _require(capabilities: Capabilities, has: bool, what: str) -> None:
    if not has:
        raise PlanError("unsupported", f"{capabilities.name} has no {what}: build without")


def _check(is_ended: Callable[[], bool]) -> None:
    if is_ended():
        raise PlanError("cancelled", "the build was cancelled; nothing was written")


def _memory_note(request: PlanRequest) -> str:
    available = available_bytes()
    if available is not None and available < request.workspace_bytes:
        note = f"the workspace may take {request.workspace_bytes >> 20} MiB, but only {available >> 20} MiB of memory are free"
        log.warning("%s", note)
        return note
    return f"workspace {request.workspace_bytes >> 20} MiB"


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> Optional[int]:
    """MemAvailable; on a Jetson that is what the GPU can have too."""
    try:
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) << 10
    except (OSError, ValueError, IndexError):
        return None
    return None


@contextmanager
def _telling(progress: Progress, report: Report, start: float, abandoned: threading.Event) -> Iterator[None]:
    """Report what is new from a thread of its own: TensorRT's threads do no output, and TensorRT 8 calls nothing back for minutes."""
    ended = threading.Event()

    def tell() -> None:
        last, told_at = ("", -1.0), time.monotonic()
        while not ended.wait(TELL_EACH_S):
            now = progress.now()
            if now != last or time.monotonic() - told_at > TELL_AGAIN_S:
                last, told_at = now, time.monotonic()
                phase, fraction = now
                message = f"{phase or 'starting'}, {time.monotonic() - start:.0f} s"
                try:
                    report("build", PARSED + (BUILT - PARSED) * fraction, message)
                except OSError as error:
                    log.warning("nobody reads the progress any more (%s): the build ends", error)
                    abandoned.set()
                    return

    thread = threading.Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
