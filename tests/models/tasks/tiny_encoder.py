"""A text encoder of one lookup: enough to follow every padded and masked token through the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save_model

VOCABULARY, DIMENSIONS = 50, 6
TABLE = np.random.default_rng(2).standard_normal((VOCABULARY, DIMENSIONS)).astype(np.float32)


def write_tiny_encoder(folder: Path, inputs: Sequence[str] = ("input_ids", "attention_mask"), dtype: int = TensorProto.INT64) -> Path:
    """Write a model.onnx: `last_hidden_state` = the row of TABLE of each id (padding too), `logits` = the sum of these rows where the
    attention mask is 1, or of all."""
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])]
    summed = "last_hidden_state"
    if "attention_mask" in inputs:
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["weights"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["weights", "last_axis"], ["columns"]),
            helper.make_node("Mul", ["last_hidden_state", "columns"], ["masked"]),
        ]
        summed = "masked"
    nodes.append(helper.make_node("ReduceSum", [summed, "token_axis"], ["logits"], keepdims=0))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, dtype, ["batch", "tokens"]) for name in inputs],
        [
            helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "tokens", DIMENSIONS]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", DIMENSIONS]),
        ],
        [
            numpy_helper.from_array(TABLE, "table"),
            numpy_helper.from_array(np.array([1], np.int64), "token_axis"),
            numpy_helper.from_array(np.array([-1], np.int64), "last_axis"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / "model.onnx"))
    return folder
