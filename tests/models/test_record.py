from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Tuple

import pytest

from models.record import RecordError, from_mapping, to_mapping

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Part:
    size: int
    ratio: float = 1.0


@dataclass(frozen=True)
class Whole:
    name: str
    kind: Literal["a", "b"]
    parts: Dict[str, Part]
    mean: Tuple[float, float, float] = (0.0, 0.0, 0.0)
    labels: Tuple[str, ...] = ()
    counts: List[int] = field(default_factory=list)
    note: Optional[str] = None
    is_on: bool = False
    anything: Any = None


VALUES: dict[str, Any] = {
    "name": "x",
    "kind": "a",
    "parts": {"model": {"size": 3, "ratio": 2}},
    "mean": [1, 2.5, 3],
    "labels": ["cat", "dog"],
    "counts": [1],
    "note": "n",
    "is_on": True,
    "anything": {"free": [1]},
}


def test_round_trip() -> None:
    whole = from_mapping(Whole, VALUES)
    assert whole.parts["model"] == Part(3, 2.0)
    assert whole.mean == (1.0, 2.5, 3.0) and isinstance(whole.mean[0], float)
    assert whole.labels == ("cat", "dog")
    assert from_mapping(Whole, to_mapping(whole)) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "x"}, r"Whole: unknown field 'nmae'; known fields are anything, counts"),
        ({"kind": "c"}, r"Whole\.kind: 'c' is not one of 'a', 'b'"),
        ({"name": 3}, r"Whole\.name: expected str, got 3"),
        ({"is_on": 1}, r"Whole\.is_on: expected bool, got 1"),
        ({"counts": [True]}, r"Whole\.counts\[0\]: expected int, got True"),
        ({"counts": [1.0]}, r"Whole\.counts\[0\]: expected int"),
        ({"counts": "12"}, r"Whole\.counts: expected a list, got str"),
        ({"mean": [1.0, 2.0]}, r"Whole\.mean: expected 3 values, got 2"),
        ({"mean": [1.0, 2.0, "x"]}, r"Whole\.mean\[2\]: expected float"),
        ({"parts": []}, r"Whole\.parts: expected a table"),
        ({"parts": {"model": {}}}, r"Whole\.parts\.model: field 'size' is missing"),
        ({"parts": {"model": {"size": 1, "color": 2}}}, r"Whole\.parts\.model: unknown field 'color'"),
        ({"note": 5}, r"Whole\.note: expected str"),
    ],
)
def test_every_wrong_field_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        from_mapping(Whole, {**VALUES, **change})


def test_missing_field_and_no_table() -> None:
    with pytest.raises(RecordError, match="field 'name' is missing"):
        from_mapping(Whole, {"kind": "a", "parts": {}})
    with pytest.raises(RecordError, match="expected a table, got list"):
        from_mapping(Whole, [])


def test_optional_may_be_null() -> None:
    assert from_mapping(Whole, {**VALUES, "note": None}).note is None


def test_seams_of_the_data_plane_import_without_any_package() -> None:
    """The worker's interpreter has numpy and the standard library only; `-S` hides even those packages."""
    modules = "models.record, models.manifest, models.store, models.upkeep, models.sources, models.catalog"
    subprocess.run([sys.executable, "-S", "-c", f"import {modules}"], cwd=ROOT, check=True, timeout=30)
