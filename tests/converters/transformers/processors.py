"""What transformers' image processors make of some pictures, in few numbers. Writes the figures that the tests without torch hold us to:

python -m tests.converters.transformers.processors > tests/models/processors.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import ROOT
from tests.models.processed import CASES, Case, digest, pictures


def processor(kind: str, **facts: Any) -> Any:
    """The one that computes with PIL: torchvision's has other names from release to release, and is not needed."""
    import transformers

    found = getattr(transformers, f"{kind}ImageProcessorPil", None) or getattr(transformers, f"{kind}ImageProcessor")
    return found(**facts)


def processed(case: Case, picture: np.ndarray) -> np.ndarray:
    """float32 [1,3,height,width], as the model would get it."""
    values = processor(case.kind, **case.processor)(images=picture[:, :, ::-1].copy(), return_tensors="np")["pixel_values"]
    return np.asarray(values, np.float32)


def figures(data: Path) -> list[dict[str, Any]]:
    """One row for each outcome, with the names of the cases that have it."""
    rows: list[dict[str, Any]] = []
    for title, picture in pictures(data).items():
        for name, case in CASES.items():
            found = {"picture": title, **digest(processed(case, picture), case.facts)}
            same = next((row for row in rows if {key: value for key, value in row.items() if key != "cases"} == found), None)
            if same is None:
                rows.append({"cases": [name], **found})
            else:
                same["cases"].append(name)
    return rows


if __name__ == "__main__":
    folder = Path(os.environ.get("HOTSPARE_TEST_DATA", ROOT.parent / "shared")).resolve()
    written = ",\n".join(json.dumps(row, separators=(",", ":")) for row in figures(folder))
    sys.stdout.write(f"[\n{written}\n]\n")
