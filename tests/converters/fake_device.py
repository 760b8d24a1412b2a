"""A machine with a GPU and TensorRT for the children of a build: their interpreter finds a module `tensorrt` that is the fake one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

# Before anything else runs in a child: the driver answers.
SITE = """
import models.device
NAMES = {"8": ("Xavier", "72", "35.4.1"), "10": ("Orin", "87", "36.4.3"), "11": ("Orin", "87", "39.2.2")}
name, sm, l4t = NAMES["VERSION".split(".")[0]]
models.device.probe_device = lambda: models.device.Device("cuda", name, sm, 8 << 30, is_integrated=True, l4t=l4t, driver="12.6")
"""
MODULE = """
import sys
from models.engines import device_memory
from tests.models.engines.fake_builder import builder_module
from tests.models.engines.fake_tensorrt import fake_module
device_memory.BACK_ENDS["cuda-python"] = "tests.models.engines.fake_cuda"
globals().update({**vars(fake_module("tensorrt", "VERSION")), **builder_module("VERSION"), "__name__": "tensorrt"})
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str, **whims: Any) -> None:
    """Every interpreter started from now on has TensorRT `version`; `whims` as in `fake_builder.Whims`."""
    (folder / "tensorrt").mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(SITE.replace("VERSION", version))
    (folder / "tensorrt" / "__init__.py").write_text(MODULE.replace("VERSION", version))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(folder), str(ROOT))))
    monkeypatch.setenv("FAKE_TENSORRT", json.dumps(whims))
