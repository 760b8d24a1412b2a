"""The real Python bindings of TensorRT on a machine without GPU, driver and TensorRT.

The bindings are small wheels. What they link to are nine C functions (TensorRT 8: four more), which a library of our own supplies: each
returns null, so `Builder()` fails with the TypeError that it raises without CUDA, while all enums, classes and signatures are there.

Version 8.5.2 is no small wheel (549 MB) and for Python 3.8 at most, so it takes part only where somebody has fetched it:
`HOTSPARE_TEST_PYTHON38=… python -m tests.conformance.bindings 8.5.2.2`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from models.durable import exclusive
from tests.conftest import ROOT

CACHE = Path(os.environ.get("HOTSPARE_TEST_CACHE", ROOT / ".cache")) / "bindings"
FETCH_S = 90
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvparsers")
FUNCTIONS = (
    *(f"create{what}_INTERNAL" for what in ("InferBuilder", "InferRefitter", "InferRuntime", "NvOnnxParserRefitter", "NvOnnxParser")),
    *("getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
    # The Caffe and UFF parsers of TensorRT 8.
    *("_ZN11nvuffparser15createUffParserEv", "_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi"),
    *("_ZN14nvcaffeparser117createCaffeParserEv", "_ZN14nvcaffeparser123shutdownProtobufLibraryEv"),
)
# A driver that has one device, an Orin by its numbers (CUDA driver API); behind it there is nothing.
DRIVER = """
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int *v) { *v = 12060; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) { s[0] = 'O'; s[1] = 0; return 0; }
int cuDeviceTotalMem_v2(unsigned long *b, int d) { *b = 8ul << 30; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 : a == 76 ? 7 : 1; return 0; }
"""


@dataclass(frozen=True)
class Bindings:
    """python: the interpreter that can import them."""

    version: str
    distribution: str
    python: str

    @property
    def folder(self) -> Path:
        tag = "cp38" if self.python != sys.executable else f"cp{sys.version_info.major}{sys.version_info.minor}"
        return CACHE / f"{self.version}-{tag}"

    def environment(self) -> dict[str, str]:
        folder = str(self.folder)
        return {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": os.pathsep.join((folder, str(ROOT)))}


class NotAvailable(Exception):
    """There is no wheel for this machine, no network, or no compiler; the message says which."""


def all_bindings() -> tuple[Bindings, ...]:
    here = sys.executable
    old = os.environ.get("HOTSPARE_TEST_PYTHON38", here if sys.version_info[:2] == (3, 8) else "")
    return (
        Bindings("8.5.2.2", "tensorrt", old),  # JetPack 5
        Bindings("10.3.0", "tensorrt-cu12-bindings", here),  # JetPack 6.1, 6.2
        Bindings("10.16.1.11", "tensorrt-cu13-bindings", here),  # JetPack 7.2
        Bindings("11.4.0.106", "tensorrt-cu13-bindings", here),  # JetPack 7.2.2
    )


def provide(bindings: Bindings) -> None:
    """Fetch and complete them unless the cache has them. Raises NotAvailable."""
    if not bindings.python:
        raise NotAvailable("HOTSPARE_TEST_PYTHON38 names no interpreter")
    with exclusive(CACHE / f"{bindings.version}.lock", FETCH_S, f"fetching the bindings of TensorRT {bindings.version}"):
        if (bindings.folder / "ready").exists():
            return
        if bindings.distribution == "tensorrt":
            raise NotAvailable(f"TensorRT {bindings.version} is large: python -m tests.conformance.bindings {bindings.version} fetches it")
        fetch(bindings, FETCH_S)


def fetch(bindings: Bindings, deadline_s: float) -> None:
    if shutil.which("cc") is None:
        raise NotAvailable("no C compiler (cc) to make the libraries that the bindings link to")
    folder = bindings.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    requirement = f"{bindings.distribution}=={bindings.version}"
    command = [bindings.python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s)
    except subprocess.TimeoutExpired as error:
        raise NotAvailable(f"{requirement} did not come within {deadline_s:.0f} s") from error
    if done.returncode != 0:
        raise NotAvailable(f"{requirement} cannot be had for {bindings.python}: {done.stderr.strip()[-300:]}")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            # Of the large wheel only the bindings: its libraries need cuBLAS and cuDNN.
            archive.extractall(folder, [name for name in archive.namelist() if "/lib" not in name])
        wheel.unlink()
    if not (folder / "tensorrt").exists():  # as NVIDIA's package of that name does it
        (folder / "tensorrt").mkdir()
        (folder / "tensorrt" / "__init__.py").write_text("from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n")
    _compile(folder, "".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS), *_sonames(bindings.version))
    _compile(folder, DRIVER, "libcuda.so.1")
    (folder / "ready").touch()


def _sonames(version: str) -> list[str]:
    return [f"lib{library}.so.{version.split('.')[0]}" for library in LIBRARIES]


def _compile(folder: Path, source: str, *sonames: str) -> None:
    for soname in sonames:
        options = ["-shared", "-nostdlib", "-fPIC", "-o", str(folder / soname), f"-Wl,-soname,{soname}"]
        subprocess.run(["cc", *options, "-x", "c", "-"], input=source, text=True, check=True, capture_output=True)


if __name__ == "__main__":
    for each in all_bindings():
        if each.version in sys.argv[1:]:
            fetch(each, 3600)
