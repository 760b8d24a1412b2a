"""Does a manifest say of a model what the model's own configuration says? Raised before anything is exported."""

from __future__ import annotations

from collections.abc import Sequence

from converters.errors import ConversionError
from converters.graph_contract import Stateless
from converters.json_object import JsonObject
from converters.transformers_facts import DETECTORS, Picture, dimensions_of, labels_of, model_type_of, picture_of, task_of, tokens_of
from models.manifest import ClassificationManifest, Detection, DetectionManifest


def check_facts(manifest: Stateless, config: JsonObject, preprocessor: JsonObject | None) -> None:
    """Raises ConversionError that names the field, both values and the remedy."""
    task = task_of(config)
    # A checkpoint with a head serves as an encoder too; a head cannot be made up.
    if task != manifest.task and not (manifest.task == "embedding" and task == "classification"):
        raise _differs(manifest, "task", manifest.task, task)
    if isinstance(manifest, DetectionManifest):
        _check_detection(manifest, manifest.detection, config, picture_of(preprocessor) if preprocessor is not None else None)
        return
    facts = manifest.classification if isinstance(manifest, ClassificationManifest) else manifest.embedding
    if facts.max_tokens > tokens_of(config):
        raise _differs(manifest, "max_tokens", facts.max_tokens, f"at most {tokens_of(config)}")
    if isinstance(manifest, ClassificationManifest):
        _check_labels(manifest, manifest.classification.labels, labels_of(config))
    elif manifest.embedding.dimensions != dimensions_of(config):
        raise _differs(manifest, "dimensions", manifest.embedding.dimensions, dimensions_of(config))


def _check_detection(manifest: DetectionManifest, facts: Detection, config: JsonObject, picture: Picture | None) -> None:
    detector = DETECTORS[model_type_of(config)]
    if facts.contract != "raw":
        raise _differs(manifest, "contract", facts.contract, "raw")
    if facts.scores != detector.scores:
        raise _differs(manifest, "scores", facts.scores, detector.scores)
    if facts.resize == "shortest_edge" and not detector.takes_any_size:
        raise ConversionError(
            f'{manifest.name}: a graph of {model_type_of(config)} has one size; set resize = "stretch" with a height and a width',
            "unsupported",
        )
    _check_labels(manifest, facts.labels, labels_of(config))
    if picture is None:
        return
    for name, given, found in (("mean", facts.mean, picture.mean), ("std", facts.std, picture.std)):
        if any(abs(one - other) > 1e-3 for one, other in zip(given, found, strict=True)):
            raise _differs(manifest, name, list(given), list(found))
    if detector.takes_any_size and facts.resize != picture.resize:
        raise _differs(manifest, "resize", facts.resize, picture.resize)
    if facts.resize == picture.resize and (facts.height, facts.width) != (picture.height, picture.width):
        raise _differs(manifest, "height × width", f"{facts.height} × {facts.width}", f"{picture.height} × {picture.width}")


def _check_labels(manifest: Stateless, given: Sequence[str], found: Sequence[str]) -> None:
    """A manifest may call a class by another name, but a name that the model knows must stand at the model's number for it."""
    if len(given) != len(found):
        raise _differs(manifest, "labels", f"{len(given)} classes", f"{len(found)} classes")
    for index, (name, own) in enumerate(zip(given, found, strict=True)):
        if name != own and name in found:
            raise _differs(manifest, f"labels[{index}]", name, own)


def _differs(manifest: Stateless, field: str, given: object, found: object) -> ConversionError:
    return ConversionError(
        f"{manifest.name}: its manifest says {field} = {given!r}, the model's configuration {found!r}; correct the manifest", "bad_request"
    )
