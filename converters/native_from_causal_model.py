"""A causal language model → a folder for the native engine: weights repacked, decoder.c compiled for the CPU at hand.

Four and eight-bit blocks of 32 columns are carried over as they are; narrower blocks and plain weights become eight-bit blocks, for which
the gate answers, or are refused where the result has to be exact. Activations are rounded to 15 bits,
or with `int8` to 8 as llama.cpp does it: faster, and less like the original.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.causal_model import CausalModel
from converters.decoder import rope_tables
from converters.decoder_graph import Progress
from converters.decoder_source import DecoderSource, Matrix, interleaved_order, with_rows
from converters.errors import ConversionError, unsupported
from converters.generation_folder import weight_formats, write_beside
from converters.onnxruntime_operators import Activations
from converters.quantised_blocks import BLOCK_LAYOUTS, Blocks
from models.engines.native.weights import ARTEFACT, BLOCK, LANES, LIBRARY, WeightsWriter, cpu_identity

# Part of the engine key, with the compiler: raise it with every change of what is written or of the C sources.
VERSION = 6
# Formats whose blocks have the engine's own width.
KEPT = frozenset(layout.name for layout in BLOCK_LAYOUTS.values() if layout.unpack is not None) - {"Q6_K"}
SOURCES = Path(__file__).parent.parent / "models" / "engines" / "native"
COMPILE_DEADLINE_S = 300.0
MAX_LOG = 600


def native_from_causal_model(
    model: CausalModel, folder: Path, progress: Progress, activations: Activations = "float32", is_exact: bool = False
) -> list[str]:
    """Write `model.native`, `decoder.so` and what lies beside them. `is_exact`: no weight may be rounded. Returns the formats of those that
    were. Raises ConversionError, with the code `unsupported` for a model that this engine cannot hold."""
    decoder, source = model.decoder, model.source
    _refuse(model)
    rounded = sorted(rounded_formats(source))
    if is_exact and rounded:
        raise unsupported(
            f"{source.path.name} has weights of {', '.join(rounded)}, which the native engine rounds to eight bits: its fp32 is not the "
            "model's; take onnxruntime for fp32, or ask for int8"
        )
    compile_library(folder)
    order = {"attn_q": decoder.heads, "attn_k": decoder.kv_heads} if decoder.has_interleaved_rows else {}
    with tempfile.TemporaryFile(dir=folder) as scratch:
        weights = WeightsWriter(scratch)
        _matrix(weights, "token_embd", source.matrix("token_embd.weight"))
        if not decoder.tied_head:
            _matrix(weights, "output", source.matrix("output.weight"))
        weights.array("output_norm", source.float32("output_norm.weight"))
        for name, table in zip(("rope.cosine", "rope.sine"), rope_tables(decoder), strict=True):
            weights.array(name, table)
        for layer in range(decoder.layers):
            progress(layer / decoder.layers, f"layer {layer + 1} of {decoder.layers}")
            for norm in ("attn_norm", "ffn_norm", *(("attn_q_norm", "attn_k_norm") if decoder.normalises_heads else ())):
                weights.array(f"blk.{layer}.{norm}", source.float32(f"blk.{layer}.{norm}.weight"))
            for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
                name = f"blk.{layer}.{part}"
                matrix = source.matrix(f"{name}.weight")
                rows = interleaved_order(len(_codes(matrix)), order[part]) if part in order else None
                _matrix(weights, name, matrix if rows is None else with_rows(matrix, rows))
                if f"{name}.bias" in source.tensors:
                    bias = source.float32(f"{name}.bias")
                    weights.array(f"{name}.bias", bias if rows is None else bias[rows])
        weights.write(folder / ARTEFACT, cpu_identity(), decoder.rms_epsilon, decoder.feed_forward, activations == "float32")
    write_beside(model, folder, {"activations": activations})
    progress(1.0, "written")
    return rounded


def rounded_formats(source: DecoderSource) -> set[str]:
    """How weights are stored that become blocks of eight bits."""
    return set(weight_formats(source)) - KEPT


def find_compiler() -> str | None:
    """CC, else cc, gcc or clang; None where there is none, and decoders stay with ONNX Runtime."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return next((found for found in (shutil.which(name) for name in names if name) if found), None)


def compiler_version() -> str:
    """First line of `cc --version`. Raises ConversionError where there is no compiler."""
    return _run([_compiler(), "--version"]).splitlines()[0]


def compile_library(folder: Path, options: tuple[str, ...] = ()) -> Path:
    """`folder`/decoder.so for the instructions of this CPU, or those that `options` name. Raises ConversionError."""
    target = folder / LIBRARY
    native = options or (("-mcpu=native",) if os.uname().machine == "aarch64" else ("-march=native",))
    flags = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-Wno-psabi", *native]
    _run([_compiler(), *flags, "-o", str(target), str(SOURCES / "decoder.c"), "-lm", "-lpthread"])
    return target


def _compiler() -> str:
    compiler = find_compiler()
    if compiler is None:
        raise unsupported("the native engine needs a C compiler and there is none; install gcc, or take onnxruntime")
    return compiler


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConversionError(f"{command[0]} could not be run: {error}", "unsupported") from error
    if done.returncode:
        raise ConversionError(f"{command[0]} could not compile the native engine: {done.stderr[:MAX_LOG]}", "unsupported")
    return done.stdout


def _refuse(model: CausalModel) -> None:
    decoder = model.decoder
    widths = {
        "head dimension": (decoder.head_dim, LANES),
        "hidden width": (decoder.hidden, BLOCK),
        "feed-forward width": (decoder.feed_forward, BLOCK),
        "query width": (decoder.heads * decoder.head_dim, BLOCK),
    }
    for name, (width, unit) in widths.items():
        if width % unit:
            raise unsupported(f"{model.source.path.name}: {name} {width} is not a multiple of {unit}, as the native engine needs it")


def _codes(matrix: Matrix) -> NDArray[Any]:
    return matrix.codes if isinstance(matrix, Blocks) else matrix


def _matrix(weights: WeightsWriter, name: str, matrix: Matrix) -> None:
    blocks = matrix if isinstance(matrix, Blocks) and matrix.width == BLOCK else eight_bit(matrix)
    scale, offset = blocks.scale, blocks.offset
    codes: NDArray[np.uint8] = blocks.codes.view(np.uint8)
    if blocks.bits == 4:
        codes = (blocks.codes + np.int8(8)).view(np.uint8)
        if offset is not None:  # of codes that begin with 0
            offset = offset - 8 * scale
    is_wide = not all(_is_half(values) for values in (scale, offset) if values is not None)
    records = packed(codes, scale, offset, blocks.bits, is_wide)
    weights.matrix(name, records, len(records) * LANES, codes.shape[1] * BLOCK, blocks.bits, offset is not None, is_wide)


def packed(
    codes: NDArray[np.uint8], scale: NDArray[np.float32], offset: NDArray[np.float32] | None, bits: int, is_wide: bool
) -> NDArray[np.uint8]:
    """Records as products.h describes them, uint8 [groups, blocks, bytes]; codes [rows, blocks, 32], factors [rows, blocks]."""
    missing = -len(codes) % LANES
    rows, blocks = len(codes) + missing, codes.shape[1]

    def grouped(values: NDArray[Any]) -> NDArray[Any]:
        filled: NDArray[Any] = np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)]) if missing else values
        folded: NDArray[Any] = filled.reshape(rows // LANES, LANES, *values.shape[1:]).swapaxes(1, 2)
        return folded

    quads = grouped(codes).reshape(rows // LANES, blocks, LANES, 8, 4).swapaxes(2, 3).astype(np.uint8)
    if bits == 4:
        quads = quads[:, :, :4] | quads[:, :, 4:] << np.uint8(4)
    parts = [quads.reshape(rows // LANES, blocks, -1)]
    for factors in (scale, offset):
        if factors is not None:
            numbers = np.ascontiguousarray(grouped(factors.astype(np.float32 if is_wide else np.float16)))
            parts.append(numbers.view(np.uint8).reshape(rows // LANES, blocks, -1))
    return np.concatenate(parts, axis=2)


def eight_bit(matrix: Matrix) -> Blocks:
    """Any weights as blocks of 32 columns with eight-bit codes: an error of at most 1/254 of the largest number of a block."""
    values = matrix.float32() if isinstance(matrix, Blocks) else matrix.astype(np.float32)
    blocks = values.reshape(len(values), -1, BLOCK)
    scale = (np.abs(blocks).max(axis=2) / 127).astype(np.float16).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(scale[:, :, None] > 0, np.rint(blocks / scale[:, :, None]), 0)
    return Blocks(np.clip(codes, -127, 127).astype(np.int8), scale, None, 8)


def _is_half(values: NDArray[np.float32]) -> bool:
    """Whether float16 holds them; offsets of Q4_1 come back from a sum with a rounding error of float32."""
    with np.errstate(over="ignore"):
        return bool(np.allclose(values.astype(np.float16).astype(np.float32), values, rtol=1e-6, atol=1e-9))
