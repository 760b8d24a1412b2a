"""What the benches share: medians and percentiles, how busy the machine was meanwhile, a table for people and JSON for machines."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.table import Table

WIDTH = 160  # of tables in a file or a pipe
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Peer:
    """`version`, or None where it is not installed; then `remedy` is the line that brings it."""

    name: str
    version: str | None
    remedy: str

    @property
    def words(self) -> str:
        return self.version or f"not installed: {self.remedy}"


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class Run(Protocol):
    @property
    def neighbours(self) -> float:
        """Cores that other processes used meanwhile."""
        ...


AnyRun = TypeVar("AnyRun", bound=Run)
QUIET_CORES = 0.1


def undisturbed(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """The runs beside which others did next to nothing; if there is none, the quietest."""
    return [run for run in runs if run.neighbours <= QUIET_CORES] or [min(runs, key=lambda run: run.neighbours)]


def machine() -> dict[str, Any]:
    lines = _lines(Path("/proc/cpuinfo"))
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}


def busy_s() -> float:
    """CPU seconds that all processes of this machine have spent since boot; 0 where the kernel does not say."""
    counters = next(iter(_lines(Path("/proc/stat"))), "cpu 0 0 0").split()[1:]
    idle = sum(int(value) for value in counters[3:5])
    return (sum(int(value) for value in counters[:8]) - idle) / TICKS_PER_S


def spent_s(process: int) -> float:
    """CPU seconds of a process and its living descendants."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            fields = "".join(_lines(folder / "stat")).rpartition(")")[2].split()
            if fields:
                parents[int(folder.name)] = int(fields[1])
                seconds[int(folder.name)] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    family = found = {process}
    while found:
        found = {child for child, parent in parents.items() if parent in family} - family
        family |= found
    return sum(seconds.get(member, 0.0) for member in family)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """The first column names the row, the others are figures."""
    shown = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*(_text(value) for value in row))
    return shown


def report(tables: Sequence[Table], notes: Sequence[str], figures: Mapping[str, Any], file: Path | None) -> None:
    console = Console(width=None if Console().is_terminal else WIDTH)
    for each in tables:
        console.print(each)
    for note in notes:
        console.print(note, highlight=False, markup=False)
    if file is not None:
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "–" if value is None else str(value)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []
