"""Fractions from nested phases and from the log of TensorRT 8; callbacks; names of pinned layers; the file of the timing cache."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from converters.tensorrt_from_onnx.network import matches
from converters.tensorrt_from_onnx.plan import available_bytes
from converters.tensorrt_from_onnx.progress import Progress
from converters.tensorrt_from_onnx.timing_cache import content_bytes, read_content


def test_a_phase_within_a_phase_counts_as_a_part_of_its_step() -> None:
    progress = Progress()
    progress.start("Building engine", "", 4)
    progress.step("Building engine", 0)
    assert progress.now() == ("Building engine", 0.25)
    progress.start("Timing kernels", "Building engine", 10)
    progress.step("Timing kernels", 4)
    assert progress.now() == ("Timing kernels", 0.375)
    progress.finish("Timing kernels")
    progress.step("Building engine", 1)
    assert progress.now() == ("Building engine", 0.5)


def test_a_fraction_never_falls_and_never_leaves_its_bounds() -> None:
    progress = Progress()
    progress.start("a", "", 2)
    progress.step("a", 5)
    assert progress.now()[1] == 1.0
    progress.start("b", "", 100)
    progress.step("b", 0)
    progress.step("unheard of", 3)
    progress.finish("unheard of")
    assert progress.now() == ("b", 1.0)


def test_phases_of_several_threads_do_not_disturb_each_other() -> None:
    progress = Progress()
    progress.start("root", "", 10)
    seen: list[float] = []

    def work(name: str) -> None:
        for _ in range(50):
            progress.start(name, "root", 20)
            for step in range(20):
                progress.step(name, step)
                seen.append(progress.now()[1])
            progress.finish(name)

    threads = [threading.Thread(target=work, args=(f"thread {index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(seen) == 4000 and all(0 <= fraction <= 0.1 + 1e-9 for fraction in seen)


def test_phases_that_name_each_other_as_parents_are_survived() -> None:
    progress = Progress()
    progress.start("a", "b", 2)
    progress.start("b", "a", 2)
    progress.step("a", 0)
    assert 0.0 <= progress.now()[1] <= 1.0


def test_the_log_of_tensorrt_8_tells_phase_and_fraction() -> None:
    progress = Progress()
    told = []
    for line in (
        "Parsing node: conv [Conv]",
        "Original: 12 layers",
        "After final dead-layer removal: 8 layers",
        "After concat removal: 4 layers",
        "Constructing optimization profile number 0 [1/1].",
        "=============== Computing reformatting costs",
        "=============== Computing costs for ",
        "=============== Computing costs for ",
        "*************** Autotuning format combination: Float(1) -> Float(1) ***************",
        "Formats and tactics selection completed in 1.2 seconds.",
        "Engine generation completed in 1.4 seconds.",
    ):
        progress.read(line)
        told.append(progress.now())
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions)
    assert told[0] == ("Parsing the graph", 0.0)
    assert told[7][0] == "Timing kernels" and told[7][1] == pytest.approx(0.1 + 0.82 / 2)
    assert told[-1] == ("Writing the engine", 0.98)


@pytest.mark.parametrize(
    ("name", "patterns", "is_match"),
    [
        ("/decoder/norm1/LayerNormalization", ("*LayerNorm*",), True),
        ("norm", ("norm",), True),
        ("norm_12", ("norm",), True),
        ("normal", ("norm",), False),
        ("norm_a", ("norm",), False),
        ("12", ("norm", "1*"), True),
        ("anything", (), False),
    ],
)
def test_a_pattern_names_a_node_and_the_layers_made_of_it(name: str, patterns: tuple[str, ...], is_match: bool) -> None:
    assert matches(name, patterns) is is_match


def test_a_timing_cache_of_another_version_or_damaged_counts_as_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "timing.cache"
    assert read_content(file, "10.3.0") == b"" and not caplog.records
    whole = content_bytes(b"kernels", "10.3.0")
    file.write_bytes(whole)
    assert read_content(file, "10.3.0") == b"kernels"
    with caplog.at_level(logging.WARNING):
        assert read_content(file, "10.16.1") == b""
        for content in (whole[:-1], whole + b"x", b"", b"kernels", b"[]\n", b"\xff" * 9000, b"[" * 4000 + b"\n"):
            file.write_bytes(content)
            assert read_content(file, "10.3.0") == b"", content[:20]
    assert len(caplog.records) == 8
    assert "of TensorRT '10.3.0', this is 10.16.1" in caplog.text and "damaged" in caplog.text


def test_free_memory_is_read_as_the_kernel_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       7990476 kB\nMemAvailable:    1024 kB\n")
    assert available_bytes(file) == 1 << 20
    file.write_text("MemAvailable: soon\n")
    assert available_bytes(file) is None
    assert available_bytes(tmp_path / "none") is None
