# SPDX-License-Identifier: Apache-2.0
"""Unusual images and videos: odd formats, broken, truncated, far too large."""

import base64
import io
import random
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from testing.photo import photo

Media = tuple[str, str]
"""The kind of a content part (``image_url`` or ``video_url``), and its URL."""


def url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def small(mode: str = "RGB") -> Image.Image:
    return photo("cat").resize((90, 60)).convert(mode)


def png_claiming(width: int, height: int) -> bytes:
    """Return a small PNG whose header declares any size; its data is a few rows."""

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def mp4(frames: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(path), codec, 10, (64, 48))
        for number in range(frames):
            frame = small().rotate(20 * number).resize((64, 48))
            writer.write(np.asarray(frame)[:, :, ::-1])
        writer.release()
        return path.read_bytes()


def pictures(clip: bytes) -> bytes:
    """Return the coded pictures of what ``mp4`` writes, without tables and headers."""
    return clip[clip.index(b"mdat") : clip.index(b"moov")]


def mp4_with_pictures_elsewhere() -> bytes:
    """Return a video whose table places the pictures 2.5 GiB further: one byte is changed."""
    clip = bytearray(mp4(4))
    clip[clip.index(b"stco") + 12] = 0xA2
    return bytes(clip)


def gif(frames: int) -> bytes:
    first, *rest = [small().rotate(20 * number) for number in range(frames)]
    return encoded(first, "GIF", save_all=True, append_images=rest, duration=100)


def flipped(content: bytes, seed: int, share: float = 0.01) -> bytes:
    """Return the content with some bytes replaced."""
    chance = random.Random(seed)
    changed = bytearray(content)
    for _ in range(max(1, int(share * len(changed)))):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def whole_images() -> Iterator[tuple[str, Media]]:
    """Yield images that are unusual but valid, and small enough to be encoded."""
    for width, height in ((1, 1), (1, 2), (2, 1), (3, 3), (1, 60), (60, 1), (7, 400), (1000, 9)):
        drawn = photo("coffee").resize((width, height))
        yield f"{width}x{height}", ("image_url", url("image/png", encoded(drawn, "PNG")))
    for mode, form in (
        *(("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG")),
        *(("I;16", "PNG"), ("I", "TIFF"), ("F", "TIFF"), ("CMYK", "JPEG"), ("CMYK", "TIFF")),
        *(("L", "JPEG"), ("P", "GIF"), ("RGBA", "WEBP"), ("RGB", "BMP"), ("RGB", "ICO")),
    ):
        drawn = small("L").convert(mode) if mode == "I;16" else small(mode)
        kind = f"image/{form.lower()}"
        yield f"{mode} {form}", ("image_url", url(kind, encoded(drawn, form)))
    yield "many frames", ("image_url", url("image/gif", gif(5)))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    turned = encoded(small(), "JPEG", exif=exif)
    yield "turned by EXIF", ("image_url", url("image/jpeg", turned))
    yield "the wrong type", ("image_url", url("image/jpeg", encoded(small(), "PNG")))


def huge_image() -> Media:
    """Return 64 megapixels in a small file."""
    blocks = photo("coffee").resize((16, 16)).resize((8000, 8000), Image.Resampling.NEAREST)
    return "image_url", url("image/png", encoded(blocks, "PNG"))


def broken_images() -> Iterator[tuple[str, Media]]:
    """Yield content that is not a valid image."""
    for form in ("PNG", "JPEG", "GIF", "WEBP"):
        content = encoded(small(), form)
        kind = f"image/{form.lower()}"
        for share in (0.02, 0.5, 0.95):
            cut = content[: int(share * len(content))]
            yield f"{form}, {share:.0%} of it", ("image_url", url(kind, cut))
        for seed in range(2):
            yield f"{form}, flipped {seed}", ("image_url", url(kind, flipped(content, seed)))
    bomb = png_claiming(60_000, 60_000)
    yield "bomb of 3.6 gigapixels", ("image_url", url("image/png", bomb))
    yield "2^31 - 1 wide", ("image_url", url("image/png", png_claiming(2**31 - 1, 1)))
    yield "no width", ("image_url", url("image/png", png_claiming(0, 5)))
    yield "nothing", ("image_url", url("image/png", b""))
    yield "text", ("image_url", url("image/png", b"hello"))
    yield "a video as image", ("image_url", url("image/png", mp4(2)))
    good = base64.b64encode(encoded(small(), "PNG")).decode("ascii")
    for name, text in {
        "no base64": "data:image/png;base64,%%%%",
        "base64 cut in a group": f"data:image/png;base64,{good[:-3]}",
        "base64 with blanks": f"data:image/png;base64,{good[:40]} \n{good[40:]}",
        "no comma": f"data:image/png;base64{good}",
        "not said to be base64": f"data:image/png,{good}",
        "no data": "data:,",
        "only a scheme": "data:",
        "empty": "",
        "a word": "cat",
        "another scheme": "ftp://127.0.0.1/cat.png",
        "script": "javascript:alert(1)",
        "no host": "http:///cat.png",
        "not a port": "http://127.0.0.1:99999/cat.png",
    }.items():
        yield name, ("image_url", text)


def videos() -> Iterator[tuple[str, Media]]:
    """Yield valid and invalid videos."""
    frame = base64.b64encode(encoded(small(), "JPEG")).decode("ascii")
    clip = mp4(6)
    for name, content in {
        "mp4": clip,
        "mp4 of one frame": mp4(1),
        "mp4 without frames": mp4(0),
        "mp4, half of it": clip[: len(clip) // 2],
        "mp4, its head": clip[:40],
        "mp4, flipped": flipped(clip, 0),
        "nothing as mp4": b"",
        "text as mp4": b"hello",
        "an image as mp4": encoded(small(), "PNG"),
    }.items():
        yield name, ("video_url", url("video/mp4", content))
    yield "gif", ("video_url", url("image/gif", gif(4)))
    yield "gif of one frame", ("video_url", url("image/gif", gif(1)))
    yield "frames", ("video_url", f"data:video/jpeg;base64,{frame},{frame},{frame}")
    yield "one frame", ("video_url", f"data:video/jpeg;base64,{frame}")
    yield "no frames", ("video_url", "data:video/jpeg;base64,")
    yield "an empty frame", ("video_url", f"data:video/jpeg;base64,{frame},,{frame}")
    yield "a broken frame", ("video_url", f"data:video/jpeg;base64,{frame},{frame[:200]}")
    yield "no frame at all", ("video_url", "data:video/jpeg;base64,,,")
