from __future__ import annotations

from itertools import pairwise

import pytest

from converters.errors import ConversionError
from converters.ladder import Place, asked_precision, ladder, native_ladder, share_of
from converters.memory import require_memory, workspace_bytes

CPU = Place("onnxruntime", "1.23.2")
ORIN = Place("tensorrt", "10.3.0", "Orin/sm_87", 87)
XAVIER = Place("tensorrt", "8.5.2.2", "Xavier/sm_72", 72)

WALKS = {
    "int8 on an Orin": (ORIN, "int8", ["int8", "fp16", "fp16 with attention and normalisation in fp32", "tf32", "fp32"]),
    "fp16 on an Orin": (ORIN, "fp16", ["fp16", "fp16 with attention and normalisation in fp32", "tf32", "fp32"]),
    "no TF32 before Ampere": (XAVIER, "fp16", ["fp16", "fp16 with attention and normalisation in fp32", "fp32"]),
    "TF32 asked of a Xavier": (XAVIER, "tf32", ["fp32"]),
    "int8 on a CPU": (CPU, "int8", ["int8", "fp32"]),
    "fp32 anywhere": (ORIN, "fp32", ["fp32"]),
}


@pytest.mark.parametrize("case", WALKS)
def test_the_walk_down(case: str) -> None:
    place, first, names = WALKS[case]
    steps = ladder(place, first)  # type: ignore[arg-type]  # the table holds plain words
    assert [step.name for step in steps] == names
    assert all(step.is_typed is (place is not XAVIER) for step in steps) or place is CPU


GENTLE = "int8 with activations in fp32"
NATIVE_WALKS = {
    "blocks of the engine's own width": ("auto", "float32", False, ["fp32"]),
    "plain weights": ("auto", "float32", True, [GENTLE, "fp32"]),
    "plain weights, rough activations": ("auto", "int8", True, ["int8", GENTLE, "fp32"]),
    "int8 of such blocks": ("int8", "float32", False, ["int8", "fp32"]),
    "int4 of plain weights": ("int4", "float32", True, ["int4", GENTLE, "fp32"]),
    "fp32 of plain weights": ("fp32", "float32", True, ["fp32"]),
}


@pytest.mark.parametrize("case", NATIVE_WALKS)
def test_the_walk_down_of_the_native_engine(case: str) -> None:
    asked, activations, is_rounded, names = NATIVE_WALKS[case]
    assert [step.name for step in native_ladder(asked, "auto", activations, is_rounded)] == names  # type: ignore[arg-type]  # plain words
    with pytest.raises(ConversionError, match="of the native engine"):
        native_ladder("fp16", "auto", activations, is_rounded)


def test_what_auto_means() -> None:
    assert asked_precision(CPU, "detection", "auto", "auto") == "fp32"
    assert asked_precision(ORIN, "detection", "auto", "auto") == "fp16"
    assert asked_precision(ORIN, "detection", "auto", "int8") == "int8"
    assert asked_precision(ORIN, "detection", "fp32", "int8") == "fp32"
    assert asked_precision(CPU, "generation", "auto", "auto", "int8") == "int8"


@pytest.mark.parametrize(("place", "task", "asked"), [(CPU, "generation", "fp16"), (ORIN, "detection", "int4")])
def test_what_a_place_does_not_have_is_refused(place: Place, task: str, asked: str) -> None:
    with pytest.raises(ConversionError) as refusal:
        asked_precision(place, task, asked, "auto")  # type: ignore[arg-type]  # the table holds plain words
    assert refusal.value.code == "unsupported"


def test_shares_cover_the_time_without_a_gap() -> None:
    for count in range(1, 6):
        shares = [share_of(index, count) for index in range(count)]
        assert shares[0][0] == 0.0
        assert shares[-1][1] == 1.0
        assert all(one[1] == other[0] for one, other in pairwise(shares))


def test_memory_is_refused_with_figures() -> None:
    require_memory("m", 100 << 20, 5.0, 757 << 20)
    require_memory("m", 100 << 20, 5.0, None)
    with pytest.raises(ConversionError, match=r"756 MiB .* 755 MiB are free") as refusal:
        require_memory("m", 100 << 20, 5.0, 755 << 20)
    assert refusal.value.code == "no_memory"


def test_the_workspace_is_a_share_within_bounds() -> None:
    assert workspace_bytes(4 << 30, 0.5) == 2 << 30
    assert workspace_bytes(64 << 20, 0.5) == 64 << 20
    assert workspace_bytes(64 << 30, 0.5) == 4 << 30
    assert workspace_bytes(None, 0.5) == 64 << 20
