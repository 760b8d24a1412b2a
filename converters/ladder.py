"""Which precisions a build tries, in order: the first whose engine is proven is published.

Half precision has 11 bits and ends at 65504. Softmax over large scores and the squares inside a normalisation are where detection
transformers lose boxes to it, so these two return to float32 first (NVIDIA/TensorRT#3652, Intellindust-AI-Lab/DEIMv2#112).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from converters.errors import ConversionError
from models.manifest import Precision

Rung = Literal["fp32", "tf32", "fp16", "int8", "int4"]
Group = Literal["attention", "normalisation", "activations"]

# The first GPUs with TF32 are Ampere's; on a Xavier (sm_72) the flag changes nothing.
TF32_SM = 80
# Before, TensorRT has flags only; from 11 on it has no flags (docs of NVIDIA/TensorRT, "Strongly Typed Networks").
TYPED_SINCE = 10
SENSITIVE: tuple[Group, ...] = ("attention", "normalisation")


@dataclass(frozen=True)
class Step:
    """One attempt.

    precision   int8 where types stand in the graph: what is not rounded to integers is in half precision
    keeps_fp32  parts of the network that are not rounded
    is_typed    the precision stands in the ONNX itself; else it is a permission to the builder, with the kept parts pinned by name
    """

    precision: Rung
    keeps_fp32: tuple[Group, ...] = ()
    is_typed: bool = True

    @property
    def name(self) -> str:
        return f"{self.precision} with {' and '.join(self.keeps_fp32)} in fp32" if self.keeps_fp32 else self.precision


@dataclass(frozen=True)
class Place:
    """Where an engine will run.

    runtime  `onnxruntime`, `native`, `tensorrt` or `tensorrt_rtx`
    device   `cpu`, or the GPU in the words of an EngineKey; `sm` is 0 without one
    reason   why an engine cannot run here, where it cannot
    provider what ONNX Runtime computes with; `tensorrt`: the version behind the provider of that name
    """

    runtime: str
    version: str
    device: str = "cpu"
    sm: int = 0
    l4t: str = ""
    can_run_here: bool = True
    reason: str = ""
    provider: str = "cpu"
    tensorrt: str = ""

    @property
    def is_tensorrt(self) -> bool:
        return self.runtime in ("tensorrt", "tensorrt_rtx")

    @property
    def is_typed(self) -> bool:
        """Whether the precision stands in the ONNX itself."""
        major = self.version.split(".")[0]
        return self.runtime != "tensorrt" or (major.isdigit() and int(major) >= TYPED_SINCE)


def asked_precision(place: Place, task: str, asked: Precision, own: Precision, activations: str = "float32") -> Rung:
    """What `auto` means: the manifest's own wish, else fp16 on a GPU, else fp32 (a decoder on ONNX Runtime: its activations).

    Raises ConversionError (code `unsupported`) for what this place or task does not have.
    """
    rung = own if asked == "auto" else asked
    if rung == "auto":
        is_gpu = place.is_tensorrt or place.provider != "cpu"
        rung = "fp16" if is_gpu else "int8" if task == "generation" and activations == "int8" else "fp32"
    if task == "generation" and not place.is_tensorrt and rung not in ("fp32", "int8", "int4"):
        raise _not_here(f"precision {rung} of a decoder on ONNX Runtime", "ask for fp32, int8 or int4")
    if task == "generation" and not place.is_typed and rung in ("int8", "int4"):
        raise _not_here(
            f"precision {rung} of a decoder on TensorRT {place.version}", "blocks of integers begin with TensorRT 10; ask for fp16"
        )
    if rung == "int4" and task != "generation":
        raise _not_here("precision int4", "only decoders have weights of four bits; ask for fp16 or int8")
    return rung


def ladder(place: Place, first: Rung, task: str = "detection") -> tuple[Step, ...]:
    """The attempts from `first` down to fp32."""
    if not place.is_tensorrt:
        return _on_onnxruntime(first, task)
    typed = place.is_typed
    steps = [
        Step("int4", (), typed),
        Step("int8", (), typed),
        Step("fp16", (), typed),
        Step("fp16", SENSITIVE, typed),
        Step("tf32", (), typed),
        Step("fp32", (), typed),
    ]
    if task == "generation":
        # Normalisation and softmax of our decoders are float32 at every step.
        steps = [step for step in steps if not step.keeps_fp32]
    if 0 < place.sm < TF32_SM:
        steps = [step for step in steps if step.precision != "tf32"]
        first = "fp32" if first == "tf32" else first
    return tuple(steps[next(index for index, step in enumerate(steps) if step.precision == first) :])


def native_ladder(asked: Precision, own: Precision, activations: str, is_rounded: bool) -> tuple[Step, ...]:
    """The attempts for the native engine, which multiplies blocks of integers only. `is_rounded`: weights of the source are no such blocks
    and become some of eight bits; then fp32 is for ONNX Runtime, and the line says so.

    Raises ConversionError (code `unsupported`).
    """
    rung = own if asked == "auto" else asked
    below = (Step("int8", ("activations",)), Step("fp32")) if is_rounded else (Step("fp32"),)
    if rung == "auto":
        return (Step("int8"), *below) if activations == "int8" else below
    if rung == "int8" or rung == "int4":
        return (Step(rung), *below)
    if rung == "fp32":
        return (Step("fp32"),)
    raise _not_here(f"precision {rung} of the native engine", "ask for fp32, int8 or int4")


def _on_onnxruntime(first: Rung, task: str) -> tuple[Step, ...]:
    # On a CPU half precision is computed in float32, so it saves memory and never time: int8 does not end there.
    if first in ("int8", "int4"):
        return (Step(first), Step("fp32"))
    if first == "fp16" and task != "generation":
        return (Step("fp16"), Step("fp16", SENSITIVE), Step("fp32"))
    return (Step("fp32"),)


def share_of(index: int, count: int) -> tuple[float, float]:
    """Where attempt `index` of `count` begins and ends within the time of all: each takes half of what is left, the last one all.

    How many will be needed nobody knows before; most builds need one.
    """
    end = 1.0 if index == count - 1 else 1 - 0.5 ** (index + 1)
    return 1 - 0.5**index, end


def _not_here(what: str, remedy: str) -> ConversionError:
    return ConversionError(f"{what} is not built here: {remedy}", "unsupported")
