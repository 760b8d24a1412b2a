"""Pictures from strangers: what is taken, what is refused before a decoder sees it, and what drawing leaves behind."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.pictures import PictureError, colour_of, decode_picture, draw_detections, draw_line, encode_jpeg, picture_header
from models.tasks.detection import Detection


def scene(height: int = 90, width: int = 120) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 2, y * 2, np.full_like(x, 90)], axis=2).astype(np.uint8)


def encoded(form: str, *flags: int) -> bytes:
    return bytes(cv2.imencode(form, scene(), list(flags))[1])


def png_that_claims(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + bytes(64)


@pytest.mark.parametrize(
    "data",
    [encoded(".jpg"), encoded(".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1), encoded(".png"), encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, 101),
     encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, 80)],
    ids=["jpeg", "progressive", "png", "webp-lossless", "webp-lossy"],
)  # fmt: skip
def test_decodes_what_it_says_it_takes(data: bytes) -> None:
    assert picture_header(data)[1:] == (120, 90)
    picture = decode_picture(data)
    assert picture.shape == (90, 120, 3)
    assert np.abs(picture.astype(int) - scene().astype(int)).mean() < 6


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "neither"),
        (b"GIF89a" + bytes(40), "neither"),
        (b"BM" + bytes(60), "neither"),
        (png_that_claims(60_000, 60_000), "60000x60000"),
        (png_that_claims(16_000, 4_000), "16000x4000"),
        (png_that_claims(0, 5), "0x5"),
        (b"\xff\xd8\xff", "within its header"),
        (b"\xff\xd8\xff\xda" + bytes(20), "before its size"),
        (encoded(".png")[:200], "damaged|decoded"),
        (bytes(21 << 20), "bytes"),
    ],
)
def test_refuses(data: bytes, words: str) -> None:
    with pytest.raises(PictureError, match=words):
        decode_picture(data)


def test_a_huge_jpeg_is_refused_by_its_header() -> None:
    data = bytearray(encoded(".jpg"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    with pytest.raises(PictureError, match="65000x65000"):
        decode_picture(bytes(data))


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    data = encoded(".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    scan = data.rindex(b"\xff\xda")
    with pytest.raises(PictureError, match="scans"):
        decode_picture(data[:-2] + data[scan:-2] * 200 + data[-2:])


def saved(mode: str, form: str, **options: object) -> bytes:
    """The scene in another colour model, as Pillow writes it."""
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.fromarray(np.ascontiguousarray(scene()[:, :, ::-1])).convert(mode).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "form", "tolerance"),
    [
        ("CMYK", "JPEG", 4),
        ("RGBA", "PNG", 0),
        ("P", "PNG", 30),
        ("RGBA", "WEBP", 4),
        ("L", "PNG", 60),
        ("LA", "PNG", 60),
        ("L", "JPEG", 60),
    ],
)
def test_other_colour_models_become_three_channels(mode: str, form: str, tolerance: float) -> None:
    picture = decode_picture(saved(mode, form, **({"lossless": True} if form == "WEBP" else {})))
    assert picture.shape == (90, 120, 3)
    assert picture.dtype.name == "uint8"
    assert np.abs(picture.astype(int) - scene().astype(int)).mean() <= tolerance


def test_sixteen_bits_become_eight() -> None:
    deep = bytes(cv2.imencode(".png", scene().astype(np.uint16) * 257)[1])
    np.testing.assert_array_equal(decode_picture(deep), scene())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int) -> None:
    """Each orientation of EXIF says how the stored picture has to be turned; stored here is the inverse of it."""
    image = pytest.importorskip("PIL.Image")
    turned: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: np.asarray, 2: np.fliplr, 3: lambda upright: np.rot90(upright, 2), 4: np.flipud, 5: lambda upright: upright.transpose(1, 0, 2),
        6: np.rot90, 7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2), 8: lambda upright: np.rot90(upright, 3),
    }  # fmt: skip
    stored = turned[orientation](scene())
    exif, file = image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.fromarray(np.ascontiguousarray(stored[:, :, ::-1])).save(file, "JPEG", quality=95, exif=exif)
    picture = decode_picture(file.getvalue())
    assert picture.shape == scene().shape
    assert np.abs(picture.astype(int) - scene().astype(int)).mean() < 4


@given(st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFFxxxxWEBP"]))
def test_any_bytes_decode_or_are_refused(data: bytes, start: bytes) -> None:
    try:
        assert decode_picture(start + data).ndim == 3
    except PictureError as error:
        assert str(error)


@pytest.mark.parametrize("size", [(90, 160), (2160, 3840)])
def test_drawing_marks_the_box_and_leaves_the_original_alone(size: tuple[int, int]) -> None:
    picture = np.full((*size, 3), 128, np.uint8)
    height, width = size
    found = Detection("cat", 0.9, width * 0.25, height * 0.4, width * 0.75, height * 0.9)
    drawn = draw_detections(picture, [found, Detection("dog", 0.5, 0, 0, width, height)])
    assert (picture == 128).all()
    assert tuple(drawn[round(found.y1), width // 2]) == colour_of("cat")
    assert (drawn[round(height * 0.7), round(width * 0.6)] == 128).all()
    draw_line(drawn, (0.5, 0.0), (0.5, 1.0), "cat 3")
    assert tuple(drawn[round(height * 0.95), round(0.5 * (width - 1))]) == (255, 255, 255)
    assert decode_picture(encode_jpeg(drawn)).shape == drawn.shape


def test_captions_keep_out_of_each_others_way() -> None:
    """Two boxes that begin at one corner: both captions can be read."""
    picture = np.full((240, 320, 3), 128, np.uint8)
    pair = [Detection("cat", 0.9, 50, 50, 200, 200), Detection("dog", 0.8, 50, 50, 210, 190)]
    drawn = draw_detections(picture, pair)
    alone = [int((draw_detections(picture, [each]) == colour_of(each.label)).all(axis=2).sum()) for each in pair]
    together = [int((drawn == colour_of(each.label)).all(axis=2).sum()) for each in pair]
    assert colour_of("cat") != colour_of("dog")
    for one, both in zip(alone, together):
        assert both > 0.6 * one


def test_a_track_s_number_stands_in_its_caption() -> None:
    picture = np.full((240, 320, 3), 128, np.uint8)
    box = {"label": "cat", "score": 0.9, "x0": 50, "y0": 50, "x1": 200, "y1": 200}
    plain, numbered = (draw_detections(picture, [SimpleNamespace(**box, **more)]) for more in ({}, {"track": 12}))
    wide = [np.flatnonzero((each[40] == colour_of("cat")).all(axis=1)).max() for each in (plain, numbered)]
    assert wide[1] > wide[0]
