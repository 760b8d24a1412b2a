from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.config import Settings
from agent.engine_options import engine_options, node_options
from models.engine_record import EngineKey, EngineRecord
from models.engines import EngineOptions
from models.record import from_mapping, to_mapping
from models.store import open_store


def test_an_engine_is_opened_as_it_was_proven(tmp_path: Path) -> None:
    settings = Settings.model_validate({"worker": {"provider": "tensorrt", "threads": 3, "slots": 2}})
    node = node_options(settings, open_store(tmp_path))
    profiles = {"input_ids": [[1, 1], [1, 64], [1, 128]]}
    proven = {"provider": "tensorrt", "precision": "fp16", "workspace_bytes": 1 << 28, "profiles": profiles, "threads": 64}
    record = {"verdict": {"attempts": [{"notes": {"opened_with": {"provider": "cuda"}}}, {"notes": {"opened_with": proven}}]}}
    options = from_mapping(EngineOptions, engine_options(node, record))
    assert (options.provider, options.precision, options.threads, options.slots) == ("tensorrt", "fp16", 3, 2)
    assert options.profiles == {"input_ids": ((1, 1), (1, 64), (1, 128))}
    assert options.cache_folder == str(tmp_path / "provider")


def test_what_was_proven_on_the_cpu_is_opened_there_whatever_the_configuration_says(tmp_path: Path) -> None:
    settings = Settings.model_validate({"worker": {"provider": "cuda"}})
    node = node_options(settings, open_store(tmp_path))
    verdicts: list[dict[str, Any]] = [{}, {"attempts": []}, {"attempts": [{"notes": {}}]}]
    for verdict in verdicts:
        options = from_mapping(EngineOptions, engine_options(node, {"verdict": verdict}))
        assert (options.provider, options.cache_folder) == ("cpu", "")


def test_a_plan_is_opened_with_the_precision_that_was_published(tmp_path: Path) -> None:
    key = EngineKey("eyes", "m" * 64, {}, "plan/1", "tensorrt", "10.3.0", "Orin/sm_87", "int8")
    verdict = {"passed": True, "precision": "fp16 with attention and normalisation in fp32", "attempts": [{"notes": {}}]}
    record = to_mapping(EngineRecord(key, {}, verdict, {}, "2026-01-01T00:00:00Z"))
    node = node_options(Settings(), open_store(tmp_path))
    assert from_mapping(EngineOptions, engine_options(node, record)).precision == "fp16"
    graph = {**record, "key": {**record["key"], "runtime": "onnxruntime"}}
    assert from_mapping(EngineOptions, engine_options(node, graph)).precision == "auto"
