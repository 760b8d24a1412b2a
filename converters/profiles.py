"""Shapes that a plan is built for, from the manifest: only what a graph leaves open needs a place in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converters.errors import ConversionError
from converters.graph_contract import Stateless
from models.manifest import DetectionManifest, EmbeddingManifest

# [least, usual, most] of each axis, by input.
Profile = dict[str, list[list[int]]]

# Texts are mostly short; kernels are chosen for what is usual.
USUAL_TOKENS = 64


def profiles_of(inputs: Mapping[str, Sequence[int]], manifest: Stateless) -> list[Profile]:
    """One profile for the inputs of a graph (name → sizes, below 1 where open); none when nothing is open. Raises ConversionError."""
    profile: Profile = {}
    for name, sizes in inputs.items():
        if all(size > 0 for size in sizes):
            continue
        known = _picture(name, manifest) if isinstance(manifest, DetectionManifest) else _tokens(manifest)
        if len(known) != len(sizes):
            raise ConversionError(f"input {name!r} of {manifest.name} has {len(sizes)} axes, {len(known)} are known here: export it again")
        ranges = [(size, size, size) if size > 0 else least_usual_most for size, least_usual_most in zip(sizes, known, strict=True)]
        profile[name] = [[each[place] for each in ranges] for place in range(3)]
    return [profile] if profile else []


Range = tuple[int, int, int]


def _tokens(manifest: Stateless) -> list[Range]:
    most = manifest.embedding.max_tokens if isinstance(manifest, EmbeddingManifest) else manifest.classification.max_tokens  # type: ignore[union-attr]  # detectors take no tokens
    rows = manifest.build.batch_max
    return [(1, rows, rows), (1, min(USUAL_TOKENS, most), most)]


def _picture(name: str, manifest: DetectionManifest) -> list[Range]:
    facts, rows = manifest.detection, (1, manifest.build.batch_max, manifest.build.batch_max)
    if name == "orig_target_sizes":
        return [rows, (2, 2, 2)]
    if facts.has_one_size:
        sides = [(facts.height,) * 3, (facts.width,) * 3]
    else:
        # The longer side is at most `width`; of pictures up to three times as long as high the shorter is at least half of `height`.
        usual = min(facts.width, facts.height * 4 // 3)
        sides = [(max(1, facts.height // 2), facts.height, facts.width), (max(1, facts.height // 2), usual, facts.width)]
    if name == "pixel_mask":
        return [rows, *sides]
    return [rows, *sides, (3, 3, 3)] if manifest.build.takes_bytes else [rows, (3, 3, 3), *sides]
