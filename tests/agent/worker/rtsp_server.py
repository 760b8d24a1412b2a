"""An RTSP server on loopback whose pictures say when they were taken. For the system's Python, which has GStreamer's bindings.

`python3 rtsp_server.py FPS [COUNT]` prints the port and serves rtsp://127.0.0.1:PORT/cam, then /cam1 and so on, COUNT in all. A picture is
320x176; its sixteen blocks, black or white, the lowest bit first, are CLOCK_MONOTONIC in hundredths of a second, cut to 16 bits.
"""

# mypy: disable-error-code="import-not-found,misc,no-any-return"
from __future__ import annotations

import sys
import time

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402  # versions are said before

WIDTH, HEIGHT, BLOCK = 320, 176, 20
CHROMA = bytes([128]) * (WIDTH * HEIGHT // 2)
GREY = bytes([90]) * WIDTH


def picture() -> bytes:
    """I420."""
    ticks = int(time.monotonic() * 100) & 0xFFFF
    row = b"".join(bytes([235 if ticks >> bit & 1 else 16]) * BLOCK for bit in range(16))
    return GREY * 20 + row * 60 + GREY * (HEIGHT - 80) + CHROMA


class Factory(GstRtspServer.RTSPMediaFactory):
    def __init__(self, fps: int) -> None:
        super().__init__()
        self.fps = fps
        self.set_shared(True)
        self.set_launch(
            f"( appsrc name=source is-live=true format=time do-timestamp=true max-buffers=2 leaky-type=downstream "
            f"caps=video/x-raw,format=I420,width={WIDTH},height={HEIGHT},framerate={fps}/1 "
            f"! openh264enc gop-size={fps} rate-control=off qp-min=20 qp-max=26 ! h264parse ! rtph264pay name=pay0 pt=96 )"
        )

    def configure(self, media: GstRtspServer.RTSPMedia) -> None:
        source = media.get_element().get_by_name_recurse_up("source")

        def push() -> bool:
            return source.emit("push-buffer", Gst.Buffer.new_wrapped(picture())) == Gst.FlowReturn.OK

        GLib.timeout_add(1000 // self.fps, push)


def main() -> None:
    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service("0")
    for number in range(int(sys.argv[2]) if len(sys.argv) > 2 else 1):
        factory = Factory(int(sys.argv[1]))
        factory.connect("media-configure", lambda configured, media: configured.configure(media))
        server.get_mount_points().add_factory(f"/cam{number or ''}", factory)
    server.attach(None)
    sys.stdout.write(f"{server.get_bound_port()}\n")
    sys.stdout.flush()
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
