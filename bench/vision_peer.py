"""The transformers side of bench/vision.py, in an environment that has torch; nothing else of the project needs it.

    python -m bench.vision_peer save MODEL FOLDER      a model of random weights, as transformers saves it, exported to ONNX beside it
    python -m bench.vision_peer serve FOLDER THREADS   a `pipeline("object-detection")` over it that answers lines of JSON

A line to `serve` is {"picture": PATH of a .npy, "planes": PATH or ""}; the answer has the milliseconds of the pipeline and of its parts,
and with `planes` (the input that we prepared) a file of what the model makes of it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SQUARE = {"size": {"height": 640, "width": 640}, "do_normalize": False, "image_processor_type": "RTDetrImageProcessor"}
COCO = {"id2label": {index: f"class {index}" for index in range(80)}, "label2id": {f"class {index}": index for index in range(80)}}
# As in the configurations that ustc-community/dfine-nano-coco and PekingU/rtdetr_r18vd were published with.
HGNET_B0 = {
    "stem_channels": [3, 16, 16], "stage_in_channels": [16, 64, 256, 512], "stage_mid_channels": [16, 32, 64, 128],
    "stage_out_channels": [64, 256, 512, 1024], "stage_num_blocks": [1, 1, 2, 1], "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True], "stage_kernel_size": [3, 3, 5, 5], "stage_numb_of_layers": [3, 3, 3, 3],
    "hidden_sizes": [64, 256, 512, 1024], "depths": [1, 1, 2, 1], "embedding_size": 64, "use_learnable_affine_block": True,
    "out_features": ["stage3", "stage4"],
}  # fmt: skip
DFINE_N = {
    "encoder_in_channels": [512, 1024], "feat_strides": [16, 32], "encoder_hidden_dim": 128, "encoder_ffn_dim": 512,
    "hidden_expansion": 0.34, "depth_mult": 0.5, "encode_proj_layers": [1], "decoder_in_channels": [128, 128], "decoder_ffn_dim": 512,
    "d_model": 128, "num_feature_levels": 2, "decoder_n_points": [6, 6], "decoder_layers": 3, "encoder_layers": 1, "num_queries": 300,
}  # fmt: skip


def detr() -> tuple[Any, dict[str, Any]]:
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=transformers.ResNetConfig(out_features=["stage4"]), id2label={i: f"class {i}" for i in range(91)},
    )  # fmt: skip
    facts = {"size": {"shortest_edge": 800, "longest_edge": 1333}, "image_processor_type": "DetrImageProcessor", **IMAGENET}
    return transformers.DetrForObjectDetection(config), facts


def rt_detr() -> tuple[Any, dict[str, Any]]:
    backbone = transformers.RTDetrResNetConfig(
        layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], out_features=["stage2", "stage3", "stage4"]
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[128, 256, 512], hidden_expansion=0.5, decoder_layers=3, **COCO
    )
    return transformers.RTDetrForObjectDetection(config), SQUARE


def d_fine() -> tuple[Any, dict[str, Any]]:
    config = transformers.DFineConfig(backbone_config=transformers.HGNetV2Config(**HGNET_B0), **DFINE_N, **COCO)
    return transformers.DFineForObjectDetection(config), SQUARE


MODELS = {"detr-r50": detr, "rt-detr-r18": rt_detr, "d-fine-n": d_fine}


def save(name: str, folder: Path) -> None:
    """The model, its configuration and its ONNX (`model.onnx`), as our own exporter writes it."""
    from converters.manifest_from_transformers import manifest_from_transformers
    from converters.onnx_from_transformers import onnx_from_transformers
    from models.record import to_mapping

    torch.manual_seed(0)
    model, facts = MODELS[name]()
    model = model.eval()
    # Initial weights make all queries score alike, and then their order is anyone's: nothing could be compared.
    with torch.no_grad():
        for parameter in model.parameters():
            spread = (2 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.1
            noise = torch.randn(parameter.shape) * spread
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    model.save_pretrained(str(folder))
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    manifest = manifest_from_transformers(folder, name)
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    onnx_from_transformers(files, manifest, folder / "model.onnx", 17, lambda fraction, message: None)
    (folder / "manifest.json").write_text(json.dumps(to_mapping(manifest)))


def serve(folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    facts = json.loads((folder / "preprocessor_config.json").read_text())
    kind = facts.pop("image_processor_type")
    processor = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    model = transformers.AutoModelForObjectDetection.from_pretrained(str(folder)).eval()
    pipeline = transformers.pipeline("object-detection", model=model, image_processor=processor(**facts), device="cpu")
    parts = watch_parts(pipeline)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    sys.stdout.write(json.dumps({"ready": versions, "parameters": sum(each.numel() for each in model.parameters())}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        picture = np.load(asked["picture"])
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        pipeline(Image.fromarray(np.ascontiguousarray(picture[:, :, ::-1])), threshold=0.5)
        spent_ms = {"ms": (time.perf_counter() - began_s) * 1000, "cpu_ms": (time.process_time() - began_cpu_s) * 1000}
        answer: dict[str, Any] = {**spent_ms, **parts}
        if asked.get("planes"):
            with torch.inference_mode():
                made = model(pixel_values=torch.from_numpy(np.load(asked["planes"])))
            answer["outputs"] = str(folder / "outputs.npz")
            np.savez(answer["outputs"], logits=made.logits.numpy(), pred_boxes=made.pred_boxes.numpy())
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def watch_parts(pipeline: Any) -> dict[str, float]:
    """Milliseconds of the pipeline's last call, by part."""
    parts: dict[str, float] = {}

    def watched(name: str, call: Any) -> Any:
        def timed(*values: Any, **named: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return call(*values, **named)
            finally:
                parts[name] = (time.perf_counter() - began_s) * 1000

        return timed

    for name, method in (("pre_ms", "preprocess"), ("run_ms", "forward"), ("post_ms", "postprocess")):
        setattr(pipeline, method, watched(name, getattr(pipeline, method)))
    return parts


if __name__ == "__main__":
    action, *rest = sys.argv[1:]
    if action == "save":
        save(rest[0], Path(rest[1]))
    else:
        serve(Path(rest[0]), int(rest[1]))
