"""Which forms a source has, and that nothing secret of one is ever shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.worker.addresses import is_source, redacted
from agent.worker.sources import parse_source

# QQ is the secret: whatever stands around it, none of it may be seen.
ANYTHING = st.text("abcXYZ019!$#%&@:+=~?/;,'\"\\_.-( )é", max_size=12)
SECRET = st.tuples(ANYTHING, ANYTHING).map(lambda parts: f"{parts[0]}QQ{parts[1]}")
FORMS = (
    "rtsp://{user}:{password}@camera.local:554/live",
    "rtsps://{user}:{password}@[fd00::7]/live?channel=1&subtype=0",
    "http://10.0.0.7:81/video.cgi?user={user}&pwd={password}",
    "http://10.0.0.7/video.cgi;user={user};pwd={password}",
    "rtsp://10.0.0.7:554/user={user}_password={password}_channel=1_stream=0.sdp",
    "rtsp://10.0.0.7/a/b/user={user}&password={password}&",
    "rtsp://admin:QQ@10.0.0.7/user={user}_password={password}?pwd={password}",
)


@given(st.sampled_from(FORMS), SECRET, SECRET)
def test_no_user_name_or_password_survives(form: str, user: str, password: str) -> None:
    address = form.format(user=user, password=password)
    for text in (address, f"open {address} failed", f"Connection refused: '{address}'", f"pipeline door: source {address!r} is wrong"):
        shown = redacted(text)
        assert "QQ" not in shown
        assert redacted(shown) == shown


@given(st.sampled_from(FORMS), SECRET, SECRET)
def test_no_refusal_and_no_error_shows_them(form: str, user: str, password: str) -> None:
    address = form.format(user=user, password=password)
    try:
        source = parse_source(address, 640, 360, 10.0)
    except ValueError as error:
        assert not is_source(address)
        assert "QQ" not in str(error)
        return
    assert is_source(address)
    assert "QQ" not in source.label
    for words in (f"[Errno 111] Connection refused: '{address}'", f"cannot resolve {address}", "no answer"):
        assert "QQ" not in source.words(OSError(words))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://admin:p@ss/w#rd@camera.local:554/live", "rtsp://…@camera.local:554/live"),
        ("rtsp://admin:pa/ss@cam/live", "rtsp://…@cam/live"),
        ("rtsp://user:my password@host/live", "rtsp://…@host/live"),
        ("refused: 'http://10.0.0.7:81/video.cgi?user=a&pwd=b'", "refused: 'http://10.0.0.7:81/video.cgi…"),
        ("rtsp://10.0.0.7:554/user=admin_password=x_channel=1.sdp", "rtsp://10.0.0.7:554/…"),
        ("rtsp://10.0.0.7/live?mail=a@b", "rtsp://…"),
        ("rtsp://10.0.0.7:554/h264/ch1", "rtsp://10.0.0.7:554/h264/ch1"),
        ("file:/srv/me@home/belt.mp4?loop=no", "file:/srv/me@home/belt.mp4?loop=no"),
        ("rtsp:/admin:secret@host", "…@host"),
        ("v4l2:/dev/video0", "v4l2:/dev/video0"),
    ],
)
def test_a_shown_address_still_tells_which_camera(address: str, shown: str) -> None:
    assert redacted(address) == shown


def test_an_error_keeps_its_own_words() -> None:
    source = parse_source("rtsp://admin:pa/ss@cam/live?x=1", 640, 360, 10.0)
    assert source.words(f"[Errno 111] Connection refused: '{source.address}'") == "[Errno 111] Connection refused: 'rtsp://…@cam/live…'"
    assert parse_source("csi:0", 640, 360, 10.0).words("no picture within 10 s") == "no picture within 10 s"
