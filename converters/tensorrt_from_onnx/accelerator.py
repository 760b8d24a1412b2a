"""What a built plan really runs on a deep-learning accelerator: of the layers that it could take a builder gives it some."""

from __future__ import annotations

import json
import logging
import re
from typing import Any, List, Optional, Sequence, Set

log = logging.getLogger(__name__)

_TOLD = re.compile(r"\[DlaLayer\] (?P<name>.+)")
_RUN = re.compile(r"\{ForeignNode\[(?P<inner>.+)\]\}")


class Placed:
    """Lines of the builder's log that name what it gave to the accelerator."""

    def __init__(self) -> None:
        self.names: List[str] = []

    def read(self, message: str) -> None:
        found = _TOLD.search(message)
        if found:
            self.names.append(found.group("name").strip())


def layers_on_dla(trt: Any, logger: Any, serialised: Any, names: Sequence[str], placed: Placed) -> Optional[int]:
    """How many of the network's layers (`names`, in its order) the accelerator runs, as the engine inspector says, or the log where it
    does not tell the two apart; None where the plan cannot be looked into."""
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(serialised)
    if engine is None:
        log.warning("the plan cannot be looked into: what runs on the DLA is not known")
        return None
    inspector = engine.create_engine_inspector()
    return len(covered(dla_names(inspector.get_engine_information(trt.LayerInformationFormat.JSON)) or placed.names, names))


def dla_names(information: str) -> List[str]:
    """The layers of an inspector's JSON that run on the accelerator; layers that are bare names say nothing."""
    try:
        layers = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError):
        return []
    return [str(entry.get("Name")) for entry in layers if isinstance(entry, dict) and "DLA" in str(entry.get("LayerType"))]


def covered(placed: Sequence[str], names: Sequence[str]) -> Set[str]:
    """The network's layers within layers of the engine: `{ForeignNode[first...last]}` is a run, `a + b` are some that were fused."""
    found: Set[str] = set()
    for name in placed:
        run = _RUN.search(name)
        first, _, last = (run.group("inner") if run else name).partition("...")
        if run and first in names and last in names:
            found.update(names[names.index(first) : names.index(last) + 1])
        else:
            found.update(each for each in first.split(" + ") if each in names)
    return found
