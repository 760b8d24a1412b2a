"""Weights into a model of transformers: from local files, as numbers, every one of them accounted for."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

# Read when the hub's library is imported: no configuration makes it fetch anything.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

from converters.errors import ConversionError, unsupported
from converters.json_object import JsonObject
from converters.transformers_facts import model_type_of

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

_CLASSES = {
    "detection": "AutoModelForObjectDetection",
    "classification": "AutoModelForSequenceClassification",
    "embedding": "AutoModel",
}
# Fields that name code to run or weights to fetch.
_DROPPED = ("auto_map", "_name_or_path", "custom_pipelines", "quantization_config")


def load_model(config: JsonObject, weights: Path, name: str, task: str) -> Any:
    """The model in float32, ready to infer. `name`: the published name of the weights. Raises ConversionError."""
    if config.object("quantization_config").values:
        raise unsupported("quantised checkpoints are not exported; take the one with floats and let the build round it")
    if config.flag("use_timm_backbone", False) or config.object("backbone_config").text("model_type", "") == "timm_backbone":
        raise unsupported(
            f"this {model_type_of(config)} has its backbone in the form of timm; take its revision for transformers (`@no_timm` at "
            "facebook/detr-resnet-50), or save it again with use_timm_backbone=False"
        )
    values = {key: value for key, value in config.values.items() if key not in _DROPPED}
    values["use_pretrained_backbone"] = False
    kind = getattr(transformers, _CLASSES[task])
    with tempfile.TemporaryDirectory(prefix="hotspare-export-") as folder:
        Path(folder, "config.json").write_text(json.dumps(values))
        Path(folder, name).symlink_to(weights.resolve())
        try:
            model, report = kind.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                use_safetensors=name.endswith(".safetensors"),
                output_loading_info=True,
                # Plain matrix products and softmax: other forms trace into operators that builders do not recognise as attention.
                attn_implementation="eager",
            )
        except ConversionError:
            raise
        except Exception as error:  # whatever strange files make of it
            raise ConversionError(f"transformers {transformers.__version__} cannot load {name}: {type(error).__name__}: {error}") from error
    _check_complete(report, task, name)
    return model.float().eval()


def _check_complete(report: Any, task: str, name: str) -> None:
    """What a checkpoint lacks would be random numbers in the graph."""
    # The pooler is not read: an embedding is made of the last hidden state.
    missing = sorted(key for key in report["missing_keys"] if not (task == "embedding" and "pooler" in key.split(".")))
    if missing or report["mismatched_keys"]:
        strange = missing or sorted(str(key) for key in report["mismatched_keys"])
        raise ConversionError(
            f"{name} has no fitting weights for {len(strange)} of the model's tensors ({', '.join(strange[:3])} …); it belongs to another "
            "architecture or version"
        )


def threads(count: int) -> None:
    torch.set_num_threads(count)
