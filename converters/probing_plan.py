"""Where does a plan leave its source? The same plan once more, with inner values as outputs: what a builder did, no graph shows.

What only fusing kernels brings about may be gone then; nothing is named in that case.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper

from converters.engine_process import EngineProcess
from converters.errors import ConversionError
from converters.graph import element_types
from converters.ladder import Rung
from converters.plan_process import build_plan
from converters.sensitive_nodes import MOVERS
from converters.verdict import WorstTensor
from converters.worst_tensor import CHOICE, Feeds, Probe, first_wrong
from models.engines import EngineError, EngineOptions

# Values that are made outputs at most: all of a small network, every few of a large one.
PROBED = 256
# A plan that took longer is not built twice for a name.
MAX_BUILD_S = 900.0

log = logging.getLogger(__name__)


def worst_in_plan(
    python: Path, request: Mapping[str, Any], source: Path, feeds: tuple[Feeds, Feeds], precision: Rung, scratch: Path, threads: int
) -> WorstTensor | None:
    """As `worst_tensor`, of the plan that `request` (see `tensorrt_from_onnx/request.py`) asks for. `feeds`: inputs of source and plan.

    As there, the plan is given the source's choices. None also where no such plan can be had.
    """
    candidate = Path(request["onnx"])
    # Beside the graph, for that is where its weights are looked for.
    graph, folder = candidate.with_name(f"probed_{candidate.name}"), scratch / "probe"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    exact, probed = Probe(source, threads), Probe(candidate, threads)
    chosen = [name for name in exact.choices if name in probed.choices]
    probed.replace(chosen, exact.run(chosen, feeds[0]) if chosen else {})
    try:
        names = write_probed(probed, graph, exact)
        build_plan(python, {**request, "onnx": str(graph), "plan": str(folder / "model.plan")}, lambda fraction, message: None)
        with EngineProcess(python, folder, "probe", EngineOptions()) as process:
            found = process.run({**feeds[1], **probed.given})
    except (ConversionError, EngineError) as error:
        if isinstance(error, ConversionError) and error.code == "cancelled":
            raise
        log.warning("the tensor is not named: %s", error)
        return None
    finally:
        graph.unlink(missing_ok=True)
    return first_wrong(names, exact.operators, exact.run(names, feeds[0]), found, precision)


def write_probed(candidate: Probe, target: Path, exact: Probe) -> list[str]:
    """Write the graph with up to PROBED of the floating-point values that the source has too as outputs; their names, as computed."""
    model = candidate.model
    types, outputs = element_types(model), {value.name for value in model.graph.output}
    computed = [node for node in model.graph.node if node.op_type not in (*MOVERS, CHOICE)]
    made = [name for node in computed for name in node.output if name in exact.operators]
    names = [name for name in made if types.get(name) in (TensorProto.FLOAT, TensorProto.FLOAT16)]
    step = max(1, -(-len(names) // PROBED))
    picked = [name for index, name in enumerate(names) if index % step == 0 or name in outputs]
    model.graph.output.extend(helper.make_tensor_value_info(name, types[name], None) for name in picked if name not in outputs)
    target.write_bytes(model.SerializeToString())
    return picked
