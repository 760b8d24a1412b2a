"""Kernels that earlier builds have timed, in one file for all builds of a device.

The file is ours around TensorRT's bytes: a line of JSON {"tensorrt", "sha256"}, then the bytes. So a torn or foreign cache is seen
before TensorRT reads it, which trusts what it is given.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Optional

from models.durable import StoreError, exclusive, shared, write_atomically

MAX_BYTES = 256 << 20
MAX_HEADER_BYTES = 4096
LOCK_WAIT_S = 10.0

log = logging.getLogger(__name__)


def use_timing_cache(config: Any, file: Path, version: str) -> Any:
    """Give the config what the file knows, nothing where there is none or a broken one. Returns the cache in use, or None."""
    try:
        with shared(_lock(file)):
            content = read_content(file, version)
    except OSError as error:
        log.warning("cannot read the timing cache %s: %s", file, error)
        content = b""
    for candidate in (content, b"") if content else (b"",):
        cache = config.create_timing_cache(candidate)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
        log.warning("TensorRT refuses the timing cache %s of %d bytes: started anew", file, len(candidate))
    return None


def keep_timing_cache(config: Any, file: Path, version: str) -> None:
    """Put what this build has timed into the file, together with what others put there meanwhile. A failure costs only time later."""
    used = config.get_timing_cache()
    if used is None:
        return
    try:
        with exclusive(_lock(file), LOCK_WAIT_S, f"the timing cache {file}"):
            theirs = read_content(file, version)
            other = config.create_timing_cache(theirs) if theirs else None
            if other is not None and not used.combine(other, False):
                log.warning("the timing cache %s cannot be combined with this build's: replaced", file)
            write_atomically(file, content_bytes(bytes(memoryview(used.serialize())), version))
    except (OSError, StoreError) as error:
        log.warning("the timing cache %s is not kept: %s", file, error)


def content_bytes(content: bytes, version: str) -> bytes:
    header = {"tensorrt": version, "sha256": hashlib.sha256(content).hexdigest()}
    return json.dumps(header, sort_keys=True).encode() + b"\n" + content


def read_content(file: Path, version: str) -> bytes:
    """TensorRT's bytes of a file; empty when it is absent, of another version or damaged, the last two with a line in the log."""
    try:
        with file.open("rb") as stream:
            header, content = stream.readline(MAX_HEADER_BYTES), stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return b""
    reason = _why_unusable(header, content, version)
    if reason is not None:
        log.warning("the timing cache %s is ignored and will be replaced: %s", file, reason)
        return b""
    return content


def _why_unusable(header: bytes, content: bytes, version: str) -> Optional[str]:
    try:
        facts = json.loads(header.decode())
    except (ValueError, RecursionError):
        return "it has no header"
    if not isinstance(facts, dict):
        return "it has no header"
    if facts.get("tensorrt") != version:
        return f"it is of TensorRT {facts.get('tensorrt')!r}, this is {version}"
    if len(content) > MAX_BYTES:
        return f"it has more than {MAX_BYTES} bytes"
    return None if facts.get("sha256") == hashlib.sha256(content).hexdigest() else "it is damaged (its sha256 differs)"


def _lock(file: Path) -> Path:
    return file.with_name(f"{file.name}.lock")
