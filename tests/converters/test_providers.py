"""Engines for providers of ONNX Runtime that use a GPU: proven on the provider that will serve, and opened as they were proven.

The worker's interpreter is real, with ONNX Runtime's CPU behind the names of the other providers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from agent.engine_options import engine_options
from converters.build import Built, build
from converters.engine_process import EngineProcess
from converters.errors import ConversionError
from converters.request import BuildRequest, parse_request
from models.engines import EngineError, EngineOptions, open_engine
from tests.conftest import ROOT
from tests.converters.manifests import embedding
from tests.converters.tiny_onnx import encoder, save

SHIM = """
import json
import models.device
import models.engines.onnx_providers
import onnxruntime

models.device.probe_device = lambda *_: models.device.Device("cuda", "Orin", "87", l4t="36.4.3")
models.engines.onnx_providers.library_version = lambda *_: "10.3.0"
NAMES = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
onnxruntime.get_available_providers = lambda: NAMES


class Session(onnxruntime.InferenceSession):
    def __init__(self, path, settings, providers):
        self.asked = providers
        with open({told!r}, "a") as told:
            told.write(json.dumps(providers) + "\\n")
        super().__init__(path, settings, providers=["CPUExecutionProvider"])

    def get_providers(self):
        return [name for name, _ in self.asked]


onnxruntime.InferenceSession = Session
in_memory_of = onnxruntime.OrtValue.ortvalue_from_shape_and_type
onnxruntime.OrtValue.ortvalue_from_shape_and_type = lambda shape, kind, device, number: in_memory_of(shape, kind, "cpu", number)
"""

Ask = Callable[..., BuildRequest]


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """Where the sessions of the worker's interpreter write the providers that they were asked for, a line each."""
    return tmp_path / "told"


@pytest.fixture
def ask(tmp_path: Path, told: Path) -> Ask:
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(SHIM.format(told=str(told)))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "shim"}:{ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    source = save(tmp_path / "tiny.onnx", encoder())

    def made(**options: Any) -> BuildRequest:
        values = {"manifest": embedding(), "sources": {"model": str(source)}, "store": str(tmp_path / "store")}
        options = {"python": str(python), **options}
        return parse_request(json.dumps({**values, "options": options}).encode())

    return made


def run(request: BuildRequest) -> Built:
    return build(request, lambda phase, fraction, message: None)


def sessions(told: Path) -> list[dict[str, dict[str, str]]]:
    return [dict(json.loads(line)) for line in told.read_text().splitlines()]


def test_the_gate_runs_on_the_provider_that_serves_and_the_worker_opens_what_it_proved(ask: Ask, told: Path, tmp_path: Path) -> None:
    request = ask(provider="tensorrt")
    built = run(request)
    record = built.engine.record
    assert (record.key.device, record.key.runtime) == ("Orin/sm_87", "onnxruntime")
    assert record.key.options == {"provider": "tensorrt", "tensorrt": "10.3.0", "l4t": "36.4.3"}
    (gate,) = sessions(told)
    options = gate["TensorrtExecutionProvider"]
    assert options["trt_fp16_enable"] == "1", "auto is half precision on a GPU"
    assert options["trt_profile_max_shapes"] == "input_ids:1x64"
    assert int(options["trt_max_workspace_size"]) > 0
    place, model = Path(options["trt_engine_cache_path"]).parts[-2:]
    assert place == "Orin-sm_87-l4t_36.4.3-tensorrt_10.3.0-fp16"
    assert len(model) == 32
    assert Path(options["trt_engine_cache_path"]).is_relative_to(tmp_path / "store" / "provider")

    node = {"threads": request.options.threads, "slots": 4, "context_tokens": 64, "cache_folder": str(tmp_path / "store" / "provider")}
    serving = engine_options(node, {"verdict": json.loads(json.dumps(record.verdict))})
    with EngineProcess(request.options.python, built.engine.folder, "embedding", EngineOptions(**serving)) as process:
        process.run({"input_ids": np.ones((1, 5), np.int64)})
        assert process.provider == "tensorrt"
    assert sessions(told)[-1] == gate, "the provider finds the engine that was proven in its cache, not one of its own"


def test_an_engine_is_not_opened_on_a_provider_that_never_proved_it(ask: Ask) -> None:
    for provider, other in (("tensorrt", "cpu"), ("cpu", "cuda")):
        request = ask(provider=provider)
        folder = run(request).engine.folder
        with (
            pytest.raises(EngineError, match=f"was proven on provider '{provider}', not on '{other}'"),
            EngineProcess(request.options.python, folder, "embedding", EngineOptions(provider=other)),
        ):
            pass
    open_engine(folder, EngineOptions(threads=1)).close()


def test_what_a_provider_takes_over_has_no_fused_operators(ask: Ask) -> None:
    fused, standard = (
        {node.domain for node in onnx.load(str(run(ask(provider=provider, precision="fp32")).engine.path("model.onnx"))).graph.node}
        for provider in ("cpu", "tensorrt")
    )
    assert standard == {""}
    assert fused >= {""}


def test_providers_have_engines_of_their_own(ask: Ask) -> None:
    built = [run(ask(provider=provider, precision="fp32")) for provider in ("cpu", "cuda", "tensorrt", "cuda")]
    assert len({each.engine.folder for each in built}) == 3
    assert [each.is_reused for each in built] == [False, False, False, True]
    verdict = built[1].engine.record.verdict
    assert verdict["attempts"][-1]["notes"]["opened_with"] == {"provider": "cuda", "precision": "fp32"}


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"provider": "cuda", "python": sys.executable}, "unsupported", r"needs CUDAExecutionProvider; ONNX Runtime of .* has "),
        ({"provider": "cuda", "target": "native"}, "bad_request", "the target is native"),
        ({"provider": "rocm"}, "bad_request", "must be one of cpu, cuda, tensorrt"),
    ],
)
def test_a_provider_that_is_not_there_is_refused(ask: Ask, options: dict[str, Any], code: str, said: str) -> None:
    with pytest.raises(ConversionError, match=said) as refusal:
        run(ask(**options))
    assert refusal.value.code == code
