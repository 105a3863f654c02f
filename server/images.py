"""Images on the wire: base64 and data URLs in, checked bytes out, and every refusal as an `ApiError`.

What an acceptable image is, and how it is decoded, is `gram_images`' business.
"""

from __future__ import annotations

import binascii
import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from gram_core.errors import InvalidImage
from gram_core.images import DecodedImage, ImageLimits, decode, inspect
from server.errors import ApiError, from_core
from server.metrics import Metrics
from server.schemas import PARSING
from server.settings import Settings

SLICE = 1 << 20  # characters decoded in one call, which holds the interpreter
DATA_URL = re.compile(r"data:[^,]{0,256};base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Checked:
    """Encoded bytes whose header is within every limit."""

    data: bytes
    pixels: int


def limits(settings: Settings) -> ImageLimits:
    """What one image may be."""
    return ImageLimits(
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
        max_aspect_ratio=settings.max_aspect_ratio,
    )


def check(posted: Sequence[str | bytes | bytearray], settings: Settings, metrics: Metrics) -> list[Checked | ApiError]:
    """Decode base64 and look at every header; the pixels of the whole request are bounded here."""
    found: list[Checked | ApiError] = []
    pixels = 0
    for index, sent in enumerate(posted):
        try:
            data = _encoded(sent, index, settings.max_image_bytes)
            header = inspect(data, limits(settings), index=index)
        except InvalidImage as error:
            metrics.decodes.labels("unknown", error.code).inc()
            found.append(from_core(error, "images"))
            continue
        except ApiError as error:
            metrics.decodes.labels("unknown", error.code).inc()
            found.append(error)
            continue
        pixels += header.width * header.height
        found.append(Checked(data, header.width * header.height))
        if pixels > settings.max_request_pixels:
            most = settings.max_request_pixels
            sentence = f"the images have more than {most} pixels in all (GRAM_MAX_REQUEST_PIXELS)."
            raise ApiError("too_many_pixels", sentence, param="images")
    return found


def load(
    image: Checked, index: int, settings: Settings, metrics: Metrics, prepare: Callable[[DecodedImage], Any]
) -> tuple[Any, float]:
    """Pixels, ready for the classifier, or the `ApiError` that says why not; and the seconds that it took."""
    started = time.monotonic()
    try:
        decoded = decode(image.data, limits(settings), index=index)
    except InvalidImage as error:
        metrics.decodes.labels("unknown", error.code).inc()
        return from_core(error, "images"), time.monotonic() - started
    metrics.decodes.labels(decoded.format, "ok").inc()
    metrics.pixels.observe(decoded.width * decoded.height)
    return prepare(decoded), time.monotonic() - started


def _encoded(data: str | bytes | bytearray, index: int, max_bytes: int) -> bytes:
    if isinstance(data, str):
        url = DATA_URL.match(data)
        with PARSING if len(data) > SLICE else nullcontext():
            data = _base64(data, url.end() if url else 0, index, max_bytes)
    if len(data) <= max_bytes:
        return bytes(data)
    sentence = f"image {index} is larger than {max_bytes} bytes (GRAM_MAX_IMAGE_BYTES). Compress it."
    raise ApiError("image_too_large", sentence, param=f"images.{index}")


def _base64(text: str, start: int, index: int, max_bytes: int) -> bytes:
    """The bytes of `text` from `start` on; of what is longer than `max_bytes` a little more than these."""
    pieces, size, ended, rest = [], 0, False, b""
    try:
        while start < len(text) and size <= max_bytes:
            piece = rest + text[start : start + SLICE].encode("ascii").translate(None, b"\r\n")
            start += SLICE
            whole = len(piece) // 4 * 4
            piece, rest = piece[:whole], piece[whole:]
            if piece and ended:
                raise binascii.Error
            pieces.append(binascii.a2b_base64(piece, strict_mode=True))
            size += len(pieces[-1])
            ended = ended or piece.endswith(b"=")
        if rest and size <= max_bytes:
            raise binascii.Error
    except ValueError:  # binascii.Error and UnicodeEncodeError are both
        sentence = f"image {index} is not base64: standard alphabet, with padding."
        raise ApiError("invalid_base64", sentence, param=f"images.{index}") from None
    return b"".join(pieces)
