"""A program: which of the given paths a TensorRT module lacks, and how many arguments its functions take. Runs under Python 3.8 too.

Standard input: {"module": name, "paths": [...]}; standard output: {"version", "absent": [...], "arguments": {path: [least, most]}}.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any

MANY = 99


def main() -> None:
    asked = json.load(sys.stdin)
    module = importlib.import_module(asked["module"])
    found = {path: find(module, path) for path in asked["paths"]}
    arguments = {path: arity(path, value) for path, value in found.items() if value is not None}
    answer = {
        "version": module.__version__,
        "absent": sorted(path for path, value in found.items() if value is None),
        "arguments": {path: counts for path, counts in arguments.items() if counts is not None},
    }
    json.dump(answer, sys.stdout)


def find(module: Any, path: str) -> Any:
    value = module
    for name in path.split("."):
        if not hasattr(value, name):
            return None
        value = getattr(value, name)
    return value


def arity(path: str, value: Any) -> tuple[int, int] | None:
    """Least and most arguments, `self` left out, by pybind's docstring; None for what is no function or does not say."""
    function = value.__init__ if isinstance(value, type) else value  # type: ignore[misc]  # for its docstring only
    if not callable(function):
        return None
    name = "__init__" if isinstance(value, type) else path.rsplit(".", 1)[-1]
    counts = []
    for line in (function.__doc__ or "").splitlines():
        match = re.match(r"(?:\d+\. )?" + re.escape(name) + r"\((.*)\) -> ", line)
        if match and "*args" not in line:
            parameters = [each for each in split(match.group(1)) if not each.startswith("self")]
            counts.append((sum("=" not in each for each in parameters), len(parameters)))
    return (min(low for low, _ in counts), max(high for _, high in counts)) if counts else None


def split(parameters: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for letter in parameters:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


if __name__ == "__main__":
    main()
