from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from converters.errors import ConversionError
from converters.onnx_from_onnx import GraphTarget, check_model, onnx_from_onnx
from converters.verify_onnx import open_result, open_source, verify_detection, verify_encoder
from models.engines.onnx import OnnxEngine
from tests.converters.manifests import detection_manifest, embedding_manifest
from tests.converters.tiny_onnx import detector, encoder, model, save


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    scratch, folder = tmp_path / "scratch", tmp_path / "engine"
    scratch.mkdir()
    folder.mkdir()
    return scratch, folder


def test_an_optimised_detector_finds_the_same_boxes(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    scratch, folder = folders
    manifest = detection_manifest()
    source = onnx_from_onnx(save(tmp_path / "m.onnx", detector()), {}, scratch, folder, manifest)
    verdict = verify_detection(manifest, open_source(source, 1), open_result(folder / "model.onnx", 1))
    assert verdict.passed
    assert verdict.figures["compared_boxes"] >= 20
    assert verdict.figures["max_score_delta"] < 1e-4


def test_another_detector_does_not_pass(tmp_path: Path) -> None:
    manifest = detection_manifest()
    source, other = save(tmp_path / "m.onnx", detector()), save(tmp_path / "n.onnx", detector(0.03))
    verdict = verify_detection(manifest, open_source(source, 1), open_result(other, 1))
    assert not verdict.passed
    assert "score_delta" in verdict.reason or "matched_boxes" in verdict.reason


class Nudged:
    """A detector whose surest box has another score, by `delta`, in so many of its first runs."""

    def __init__(self, engine: OnnxEngine, delta: float, runs: int) -> None:
        self.inputs, self.outputs, self.provider = engine.inputs, engine.outputs, engine.provider
        self._engine, self._delta, self._runs = engine, delta, runs

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = self._engine.run(inputs)
        if self._runs > 0:
            logits = np.array(outputs["logits"])
            place = np.unravel_index(logits.argmax(), logits.shape)
            score = 1 / (1 + np.exp(-logits[place])) + self._delta
            logits[place] = np.log(score / (1 - score))
            self._runs -= 1
            outputs = {**outputs, "logits": logits}
        return outputs

    def close(self) -> None:
        self._engine.close()


@pytest.mark.parametrize(
    ("delta", "runs", "refused_by"),
    [(-0.1, 1, ""), (-0.3, 1, "max_score_delta"), (-0.05, 4, ""), (-0.1, 4, "p99_score_delta"), (-0.03, 16, "p95_score_delta")],
)
def test_few_of_many_boxes_may_have_another_score_the_fewer_the_further(tmp_path: Path, delta: float, runs: int, refused_by: str) -> None:
    source = save(tmp_path / "m.onnx", detector())
    found = verify_detection(detection_manifest(), open_source(source, 1), Nudged(open_result(source, 1), delta, runs))
    assert found.figures["compared_boxes"] == 320
    assert found.figures["max_score_delta"] == pytest.approx(-delta, abs=0.02)
    assert refused_by in found.reason and found.passed == (not refused_by)


def test_an_encoder_keeps_its_vectors(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    scratch, folder = folders
    manifest = embedding_manifest()
    source = onnx_from_onnx(save(tmp_path / "m.onnx", encoder()), {}, scratch, folder, manifest)
    verdict = verify_encoder(manifest, open_source(source, 1), open_result(folder / "model.onnx", 1), None)
    assert verdict.passed
    assert verdict.figures["min_cosine"] > 0.99999


def test_vectors_that_are_not_numbers_do_not_pass(tmp_path: Path) -> None:
    broken = encoder()
    broken.graph.initializer[0].raw_data = np.full((64, 8), np.nan, np.float32).tobytes()
    source, other = save(tmp_path / "m.onnx", encoder()), save(tmp_path / "n.onnx", broken)
    verdict = verify_encoder(embedding_manifest(), open_source(source, 1), open_result(other, 1), None)
    assert not verdict.passed


def test_weights_in_a_listed_file_are_found(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    scratch, folder = folders
    manifest = detection_manifest()
    path = save(tmp_path / "m.onnx", detector(), external="weights.bin")
    blob = (tmp_path / "weights.bin").rename(tmp_path / "blob")
    source = onnx_from_onnx(path, {"weights.bin": blob}, scratch, folder, manifest)
    assert verify_detection(manifest, open_source(source, 1), open_result(folder / "model.onnx", 1)).passed


def test_a_graph_that_folding_would_blow_up_is_kept(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    scratch, folder = folders
    table = np.random.default_rng(0).integers(-128, 128, (2_000_000, 1), dtype=np.int8)
    nodes = [
        helper.make_node("Cast", ["table"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["floats", "input_ids"], ["last_hidden_state"]),
    ]
    value = model(
        nodes, {"input_ids": (TensorProto.INT64, ["N", "T"])}, {"last_hidden_state": (TensorProto.FLOAT, ["N", "T", 1])}, {"table": table}
    )
    path = save(tmp_path / "m.onnx", value)
    onnx_from_onnx(path, {}, scratch, folder, embedding_manifest(dimensions=1))
    assert (folder / "model.onnx").read_bytes() == path.read_bytes()


def place(value: Any, tensor: str, **facts: str) -> None:
    """Make a weight lie elsewhere."""
    found = next(item for item in value.graph.initializer if item.name == tensor)
    found.ClearField("raw_data")
    found.data_location = TensorProto.EXTERNAL
    for key, text in facts.items():
        found.external_data.add(key=key, value=text)


def into_a_subgraph(value: Any) -> None:
    """A secret file read by a constant inside the branch of an If."""
    stolen = TensorProto(name="s", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    stolen.external_data.add(key="location", value="../secret")
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=stolen)], "b", [], [helper.make_tensor_value_info("c", 1, [1])]
    )
    value.graph.node.append(helper.make_node("If", ["condition"], ["stolen"], then_branch=branch, else_branch=branch))


def renamed(value: Any, old: str, new: str) -> None:
    for item in (*value.graph.input, *value.graph.output):
        if item.name == old:
            item.name = new
    for node in value.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


HOSTILE: dict[str, tuple[Callable[[Any], None], str]] = {
    "absolute": (lambda value: place(value, "to_logits", location="/etc/passwd"), "only a file beside"),
    "parent": (lambda value: place(value, "to_logits", location="../weights.bin"), "only a file beside"),
    "hidden parent": (lambda value: place(value, "to_logits", location="a/../../b"), "only a file beside"),
    "windows": (lambda value: place(value, "to_logits", location="..\\b"), "only a file beside"),
    "empty": (lambda value: place(value, "to_logits", location=""), "only a file beside"),
    "unlisted": (lambda value: place(value, "to_logits", location="other.bin"), "does not list"),
    "behind the end": (lambda value: place(value, "to_logits", location="weights.bin", offset="90", length="100"), "which has 100 bytes"),
    "negative": (lambda value: place(value, "to_logits", location="weights.bin", offset="-1"), "lies at -1"),
    "no number": (lambda value: place(value, "to_logits", location="weights.bin", offset="x"), "not one"),
    "in a subgraph": (into_a_subgraph, "only a file beside"),
    "strange domain": (lambda value: value.opset_import.append(helper.make_opsetid("evil.ops", 1)), "'evil.ops'"),
    "opset of tomorrow": (lambda value: value.opset_import[0].CopyFrom(helper.make_opsetid("", 900)), "opset 900"),
    "input missing": (lambda value: renamed(value, "pixel_values", "image"), "no input 'pixel_values'"),
    "output missing": (lambda value: renamed(value, "pred_boxes", "b"), "no output 'pred_boxes'"),
    "input of another type": (
        lambda value: setattr(value.graph.input[0].type.tensor_type, "elem_type", TensorProto.FLOAT16),
        "is float16, not float",
    ),
    "unknown input": (lambda value: value.graph.input.append(helper.make_tensor_value_info("magic", 1, [1])), "'magic' means"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_or_unfit_model_is_refused_before_it_is_loaded(tmp_path: Path, case: str) -> None:
    change, word = HOSTILE[case]
    value = detector()
    change(value)
    path = tmp_path / "m.onnx"
    path.write_bytes(value.SerializeToString())
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    with pytest.raises(ConversionError, match=word):
        check_model(path, {"weights.bin": tmp_path / "weights.bin"}, detection_manifest())


@pytest.mark.parametrize("content", [b"", b"not a model at all", bytes(1000), b"\x08\x07\x3a\xff\xff\xff\xff\x0f"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match="not an ONNX model"):
        check_model(path, {}, detection_manifest())


def test_the_checker_speaks(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    value = detector()
    value.graph.node[1].input[1] = "nowhere"
    path = tmp_path / "m.onnx"
    path.write_bytes(value.SerializeToString())
    with pytest.raises(ConversionError, match="ONNX checker"):
        onnx_from_onnx(path, {}, *folders, detection_manifest())


def test_real_detectors_keep_their_boxes(test_data: Path, folders: tuple[Path, Path]) -> None:
    scratch, folder = folders
    manifest = detection_manifest(height=416, width=416, contract="deploy", labels=[str(index) for index in range(80)])
    source = onnx_from_onnx(test_data / "models" / "deimv2_hgnetv2_femto_coco.onnx", {}, scratch, folder, manifest)
    verdict = verify_detection(manifest, open_source(source, 2), open_result(folder / "model.onnx", 2))
    assert verdict.passed
    assert len(onnx.load(str(folder / "model.onnx")).graph.node) < len(onnx.load(str(source)).graph.node)


@pytest.mark.parametrize("is_standard", [False, True])
def test_auxiliary_outputs_and_what_makes_them_are_gone(tmp_path: Path, folders: tuple[Path, Path], is_standard: bool) -> None:
    scratch, folder = folders
    value = detector()
    value.graph.node.extend([helper.make_node("Relu", ["flat_logits"], ["aux"]), helper.make_node("Exp", ["shares"], ["spread"])])
    for name in ("aux", "shares", "spread"):
        value.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", None]))
    path, manifest = save(tmp_path / "m.onnx", value, external="weights.bin"), detection_manifest()
    source = onnx_from_onnx(
        path, {"weights.bin": tmp_path / "weights.bin"}, scratch, folder, manifest, GraphTarget(is_standard=is_standard)
    )
    for written in (source, folder / "model.onnx"):
        graph = onnx.load(str(written)).graph
        assert {each.name for each in graph.output} == {"logits", "pred_boxes"}
        assert not {"Relu", "Exp"} & {node.op_type for node in graph.node}
    assert verify_detection(manifest, open_source(source, 1), open_result(folder / "model.onnx", 1)).passed
