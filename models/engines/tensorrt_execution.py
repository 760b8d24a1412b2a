"""One execution context of a plan on one stream: the shapes and addresses it was told last, and the CUDA graph of what repeats.

API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/ExecutionContext.html
"""

from __future__ import annotations

import logging
from typing import Any, Callable, Dict, Mapping, Tuple

from models.engines import EngineError
from models.engines.device_memory import DeviceMemory
from models.engines.tensorrt_logger import logger_of
from models.engines.tensorrt_plan import Plan

log = logging.getLogger(__name__)


def nothing() -> None:
    """Nothing to queue."""


class Execution:
    """Tell it shapes, then addresses, then run; what has not changed is not told again.

    A graph holds shapes and addresses, and a context that was changed since makes it worthless, so there is one graph at most: of the
    last shapes and addresses, captured when they come for the second time. The first run lets TensorRT finish what a change left to do.
    """

    def __init__(self, plan: Plan, memory: DeviceMemory, captures: bool) -> None:
        self._plan = plan
        self._memory = memory
        self._captures = captures and memory.can_capture and not plan.host_inputs
        self._logger = logger_of(plan.module)
        self._logger.forget()
        self._context = plan.engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"{plan.artefact}: TensorRT has no memory to run it: {self._logger.last_words()}")
        self._profile = 0
        self._shapes: Dict[str, Tuple[int, ...]] = {}
        self._addresses: Dict[str, int] = {}
        self._runs = 0
        self._graph: Any = None

    def reshape(self, shapes: Mapping[str, Tuple[int, ...]]) -> None:
        """Shapes of all inputs. Raises EngineError when no profile of the plan admits them."""
        changed = {name: tuple(shape) for name, shape in shapes.items() if self._shapes.get(name) != tuple(shape)}
        if not changed:
            return
        profile = self._plan.profile_for(shapes)
        self._forget_graph()
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, self._memory.stream):
                raise self._failure(f"profile {profile} cannot be chosen")
            self._memory.synchronize()
            self._profile = profile
            self._addresses = {}
            changed = dict(shapes)
        self._shapes = {}  # a half told context is told everything again
        for name, shape in changed.items():
            if not self._context.set_input_shape(name, tuple(shape)):
                raise self._failure(f"input {name!r} cannot have shape {list(shape)}")
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Addresses of inputs and outputs; of `host_inputs` those on the host."""
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._forget_graph()
                if not self._context.set_tensor_address(name, address):
                    raise self._failure(f"{name!r} cannot lie at {address:#x}")
                self._addresses[name] = address

    def allocate_with(self, name: str, allocator: Any) -> None:
        """Have an output whose shape depends on data allocated by an IOutputAllocator; such runs are not captured."""
        self._captures = False
        if not self._context.set_output_allocator(name, allocator):
            raise self._failure(f"output {name!r} cannot be allocated while running")

    def infer_shapes(self) -> None:
        """Have the shapes of outputs follow from inputs. Raises EngineError with the inputs that are not known well enough."""
        missing = self._context.infer_shapes()
        if missing:
            raise self._failure(f"shapes or values of {', '.join(missing)} are missing")

    def shape(self, name: str) -> Tuple[int, ...]:
        """The shape of a tensor as it follows from those of the inputs; -1 where it depends on data."""
        return tuple(self._context.get_tensor_shape(name))

    def run(self, before: Callable[[], None] = nothing, after: Callable[[], None] = nothing) -> None:
        """Queue `before`, the model and `after`, the same calls for the same shapes and addresses; does not wait."""

        def queue() -> None:
            before()
            if not self._context.execute_async_v3(self._memory.stream):
                raise self._failure("it cannot be run")
            after()

        if self._graph is None and self._captures and self._runs:
            self._capture(queue)
        if self._graph is None:
            queue()
        else:
            self._memory.launch(self._graph)
        self._runs += 1

    def close(self) -> None:
        self._forget_graph()
        self._context = None

    def _capture(self, queue: Callable[[], None]) -> None:
        try:
            self._graph = self._memory.capture(queue)
        except EngineError as error:
            log.warning("%s runs without a CUDA graph: %s", self._plan.artefact, error)
            self._captures = False

    def _forget_graph(self) -> None:
        self._runs = 0
        if self._graph is not None:
            graph, self._graph = self._graph, None
            self._memory.forget(graph)

    def _failure(self, what: str) -> EngineError:
        words = self._logger.last_words()
        self._logger.forget()
        return EngineError(f"{self._plan.artefact}: {what}: {words}")
