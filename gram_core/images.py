"""Encoded bytes in, a checked and upright RGB image out; otherwise a refusal in our own words.

Three formats, told apart by their first bytes. `inspect` walks the container itself and applies every
limit before Pillow sees the file; `decode` then gives what `Image.open(f).convert("RGB")` gives, plus what
that leaves out: EXIF orientation, alpha on white, the high byte of 16-bit grey. Safe under threads.
This module knows nothing of tensors, classes or HTTP, and never opens a path or a URL.
"""

from __future__ import annotations

import hashlib
import re
import struct
import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Final

import numpy as np

# Naming the plugins here keeps Pillow from searching for them: its search imports every plugin it has.
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

from gram_core.errors import InvalidImage

__all__ = ["PILLOW_MAX_PIXELS", "DecodedImage", "ImageHeader", "ImageLimits", "decode", "inspect"]

PILLOW_MAX_PIXELS: Final = 80_000_000  # Pillow's process-wide fence, behind our own lower ones
MAX_SEGMENTS: Final = 1024  # of a JPEG, or of a PNG's metadata: Pillow reads each of them in Python
MAX_DATA_CHUNKS: Final = 65536  # of a PNG: the busiest encoders write one per row
PIECE: Final = 65536  # bytes searched in one call, which holds the interpreter: 16 MiB of fill bytes take 0.4 s

_DAMAGED = "can't be decoded: it is damaged, cut off or of an unsupported kind. Save it again and send that."
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Stuffed bytes, restarts and reserved codes neither carry a length nor end a scan: no markers here.
_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
_SOI, _EOI, _SOS, _APP1 = 0xD8, 0xD9, 0xDA, 0xE1
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # not JFIF and Adobe, which tell the colour space
_ORIENTATION = 0x0112
_INTEGERS = {3: "H", 4: "I"}  # TIFF's SHORT and LONG
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Image.MAX_IMAGE_PIXELS = PILLOW_MAX_PIXELS
# Once, here: `catch_warnings` around a call swaps the filters of the whole process, other threads included.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What one image may cost. An image exactly at a limit is answered."""

    max_bytes: int = 16_777_216
    max_pixels: int = 32_000_000
    max_aspect_ratio: int = 100
    max_jpeg_scans: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.max_pixels > PILLOW_MAX_PIXELS:
            raise ValueError(f"max_pixels is {self.max_pixels}; it may be at most {PILLOW_MAX_PIXELS}.")


_DEFAULT_LIMITS: Final = ImageLimits()


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """What a file says of itself. Width and height are as stored: orientation is not applied yet."""

    width: int
    height: int
    format: str
    exif: bytes | None = None  # of a JPEG only; Pillow hands out the others'
    unneeded: tuple[tuple[int, int], ...] = ()  # spans of a JPEG that say nothing about its pixels


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodedImage:
    """An upright image of mode RGB. `sha256` is of the encoded bytes; `notes` say what was changed."""

    rgb: Image.Image
    width: int
    height: int
    format: str
    notes: tuple[str, ...]
    sha256: bytes


def inspect(data: bytes, limits: ImageLimits = _DEFAULT_LIMITS, *, index: int | None = None) -> ImageHeader:
    """Apply every limit to the header; no pixel is decoded and Pillow is not called.

    Raises `InvalidImage`. A file that passes may still turn out to be damaged.
    """
    try:
        return _checked(data, limits)
    except InvalidImage as error:
        raise _addressed(error, index) from None


def decode(data: bytes, limits: ImageLimits = _DEFAULT_LIMITS, *, index: int | None = None) -> DecodedImage:
    """Turn the bytes of one JPEG, PNG or WEBP file into an upright RGB image.

    Notes, in this order: `first_frame_of_N` (animation), `exif_ignored` (unreadable, or an orientation
    outside 1..8), `alpha_composited` (some pixel lets the white background through).
    Raises `InvalidImage` with a fixed sentence and the `index` given.
    """
    header = inspect(data, limits, index=index)
    try:
        rgb, notes = _pixels(data, header)
    except Exception:
        # On damaged files Pillow raises OSError, ValueError, SyntaxError, struct.error, AssertionError and
        # others. Its messages may hold memory addresses, so nothing of them is kept.
        raise _addressed(InvalidImage(_DAMAGED), index) from None
    digest = hashlib.sha256(data).digest()
    return DecodedImage(rgb=rgb, width=rgb.width, height=rgb.height, format=header.format, notes=notes, sha256=digest)


def _addressed(error: InvalidImage, index: int | None) -> InvalidImage:
    """Inside this module a message lacks its subject; this adds it."""
    subject = "this image" if index is None else f"image {index}"
    return InvalidImage(f"{subject} {error.message}", code=error.code, index=index)


def _too_complex(parts: str) -> InvalidImage:
    return InvalidImage(f"has too many {parts}. Save it again and send that.", code="image_too_complex")


def _checked(data: bytes, limits: ImageLimits) -> ImageHeader:
    if not data:
        raise InvalidImage("has 0 bytes. Send the content of a JPEG, PNG or WEBP file.")
    if (size := len(data)) > limits.max_bytes:
        message = f"has {size} bytes, the limit is {limits.max_bytes} (GRAM_MAX_IMAGE_BYTES). Compress it."
        raise InvalidImage(message, code="image_too_large")
    try:
        if data.startswith(b"\xff\xd8"):
            header = _walk_jpeg(data, limits.max_jpeg_scans)
        elif data.startswith(_PNG_SIGNATURE):
            header = _walk_png(data)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            header = _walk_webp(data)
        else:
            message = "is not a JPEG, PNG or WEBP file. Convert it to one of these."
            raise InvalidImage(message, code="unsupported_image_format")
    except struct.error:  # a field beyond the end of the file
        raise InvalidImage(_DAMAGED) from None

    width, height, ratio = header.width, header.height, limits.max_aspect_ratio
    if (pixels := width * height) == 0:
        raise InvalidImage(_DAMAGED)
    if pixels > limits.max_pixels:
        message = f"has {pixels} pixels, the limit is {limits.max_pixels} (GRAM_MAX_IMAGE_PIXELS). Shrink it."
        raise InvalidImage(message, code="image_too_many_pixels")
    if max(width, height) > ratio * min(width, height):
        message = f"is {width} x {height}, the limit is 1 to {ratio} (GRAM_MAX_ASPECT_RATIO). Crop or pad it."
        raise InvalidImage(message, code="image_shape_unsupported")
    return header


def _walk_jpeg(data: bytes, max_scans: int) -> ImageHeader:
    """Follow the markers as libjpeg does: from segment to segment and, after a scan, through its data."""
    at, scans, segments = 2, 0, 0
    sizes: list[tuple[int, int]] = []
    exif: bytes | None = None
    unneeded: list[tuple[int, int]] = []
    while match := _next_marker(data, at):
        code, start, body = match[1][0], match.start(), match.end() + 2
        length = int.from_bytes(data[match.end() : body], "big")
        if code in (_SOI, _EOI) or length < 2:  # the decoder goes no further either: only EOI is no error
            break
        if scans == 0 and start > at:
            unneeded.append((at, start))  # junk or padding
        at = match.end() + length
        segments += 1
        if segments > MAX_SEGMENTS:
            raise _too_complex("segments")
        if code == _SOS:
            scans += 1
            if scans > max_scans:
                raise _too_complex(f"scans, the limit is {max_scans}")
        elif code in _SOF:
            sizes.append(struct.unpack_from(">HH", data, body + 1))
        elif code in _METADATA and scans == 0:
            unneeded.append((start, at))
            if code == _APP1 and exif is None and data.startswith(b"Exif\0", body):
                exif = data[body:at]
    if scans == 0 or len(sizes) != 1:
        raise InvalidImage(_DAMAGED)
    ((height, width),) = sizes
    return ImageHeader(width=width, height=height, format="jpeg", exif=exif, unneeded=tuple(unneeded))


def _next_marker(data: bytes, at: int) -> re.Match[bytes] | None:
    while at < len(data):
        if (match := _JPEG_MARKER.search(data, at, at + PIECE)) is not None:
            return match
        at += PIECE - 1  # a marker has two bytes
    return None


def _walk_png(data: bytes) -> ImageHeader:
    length, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if length != 13 or kind != b"IHDR":
        raise InvalidImage(_DAMAGED)
    counts, at = [0, 0], 33
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        at += length + 12
        if kind == b"IEND":
            break
        if kind == b"IHDR":
            raise InvalidImage(_DAMAGED)
        counts[kind in (b"IDAT", b"fdAT", b"fcTL")] += 1
        if counts[False] > MAX_SEGMENTS or counts[True] > MAX_DATA_CHUNKS:
            raise _too_complex("chunks")
    return ImageHeader(width=width, height=height, format="png")


def _walk_webp(data: bytes) -> ImageHeader:
    """Read the size in the first chunk alone: libwebp itself refuses what doesn't agree with it."""
    kind = data[12:16]
    width = height = 0
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    return ImageHeader(width=width, height=height, format="webp")


def _pixels(data: bytes, header: ImageHeader) -> tuple[Image.Image, tuple[str, ...]]:
    # Pillow would parse EXIF, MPF and Photoshop blocks on opening, slowly, and might fail over a bad one.
    edges = [0, *(edge for span in header.unneeded for edge in span), len(data)]
    kept = b"".join(memoryview(data)[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
    notes = []
    with Image.open(BytesIO(kept), formats=(header.format.upper(),)) as image:
        if image.size != (header.width, header.height):
            raise InvalidImage(_DAMAGED)  # Pillow found another header than the one that was checked
        image.load()
        if (frames := getattr(image, "n_frames", 1)) > 1:
            notes.append(f"first_frame_of_{frames}")
        exif = header.exif or image.info.get("exif")
        orientation = _orientation(exif) if isinstance(exif, bytes) else 1
        if orientation is None:
            notes.append("exif_ignored")
        rgb, composited = _on_white(image, depth=data[24] if header.format == "png" else 8)
        if composited:
            notes.append("alpha_composited")
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    rgb.info.clear()  # a profile or a colour key left in there would act on later conversions
    return rgb, tuple(notes)


def _on_white(image: Image.Image, *, depth: int) -> tuple[Image.Image, bool]:
    """The image as RGB, and whether the white below it shows anywhere. `depth`: a PNG's bits per sample."""
    key = image.info.pop("transparency", None)
    if image.mode == "I;16":
        samples = np.asarray(image)
        grey = (samples >> 8).astype(np.uint8)
        clear = isinstance(key, int) and bool((samples == key).any())  # numpy compares with None one by one
        if clear:
            grey[samples == key] = 255
        return Image.fromarray(grey).convert("RGB"), clear
    if image.mode == "L" and isinstance(key, int):
        top = 2**depth - 1
        key = (key & top) * 255 // top  # Pillow scales the samples to 8 bits, but not the key
    elif image.mode == "RGB" and isinstance(key, tuple):
        key = tuple(value >> 8 if depth == 16 else value & 255 for value in key)
    if isinstance(key, int | tuple | bytes):  # not a str: that is a text chunk which took the name
        image.info["transparency"] = key
    elif "A" not in image.getbands():
        return image.convert("RGB"), False
    layers = image.convert("RGBA")
    if layers.getchannel("A").getextrema() == (255, 255):
        return layers.convert("RGB"), False
    rgb = Image.new("RGB", image.size, "white")
    rgb.paste(layers, mask=layers)
    return rgb, True


def _orientation(exif: bytes) -> int | None:
    """1 where none is stated; None where the block can't be read or states a number outside 1..8."""
    tiff = exif.removeprefix(b"Exif\0\0")
    try:
        order = {b"II*\0": "<", b"MM\0*": ">"}[tiff[:4]]
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for at in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, at)
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(order + _INTEGERS[kind], tiff, at + 8)
                return value if 1 <= value <= 8 else None
    except (struct.error, KeyError):
        return None
    return 1
