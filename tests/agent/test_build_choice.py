"""Which engine is wanted here, and which of those at hand may serve, on plain values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.build_choice import BuildChoice, Machine, choices, is_like, opens_here, usable
from agent.config import ConvertSettings
from agent.preparation import PreparationFailed
from models.device import Device
from models.engine_record import EngineFile, EngineKey, EngineRecord, StoredEngine
from models.manifest import manifest_digest, manifest_from_mapping
from models.runtimes import OnnxRuntime, Runtimes, TensorRT
from tests.converters.manifests import detection_manifest
from tests.converters.manifests import generation as generation_values

ORIN = Device("cuda", "Orin", "87", 8 << 30, True, "36.4.3", "12.6")
CPU = Device("cpu", "cpu")
ONNX = OnnxRuntime("1.23.0", ("CPUExecutionProvider",))
EYES = detection_manifest()
CHAT = manifest_from_mapping(generation_values())
AUTO = ConvertSettings()


def machine(device: Device = CPU, tensorrt: str = "", **facts: Any) -> Machine:
    return Machine(Runtimes("3.10.12", device, ONNX, TensorRT(tensorrt) if tensorrt else None), cpu="aarch64/1", **facts)


ORIN_10_3 = machine(ORIN, "10.3.0")


@pytest.mark.parametrize(
    ("here", "manifest", "targets"),
    [
        (ORIN_10_3, EYES, ["tensorrt"]),
        (ORIN_10_3, CHAT, ["tensorrt"]),
        (machine(CPU, "10.3.0"), EYES, ["onnxruntime"]),
        (machine(ORIN), EYES, ["onnxruntime"]),
        (machine(), CHAT, ["onnxruntime"]),
        (machine(has_compiler=True), CHAT, ["native", "onnxruntime"]),
        (machine(has_compiler=True), EYES, ["onnxruntime"]),
        (Machine(), EYES, ["onnxruntime"]),
    ],
)
def test_auto_takes_what_the_machine_has(here: Machine, manifest: Any, targets: list[str]) -> None:
    assert [choice.target for choice in choices(AUTO, {}, here, manifest)] == targets


def test_an_order_wins_over_the_configuration() -> None:
    settings = ConvertSettings(target="onnxruntime", precision="fp16", calibration=Path("/calibration"))
    order = {"target": "tensorrt", "precision": "int8", "calibration": "belt", "accept_unverified": True}
    assert choices(settings, order, ORIN_10_3, EYES) == (BuildChoice("tensorrt", "int8", Path("/calibration/belt"), True),)
    assert choices(settings, {}, ORIN_10_3, EYES) == (BuildChoice("onnxruntime", "fp16"),)


@pytest.mark.parametrize(
    ("settings", "order", "said"),
    [
        (AUTO, {"target": "tensorrt"}, "it is not installed there"),
        (ConvertSettings(target="tensorrt_rtx"), {}, "tensorrt_rtx"),
        (AUTO, {"calibration": "belt"}, "convert.calibration"),
        (ConvertSettings(calibration=Path("/c")), {"calibration": "../etc"}, "plain name"),
        (ConvertSettings(calibration=Path("/c")), {"calibration": ".."}, "plain name"),
    ],
)
def test_what_is_not_here_is_refused(settings: ConvertSettings, order: dict[str, str], said: str) -> None:
    with pytest.raises(PreparationFailed, match=said) as refusal:
        choices(settings, order, machine(), EYES)
    assert refusal.value.is_final


def test_a_module_that_cannot_be_loaded_is_told_with_its_reason() -> None:
    broken = replace(machine().runtimes, problems={"tensorrt": "OSError: libnvinfer.so.10 is missing"})
    with pytest.raises(PreparationFailed, match="libnvinfer"):
        choices(ConvertSettings(target="tensorrt"), {}, Machine(broken), EYES)


def engine(runtime: str, version: str, device: str = "cpu", passed: object = True, **changes: Any) -> StoredEngine:
    facts: dict[str, Any] = {"model": EYES.name, "manifest": manifest_digest(EYES), "sources": {"model": "a" * 64}, "precision": "fp32"}
    key = EngineKey(runtime=runtime, runtime_version=version, device=device, converter="c/1", **{**facts, **changes})
    verdict = {} if passed is None else {"passed": passed}
    return StoredEngine(Path(f"/e/{key.digest()}"), EngineRecord(key, {"m": EngineFile("b" * 64, 1)}, verdict, {}, f"2026-{version}"))


GRAPH = engine("onnxruntime", "1.19.2")
PLAN = engine("tensorrt", "10.3.0", "Orin/sm_87", options={"l4t": "36.4.3"})


def test_a_plan_serves_only_where_it_was_built_and_a_graph_everywhere() -> None:
    assert opens_here(PLAN.record.key, ORIN_10_3)
    for other in (
        machine(ORIN, "10.7.0"),
        machine(replace(ORIN, sm="72"), "10.3.0"),
        machine(replace(ORIN, l4t="36.5.0"), "10.3.0"),
        machine(CPU, "10.3.0"),
    ):
        assert not opens_here(PLAN.record.key, other)
        assert opens_here(GRAPH.record.key, other)
    native = engine("native", "cc 12", "aarch64/1").record.key
    assert opens_here(native, machine()) and not opens_here(replace(native, device="aarch64/2"), machine())


def fit(engines: list[StoredEngine], here: Machine = ORIN_10_3, choice: BuildChoice | None = None) -> list[StoredEngine]:
    return usable(engines, EYES, {"model": "a" * 64}, choice or BuildChoice("tensorrt"), here)


def test_after_an_upgrade_the_old_path_serves() -> None:
    assert fit([GRAPH, PLAN]) == [PLAN, GRAPH]
    assert fit([GRAPH, PLAN], machine(ORIN, "10.7.0")) == [GRAPH]
    assert is_like(PLAN.record.key, BuildChoice("tensorrt"), ORIN_10_3)
    assert not is_like(PLAN.record.key, BuildChoice("tensorrt"), machine(ORIN, "10.7.0"))
    assert not is_like(GRAPH.record.key, BuildChoice("tensorrt"), ORIN_10_3)


@pytest.mark.parametrize(
    "other",
    [
        engine("onnxruntime", "1.23.0", manifest="c" * 64),
        engine("onnxruntime", "1.23.0", sources={"model": "c" * 64}),
        engine("onnxruntime", "1.23.0", passed=False),
        engine("onnxruntime", "1.23.0", passed=None),
    ],
    ids=["another manifest", "another source", "refused", "never proven"],
)
def test_what_is_of_another_model_or_not_proven_does_not_serve(other: StoredEngine) -> None:
    assert fit([other]) == []


def test_an_unproven_engine_serves_where_the_operator_says_so() -> None:
    unproven = engine("onnxruntime", "1.23.0", passed=False)
    assert fit([unproven], choice=BuildChoice(accept_unverified=True)) == [unproven]


def test_the_newest_of_equals_comes_first() -> None:
    older, newer = engine("onnxruntime", "1.19.0"), engine("onnxruntime", "1.22.0")
    assert fit([older, newer]) == [newer, older]
    assert fit([newer, engine("onnxruntime", "1.23.0")], choice=BuildChoice("onnxruntime"))[0].record.key.runtime_version == "1.23.0"


TENSORRT_PROVIDER = OnnxRuntime("1.23.0", ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"), "10.3.0")
ORIN_PROVIDERS = Machine(Runtimes("3.10.12", ORIN, TENSORRT_PROVIDER))
PROVEN_THERE = {"provider": "tensorrt", "tensorrt": "10.3.0", "l4t": "36.4.3"}


def proven(options: dict[str, str]) -> StoredEngine:
    made = engine("onnxruntime", "1.23.0")
    key = replace(made.record.key, device=ORIN.key if options else "cpu", options=options)
    return replace(made, record=replace(made.record, key=key))


def test_what_serves_is_built_for_the_provider_that_will_serve_it() -> None:
    (choice,) = choices(AUTO, {}, ORIN_PROVIDERS, EYES, provider="tensorrt")
    assert (choice.target, choice.provider, choice.is_slow) == ("onnxruntime", "tensorrt", True)
    (text,) = choices(AUTO, {}, ORIN_PROVIDERS, CHAT, provider="tensorrt")
    assert text.provider == "cpu", "ONNX Runtime generates on its CPU only"
    (plan,) = choices(AUTO, {}, ORIN_10_3, EYES, provider="tensorrt")
    assert (plan.target, plan.provider) == ("tensorrt", "cpu"), "a plan of our own needs no provider"
    with pytest.raises(PreparationFailed, match=r"worker\.provider is cuda, but ONNX Runtime of worker\.python has only CPUExecution"):
        choices(AUTO, {}, machine(ORIN), EYES, provider="cuda")


def test_an_engine_of_one_provider_is_none_of_another() -> None:
    there, here = proven(PROVEN_THERE), proven({})
    wanted = BuildChoice(provider="tensorrt")
    assert is_like(there.record.key, wanted, ORIN_PROVIDERS)
    assert not is_like(here.record.key, wanted, ORIN_PROVIDERS)
    assert not is_like(there.record.key, BuildChoice(), ORIN_PROVIDERS)
    assert fit([here, there], ORIN_PROVIDERS, wanted) == [there, here], "the CPU serves until the wanted one is there"
    upgraded = Machine(replace(ORIN_PROVIDERS.runtimes, onnxruntime=replace(TENSORRT_PROVIDER, tensorrt="10.7.0")))
    assert not opens_here(there.record.key, upgraded)
    assert not opens_here(there.record.key, Machine())
    assert opens_here(here.record.key, upgraded)
