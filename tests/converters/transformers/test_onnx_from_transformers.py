"""Exported graphs against torch: small random models of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from converters.errors import ConversionError
from converters.graph import opset_of
from converters.onnx_from_transformers import onnx_from_transformers
from models.manifest import GenerationManifest
from tests.converters.transformers.tiny_models import (
    DETECTORS,
    ENCODERS,
    HEIGHT,
    WIDTH,
    detection_facts,
    files_of,
    manifest_for,
    save_detector,
    save_encoder,
)

torch = pytest.importorskip("torch")
DELTA = 1e-4


def export(folder: Path, task: str, opset: int = 17, **facts: Any) -> Path:
    manifest = manifest_for(task, **facts)
    assert not isinstance(manifest, GenerationManifest)
    return onnx_from_transformers(files_of(folder), manifest, folder / "out.onnx", opset, lambda fraction, message: None)


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def pictures(count: int, height: int, width: int) -> NDArray[np.float32]:
    return np.random.default_rng(count).random((count, 3, height, width), np.float32)


@pytest.mark.parametrize("model_type", DETECTORS)
def test_a_detector_is_what_it_was(model_type: str, tmp_path: Path) -> None:
    model = save_detector(model_type, tmp_path)
    path = export(tmp_path, "detection", **detection_facts(model_type))
    graph = onnx.load(str(path))
    assert [value.name for value in graph.graph.input] == ["pixel_values"]
    assert [value.name for value in graph.graph.output] == ["logits", "pred_boxes"]
    assert opset_of(graph) == 17
    is_fixed = DETECTORS[model_type][2] == "stretch"
    shape = graph.graph.input[0].type.tensor_type.shape.dim
    assert [side.dim_param or side.dim_value for side in shape] == ["batch", 3, *((HEIGHT, WIDTH) if is_fixed else ("height", "width"))]
    sizes = [(1, HEIGHT, WIDTH), (2, HEIGHT, WIDTH), *(() if is_fixed else ((1, 192, 160), (2, 224, 288)))]
    runtime = session(path)
    for size in sizes:
        values = pictures(*size)
        with torch.no_grad():
            expected = model(pixel_values=torch.from_numpy(values))
        logits, boxes = runtime.run(None, {"pixel_values": values})
        assert np.abs(logits - expected.logits.numpy()).max() < DELTA, size
        assert np.abs(boxes - expected.pred_boxes.numpy()).max() < DELTA, size


@pytest.mark.parametrize("is_classifier", [False, True], ids=["embedding", "classification"])
@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_encoder_is_what_it_was(model_type: str, is_classifier: bool, tmp_path: Path) -> None:
    model = save_encoder(model_type, tmp_path, is_classifier)
    path = export(tmp_path, "classification" if is_classifier else "embedding")
    graph = onnx.load(str(path))
    inputs = [value.name for value in graph.graph.input]
    assert inputs[:2] == ["input_ids", "attention_mask"] and set(inputs[2:]) <= {"token_type_ids"}
    field = "logits" if is_classifier else "last_hidden_state"
    assert [value.name for value in graph.graph.output] == [field]
    runtime, rng = session(path), np.random.default_rng(0)
    for rows, tokens in ((1, 7), (2, 33), (3, 64)):
        ids = rng.integers(2, 200, (rows, tokens))
        mask = np.ones_like(ids)
        mask[0, tokens // 2 :] = 0
        fed = {name: {"input_ids": ids, "attention_mask": mask}.get(name, np.zeros_like(ids)) for name in inputs}
        with torch.no_grad():
            expected = model(**{name: torch.from_numpy(values) for name, values in fed.items()})[field].numpy()
        found = runtime.run(None, fed)[0]
        assert np.abs(found - expected).max() < DELTA * (1 + np.abs(expected).max()), (rows, tokens)


@pytest.mark.parametrize("opset", [16, 20])
@pytest.mark.parametrize("model_type", ["detr", "rt_detr", "d_fine"])
def test_the_operator_set_is_the_one_asked_for(model_type: str, opset: int, tmp_path: Path) -> None:
    save_detector(model_type, tmp_path)
    graph = onnx.load(str(export(tmp_path, "detection", opset, **detection_facts(model_type))))
    assert opset_of(graph) == opset
    assert graph.ir_version <= 9
    kinds = {tensor.data_type for tensor in graph.graph.initializer}
    assert onnx.TensorProto.DOUBLE not in kinds
    read = {name for node in graph.graph.node for name in node.input}
    assert {tensor.name for tensor in graph.graph.initializer} <= read


def test_old_weights_are_read_as_numbers_and_code_in_them_is_not_run(tmp_path: Path) -> None:
    model = save_encoder("bert", tmp_path, is_classifier=True)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    export(tmp_path, "classification")

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "was_here",))

    torch.save({**model.state_dict(), "evil": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="cannot load"):
        export(tmp_path, "classification")
    assert not (tmp_path / "was_here").exists()


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    save_detector("detr", tmp_path)
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    weights.pop(next(name for name in weights if name.startswith("class_labels_classifier")))
    safetensors.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="no fitting weights for 1 "):
        export(tmp_path, "detection", **detection_facts("detr"))


def test_a_backbone_of_timm_is_refused_with_the_way_out(tmp_path: Path) -> None:
    save_detector("detr", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "use_timm_backbone": True, "backbone_config": None}))
    with pytest.raises(ConversionError, match="no_timm"):
        export(tmp_path, "detection", **detection_facts("detr"))
