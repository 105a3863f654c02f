"""Decoding: the whole zoo, golden pixels, limits before pixels, damaged files, memory, threads."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from gram_core import images
from gram_core.errors import InvalidImage
from gram_core.images import PILLOW_MAX_PIXELS, ImageLimits, decode, inspect
from tests import zoo
from tests.zoo import Member, encoded, picture

ROOT = Path(__file__).parents[1]
MEMBERS = zoo.zoo()
ANSWERS = [member for member in MEMBERS if member.code is None]
LIGHT = [member for member in ANSWERS if not member.heavy]
# Every limit that stands in the file's first bytes must act before Pillow is asked anything.
HEADER_CODES = {
    "unsupported_image_format",
    "image_too_large",
    "image_too_many_pixels",
    "image_shape_unsupported",
    "image_too_complex",
}
CODES = HEADER_CODES | {"undecodable_image"}
# Nothing of Pillow's own messages: addresses, paths, exception names.
LEAK = re.compile(r"0x[0-9a-f]{4,}|(?<![\w.])/\w|Traceback|Error|BytesIO|PIL")


def refused(data: bytes, limits: ImageLimits | None = None) -> InvalidImage:
    with pytest.raises(InvalidImage) as caught:
        decode(data, limits or ImageLimits(), index=7)
    return caught.value


def array(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(decode(data).rgb)


def plainly(data: bytes) -> NDArray[np.uint8]:
    """What open_clip's preprocessing starts from."""
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        return np.asarray(image.convert("RGB"))


def on_white(rgb: NDArray[Any], alpha: NDArray[Any]) -> NDArray[np.uint8]:
    """The mean of colour and white by alpha, rounded to the nearest (n / 255 has no ties: 255 is odd)."""
    wide, a = rgb.astype(np.int64), alpha.astype(np.int64)
    return ((wide * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)


class Called(BaseException):
    """Not an Exception, which `decode` would turn into a refusal."""


def forbidden(*_: object, **__: object) -> NoReturn:
    raise Called


# --- the zoo


def test_zoo_names_are_unique_and_its_bytes_the_same_every_time() -> None:
    assert len({member.name for member in MEMBERS}) == len(MEMBERS)
    again = [hashlib.sha256(member.data).digest() for member in zoo.zoo.__wrapped__()]
    assert again == [hashlib.sha256(member.data).digest() for member in MEMBERS]


@pytest.mark.parametrize("member", ANSWERS, ids=lambda member: member.name)
def test_a_good_image_is_answered(member: Member) -> None:
    image = decode(member.data)
    assert (image.width, image.height) == image.rgb.size == member.size
    assert (image.format, image.notes) == (member.format, member.notes)
    assert image.rgb.mode == "RGB"
    assert type(image.rgb) is Image.Image
    assert image.rgb.info == {}
    assert image.sha256 == hashlib.sha256(member.data).digest()
    header = inspect(member.data)
    assert sorted((header.width, header.height)) == sorted(member.size)
    assert header.format == member.format


@pytest.mark.parametrize(
    "member", [member for member in MEMBERS if member.code is not None], ids=lambda member: member.name
)
def test_a_bad_image_is_refused_in_our_own_words(member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(member.data)
    assert (error.code, error.index) == (member.code, 7)
    assert error.message.startswith("image 7 ")
    assert error.message.endswith(".")
    assert not LEAK.search(error.message)
    assert error.__cause__ is None
    assert error.__suppress_context__
    if member.code in HEADER_CODES:
        monkeypatch.setattr(Image, "open", forbidden)
        with pytest.raises(InvalidImage) as caught:
            inspect(member.data)
        assert caught.value.code == member.code
        assert caught.value.message.startswith("this image ")
        assert refused(member.data).code == member.code


def test_no_other_plugin_of_pillow_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    assert len(Image.OPEN) > 30
    for name in set(Image.OPEN) - {"JPEG", "PNG", "WEBP"}:
        monkeypatch.setitem(Image.OPEN, name, (forbidden, forbidden))
    # Pillow reads EXIF and the index of an MPO with its TIFF parser; we read the one tag ourselves.
    monkeypatch.setattr(TiffImagePlugin.ImageFileDirectory_v2, "load", forbidden)
    for member in MEMBERS:
        if member.heavy:
            continue
        if member.code is None:
            assert decode(member.data).notes == member.notes
        else:
            assert refused(member.data).code == member.code


def test_each_file_is_opened_as_the_one_format_its_bytes_show(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    really_open = Image.open

    def spy(file: Any, **options: Any) -> Any:
        seen.append(options)
        return really_open(file, **options)

    monkeypatch.setattr(Image, "open", spy)
    for member in LIGHT:
        decode(member.data)
        assert seen.pop() == {"formats": (member.format.upper(),)}
        assert not seen


def test_pillow_is_not_handed_what_says_nothing_about_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    base = encoded(picture(), "JPEG")
    first = zoo.markers(base)[2][0]  # behind JFIF
    clutter = [zoo.segment(code, b"?" * 50) for code in (*range(0xE1, 0xEE), 0xEF, 0xFE)]
    really_open = Image.open

    def spy(file: Any, **options: Any) -> Any:
        assert file.getvalue() == base
        return really_open(file, **options)

    monkeypatch.setattr(Image, "open", spy)
    decode(base[:first] + b"".join(clutter) + bytes(1000) + b"\xff" * 1000 + base[first:])


def test_pillows_process_wide_limits_are_ours_and_stay_so() -> None:
    assert Image.MAX_IMAGE_PIXELS == PILLOW_MAX_PIXELS
    assert PILLOW_MAX_PIXELS < 89_478_485  # Pillow's own
    assert ImageLimits().max_pixels < PILLOW_MAX_PIXELS
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


# --- golden pixels


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's own reading of damaged EXIF and MPF
@pytest.mark.parametrize(
    "member",
    [
        member
        for member in LIGHT
        if not set(member.notes) & {"alpha_composited"} and not re.search(r"exif_[2-8]|exif_after|grey_16", member.name)
    ],
    ids=lambda member: member.name,
)
def test_upright_opaque_8_bit_images_are_what_pillow_gives(member: Member) -> None:
    assert np.array_equal(array(member.data), plainly(member.data))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
def test_each_orientation_turns_the_picture_as_exif_defines(order: str, kind: int) -> None:
    # The six pixels as they should be seen; EXIF says where the stored row 0 and column 0 belong.
    seen = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.T,
        6: np.rot90(seen),
        7: seen[::-1, ::-1].T,
        8: np.rot90(seen, -1),
    }
    for orientation, samples in stored.items():
        block = zoo.chunk(b"eXIf", zoo.exif(orientation, order=order, kind=kind))
        turned = array(zoo.png(samples[..., None], 8, 0, before=block))
        assert np.array_equal(turned[..., 0], seen), orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_agrees_with_pillows_own_transposing(kind: str, orientation: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = encoded(picture(), kind, exif=tags)
    with Image.open(io.BytesIO(data), formats=(kind,)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(array(data), expected)


def test_a_jpeg_without_orientation_keeps_no_note() -> None:
    tags = Image.Exif()
    tags[0x010F] = "a maker of cameras"
    assert decode(encoded(picture(), "JPEG", exif=tags)).notes == ()


def test_every_alpha_over_every_colour_is_rounded_to_the_nearest() -> None:
    colour, alpha = (side[..., None] for side in np.meshgrid(np.arange(256), np.arange(256)))
    expected = on_white(colour, alpha)
    grey = array(zoo.png(np.concatenate([colour, alpha], 2), 8, 4))
    rgba = array(zoo.png(np.concatenate([colour, colour, 255 - colour, alpha], 2), 8, 6))
    assert np.array_equal(grey, np.repeat(expected, 3, 2))
    assert np.array_equal(rgba[..., :2], np.repeat(expected, 2, 2))
    assert np.array_equal(rgba[..., 2:], on_white(255 - colour, alpha))


def test_alpha_in_a_webp_is_composited_like_that_of_a_png() -> None:
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    samples = np.asarray(image)
    webp = array(encoded(image, "WEBP", lossless=True, exact=True))
    assert np.array_equal(webp, on_white(samples[..., :3], samples[..., 3:]))
    assert np.array_equal(webp, array(encoded(image, "PNG")))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("alphas", [b"\x00", b"\xff\x00", b"\x80\x40", b"\xff"])
def test_a_palette_entry_shows_the_white_below_it_by_its_alpha(depth: int, alphas: bytes) -> None:
    index = (np.arange(60) % 2).reshape(6, 10, 1)
    palette = np.array([[10, 200, 30], [250, 0, 77]], np.uint8)
    before = zoo.chunk(b"PLTE", palette.tobytes()) + zoo.chunk(b"tRNS", alphas)
    image = decode(zoo.png(index, depth, 3, before=before))
    alpha = np.frombuffer(alphas.ljust(2, b"\xff"), np.uint8)[index]
    assert np.array_equal(np.asarray(image.rgb), on_white(palette[index[..., 0]], alpha))
    assert image.notes == (() if alpha.min() == 255 else ("alpha_composited",))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_colour_key_of_a_grey_png_is_compared_at_its_own_depth(depth: int) -> None:
    samples = (np.arange(256, dtype=np.uint32).reshape(16, 16, 1) * 257) >> (16 - depth)
    key = int(samples[3, 5, 0])
    shown = samples >> 8 if depth == 16 else samples * 255 // (2**depth - 1)
    expected = np.where(samples == key, 255, shown).astype(np.uint8)
    image = decode(zoo.png(samples, depth, 0, before=zoo.trns([key])))
    assert np.array_equal(np.asarray(image.rgb), np.repeat(expected, 3, 2))
    assert image.notes == ("alpha_composited",)


def test_the_colour_key_of_a_16_bit_grey_png_looks_at_the_low_byte_too() -> None:
    samples = np.array([[[0x1234], [0x1235], [0x1234]]])
    pixels = array(zoo.png(samples, 16, 0, before=zoo.trns([0x1234])))
    assert pixels[0, :, 0].tolist() == [255, 0x12, 255]


def test_the_colour_key_of_an_rgb_png_clears_that_colour_alone() -> None:
    samples = np.array([[[1, 2, 3], [1, 2, 4], [200, 2, 3]]])
    pixels = array(zoo.png(samples, 8, 2, before=zoo.trns([1, 2, 3])))
    assert pixels.tolist() == [[[255, 255, 255], [1, 2, 4], [200, 2, 3]]]


def test_a_ramp_of_16_bit_grey_keeps_256_levels() -> None:
    ramp = zoo.ramp16()
    pixels = array(zoo.png(ramp, 16, 0))
    assert np.array_equal(pixels, np.repeat((ramp >> 8).astype(np.uint8), 3, 2))
    assert len(np.unique(pixels)) == 256


@pytest.mark.parametrize(("channels", "colour"), [(2, 4), (3, 2), (4, 6)])
def test_other_16_bit_kinds_keep_their_high_bytes(channels: int, colour: int) -> None:
    samples = zoo.ramp16(channels)
    high = (samples >> 8).astype(np.uint8)
    rgb = np.repeat(high[..., :1], 3, 2) if channels == 2 else high[..., :3]
    alpha = high[..., -1:] if channels in (2, 4) else np.full_like(high[..., :1], 255)
    assert np.array_equal(array(zoo.png(samples, 16, colour)), on_white(rgb, alpha))


def test_cmyk_colours_come_out_as_their_names_say() -> None:
    inks = {(0, 255, 255, 0): (255, 0, 0), (255, 0, 255, 0): (0, 255, 0), (0, 0, 0, 255): (0, 0, 0)}
    for ink, colour in inks.items():
        pixels = array(encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100))
        # JPEG at quality 100 quantises by 1, so each of the four inks is off by 1 at most.
        assert np.abs(pixels.astype(int) - colour).max() <= 4


def test_ycck_is_not_read_as_cmyk() -> None:
    assert not np.array_equal(array(zoo.cmyk(transform=0)), array(zoo.cmyk(transform=2)))


def test_the_first_frame_of_an_animation_is_the_one_that_is_shown() -> None:
    assert np.array_equal(array(zoo.apng(3)), np.asarray(picture(seed=0)))
    first = encoded(picture(16, 12, seed=0), "WEBP", lossless=True)
    assert np.array_equal(array(zoo.animation(5)), plainly(first))


def test_the_first_image_of_an_mpo_is_the_one_that_is_shown() -> None:
    pair = [picture(), picture(seed=1)]
    mpo = encoded(pair[0], "MPO", save_all=True, append_images=pair[1:], exif=b"Exif\0\0" + zoo.exif(3))
    alone = plainly(encoded(pair[0], "JPEG"))
    assert np.array_equal(array(mpo), alone[::-1, ::-1])


# --- limits


def small_png(width: int, height: int) -> bytes:
    return zoo.one_colour_png(width, height)


@pytest.mark.parametrize(
    ("limits", "fine", "over", "code"),
    [
        (
            ImageLimits(max_bytes=len(small_png(9, 9))),
            small_png(9, 9),
            small_png(9, 9) + b"\0",
            "image_too_large",
        ),
        (ImageLimits(max_pixels=90), small_png(9, 10), small_png(13, 7), "image_too_many_pixels"),
        (ImageLimits(max_aspect_ratio=3), small_png(3, 9), small_png(3, 10), "image_shape_unsupported"),
        (ImageLimits(max_aspect_ratio=3), small_png(9, 3), small_png(10, 3), "image_shape_unsupported"),
        (ImageLimits(max_jpeg_scans=20), zoo.with_scans(20), zoo.with_scans(21), "image_too_complex"),
    ],
)
def test_an_image_exactly_at_a_limit_is_answered_and_one_beyond_it_is_not(
    limits: ImageLimits, fine: bytes, over: bytes, code: str
) -> None:
    decode(fine, limits)
    assert refused(over, limits).code == code


@pytest.mark.parametrize(
    ("name", "knob"),
    [
        ("jpeg_one_byte_too_long", "GRAM_MAX_IMAGE_BYTES"),
        ("png_65500x65500", "GRAM_MAX_IMAGE_PIXELS"),
        ("png_1x101", "GRAM_MAX_ASPECT_RATIO"),
    ],
)
def test_a_refusal_by_a_limit_names_its_setting(name: str, knob: str) -> None:
    (member,) = (member for member in MEMBERS if member.name == name)
    assert knob in refused(member.data).message


def test_scans_are_not_counted_in_metadata_or_past_the_end() -> None:
    lure = b"\xff\xda\0\x02" * 200
    jpeg = zoo.with_segments(encoded(picture(), "JPEG"), zoo.segment(0xFE, lure)) + b"\0\x02" + lure
    assert np.array_equal(array(jpeg), plainly(jpeg))


def test_an_end_marker_inside_a_comment_does_not_hide_the_scans_behind_it() -> None:
    jpeg = zoo.with_scans(80)
    second = [at for at, code in zoo.markers(jpeg) if code == 0xDA][1]
    hidden = jpeg[:second] + zoo.segment(0xFE, b"\xff\xd9") + jpeg[second:]
    assert refused(hidden).code == "image_too_complex"


@pytest.mark.parametrize("piece", [2, 3, 61])
def test_a_jpeg_searched_in_pieces_is_a_jpeg_searched_at_once(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [member.data for member in MEMBERS if member.name.startswith("jpeg") and len(member.data) < 20_000]

    def seen() -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        for data in files:
            try:
                found.append((inspect(data),))
            except InvalidImage as error:
                found.append((error.code, error.message))
        return found

    expected = seen()
    assert sum(len(outcome) == 1 for outcome in expected) > 20
    monkeypatch.setattr(images, "PIECE", piece)
    assert seen() == expected


def test_a_header_that_pillow_reads_differently_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(), "JPEG")
    other = Image.open(io.BytesIO(small_png(9, 9)), formats=("PNG",))
    monkeypatch.setattr(Image, "open", lambda *_, **__: other)
    assert refused(data).code == "undecodable_image"


@pytest.mark.parametrize("error", [OSError, MemoryError, AssertionError, Image.DecompressionBombError])
def test_whatever_pillow_raises_becomes_one_fixed_sentence(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error("cannot identify image file <_io.BytesIO object at 0x7f31c0a9>")

    monkeypatch.setattr(Image, "open", fail)
    got = refused(encoded(picture(), "PNG"))
    assert got.code == "undecodable_image"
    assert not LEAK.search(got.message)


@pytest.mark.parametrize("name", ["max_bytes", "max_pixels", "max_aspect_ratio", "max_jpeg_scans"])
def test_limits_that_make_no_sense_are_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ImageLimits(**{name: 0})
    with pytest.raises(ValueError, match="max_pixels"):
        ImageLimits(max_pixels=PILLOW_MAX_PIXELS + 1)


# --- damage


def outcome(data: bytes, limits: ImageLimits) -> tuple[str, str]:
    try:
        return "answer", decode(data, limits).rgb.mode
    except InvalidImage as error:
        return error.code, error.message


def survive(kind: str, count: int, limits: ImageLimits) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    seeds = zoo.mutation_seeds()[kind]
    for number, data in enumerate(seeds):
        for copy in zoo.flips(data, count // len(seeds), seed=number):
            code, message = outcome(copy, limits)
            outcomes[code] += 1
            assert code in CODES | {"answer"}
            assert not LEAK.search(message)
    return outcomes


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_flipped_bytes_give_an_answer_or_a_refusal(kind: str) -> None:
    outcomes = survive(kind, 400, ImageLimits(max_pixels=1_000_000))
    assert outcomes["answer"] > 0
    assert outcomes["undecodable_image"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_4000_flips_give_an_answer_or_a_refusal(kind: str) -> None:
    assert survive(kind, 4000, ImageLimits()).total() >= 3990


def test_flipped_exif_never_costs_the_image() -> None:
    block = zoo.exif(6)
    base = encoded(picture(16, 12), "JPEG")
    for copy in zoo.flips(block, 300, seed=5):
        image = decode(zoo.with_segments(base, zoo.segment(0xE1, b"Exif\0\0" + copy)))
        assert image.notes in ((), ("exif_ignored",))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_file_cut_anywhere_is_refused(kind: str) -> None:
    data = encoded(picture(16, 12), kind)
    # The pixels of a PNG are complete before its last bytes: end of the deflate stream, two checksums, IEND.
    end = len(data) - (2 + 4 + 4 + 12 if kind == "PNG" else 0)
    magic = {"JPEG": 2, "PNG": 8, "WEBP": 12}[kind]
    for length in range(1, end):
        expected = "undecodable_image" if length >= magic else "unsupported_image_format"
        assert refused(data[:length]).code == expected, length


# --- memory, processes, threads

CHILD = """
import json, resource, sys
from pathlib import Path
from gram_core.errors import InvalidImage
from gram_core.images import decode

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

first, *rest = map(Path, sys.argv[1:])
decode(first.read_bytes())
grown = {}
for path in rest:
    data, before = path.read_bytes(), peak()
    try:
        decode(data)
        code = None
    except InvalidImage as error:
        code = error.code
    grown[path.name] = [code, peak() - before]
print(json.dumps({"grown": grown, "torch": "torch" in sys.modules}))
"""

BOMBS = [
    member for member in MEMBERS if re.search(r"bomb|many_|20000|65500|10000_scans|over_the_cap|differ", member.name)
]


def test_no_bomb_takes_memory_and_decoding_needs_no_torch(tmp_path: Path) -> None:
    names = [member.name for member in BOMBS]
    assert len(names) >= 12
    for member in BOMBS:
        (tmp_path / member.name).write_bytes(member.data)
    (tmp_path / "warm").write_bytes(encoded(picture(), "PNG"))
    paths = [str(tmp_path / name) for name in ["warm", *names]]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    told = json.loads(done.stdout)
    assert not told["torch"]
    assert {name: code for name, (code, _) in told["grown"].items()} == {m.name: m.code for m in BOMBS}
    # Pillow inflates at most 1 MiB of a text chunk or profile; the rest is allocator noise. Unchecked, the
    # smallest of these would take 200 MiB.
    assert max(kib for _, kib in told["grown"].values()) < 16 * 1024, told["grown"]


def test_threads_agree_with_one_thread() -> None:
    def digest(member: Member) -> tuple[str, bytes | str]:
        try:
            image = decode(member.data)
        except InvalidImage as error:
            return member.name, error.message
        return member.name, hashlib.sha256(image.rgb.tobytes()).digest() + repr(image.notes).encode()

    members = [member for member in MEMBERS if not member.heavy and len(member.data) < 1 << 20]
    expected = dict(map(digest, members))
    rng = np.random.default_rng(0)
    order = [members[at] for _ in range(4) for at in rng.permutation(len(members))]
    with ThreadPoolExecutor(8) as pool:
        for name, got in pool.map(digest, order):
            assert got == expected[name], name


def test_the_module_sets_pillow_up_again_when_imported_anew() -> None:
    program = (
        "import warnings, gram_core.images as images; from PIL import Image;"
        f"assert Image.MAX_IMAGE_PIXELS == {PILLOW_MAX_PIXELS} == images.PILLOW_MAX_PIXELS;"
        "assert any(f[0] == 'ignore' and f[3] and f[3].match('PIL.Image') for f in warnings.filters);"
        "assert len(Image.OPEN) < 8"  # only the plugins that are needed were imported
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_100000_decodes_keep_no_memory(kind: str) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    data = encoded(picture(16, 12), kind)
    broken = data[: len(data) * 2 // 3]
    start = 0
    for turn in range(100_000):
        decode(data)
        with pytest.raises(InvalidImage):
            decode(broken)
        if turn == 10_000:
            start = resident()
    # 90 000 leaks of a single 16 x 12 image (576 bytes) would be 49 MiB.
    assert resident() - start < 8 << 20


def test_the_public_names_are_listed() -> None:
    assert set(images.__all__) == {
        "PILLOW_MAX_PIXELS",
        "DecodedImage",
        "ImageHeader",
        "ImageLimits",
        "decode",
        "inspect",
    }
