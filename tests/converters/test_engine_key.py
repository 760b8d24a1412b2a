"""Whatever shapes an engine stands in its key: a fault that is mended there must not serve on from the store."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from converters import decoder_line, native_line, stateless_line
from converters.ladder import Place
from tests.conftest import ROOT

PLACES = (Place("onnxruntime", "1.23.2"), Place("native", "gcc 13"), Place("tensorrt", "10.3.0"), Place("tensorrt_rtx", "1.7.1"))


def versioned() -> dict[str, int]:
    """Module → its VERSION, of all converters that have one; a module that only names another's counts as that one."""
    files = [path for path in (ROOT / "converters").rglob("*.py") if "\nVERSION = " in path.read_text()]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    return {name: importlib.import_module(name).VERSION for name, path in modules.items() if not _is_borrowed(path)}


def _is_borrowed(path: Path) -> bool:
    return ".VERSION" in path.read_text().split("\nVERSION = ")[1].splitlines()[0]


def parts(place: Place) -> set[str]:
    lines = [native_line.converter()] if place.runtime == "native" else [decoder_line.converters(place), stateless_line.converters(place)]
    return {part for line in lines for part in line.split("+")}


def test_every_converter_with_a_version_stands_in_a_key() -> None:
    named = set().union(*map(parts, PLACES))
    assert named == {f"{name.split('.')[-1]}/{version}" for name, version in versioned().items()}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.runtime)
def test_a_plan_depends_on_what_builds_plans_and_nothing_else_does(place: Place) -> None:
    lines = [native_line.converter()] if place.runtime == "native" else [decoder_line.converters(place), stateless_line.converters(place)]
    assert all(("tensorrt_from_onnx/" in line) is place.is_tensorrt for line in lines)
