"""Pictures: accuracy and time of our detector against the same weights run otherwise. Prints a table and one line of JSON.

    python -m bench.vision [--rounds N]

HOTSPARE_TEST_DATA names the folder with models/ and data/coco64/ (default: ../shared). Accuracy is mAP at IoU 0.50:0.95 of DEIMv2-Femto.
The transformers pipeline is timed where transformers and torch are installed, with a DETR of random weights: time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime

from bench.average_precision import Found, Truth, mean_average_precision
from models import manifest
from models.engines import EngineOptions, open_engine
from models.pictures import Picture, decode_picture
from models.tasks.detection import Detector

FEMTO = "deimv2_hgnetv2_femto_coco_raw.onnx"
THREADS = 2
Row = dict[str, Any]


class Pictures:
    """The 64 pictures, decoded, with their truth."""

    def __init__(self, folder: Path) -> None:
        described = json.loads((folder / "instances.json").read_text())
        names = {each["id"]: each["name"] for each in described["categories"]}
        self.labels = tuple(names[number] for number in sorted(names))
        self.pictures: dict[int, Picture] = {}
        self.truth: dict[int, list[Truth]] = {}
        for each in described["images"]:
            self.pictures[each["id"]] = decode_picture((folder / "images" / each["file_name"]).read_bytes())
            self.truth[each["id"]] = []
        for each in described["annotations"]:
            x, y, width, height = each["bbox"]
            self.truth[each["image_id"]].append(Truth(names[each["category_id"]], (x, y, x + width, y + height), bool(each["iscrowd"])))


def with_pillow(picture: Picture) -> Any:
    from PIL import Image

    scaled = Image.fromarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)).resize((416, 416), Image.Resampling.BILINEAR)
    return (np.asarray(scaled, np.float32) / 255).transpose(2, 0, 1)[None]


def with_opencv(picture: Picture) -> Any:
    scaled = cv2.cvtColor(cv2.resize(picture, (416, 416)), cv2.COLOR_BGR2RGB)
    return (scaled.astype(np.float32) / 255).transpose(2, 0, 1)[None]


def bare(
    session: onnxruntime.InferenceSession, prepare: Callable[[Picture], Any], labels: Sequence[str], count: int
) -> Callable[[Picture], list[Found]]:
    """The model without us: session.run, a sigmoid, the best `count`."""

    def detect(picture: Picture) -> list[Found]:
        logits, boxes = session.run(["logits", "pred_boxes"], {"pixel_values": prepare(picture)})
        scores = 1 / (1 + np.exp(-logits[0]))
        height, width = picture.shape[:2]
        found = []
        for query, label in zip(*np.unravel_index(np.argsort(-scores, axis=None)[:count], scores.shape), strict=True):
            x, y, w, h = boxes[0, query] * (width, height, width, height)
            found.append(Found(labels[label], float(scores[query, label]), (x - w / 2, y - h / 2, x + w / 2, y + h / 2)))
        return found

    return detect


def ours(detector: Detector, threshold: float) -> Callable[[Picture], list[Found]]:
    return lambda picture: [
        Found(each.label, each.score, (each.x0, each.y0, each.x1, each.y1)) for each in detector.detect(picture, threshold)
    ]


def milliseconds(ways: dict[str, Callable[[Picture], object]], pictures: Sequence[Picture], rounds: int) -> dict[str, float]:
    """Median over all pictures and rounds. The ways take turns by round: a busy moment hits all of them, and idle threads of one session
    do not spin into the time of the next."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, detect in ways.items():
            detect(pictures[0])
            for picture in pictures:
                began_s = time.perf_counter()
                detect(picture)
                spent[name].append((time.perf_counter() - began_s) * 1000)
    return {name: round(statistics.median(each), 2) for name, each in spent.items()}


def femto(data: Path, rounds: int) -> list[Row]:
    described = Pictures(data / "data/coco64")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(str(data / "models" / FEMTO), options, providers=["CPUExecutionProvider"])
    facts = manifest.Detection(416, 416, described.labels)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.onnx").symlink_to(data / "models" / FEMTO)
        model = manifest.DetectionManifest("deimv2-femto", "Apache-2.0", "", "onnx", {}, detection=facts)
        engine = open_engine(Path(folder), EngineOptions(threads=THREADS))
        alone = open_engine(Path(folder), EngineOptions(threads=THREADS, spinning=True))
        detector = Detector(engine, model)
        prepares = {"same ONNX, cv2 written out": with_opencv}
        if find_spec("PIL"):
            prepares["same ONNX, Pillow"] = with_pillow
        precision = {"hotspare": precision_of(described, ours(detector, 0.0))}
        # Spinning threads are quicker, and take the cores of the cameras beside them: a bare session has them, ours not unless asked.
        precision["hotspare, spinning threads"] = precision["hotspare"]
        ways: dict[str, Callable[[Picture], object]] = {
            "hotspare": ours(detector, 0.5),
            "hotspare, spinning threads": ours(Detector(alone, model), 0.5),
        }
        for name, prepare in prepares.items():
            precision[name] = precision_of(described, bare(session, prepare, described.labels, 100))
            ways[name] = bare(session, prepare, described.labels, 5)
        spent = milliseconds(ways, list(described.pictures.values()), rounds)
        engine.close()
        alone.close()
    return [{"model": "deimv2-femto 416", "way": name, "ms": spent[name], "map": round(precision[name], 4)} for name in ways]


def precision_of(described: Pictures, detect: Callable[[Picture], list[Found]]) -> float:
    return mean_average_precision(described.truth, {number: detect(picture) for number, picture in described.pictures.items()})


def detr(picture: Picture, rounds: int) -> list[Row]:
    """DETR-ResNet-50 of random weights: the transformers pipeline, and the same weights exported and run by us."""
    import torch
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig, pipeline

    try:
        from transformers import DetrImageProcessorPil as Processor
    except ImportError:
        from transformers import DetrImageProcessor as Processor
    from PIL import Image

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    backbone = ResNetConfig(out_features=["stage4"])
    config = DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, num_labels=91)
    model = DetrForObjectDetection(config).eval().requires_grad_(False)
    theirs = pipeline("object-detection", model=model, image_processor=Processor(), device="cpu")

    class Raw(torch.nn.Module):  # type: ignore[misc]  # torch is not installed where types are checked
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            answer = self.model(pixel_values)
            return answer.logits, answer.pred_boxes

    facts = manifest.Detection(
        800,
        1333,
        tuple(map(str, range(91))),
        resize="shortest_edge",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        scores="softmax",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            Raw(), (torch.zeros(1, 3, 800, 1066),), str(path), input_names=["pixel_values"], output_names=["logits", "pred_boxes"],
            opset_version=17, dynamo=False,
        )  # fmt: skip
        engine = open_engine(Path(folder), EngineOptions(threads=THREADS))
        detector = Detector(engine, manifest.DetectionManifest("detr", "Apache-2.0", "", "onnx", {}, detection=facts))
        ways: dict[str, Callable[[Picture], object]] = {
            "hotspare": lambda each: detector.detect(each, 0.5),
            "transformers pipeline": lambda each: theirs(Image.fromarray(cv2.cvtColor(each, cv2.COLOR_BGR2RGB)), threshold=0.5),
        }
        spent = milliseconds(ways, [picture], rounds)
        engine.close()
    return [{"model": "detr-resnet-50 800x1066", "way": name, "ms": spent[name]} for name in ways]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    data = Path(os.environ.get("HOTSPARE_TEST_DATA", Path(__file__).parents[2] / "shared"))
    rows = femto(data, rounds)
    if find_spec("torch") and find_spec("transformers"):
        rows += detr(cv2.resize(decode_picture((data / "data/two_cats.png").read_bytes()), (1280, 960)), rounds)
    else:
        print("transformers and torch are not installed here: their pipeline is not timed\n")
    print(f"{'model':<26}{'way':<30}{'ms':>10}{'mAP':>9}")
    for row in rows:
        print(f"{row['model']:<26}{row['way']:<30}{row['ms']:>10.1f}{row.get('map', float('nan')):>9.4f}")
    versions = {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__, "opencv": cv2.__version__}
    print(json.dumps({"bench": "vision", "threads": THREADS, "rounds": rounds, "rows": rows, "versions": versions}))


if __name__ == "__main__":
    main()
