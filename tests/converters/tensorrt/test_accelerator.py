"""Which layers of a network an engine runs on a DLA, from what the engine inspector and the log of a build say."""

from __future__ import annotations

import json

import pytest

from converters.tensorrt_from_onnx.accelerator import Placed, covered, dla_names

LAYERS = ["conv1", "relu1", "conv2", "pool", "fc"]


@pytest.mark.parametrize(
    ("placed", "names"),
    [
        (["{ForeignNode[conv1...conv2]}"], {"conv1", "relu1", "conv2"}),
        (["{ForeignNode[pool]}"], {"pool"}),
        (["conv1 + relu1", "fc"], {"conv1", "relu1", "fc"}),
        (["{ForeignNode[conv1...gone]}", "elsewhere"], {"conv1"}),
        ([], set()),
    ],
)
def test_runs_and_fused_layers_are_counted_by_what_they_were(placed: "list[str]", names: "set[str]") -> None:
    assert covered(placed, LAYERS) == names


def test_the_inspector_tells_the_two_apart_where_it_is_detailed() -> None:
    layers = [{"Name": "{ForeignNode[conv1...pool]}", "LayerType": "DLA"}, {"Name": "fc", "LayerType": "gemm"}]
    assert dla_names(json.dumps({"Layers": layers})) == ["{ForeignNode[conv1...pool]}"]
    for brief in (json.dumps({"Layers": ["conv1", "fc"]}), "[]", "no JSON", ""):
        assert dla_names(brief) == []


def test_the_log_names_what_went_there() -> None:
    placed = Placed()
    for line in ("---------- Layers Running on DLA ----------", "[DlaLayer] {ForeignNode[conv1...pool]}", "[GpuLayer] CONVOLUTION: fc"):
        placed.read(line)
    assert placed.names == ["{ForeignNode[conv1...pool]}"]
