"""Whether an input file is one: each of its lines as it must be, no custom_id twice, not too many. Blocks."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from agent.batches.journal import Lines
from agent.batches.record import LineError

MOST_ERRORS = 100  # are told; who mends a hundred sees the others


def validate(file: Path, endpoint: str, most_lines: int, line_bytes: int) -> tuple[int, tuple[LineError, ...]]:
    """How many requests the file holds, and what is wrong with it. Raises InputLost."""
    lines, errors, total = Lines(file, endpoint, most_lines, line_bytes), list[LineError](), 0
    seen: set[bytes] = set()  # digests: 50,000 identifiers may be of 512 characters each
    try:
        for line in lines:
            if isinstance(line, LineError):
                errors.append(line)
            else:
                digest = blake2b(line.custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
                if digest in seen:
                    message = f"custom_id {line.custom_id[:80]!r} stands in an earlier line too; each must be its own."
                    errors.append(LineError(code="duplicate_custom_id", message=message, line=line.number, param="custom_id"))
                seen.add(digest)
                total += 1
            if len(errors) >= MOST_ERRORS:
                break
    finally:
        lines.close()
    if not total and not errors:
        errors.append(LineError(code="empty_file", message="The file has no request; send one JSON object a line."))
    return total, tuple(errors)
