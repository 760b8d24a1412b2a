"""Films: which frames are given, what is refused before it is decoded, and what writing leaves behind."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from agent.worker.film import Film, FilmError, FilmWriter


def shade(number: int) -> np.ndarray:
    return np.full((64, 96, 3), 40 + 4 * number, np.uint8)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """30 frames at 10 a second, each lighter than the one before."""
    path = tmp_path / "film.mp4"
    with FilmWriter(path, 10) as writer:
        for number in range(30):
            writer.write(shade(number), number / 10)
    return path


@pytest.mark.parametrize(
    ("every", "fps", "numbers"),
    [(1, None, list(range(30))), (7, None, [0, 7, 14, 21, 28]), (1, 2.0, [0, 5, 10, 15, 20, 25]), (1, 100.0, list(range(30))),
     (1, 3.0, [0, 4, 7, 10, 14, 17, 20, 24, 27]), (4, 1.0, [0, 12, 20])],
)  # fmt: skip
def test_frames_are_those_that_are_wanted(film: Path, every: int, fps: float | None, numbers: list[int]) -> None:
    with Film(film, every, fps) as opened:
        frames = list(opened)
    assert (opened.frames, opened.fps) == (30, 10)
    assert [frame.number for frame in frames] == numbers
    for frame in frames:
        assert frame.at_s == pytest.approx(frame.number / 10, abs=0.001)
        assert frame.picture.mean() == pytest.approx(40 + 4 * frame.number, abs=4)


def test_a_film_cut_short_is_said(film: Path) -> None:
    data = film.read_bytes()
    film.write_bytes(data[: data.index(b"mdat") + 400])
    with pytest.raises(FilmError, match="neither MP4"):  # its table of contents was at its end
        Film(film)


def test_damage_within_is_said_after_what_could_be_read(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(60):
            noise = np.random.default_rng(number).integers(0, 256, (64, 96, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="bgr24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    numbers: list[int] = []
    with Film(path) as opened, pytest.raises(FilmError, match=r"breaks off after \d+ of 60 frames|broke off|damaged"):
        numbers.extend(frame.number for frame in opened)
    assert 5 < len(numbers) < 55


def test_frames_larger_than_pictures_may_be_are_refused_before_one_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "wide.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16400, 16, "yuvj420p"
        frame = av.VideoFrame(16400, 16, "yuvj420p")
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(FilmError, match="16400x16"):
        Film(path)


def test_sound_alone_is_no_film(tmp_path: Path) -> None:
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(FilmError, match="no pictures"):
        Film(path)


def test_an_error_leaves_no_film_behind_and_an_interruption_what_there_is(tmp_path: Path) -> None:
    for error, kept in ((RuntimeError, 0), (KeyboardInterrupt, 3)):
        path = tmp_path / f"{error.__name__}.mp4"
        with pytest.raises(error), FilmWriter(path, 10) as writer:
            for number in range(3):
                writer.write(shade(number)[:63, :95], number / 10)
            raise error
        assert path.exists() == bool(kept)
        if kept:
            with Film(path) as film:
                assert [frame.picture.shape for frame in film] == [(62, 94, 3)] * kept
    assert [path.name for path in tmp_path.iterdir()] == ["KeyboardInterrupt.mp4"]
