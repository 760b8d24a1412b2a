"""Small models of transformers with random weights, as folders on the disk, and the manifests that fit them.

torch and transformers are optional: `make test-convert` brings them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.manifest import Manifest, manifest_from_mapping

CLASSES = 5
LABELS = {"id2label": {index: f"c{index}" for index in range(CLASSES)}, "label2id": {f"c{index}": index for index in range(CLASSES)}}
HEIGHT, WIDTH = 160, 192  # five and six cells of the coarsest map: of maps with one row, tracing makes not-a-number

_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_PLAIN = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 7,
}  # fmt: skip
_REAL_TIME = {
    "encoder_hidden_dim": 16, "encoder_in_channels": [8, 16, 16], "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "encoder_layers": 1,
    "d_model": 16, "decoder_in_channels": [16, 16, 16], "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32,
    "num_queries": 9, "hidden_expansion": 0.5,
}  # fmt: skip
_HGNET = {
    "stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 16, 16], "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 16, 16, 16], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2],
    "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"], "use_learnable_affine_block": True,
}  # fmt: skip
_TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 200}

# model_type → class prefix, softmax or sigmoid, resize
DETECTORS = {
    "detr": ("Detr", "softmax", "shortest_edge"),
    "conditional_detr": ("ConditionalDetr", "sigmoid", "shortest_edge"),
    "dab-detr": ("DabDetr", "sigmoid", "shortest_edge"),
    "table-transformer": ("TableTransformer", "softmax", "shortest_edge"),
    "yolos": ("Yolos", "softmax", "shortest_edge"),
    "deformable_detr": ("DeformableDetr", "sigmoid", "stretch"),
    "rt_detr": ("RTDetr", "sigmoid", "stretch"),
    "rt_detr_v2": ("RTDetrV2", "sigmoid", "stretch"),
    "d_fine": ("DFine", "sigmoid", "stretch"),
}
# model_type → class prefix, further fields of its configuration
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _TEXT),
    "distilbert": ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 200}),
    "mobilebert": ("MobileBert", {**_TEXT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}),
    "roberta": ("Roberta", {**_TEXT, "type_vocab_size": 1, "max_position_embeddings": 130}),
    "xlm-roberta": ("XLMRoberta", {**_TEXT, "type_vocab_size": 1}),
    "camembert": ("Camembert", {**_TEXT, "type_vocab_size": 1}),
    "mpnet": ("MPNet", _TEXT),
    "albert": ("Albert", {**_TEXT, "embedding_size": 16}),
    "electra": ("Electra", {**_TEXT, "embedding_size": 16}),
}


def save_detector(model_type: str, folder: Path, size: dict[str, int] | None = None, seed: int = 1) -> Any:
    """Writes the folder and returns the model."""
    transformers = pytest.importorskip("transformers")
    prefix, _, resize = DETECTORS[model_type]
    config = getattr(transformers, f"{prefix}Config")(**_detector_fields(model_type), **LABELS)
    size = size or ({"height": HEIGHT, "width": WIDTH} if resize == "stretch" else {"shortest_edge": HEIGHT, "longest_edge": 2 * HEIGHT})
    folder.mkdir(parents=True, exist_ok=True)
    normalises = model_type not in ("rt_detr", "rt_detr_v2", "d_fine")
    facts = {"size": size, "do_normalize": normalises, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return _save(getattr(transformers, f"{prefix}ForObjectDetection"), config, folder, seed)


def save_encoder(model_type: str, folder: Path, is_classifier: bool, seed: int = 1) -> Any:
    transformers = pytest.importorskip("transformers")
    prefix, fields = ENCODERS[model_type]
    config = getattr(transformers, f"{prefix}Config")(**fields, **(LABELS if is_classifier else {}))
    return _save(getattr(transformers, f"{prefix}{'ForSequenceClassification' if is_classifier else 'Model'}"), config, folder, seed)


def manifest_for(task: str, **facts: Any) -> Manifest:
    files = {"model": {"source": "file:/nowhere/model.safetensors"}}
    labels = [f"c{index}" for index in range(CLASSES)]
    fitting: dict[str, dict[str, Any]] = {
        "detection": {"height": HEIGHT, "width": WIDTH, "labels": labels},
        "classification": {"labels": labels, "max_tokens": 64},
        "embedding": {"dimensions": 32, "max_tokens": 64},
    }
    values = {"name": f"tiny-{task}", "licence": "CC0-1.0", "summary": "test", "format": "transformers", "files": files}
    return manifest_from_mapping({**values, "task": task, task: {**fitting[task], **facts}})


def detection_facts(model_type: str) -> dict[str, Any]:
    _, scores, resize = DETECTORS[model_type]
    if resize == "stretch":
        facts: dict[str, Any] = {"resize": "stretch", "scores": scores}
    else:
        facts = {"resize": "shortest_edge", "scores": scores, "height": HEIGHT, "width": 2 * HEIGHT}
    if model_type not in ("rt_detr", "rt_detr_v2", "d_fine"):
        facts.update(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    return facts


def files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir() if path.is_file()}


def _detector_fields(model_type: str) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    if model_type == "yolos":
        text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        return {**text, "image_size": [HEIGHT, WIDTH], "patch_size": 16, "num_detection_tokens": 7}
    levels = ["stage2", "stage3", "stage4"]
    if model_type == "d_fine":
        return {"backbone_config": transformers.HGNetV2Config(**_HGNET), **_REAL_TIME, "encoder_in_channels": [16, 16, 16]}
    if model_type.startswith("rt_detr"):
        return {"backbone_config": transformers.RTDetrResNetConfig(**_STAGES, out_features=levels), **_REAL_TIME}
    is_deformable = model_type == "deformable_detr"
    backbone = transformers.ResNetConfig(**_STAGES, out_features=levels if is_deformable else ["stage4"])
    # Deformable DETR normalises groups of a 32nd of its channels.
    width = {"hidden_size" if model_type == "dab-detr" else "d_model": 32 if is_deformable else 16}
    return {"backbone_config": backbone, "use_timm_backbone": False, **_PLAIN, **width}


def _save(kind: Any, config: Any, folder: Path, seed: int) -> Any:
    torch = pytest.importorskip("torch")
    config._attn_implementation = "eager"
    torch.manual_seed(seed)  # biases keep what their layers begin with
    model = kind(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Initial weights make all queries score alike, and then their order is anyone's.
        for parameter in model.parameters():
            spread = (2 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.2
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    model.eval()
    model.save_pretrained(str(folder))
    return model
