"""Writes an ONNX graph node by node, its weights streamed into one external file so that the runtime can map them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

# The newest that TensorRT 8.5 reads, and with 4-bit constants.
OPSET = 17
OPSET_WITH_CODES = 21
# The oldest runtime that a device may bring (ONNX Runtime 1.19, the last for Python 3.8) reads up to 10.
IR_VERSIONS = {OPSET: 9, OPSET_WITH_CODES: 10}
PAGE_BYTES = 4096
INLINE_BYTES = 65_536
MICROSOFT = "com.microsoft"


class GraphWriter:
    """Collects nodes and constants; constants above 64 KiB go to `{name}.data` beside the graph at once."""

    def __init__(self, folder: Path, name: str = "model.onnx", opset: int = OPSET) -> None:
        self.opset = opset
        self._path = folder / name
        self._data_path = folder / f"{name}.data"
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def __enter__(self) -> GraphWriter:
        self._data = self._data_path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._data.close()

    def input(self, name: str, kind: int, shape: Sequence[str | int]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def output(self, name: str, kind: int, shape: Sequence[str | int]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, kind, list(shape)))

    def node(self, operator: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output and return that output's name."""
        return self.nodes(operator, inputs, [output], domain, **attributes)[0]

    def nodes(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any) -> Sequence[str]:
        """Append a node with several outputs; an empty name leaves an optional one out."""
        name = next(output for output in outputs if output)
        self._nodes.append(helper.make_node(operator, list(inputs), list(outputs), name=f"{name}/{operator}", domain=domain, **attributes))
        return outputs

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Add a constant (once for each name) and return its name."""
        if name in self._constants:
            return name
        return self._add(name, np.ascontiguousarray(values), helper.np_dtype_to_tensor_dtype(values.dtype), values.shape)

    def packed(self, name: str, values: NDArray[np.uint8], shape: Sequence[int]) -> str:
        """Add a constant of signed 4-bit numbers, two to a byte, the first in the low half."""
        return name if name in self._constants else self._add(name, values, TensorProto.INT4, shape)

    def _add(self, name: str, values: NDArray[Any], kind: int, shape: Sequence[int]) -> str:
        tensor = TensorProto(name=name, data_type=kind, dims=shape)
        if values.nbytes <= INLINE_BYTES:
            tensor.raw_data = values.tobytes()
            self._constants[name] = tensor
            return name
        # Mapping begins at page boundaries, so each constant does too.
        self._data.write(b"\0" * (-self._data.tell() % PAGE_BYTES))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._data_path.name), ("offset", self._data.tell()), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(values.data)
        self._constants[name] = tensor
        return name

    def integers(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, np.int64))

    def save(self, graph_name: str, properties: dict[str, str]) -> Path:
        domains = {"": self.opset} | {node.domain: 1 for node in self._nodes if node.domain}
        graph = helper.make_graph(self._nodes, graph_name, self._inputs, self._outputs, list(self._constants.values()))
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in domains.items()],
            ir_version=IR_VERSIONS[self.opset],
            producer_name="hotspare",
        )
        helper.set_model_props(model, properties)
        self._path.write_bytes(model.SerializeToString())
        return self._path
