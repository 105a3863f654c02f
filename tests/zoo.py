"""The image zoo: one file of every kind a server may be sent, each with its outcome under default limits.

Everything is made here from seeds and by hand, so that two runs give the same bytes. A member without a
`code` must be answered with its size, format and notes; the others must be refused with their `code`.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MEDIA_TYPES = {"jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Member:
    """`size` is the upright one; the file should be sent under the media type `claims` and as `filename`."""

    name: str
    data: bytes
    code: str | None = None
    size: tuple[int, int] = (0, 0)
    format: str = ""
    notes: tuple[str, ...] = ()
    claims: str = "application/octet-stream"
    filename: str = "image"
    heavy: bool = False  # tens of megapixels: once is enough


# ---------------------------------------------------------------------------------------------- pictures


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """A smooth colour picture without any symmetry, so that every flip and turn of it differs."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int, *, order: str = "<", kind: int = 3) -> bytes:
    """A TIFF block that states the orientation after one other tag; kind 3 is SHORT, 4 LONG."""
    value = struct.pack(order + {3: "Hxx", 4: "I", 2: "Hxx"}[kind], orientation)
    entries = struct.pack(order + "HHI4s", 0x0100, 4, 1, struct.pack(order + "I", 48))
    entries += struct.pack(order + "HHI", 0x0112, kind, 1) + value
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "IH", 8, 2) + entries + bytes(4)


# --------------------------------------------------------------------------------------------------- PNG


def chunk(kind: bytes, data: bytes, *, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def ihdr(width: int, height: int, depth: int, colour: int, *, interlace: int = 0) -> bytes:
    return struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)


def rows(samples: NDArray[Any], depth: int) -> bytes:
    """The unfiltered scanlines of (height, width, channels) samples."""
    height = samples.shape[0]
    flat = samples.reshape(height, -1)
    if depth == 16:
        packed = flat.astype(">u2").view(np.uint8).reshape(height, -1)
    elif depth == 8:
        packed = flat.astype(np.uint8)
    else:
        bits = np.unpackbits(flat.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        packed = np.packbits(bits.reshape(height, -1), axis=1)
    return b"".join(b"\0" + line.tobytes() for line in packed)


def png(
    samples: NDArray[Any],
    depth: int,
    colour: int,
    *,
    before: bytes = b"",
    after: bytes = b"",
    level: int = 6,
) -> bytes:
    """A PNG of (height, width, channels) samples, with ready-made chunks before and after its data."""
    height, width = samples.shape[:2]
    return (
        PNG_SIGNATURE
        + chunk(b"IHDR", ihdr(width, height, depth, colour))
        + before
        + chunk(b"IDAT", zlib.compress(rows(samples, depth), level))
        + after
        + chunk(b"IEND", b"")
    )


def zeros(count: int) -> bytes:
    """A zlib stream of `count` zero bytes, made without having them: one flushed block, repeated."""
    unit = 1 << 20
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(unit)) + deflate.flush(zlib.Z_FULL_FLUSH)
    repeats, rest = divmod(count, unit)
    tail = zlib.compressobj(9, zlib.DEFLATED, -15)
    end = tail.compress(bytes(rest)) + tail.flush()
    adler = (count % 65521) << 16 | 1
    return b"\x78\xda" + block * repeats + end + struct.pack(">I", adler)


def one_colour_png(width: int, height: int, *, depth: int = 1, colour: int = 0) -> bytes:
    line = 1 + -(-width * depth // 8)
    header = chunk(b"IHDR", ihdr(width, height, depth, colour))
    return PNG_SIGNATURE + header + chunk(b"IDAT", zeros(line * height)) + chunk(b"IEND", b"")


def ramp16(channels: int = 1) -> NDArray[np.uint16]:
    """16 x 32 samples of 16 bits that take each of the 256 high bytes twice, with differing low bytes."""
    steps = np.arange(512, dtype=np.uint32)
    grey = ((steps // 2 << 8) + steps * 37 % 256).astype(np.uint16).reshape(16, 32, 1)
    return np.concatenate([np.roll(grey, k, axis=1) for k in range(channels)], axis=2)


def apng(frames: int = 3) -> bytes:
    images = [picture(seed=seed) for seed in range(frames)]
    return encoded(images[0], "PNG", save_all=True, append_images=images[1:])


# -------------------------------------------------------------------------------------------------- JPEG


def markers(jpeg: bytes) -> list[tuple[int, int]]:
    """(offset, code) of every marker up to and including EOI."""
    found, at = [], 0
    while True:
        code = jpeg[at + 1]
        found.append((at, code))
        if code == 0xD9:
            return found
        at += 2 if code == 0xD8 else 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if code == 0xDA:
            while jpeg[at] != 0xFF or jpeg[at + 1] == 0 or 0xD0 <= jpeg[at + 1] <= 0xD7:
                at += 1


def segment(code: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(body) + 2) + body


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def with_scans(total: int, width: int = 48, height: int = 32) -> bytes:
    """A progressive JPEG whose last scan is repeated until there are `total`."""
    jpeg = encoded(picture(width, height), "JPEG", progressive=True)
    found = markers(jpeg)
    scans = [at for at, code in found if code == 0xDA]
    end = found[-1][0]
    return jpeg[:end] + jpeg[scans[-1] : end] * (total - len(scans)) + jpeg[end:]


def cmyk(*, transform: int | None = 0) -> bytes:
    """A CMYK JPEG; `transform` is the Adobe segment's byte (2 makes it YCCK), None leaves the segment out."""
    jpeg = encoded(picture().convert("CMYK"), "JPEG", quality=95)
    at = next(at for at, code in markers(jpeg) if code == 0xEE)
    if transform is None:
        return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]
    return patched(jpeg, at + 4 + 11, bytes([transform]))


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(zipfile.ZipInfo("readme.txt"), b"not a picture \xff\xda" * 100)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------- WEBP


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def animation(frames: int) -> bytes:
    images = [picture(16, 12, seed=seed) for seed in range(8)]
    # 8 encoded frames, repeated: the plainest way to many frames. Frame chunks are independent of each other.
    webp = encoded(images[0], "WEBP", save_all=True, append_images=images[1:], lossless=True, allow_mixed=False)
    first = webp.index(b"ANMF")
    loop = webp[first:]
    unit = loop[: 8 + int.from_bytes(loop[4:8], "little")]
    body = webp[12:first] + unit * frames
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


# --------------------------------------------------------------------------------------------------- zoo


def _answer(
    name: str,
    data: bytes,
    size: tuple[int, int] = (48, 32),
    *notes: str,
    claims: str | None = None,
    filename: str = "image",
    heavy: bool = False,
) -> Member:
    magic = "png" if data[:4] == b"\x89PNG" else "webp" if data[:4] == b"RIFF" else "jpeg"
    return Member(
        name=name,
        data=data,
        size=size,
        format=magic,
        notes=notes,
        claims=claims or MEDIA_TYPES[magic],
        filename=filename,
        heavy=heavy,
    )


def _refuse(name: str, data: bytes, code: str = "undecodable_image") -> Member:
    return Member(name=name, data=data, code=code)


def _sizes() -> list[Member]:
    def plain(width: int, height: int) -> bytes:
        return png(np.asarray(picture(width, height)), 8, 2)

    fine = [(1, 1), (1, 3), (3, 1), (3, 3), (1, 100), (100, 1)]
    narrow = [(1, 101), (101, 1), (1, 20_000), (20_000, 1)]
    large = [(6401, 5000), (65_500, 65_500)]
    members = [_answer(f"png_{w}x{h}", plain(w, h), (w, h)) for w, h in fine]
    members += [_answer("png_6000x5000", one_colour_png(6000, 5000), (6000, 5000), heavy=True)]
    members += [_refuse(f"png_{w}x{h}", one_colour_png(w, h), "image_shape_unsupported") for w, h in narrow]
    members += [_refuse(f"png_{w}x{h}", one_colour_png(w, h), "image_too_many_pixels") for w, h in large]
    return members


def _jpegs() -> list[Member]:
    base = encoded(picture(), "JPEG", quality=90)
    found = markers(base)
    sof = next(at for at, code in found if code == 0xC0)
    sos = next(at for at, code in found if code == 0xDA)
    rest = encoded(picture(seed=1), "JPEG")
    pair = encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    members = [
        _answer("jpeg_baseline", base),
        _answer("jpeg_progressive", encoded(picture(), "JPEG", progressive=True)),
        _answer("jpeg_grey", encoded(picture().convert("L"), "JPEG")),
        _answer("jpeg_cmyk", cmyk(transform=None)),
        _answer("jpeg_adobe_inverted", cmyk(transform=0)),
        _answer("jpeg_ycck", cmyk(transform=2)),
        _answer("jpeg_restart_markers", encoded(picture(), "JPEG", restart_marker_blocks=1)),
        _answer("jpeg_mpo", pair),
        _answer("jpeg_trailing_garbage", base + bytes(range(256)) * 40),
        _answer("jpeg_zip", base + archive()),
        _answer("jpeg_then_jpeg", base + rest),
        _answer("jpeg_junk_between_segments", base[: found[2][0]] + bytes(300) + base[found[2][0] :]),
        _answer("jpeg_fill_bytes", base[: found[1][0]] + b"\xff" * 300 + base[found[1][0] :]),
        _answer("jpeg_icc_profile", encoded(picture(), "JPEG", icc_profile=bytes(100_000))),
        _answer("jpeg_64_scans", with_scans(64)),
        _refuse("jpeg_eoi_missing", base[: found[-1][0]]),
        _refuse("jpeg_65_scans", with_scans(65), "image_too_complex"),
        _refuse("jpeg_10000_scans", with_scans(10_000), "image_too_complex"),
        _refuse(
            "jpeg_many_segments",
            with_segments(base, *[segment(0xFE, b"")] * 100_000),
            "image_too_complex",
        ),
        _refuse("jpeg_12_bit", patched(base, sof + 4, b"\x0c")),
        _refuse("jpeg_header_only", base[:sos]),
        _refuse("jpeg_two_frames", with_segments(base, base[sof : found[found.index((sof, 0xC0)) + 1][0]])),
        _refuse("jpeg_height_0", patched(base, sof + 5, b"\0\0")),
    ]
    for order, name in (("<", "little"), (">", "big")):
        for orientation in range(1, 9):
            size = (48, 32) if orientation < 5 else (32, 48)
            block = segment(0xE1, b"Exif\0\0" + exif(orientation, order=order))
            members.append(_answer(f"jpeg_exif_{orientation}_{name}", with_segments(base, block), size))
    bad = {
        "0": exif(0),
        "9": exif(9),
        "65535": exif(65_535),
        "ascii": exif(6, kind=2),
        "empty": b"",
        "no_tiff": b"garbage" * 9,
        "cut": exif(6)[:20],
        "far_directory": b"II*\0" + struct.pack("<I", 0xFFFFFFF0),
        "many_entries": b"II*\0" + struct.pack("<IH", 8, 65_535) + bytes(24),
    }
    for name, body in bad.items():
        data = with_segments(base, segment(0xE1, b"Exif\0\0" + body))
        members.append(_answer(f"jpeg_bad_exif_{name}", data, (48, 32), "exif_ignored"))
    broken_mpf = with_segments(base, segment(0xE2, b"MPF\0" + b"MM\0*" + bytes(40)))
    members.append(_answer("jpeg_broken_mpf", broken_mpf))
    for number, (at, code) in enumerate(found[:-1]):
        members.append(_refuse(f"jpeg_cut_{number}_after_marker_{code:02x}", base[: at + 2]))
    members.append(_refuse("jpeg_cut_in_the_scan", base[: (sos + len(base)) // 2]))
    return members


def _pngs() -> list[Member]:
    rgb = np.asarray(picture())
    grey = rgb[..., :1]
    alpha = np.tile(np.arange(48, dtype=np.uint8) * 5, (32, 1))[..., None]
    index = (np.arange(48 * 32) % 4).reshape(32, 48, 1)
    colours = chunk(b"PLTE", bytes([10, 20, 30, 200, 100, 0, 0, 255, 128, 250, 250, 5]))
    small = (32, 16)  # of ramp16
    base = png(rgb, 8, 2)
    data = zlib.compress(rows(rgb, 8))
    start = PNG_SIGNATURE + chunk(b"IHDR", ihdr(48, 32, 8, 2))
    end = chunk(b"IEND", b"")
    clear = "alpha_composited"
    return [
        _answer("png_rgb", base),
        _answer("png_1_bit", png(grey >> 7, 1, 0)),
        _answer("png_2_bit", png(grey >> 6, 2, 0)),
        _answer("png_4_bit", png(grey >> 4, 4, 0)),
        _answer("png_grey", png(grey, 8, 0)),
        _answer("png_grey_alpha", png(np.concatenate([grey, alpha], 2), 8, 4), (48, 32), clear),
        _answer("png_palette_2_bit", png(index, 2, 3, before=colours)),
        _answer("png_palette", png(index, 8, 3, before=colours)),
        _answer(
            "png_palette_trns",
            png(index, 8, 3, before=colours + chunk(b"tRNS", b"\x80\xff\0")),
            (48, 32),
            clear,
        ),
        _answer(
            "png_palette_trns_one",
            png(index, 2, 3, before=colours + chunk(b"tRNS", b"\xff\0")),
            (48, 32),
            clear,
        ),
        _answer("png_palette_trns_opaque", png(index, 8, 3, before=colours + chunk(b"tRNS", b"\xff\xff"))),
        _answer("png_rgb_trns", png(rgb, 8, 2, before=trns(rgb[3, 4])), (48, 32), clear),
        _answer("png_rgb_trns_unused", png(rgb | 1, 8, 2, before=trns([0, 0, 0]))),
        _answer("png_grey_trns", png(grey, 8, 0, before=trns(grey[3, 4])), (48, 32), clear),
        _answer("png_1_bit_trns", png(grey >> 7, 1, 0, before=trns([1])), (48, 32), clear),
        _answer("png_2_bit_trns", png(grey >> 6, 2, 0, before=trns(grey[3, 4] >> 6)), (48, 32), clear),
        _answer("png_4_bit_trns", png(grey >> 4, 4, 0, before=trns(grey[3, 4] >> 4)), (48, 32), clear),
        _answer("png_rgba", png(np.concatenate([rgb, alpha], 2), 8, 6), (48, 32), clear),
        _answer("png_rgba_opaque", png(np.concatenate([rgb, alpha | 255], 2), 8, 6)),
        _answer("png_grey_16", png(ramp16(), 16, 0), small),
        _answer("png_grey_16_trns", png(ramp16(), 16, 0, before=trns(ramp16()[2, 3])), small, clear),
        _answer("png_grey_alpha_16", png(ramp16(2), 16, 4), small, clear),
        _answer("png_rgb_16", png(ramp16(3), 16, 2), small),
        _answer("png_rgb_16_trns", png(ramp16(3), 16, 2, before=trns(ramp16(3)[2, 9])), small, clear),
        _answer("png_rgba_16", png(ramp16(4), 16, 6), small, clear),
        _answer("png_interlaced", interlaced()),
        _answer("png_icc_profile", encoded(picture(), "PNG", icc_profile=bytes(100_000))),
        _answer("png_apng", apng(3), (48, 32), "first_frame_of_3"),
        _answer("png_exif_6", png(rgb, 8, 2, before=chunk(b"eXIf", exif(6))), (32, 48)),
        _answer("png_exif_after_data", png(rgb, 8, 2, after=chunk(b"eXIf", exif(6))), (32, 48)),
        _answer("png_exif_bad", png(rgb, 8, 2, before=chunk(b"eXIf", b"??")), (48, 32), "exif_ignored"),
        _answer("png_text_named_transparency", png(rgb, 8, 2, before=chunk(b"tEXt", b"transparency\x00255"))),
        _answer("png_idat_bad_crc", start + chunk(b"IDAT", data, crc=1) + end),
        _answer("png_iend_missing", start + chunk(b"IDAT", data)),
        _answer("png_idat_too_long", start + chunk(b"IDAT", zlib.compress(rows(rgb, 8) + bytes(5000))) + end),
        _answer("png_idat_bomb", start + chunk(b"IDAT", zeros(200 << 20)) + end),
        _answer(
            "png_idat_in_pieces",
            start + b"".join(chunk(b"IDAT", data[i : i + 1]) for i in range(len(data))) + end,
        ),
        _refuse("png_ztxt_bomb", png(rgb, 8, 2, before=chunk(b"zTXt", b"note\0\0" + zeros(200 << 20)))),
        _refuse("png_ztxt_bomb_after_data", png(rgb, 8, 2, after=chunk(b"zTXt", b"note\0\0" + zeros(200 << 20)))),
        _refuse("png_itxt_bomb", png(rgb, 8, 2, before=chunk(b"iTXt", b"note\0\1\0\0\0" + zeros(200 << 20)))),
        _refuse("png_iccp_bomb", png(rgb, 8, 2, before=chunk(b"iCCP", b"icc\0\0" + zeros(200 << 20)))),
        _refuse(
            "png_many_iccp",
            png(rgb, 8, 2, before=chunk(b"iCCP", b"icc\0\0" + zeros(1 << 20)) * 5000),
            "image_too_complex",
        ),
        _refuse("png_many_empty_idat", start + chunk(b"IDAT", b"") * 100_000 + end, "image_too_complex"),
        _refuse(
            "png_ihdr_bad_crc",
            PNG_SIGNATURE + chunk(b"IHDR", ihdr(48, 32, 8, 2), crc=1) + chunk(b"IDAT", data) + end,
        ),
        _refuse("png_two_ihdr", start + start[8:] + chunk(b"IDAT", data) + end),
        _refuse(
            "png_two_ihdr_that_differ",
            start + chunk(b"IHDR", ihdr(9000, 9000, 8, 2)) + chunk(b"IDAT", data) + end,
        ),
        _refuse("png_no_ihdr", PNG_SIGNATURE + chunk(b"IDAT", data) + end),
        _refuse("png_idat_missing", start + end),
        _refuse("png_idat_short", start + chunk(b"IDAT", zlib.compress(rows(rgb, 8)[:2000])) + end),
        _refuse("png_idat_cut", base[: len(base) // 2]),
        _refuse("png_signature_only", PNG_SIGNATURE),
        _refuse("png_width_0", PNG_SIGNATURE + chunk(b"IHDR", ihdr(0, 32, 8, 2)) + chunk(b"IDAT", data) + end),
        _refuse("png_depth_3", PNG_SIGNATURE + chunk(b"IHDR", ihdr(48, 32, 3, 0)) + chunk(b"IDAT", data) + end),
    ]


def trns(values: Any) -> bytes:
    return chunk(b"tRNS", b"".join(int(value).to_bytes(2, "big") for value in values))


def interlaced() -> bytes:
    rgb = np.asarray(picture())
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    lines = b"".join(rows(rgb[y::dy, x::dx], 8) for y, x, dy, dx in passes)
    header = chunk(b"IHDR", ihdr(48, 32, 8, 2, interlace=1))
    return PNG_SIGNATURE + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def _webps() -> list[Member]:
    image = picture()
    alpha = Image.linear_gradient("L").resize(image.size)
    see_through = image.copy()
    see_through.putalpha(alpha)
    lossless = encoded(image, "WEBP", lossless=True)
    lossy = encoded(image, "WEBP", quality=80)
    turned = encoded(image, "WEBP", lossless=True, exif=exif(6))
    film = animation(1000)
    frame = film.index(b"ANMF") + 8
    return [
        _answer("webp_lossy", lossy),
        _answer("webp_lossless", lossless),
        _answer("webp_alpha", encoded(see_through, "WEBP", quality=80), (48, 32), "alpha_composited"),
        _answer("webp_alpha_lossless", encoded(see_through, "WEBP", lossless=True), (48, 32), "alpha_composited"),
        _answer("webp_animated_1000", film, (16, 12), "first_frame_of_1000"),
        _answer("webp_icc_profile", encoded(image, "WEBP", icc_profile=bytes(100_000))),
        _answer("webp_exif_6", turned, (32, 48)),
        _answer("webp_exif_bad", encoded(image, "WEBP", exif=b"Exif\0\0??"), (48, 32), "exif_ignored"),
        _refuse("webp_truncated", lossy[: len(lossy) // 2]),
        _refuse("webp_lossless_truncated", lossless[: len(lossless) // 2]),
        _refuse("webp_riff_only", lossy[:12]),
        _refuse("webp_header_only", lossy[:30]),
        _refuse("webp_canvas_over_the_cap", patched(film, 24, b"\xff\x3f\0\xff\x3f\0"), "image_too_many_pixels"),
        _refuse("webp_canvas_of_another_size", patched(turned, 24, b"\x3f\0\0\x3f\0\0")),
        _refuse("webp_canvas_too_narrow", patched(film, 24, b"\x0f\x27\0\0\0\0"), "image_shape_unsupported"),
        _refuse("webp_frame_outside_the_canvas", patched(film, frame, b"\x40\0\0")),
        _refuse("webp_unknown_chunk", riff((b"JUNK", bytes(40)))),
    ]


def _strangers() -> list[Member]:
    image = picture()
    rng = np.random.default_rng(1)

    def box(brand: bytes) -> bytes:
        return struct.pack(">I4s4sI4s", 24, b"ftyp", brand, 0, b"mif1") + bytes(100)

    files = {
        "gif": encoded(image.convert("P"), "GIF"),
        "tiff": encoded(image, "TIFF"),
        "bmp": encoded(image, "BMP"),
        "ico": encoded(image, "ICO"),
        "ppm": encoded(image, "PPM"),
        "eps": encoded(image, "EPS"),
        "jp2": encoded(image, "JPEG2000"),
        "qoi": b"qoif" + struct.pack(">IIBB", 4, 4, 3, 0) + bytes(24),
        "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><rect width='9'/></svg>",
        "psd": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 4, 8, 3) + bytes(64),
        "fits": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800),
        "heic": box(b"heic"),
        "avif": box(b"avif"),
        "wav": b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + bytes(28),
        "text": b"a photo of a cat\n",
        "zip": archive(),
        "gzip": b"\x1f\x8b\x08" + bytes(60),
        "random": b"\x01" + rng.bytes(5000),
        "one_byte": b"\xff",
        "png_without_its_first_byte": png(np.asarray(image), 8, 2)[1:],
        "space_before_jpeg": b" " + encoded(image, "JPEG"),
        "pickle": b"\x80\x04\x95" + bytes(30),
        "npy": b"\x93NUMPY\x01\0" + bytes(100),
    }
    members = [_refuse(f"other_{name}", data, "unsupported_image_format") for name, data in files.items()]
    members.append(_refuse("empty", b""))
    members.append(_refuse("jpeg_one_byte_too_long", encoded(image, "JPEG") + bytes(1 << 24), "image_too_large"))
    return members


def _lies() -> list[Member]:
    rgb = np.asarray(picture())
    return [
        _answer("lie_png_as_jpg", png(rgb, 8, 2), claims="image/webp", filename="photo.jpg"),
        _answer("lie_jpeg_as_png", encoded(picture(), "JPEG"), claims="image/png", filename="photo.png"),
        _answer("lie_webp_as_text", encoded(picture(), "WEBP"), claims="text/plain", filename="../../a.txt"),
    ]


@cache
def zoo() -> tuple[Member, ...]:
    """All members, always in the same order; names are unique."""
    return (*_sizes(), *_jpegs(), *_pngs(), *_webps(), *_strangers(), *_lies())


def flips(data: bytes, count: int, seed: int) -> list[bytes]:
    """`count` copies of `data`, each with one to eight of its bytes replaced."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        copy = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 9)):
            copy[at] = int(rng.integers(0, 256))
        out.append(bytes(copy))
    return out


def mutation_seeds() -> dict[str, list[bytes]]:
    """Small files of each format that between them hold every structure worth breaking."""
    by_name = {member.name: member.data for member in zoo()}
    pair = [picture(16, 12), picture(16, 12, seed=1)]
    block = b"Exif\0\0" + exif(6)
    mpo = encoded(pair[0], "MPO", save_all=True, append_images=pair[1:], exif=block)
    names = {
        "jpeg": ["jpeg_exif_6_big", "jpeg_progressive", "jpeg_ycck", "jpeg_restart_markers"],
        "png": ["png_palette_trns", "png_grey_16", "png_apng", "png_exif_6", "png_interlaced"],
        "webp": ["webp_exif_6", "webp_alpha", "webp_lossless"],
    }
    seeds = {kind: [by_name[name] for name in chosen] for kind, chosen in names.items()}
    seeds["jpeg"].append(mpo)
    seeds["webp"].append(animation(3))
    return seeds
