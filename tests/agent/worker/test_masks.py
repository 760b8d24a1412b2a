"""No pixel of a masked area differs from black in anything that is decoded again: pictures, streams, snapshots, video."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.worker.areas import Mask
from agent.worker.masks import BLOCK, Masks
from agent.worker.polygons import inside
from agent.worker.views import small_jpeg
from agent.worker_protocol import SMALL_BYTES, CameraEvent, CameraFrame, Watch
from models.pictures import Picture, decode_picture, encode_jpeg
from tests.agent.worker.test_vision import Bench, closing

SLANTED = ((0.21, 0.33), (0.52, 0.11), (0.77, 0.58), (0.4, 0.93))
CORNER = ((0.8, 0.0), (1.0, 0.0), (1.0, 0.27))


def area(masks: list[Mask], height: int, width: int) -> np.ndarray:
    """The pixels whose middle or a corner lies in a mask, found without what is tested here: bool [H,W]."""
    covered = np.zeros((height, width), bool)
    for dx, dy in ((0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        x, y = np.meshgrid((np.arange(width) + dx) / width, (np.arange(height) + dy) / height)
        points = np.stack([x.ravel(), y.ravel()], axis=1)
        for mask in masks:
            covered |= inside(np.array(mask.points), points).reshape(height, width)
    return covered


def noise(height: int, width: int, seed: int = 0) -> Picture:
    picture: Picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return picture


def test_a_masked_picture_is_black_in_the_polygon_and_untouched_beyond_two_blocks() -> None:
    masks = [Mask("a", SLANTED), Mask("b", CORNER)]
    picture = noise(360, 640)
    masked = Masks(masks).apply(picture.copy())
    covered = area(masks, 360, 640)
    assert not masked[covered].any()
    near = cv2.dilate(covered.astype(np.uint8), np.ones((4 * BLOCK + 1,) * 2, np.uint8)).astype(bool)
    assert (masked[~near] == picture[~near]).all()
    assert 0.2 < covered.mean() < 0.5


def test_masks_take_luma_fixed_arrays_and_any_size() -> None:
    masks = Masks([Mask("a", SLANTED)])
    fixed = noise(90, 160)[:, :, 0]
    fixed.flags.writeable = False
    for _ in range(2):
        masked = masks.apply(fixed)
        assert not masked[area([Mask("a", SLANTED)], 90, 160)].any()
    assert fixed[45, 80] != 0
    for height in range(30, 60):
        assert masks.apply(noise(height, 40)).shape == (height, 40, 3)
    untouched = noise(90, 160)
    assert Masks(()).apply(untouched) is untouched
    assert not Masks(())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=8),
    st.integers(40, 200),
    st.integers(40, 200),
    st.sampled_from([60, 80, 88, 95]),
)
def test_jpeg_of_noise_decodes_to_black_within_any_polygon(
    points: list[tuple[float, float]], height: int, width: int, quality: int
) -> None:
    masks = [Mask("any", tuple(points))]
    decoded = decode_picture(encode_jpeg(Masks(masks).apply(noise(height, width, height)), quality))
    assert not decoded[area(masks, height, width)].any()


@pytest.mark.parametrize("options", [{"preset": "ultrafast", "crf": "38"}, {"preset": "veryfast", "crf": "23", "tune": "zerolatency"}])
def test_h264_of_moving_noise_decodes_to_black(options: dict[str, str]) -> None:
    """Blurred noise that moves under the mask's edge: predicted from neighbours, deblocked, the hardest case for a hard edge."""
    masks = [Mask("a", SLANTED), Mask("b", CORNER)]
    painter = Masks(masks)
    texture = cv2.GaussianBlur(noise(360, 1280), (0, 0), 3).astype(np.float64)
    ground = np.clip((texture - 128) * 4 + 128, 0, 255).astype(np.uint8)
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for step in range(30):
            picture = np.ascontiguousarray(ground[:, step * 7 : step * 7 + 640])
            planes = painter.apply_yuv420(av.VideoFrame.from_ndarray(picture, format="bgr24").to_ndarray(format="yuv420p"))
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts = step
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data.seek(0)
    covered = area(masks, 360, 640)
    with av.open(data) as container:
        frames = [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]
    assert len(frames) == 30
    assert max(int(frame[covered].max()) for frame in frames) == 0
    assert min(int(frame[~covered].max()) for frame in frames) > 200


@pytest.mark.parametrize(("height", "width"), [(1080, 1920), (1920, 1080), (720, 1280), (90, 160), (37, 4000)])
def test_a_small_picture_of_noise_fits_into_a_message_and_is_black_there(height: int, width: int) -> None:
    masks = [Mask("a", SLANTED), Mask("b", CORNER)]
    painter = Masks(masks)
    jpeg = small_jpeg(painter.apply(noise(height, width)), painter)
    assert len(jpeg) <= SMALL_BYTES
    decoded = decode_picture(jpeg)
    covered = area(masks, *decoded.shape[:2])
    assert max(decoded.shape[:2]) <= 1280
    assert not decoded[covered].any()
    assert decoded[~covered].any()
    assert decoded.shape[1] / decoded.shape[0] == pytest.approx(width / height, rel=0.1)


def test_a_small_picture_of_an_ordinary_scene_keeps_its_size() -> None:
    scene = np.asarray(cv2.GaussianBlur(noise(1080, 1920), (0, 0), 9), np.uint8)
    assert decode_picture(small_jpeg(scene, Masks())).shape == (720, 1280, 3)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with closing(Bench(tmp_path)) as made:
        yield made


def test_live_frames_and_snapshots_of_a_running_pipeline_are_black_there(bench: Bench) -> None:
    """Objects cross the mask on a belt, and their boxes with them: nothing of either may be drawn within it."""
    strip = ((0.45, 0.0), (0.55, 0.0), (0.55, 1.0), (0.45, 1.0))
    masks: list[dict[str, Any]] = [{"name": "strip", "points": [list(point) for point in strip]}]
    bench.start("belt", "conveyor:?seed=3&fps=30", fps=15.0, line={}, masks=masks)
    bench.service.handle(Watch(3, "belt", fps=10.0, seconds=2.0), b"")
    bench.work(1.5)
    bench.service.handle(Watch(3, "belt", fps=10.0, seconds=3.0, view="plain"), b"")
    bench.service.handle(Watch(3, "belt", fps=5.0, seconds=3.0, view="small"), b"")
    bench.work(2.0)
    live = [payload for report, payload in bench.sent if isinstance(report, CameraFrame)]
    snapshots = [payload for report, payload in bench.sent if isinstance(report, CameraEvent) and payload]
    assert len(live) >= 20
    assert snapshots
    views = {report.view for report in bench.reports if isinstance(report, CameraFrame)}
    assert views == {"drawn", "plain", "small"}
    covered = area([Mask("strip", strip)], 360, 640)
    for payload in live + snapshots:
        picture = decode_picture(payload)
        assert not picture[covered].any()
        assert picture[~covered].any()
    boxes = [found["box"] for report, _ in bench.sent if isinstance(report, CameraFrame) for found in report.detections]
    assert any(x0 < 0.55 * 640 and x1 > 0.45 * 640 for x0, _, x1, _ in boxes), "no box reached over the mask; nothing was tried"
