"""The gate on real models: a fault planted into one step of the ladder is seen, named, and the next step is published."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from converters.build import KINDS, Built, build
from converters.errors import ConversionError
from converters.line import Kind
from converters.request import BuildRequest, parse_request
from converters.stateless_line import ROUNDINGS, Recipe, StatelessLine, converters
from models.catalog import load_catalog
from models.manifest import DetectionManifest
from models.record import to_mapping
from tests.conftest import ROOT

CONVEYOR = ROOT / "models" / "weights" / "conveyor_detr.onnx"

Spoil = Callable[[Any], None]


def scale_a_normalisation(model: Any) -> None:
    """The weight of a LayerNorm in the middle of the network becomes 5 % larger."""
    change(model, "model.decoder.0.norms.0.weight", lambda values: values * 1.05)


def shift_a_class(model: Any) -> None:
    """The boxes of the first class lie 5 % of the picture further to the right."""
    (boxes,) = [node for node in model.graph.node if "pred_boxes" in node.output]
    boxes.output[list(boxes.output).index("pred_boxes")] = "boxes.right"
    shift = numpy_helper.from_array(np.array([0.05, 0, 0, 0], np.float32), "shift")
    first = numpy_helper.from_array(np.array(0, np.int64), "first")
    model.graph.initializer.extend([shift, first])
    model.graph.node.extend(
        [
            helper.make_node("ArgMax", ["logits"], ["class"], axis=-1, keepdims=1),
            helper.make_node("Equal", ["class", "first"], ["is_first"]),
            helper.make_node("Cast", ["is_first"], ["share"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["share", "shift"], ["shifted"]),
            helper.make_node("Add", ["boxes.right", "shifted"], ["pred_boxes"]),
        ]
    )


def make_a_nan(model: Any) -> None:
    change(model, "model.encoder.norms.1.bias", lambda values: np.where(np.arange(len(values)) == 0, np.nan, values))


def change(model: Any, name: str, how: Callable[[Any], Any]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.startswith(name):
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(how(values).astype(values.dtype), tensor.name))
            return
    raise AssertionError(f"{name} is no weight")


def spoiled(spoil: Spoil) -> Kind:
    """The line of stateless models, whose first attempt at half precision has a fault."""

    def faulty(source: Path, target: Path, recipe: Recipe) -> Mapping[str, Any]:
        notes = ROUNDINGS["fp16"](source, target, recipe)
        if not recipe.step.keeps_fp32:
            model = onnx.load(str(target))
            spoil(model)
            onnx.save(model, str(target))
        return notes

    return Kind(lambda job: StatelessLine(job, {**ROUNDINGS, "fp16": faulty}), converters, copies=5.0)


def request(store: Path, **options: Any) -> BuildRequest:
    manifest = to_mapping(load_catalog().find("conveyor-detr"))
    return parse_request(
        json.dumps({"manifest": manifest, "sources": {"model": str(CONVEYOR)}, "store": str(store), "options": options}).encode()
    )


def run(store: Path, kind: Kind, **options: Any) -> Built:
    told: list[float] = []
    built = build(
        request(store, precision="fp16", **options), lambda phase, fraction, message: told.append(fraction), {("onnx", "detection"): kind}
    )
    assert told == sorted(told)
    return built


def test_half_precision_of_a_real_detector_passes(tmp_path: Path) -> None:
    verdict = run(tmp_path, KINDS["onnx", "detection"]).engine.record.verdict
    assert (verdict["passed"], verdict["precision"], verdict["inputs"]) == (True, "fp16", 16)
    assert 0 < verdict["figures"]["max_score_delta"] < 0.02


@pytest.mark.parametrize("spoil", [scale_a_normalisation, shift_a_class, make_a_nan])
def test_a_planted_fault_is_named_and_the_next_step_is_published(tmp_path: Path, spoil: Spoil) -> None:
    verdict = run(tmp_path, spoiled(spoil)).engine.record.verdict
    first, second = verdict["attempts"]
    assert (first["status"], second["status"]) == ("failed", "passed")
    assert verdict["precision"] == "fp16 with attention and normalisation in fp32"
    worst = first["worst"]
    if spoil is make_a_nan:
        assert "NaN" in first["reason"]
        assert (worst["operator"], worst["relative_error"]) == ("Add", None)
        assert "/encoder/norms.1/" in worst["name"]
    elif spoil is shift_a_class:
        assert "matched_boxes" in first["reason"]
        assert worst["name"] == "pred_boxes"
    else:
        assert worst["relative_error"] > 0.02
        assert "/decoder.0/norms.0/" in worst["name"]


def test_one_picture_of_a_site_is_topped_up_with_made_up_ones(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    cv2.imwrite(str(tmp_path / "site" / "one.png"), np.full((40, 60, 3), 90, np.uint8))
    verdict = run(tmp_path / "store", KINDS["onnx", "detection"], calibration=str(tmp_path / "site")).engine.record.verdict
    assert (verdict["passed"], verdict["inputs"], verdict["own_inputs"]) == (True, 16, 1)


def test_without_a_step_that_passes_nothing_is_published(tmp_path: Path) -> None:
    strict = request(tmp_path, precision="fp16")
    assert isinstance(strict.manifest, DetectionManifest)
    tolerance = dataclasses.replace(strict.manifest.detection, max_score_delta=0.0)
    strict = dataclasses.replace(strict, manifest=dataclasses.replace(strict.manifest, detection=tolerance))
    with pytest.raises(ConversionError) as refusal:
        build(strict, lambda phase, fraction, message: None)
    assert refusal.value.code == "not_the_same_model"
    assert refusal.value.verdict is not None
    assert not list((tmp_path / "engines").iterdir())
    accepted = dataclasses.replace(strict, options=dataclasses.replace(strict.options, accept_unverified=True))
    verdict = build(accepted, lambda phase, fraction, message: None).engine.record.verdict
    assert (verdict["passed"], verdict["status"], len(verdict["attempts"])) == (False, "failed", 3)
    with pytest.raises(ConversionError) as again:
        build(strict, lambda phase, fraction, message: None)
    assert again.value.code == "not_verified"
