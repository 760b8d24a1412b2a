"""What the configuration files of a Hugging Face folder say of a detector or a text encoder, in the words of our manifests.

Pure: JSON in, facts out; neither torch nor transformers is needed. Nothing is taken on trust that only code in the folder could say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from converters.errors import ConversionError, unsupported
from converters.json_object import JsonObject

Scores = Literal["sigmoid", "softmax"]
Task = Literal["detection", "classification", "embedding", "generation"]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Detector:
    """`takes_any_size`: an exported graph follows the size of its picture; else the size is fixed when it is exported.

    `multiple_of`: sides are cut to it, because patches are.
    """

    scores: Scores
    takes_any_size: bool
    multiple_of: int = 1


# By `model_type`. The scores are those of each model's own post-processing: of the family only the first generation has a background
# class. Deformable attention cuts its features into levels whose sizes tracing writes down as numbers.
DETECTORS: dict[str, Detector] = {
    "detr": Detector("softmax", True),
    "table-transformer": Detector("softmax", True),
    "yolos": Detector("softmax", True, 16),
    "conditional_detr": Detector("sigmoid", True),
    "dab-detr": Detector("sigmoid", True),
    "deformable_detr": Detector("sigmoid", False),
    "rt_detr": Detector("sigmoid", True),
    "rt_detr_v2": Detector("sigmoid", True),
    "d_fine": Detector("sigmoid", True),
}
ENCODERS = frozenset({"bert", "distilbert", "mobilebert", "roberta", "xlm-roberta", "camembert", "mpnet", "albert", "electra"})
# Their positions begin behind the number of the padding token.
_SHIFTED_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})
_DEFAULT_TOKENS = 512
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Picture:
    """How a picture is prepared; the fields are those of `models.manifest.Detection`."""

    resize: Literal["stretch", "shortest_edge"]
    height: int
    width: int
    mean: Triple
    std: Triple


def model_type_of(config: JsonObject) -> str:
    return config.text("model_type", "")


def task_of(config: JsonObject) -> Task:
    """The task of the first architecture that is named. Raises ConversionError for one that is not exported here."""
    kind, names = model_type_of(config), [str(name) for name in config.list("architectures")]
    name = names[0] if names else ""
    if name.endswith("ForCausalLM"):
        return "generation"
    if kind in DETECTORS and (not name or name.endswith("ForObjectDetection")):
        return "detection"
    if kind in ENCODERS:
        if name.endswith("ForSequenceClassification"):
            return "classification"
        if not name or name.endswith(("Model", "ForMaskedLM", "ForPreTraining")):
            return "embedding"
    raise unsupported(
        f"{config.name}: architecture {name or 'unnamed'!r} of model type {kind!r} is not exported here; supported are detectors "
        f"({', '.join(DETECTORS)}) and encoders ({', '.join(sorted(ENCODERS))}) with a classification head or none"
    )


def labels_of(config: JsonObject) -> tuple[str, ...]:
    """Names of the classes in their order. Raises ConversionError where numbers are left out."""
    values = config.object("id2label").values
    if not values:
        # transformers itself writes no table of two classes without names.
        return tuple(f"LABEL_{index}" for index in range(config.integer("num_labels", 2)))
    names = {int(key): str(name) for key, name in values.items() if key.isdecimal()}
    if sorted(names) != list(range(len(values))):
        raise ConversionError(
            f"{config.name}: id2label numbers its {len(values)} classes {_few(sorted(names))}, not 0 to {len(values) - 1}"
        )
    return tuple(names[index] for index in range(len(names)))


def dimensions_of(config: JsonObject) -> int:
    return config.integer("dim" if model_type_of(config) == "distilbert" else "hidden_size")


def tokens_of(config: JsonObject) -> int:
    """Positions that the model has for tokens, within what is usual."""
    positions = config.integer("max_position_embeddings", _DEFAULT_TOKENS)
    shift = config.integer("pad_token_id", 1) + 1 if model_type_of(config) in _SHIFTED_POSITIONS else 0
    return max(2, min(positions - shift, _DEFAULT_TOKENS))


def picture_of(preprocessor: JsonObject) -> Picture:
    """Facts of a `preprocessor_config.json`, in its old and its new form. Raises ConversionError."""
    if not preprocessor.flag("do_resize", True) or not preprocessor.flag("do_rescale", True):
        raise unsupported(f"{preprocessor.name}: pictures that are not resized or not scaled to 0..1 are not prepared here")
    if abs(preprocessor.number("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        raise unsupported(f"{preprocessor.name}: rescale_factor {preprocessor.number('rescale_factor')} is not 1/255")
    resize, height, width = _size_of(preprocessor)
    if not preprocessor.flag("do_normalize", True):
        return Picture(resize, height, width, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    mean, std = _triple(preprocessor, "image_mean", _IMAGENET_MEAN), _triple(preprocessor, "image_std", _IMAGENET_STD)
    if min(std) <= 0:
        raise ConversionError(f"{preprocessor.name}: image_std {std} must be above zero")
    return Picture(resize, height, width, mean, std)


def _size_of(preprocessor: JsonObject) -> tuple[Literal["stretch", "shortest_edge"], int, int]:
    size = preprocessor.values.get("size")
    if isinstance(size, int):  # before 2023
        return "shortest_edge", _side(preprocessor, size), _side(preprocessor, preprocessor.integer("max_size", 1333))
    sides = preprocessor.object("size")
    if "height" in sides and "width" in sides:
        return "stretch", _side(sides, sides.integer("height")), _side(sides, sides.integer("width"))
    if "shortest_edge" in sides:
        return "shortest_edge", _side(sides, sides.integer("shortest_edge")), _side(sides, sides.integer("longest_edge", 1333))
    raise unsupported(f"{preprocessor.name}: size {sides.values} is neither height and width nor shortest_edge")


def _side(where: JsonObject, value: int) -> int:
    if not 16 <= value <= 8192:
        raise ConversionError(f"{where.name}: a picture's side of {value} pixels is not within 16..8192")
    return value


def _triple(where: JsonObject, key: str, default: Triple) -> Triple:
    values = where.list(key) or list(default)
    if len(values) != 3 or not all(isinstance(value, (int, float)) and abs(value) < 1e6 for value in values):
        raise ConversionError(f"{where.name}: {key} is {values}, not three numbers")
    return (float(values[0]), float(values[1]), float(values[2]))


def _few(values: Sequence[Any]) -> str:
    return f"{', '.join(map(str, values[:4]))}{' …' if len(values) > 4 else ''}"
