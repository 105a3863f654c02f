"""Corruptions: what they depend on, how strong they are, and whether each is what its name and the paper say."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from gram_core.errors import InvalidConfig, InvalidImage
from gram_core.evaluate import corruptions
from gram_core.evaluate.corruptions import CORRUPTIONS, FAMILIES, SEVERITIES, SIDE, corrupt, corrupted, parse
from gram_core.evaluate.labelled import LabelledSet

ROOT = Path(__file__).parents[1]
# These draw nothing: brightness, contrast and the like are functions of the image alone.
FIXED = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
RNG = np.random.default_rng  # for the functions that take a generator


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@cache
def photo(name: str = "chelsea.png") -> bytes:
    """A photograph from scikit-image's wheel, its middle, at 224 x 224: what `corrupt` needn't resize."""
    with Image.open(io.BytesIO((files("skimage") / "data" / name).read_bytes())) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side))
        return png(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def values(data: bytes) -> NDArray[np.float64]:
    """(H, W, 3) in [0, 1]."""
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        return np.asarray(image, dtype=np.float64) / 255


@cache
def made(name: str, severity: int, seed: int = 0) -> bytes:
    return corrupt(photo(), name, severity, seed)


def clean() -> NDArray[np.float32]:
    return values(photo()).astype(np.float32)


def grain(x: NDArray[Any]) -> float:
    """Energy of the differences between neighbours."""
    return float(np.square(np.diff(x, axis=0)).mean() + np.square(np.diff(x, axis=1)).mean())


def likeness(x: NDArray[Any]) -> float:
    """Correlation with the clean photograph: brighter or paler alone doesn't lower it."""
    return float(np.corrcoef(x.ravel(), clean().ravel())[0, 1])


# ---------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_gives_a_png_of_the_same_size_that_differs(name: str, severity: int) -> None:
    data = made(name, severity)
    assert data.startswith(b"\x89PNG")
    assert values(data).shape == (SIDE, SIDE, 3)
    assert np.abs(values(data) - clean()).mean() > 0.01


def test_the_result_is_the_same_in_another_process_thread_and_order() -> None:
    here = {name: hashlib.sha256(made(name, 3)).hexdigest() for name in CORRUPTIONS}
    script = (
        "import hashlib, json, sys; import numpy as np; from gram_core.evaluate.corruptions import *;"
        "np.random.seed(7); data = sys.stdin.buffer.read();"
        "names = list(reversed(CORRUPTIONS)); corrupt(data, 'snow', 1);"
        "print(json.dumps({n: hashlib.sha256(corrupt(data, n, 3)).hexdigest() for n in names}))"
    )
    ran = subprocess.run([sys.executable, "-c", script], input=photo(), capture_output=True, check=True, cwd=ROOT)
    assert json.loads(ran.stdout) == here
    with ThreadPoolExecutor(4) as pool:
        there = pool.map(lambda name: hashlib.sha256(corrupt(photo(), name, 3)).hexdigest(), here)
        assert dict(zip(here, there, strict=True)) == here


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    np.random.seed(3)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    for name in CORRUPTIONS:
        assert corrupt(photo(), name, 2) == made(name, 2)
    assert np.array_equal(np.random.get_state()[1], before)  # type: ignore[index]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_matters_exactly_where_something_is_drawn(name: str) -> None:
    assert (made(name, 3, seed=1) == made(name, 3)) == (name in FIXED)


def test_two_images_of_the_same_pixels_get_different_noise() -> None:
    grey = np.full((SIDE, SIDE, 3), 128)
    webp = io.BytesIO()
    Image.fromarray(grey.astype(np.uint8)).save(webp, "WEBP", lossless=True)
    assert corrupt(png(grey), "gaussian_noise", 1) != corrupt(webp.getvalue(), "gaussian_noise", 1)


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (100, 1), (1, 100), (32, 32), (224, 500)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_shape_comes_back_with_a_short_side_of_224_and_at_most_four_times_that(
    name: str, size: tuple[int, int]
) -> None:
    wide, high = size
    pixels = RNG(0).integers(0, 256, (high, wide, 3))
    result = values(corrupt(png(pixels), name, 3 if wide % 2 else 1))
    longest = min(4 * SIDE, round(SIDE * max(size) / min(size)))
    assert result.shape[:2] == ((longest, SIDE) if high > wide else (SIDE, longest))


def test_of_a_stripe_the_middle_is_kept() -> None:
    stripe = np.zeros((1, 9, 3))
    stripe[0, 3:6] = 255
    lit = values(corrupt(png(stripe), "contrast", 1)).mean((0, 2))  # 4 of the 9 pixels: dark, then three lit ones
    assert lit.size == 4 * SIDE
    assert lit[:100].max() < lit[300:].min()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_grey_palette_and_transparent_images_are_disturbed_as_rgb(name: str, mode: str) -> None:
    with Image.open(io.BytesIO(photo("coffee.png"))) as image:
        small = image.resize((40, 30))
    if mode == "I;16":
        small = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    else:
        small = small.convert(mode)
    if mode == "RGBA":
        small.putalpha(128)
    file = io.BytesIO()
    small.save(file, "PNG")
    assert values(corrupt(file.getvalue(), name, 2)).shape == (SIDE, 299, 3)


def test_black_and_white_images_survive_every_corruption() -> None:
    for level in (0, 255):
        data = png(np.full((8, 8, 3), level))
        for name in CORRUPTIONS:
            assert values(corrupt(data, name, 5)).shape == (SIDE, SIDE, 3)


def test_a_damaged_file_is_refused_as_everywhere() -> None:
    with pytest.raises(InvalidImage, match="can't be decoded"):
        corrupt(photo()[:200], "fog", 1)


# ---------------------------------------------------------------------------------------------- severity


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "pixelate", "jpeg_compression"])
def test_noise_and_digital_damage_grow_with_severity(name: str) -> None:
    far = [np.abs(values(made(name, severity)) - clean()).mean() for severity in SEVERITIES]
    assert far == sorted(far)
    assert far[-1] > 1.5 * far[0]


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur"])
def test_blur_takes_fine_detail_and_more_of_it_with_severity(name: str) -> None:
    # Glass: by the parameters severity 2 smooths more than 1 but shuffles once, not twice, and 4 less than 3. Smoothing
    # decides about detail, so order holds; the angle of motion is drawn, hence the mean over three seeds.
    left = [np.mean([grain(values(made(name, severity, seed))) for seed in range(3)]) for severity in SEVERITIES]
    assert [grain(clean()), *left] == sorted([grain(clean()), *left], reverse=True)
    assert left[-1] < 0.3 * grain(clean())


@pytest.mark.parametrize("name", ["snow", "frost", "fog"])
def test_weather_hides_more_of_the_picture_with_severity(name: str) -> None:
    # Each draw differs by far more than neighbouring severities do, and snow's 2 and 3 are of different kinds
    # (fine and dense, coarse and bright): the mean over eight draws, ends and middle.
    like = [np.mean([likeness(values(made(name, severity, seed))) for seed in range(8)]) for severity in (1, 3, 5)]
    assert like == sorted(like, reverse=True)
    assert like[0] > like[-1] + 0.1


def test_brightness_raises_the_mean_and_contrast_lowers_the_deviation() -> None:
    means = [values(made("brightness", severity)).mean() for severity in SEVERITIES]
    deviations = [values(made("contrast", severity)).std((0, 1)).mean() for severity in SEVERITIES]
    assert [clean().mean(), *means] == sorted([clean().mean(), *means])
    # c times the deviation; rounding to n/255 adds at most 1/sqrt(12) of a grey level, in squares.
    for share, deviation in zip((0.4, 0.3, 0.2, 0.1, 0.05), deviations, strict=True):
        assert deviation == pytest.approx(share * clean().std((0, 1)).mean(), abs=0.5 / 255)


def test_elastic_bends_the_whole_picture_at_1_and_2_and_its_details_more_and_more_at_3_to_5() -> None:
    far = [
        np.mean([np.abs(values(made("elastic_transform", level, seed)) - clean()).mean() for seed in range(6)])
        for level in (1, 2)
    ]
    assert far[0] < far[1]
    # On a ramp the affine part has no second difference, and that of the local part is proportional to the amount.
    ramp = np.broadcast_to(np.linspace(0, 1, SIDE, dtype=np.float32)[None, :, None], (SIDE, SIDE, 3))
    bend = []
    for severity in (3, 4, 5):
        middle = CORRUPTIONS["elastic_transform"](ramp, severity, RNG(1))[60:-60, 60:-60]
        bend.append(np.diff(middle, 2, axis=1).std())
    assert np.divide(bend, bend[0]) == pytest.approx([1, 0.07 / 0.05, 0.12 / 0.05], rel=0.01)


# ---------------------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize(("severity", "sigma"), list(enumerate((0.08, 0.12, 0.18, 0.26, 0.38), start=1)))
def test_gaussian_noise_has_the_deviation_of_its_parameter(severity: int, sigma: float) -> None:
    noisy = values(corrupt(png(np.full((SIDE, SIDE, 3), 128)), "gaussian_noise", severity))
    z = np.linspace(-8, 8, 100_001)
    clipped, weight = np.clip(128 / 255 + sigma * z, 0, 1), np.exp(-(z**2) / 2)
    mean = np.average(clipped, weights=weight)
    expected = np.sqrt(np.average((clipped - mean) ** 2, weights=weight))
    # 150,528 samples: the deviation is known to 1 / sqrt(2 N) = 0.2%, and five times that is passed once in 10^6.
    assert noisy.std() == pytest.approx(expected, rel=0.01)
    assert noisy.mean() == pytest.approx(mean, abs=5 * sigma / np.sqrt(noisy.size))


@pytest.mark.parametrize(("severity", "photons"), list(enumerate((60, 25, 12, 5, 3), start=1)))
def test_shot_noise_is_poisson_of_so_many_photons(severity: int, photons: int) -> None:
    x = np.full((SIDE, SIDE, 3), 0.3, dtype=np.float32)
    noisy = CORRUPTIONS["shot_noise"](x, severity, RNG(0))
    assert np.allclose(noisy * photons, np.rint(noisy * photons), atol=1e-4)
    # Relative error of the variance: sqrt(2 / N + 1 / (N lambda)) < 0.4% for lambda >= 0.9; five times that.
    assert noisy.var() == pytest.approx(0.3 / photons, rel=0.02)
    assert noisy.mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.3 / photons / x.size))


@pytest.mark.parametrize(("severity", "share"), list(enumerate((0.03, 0.06, 0.09, 0.17, 0.27), start=1)))
def test_impulse_noise_hits_its_share_of_samples_half_white_half_black(severity: int, share: float) -> None:
    noisy = values(corrupt(png(np.full((SIDE, SIDE, 3), 128)), "impulse_noise", severity))
    for extreme in (0.0, 1.0):  # binomial: sqrt(share / 2 / N) < 0.001; five times that
        assert (noisy == extreme).mean() == pytest.approx(share / 2, abs=0.005)
    assert set(np.unique(noisy)) == {0.0, 128 / 255, 1.0}
    assert not np.array_equal(noisy[..., 0] == 1, noisy[..., 1] == 1)


@pytest.mark.parametrize(("sigma", "truncate", "border"), [(0.7, 4, "edge"), (1.5, 4, "edge"), (170.8, 3, "symmetric")])
def test_the_gaussian_filter_equals_scipy(sigma: float, truncate: float, border: Any) -> None:
    x = RNG(0).random((SIDE, 300, 2))
    mode = {"edge": "nearest", "symmetric": "reflect"}[border]
    reference = ndimage.gaussian_filter(x, (sigma, sigma, 0), truncate=truncate, mode=mode)
    ours = corruptions._gaussian(x, sigma, truncate=truncate, border=border)
    np.testing.assert_allclose(ours, reference, atol=2e-6)  # sums in float32, a few units of its 6e-8 per step


@pytest.mark.parametrize(("severity", "radius", "soft"), [(1, 3, 0.1), (3, 6, 0.5), (4, 8, 0.5), (5, 10, 0.5)])
def test_defocus_equals_a_softened_disk_in_scipy(severity: int, radius: int, soft: float) -> None:
    edge = max(radius, 8)
    y, x = np.mgrid[-edge : edge + 1, -edge : edge + 1]
    disk = (x**2 + y**2 <= radius**2) / (x**2 + y**2 <= radius**2).sum()
    # OpenCV: 3 taps up to radius 8 and 5 beyond; `mirror` is its REFLECT_101
    soft_disk = ndimage.gaussian_filter(disk, soft, radius=1 if radius <= 8 else 2, mode="mirror")
    reference = np.stack([ndimage.correlate(c, soft_disk, mode="mirror") for c in np.moveaxis(clean(), 2, 0)], axis=2)
    np.testing.assert_allclose(CORRUPTIONS["defocus_blur"](clean(), severity, RNG(0)), reference, atol=5e-6)


@pytest.mark.parametrize(
    ("severity", "factors"),
    [(1, np.arange(1, 1.11, 0.01)), (3, np.arange(1, 1.21, 0.02)), (5, np.arange(1, 1.31, 0.03))],
)
def test_zoom_blur_equals_the_mean_of_scipy_zooms(severity: int, factors: NDArray[np.float64]) -> None:
    layers = [clean()]
    for factor in factors:
        kept = int(np.ceil(SIDE / factor))
        start = (SIDE - kept) // 2
        middle = clean()[start : start + kept, start : start + kept]
        large = ndimage.zoom(middle, (factor, factor, 1), order=1)
        trim = (large.shape[0] - SIDE) // 2
        layers.append(large[trim : trim + SIDE, trim : trim + SIDE])
    ours = CORRUPTIONS["zoom_blur"](clean(), severity, RNG(0))
    np.testing.assert_allclose(ours, np.mean(layers, axis=0), atol=2e-5)  # places in the picture are float32 shares


@pytest.mark.parametrize(("repeat", "mode"), [(False, "mirror"), (True, "reflect")])
def test_the_bilinear_lookup_equals_scipy_far_beyond_the_border(repeat: bool, mode: str) -> None:
    x = RNG(0).random((20, 30, 3)).astype(np.float32)
    places = RNG(1).uniform(-100, 130, (2, 40, 50))
    reference = np.stack([ndimage.map_coordinates(c, places, order=1, mode=mode) for c in np.moveaxis(x, 2, 0)], axis=2)
    np.testing.assert_allclose(corruptions._lookup(x, *places, repeat=repeat), reference, atol=1e-5)


@pytest.mark.parametrize(("severity", "parts"), [(1, (2, 0.7, 0.1)), (2, (2, 0.08, 0.2)), (4, (0.07, 0.01, 0.02))])
def test_elastic_equals_an_affine_map_and_a_shift_in_scipy(severity: int, parts: tuple[float, ...]) -> None:
    amount, sigma, jitter = (244 * part for part in parts)
    x = clean()[:, :200]
    rng = RNG(3)
    # (x, y) of three points, 66 from the centre (100, 112), and where they go
    points = np.array([[166, 178], [166, 46], [34, 46]])
    moved = points + rng.uniform(-jitter, jitter, (3, 2))
    forward = np.linalg.solve(np.column_stack([points, np.ones(3)]), moved).T  # (2, 3)
    there = np.stack(np.meshgrid(np.arange(200), np.arange(224))).astype(float) - forward[:, 2, None, None]
    source = np.einsum("ij,jhw->ihw", np.linalg.inv(forward[:, :2]), there)[::-1]  # (row, column)
    turned = [ndimage.map_coordinates(c, source, order=1, mode="mirror") for c in np.moveaxis(x.astype(float), 2, 0)]
    draws = rng.uniform(-1, 1, (224, 200, 2))
    shift = [amount * ndimage.gaussian_filter(draws[..., i], sigma, truncate=3, mode="reflect") for i in (0, 1)]
    places = np.mgrid[:224, :200] + shift
    reference = np.stack([ndimage.map_coordinates(c, places, order=1, mode="reflect") for c in turned], axis=2)
    # float32: 1e-6 of a sum, times an amount of 488 pixels, is 5e-4 pixel of a picture whose steps are below 1
    np.testing.assert_allclose(CORRUPTIONS["elastic_transform"](x, severity, RNG(3)), reference, atol=5e-4)


def test_motion_smears_a_point_into_half_a_gaussian_along_a_line() -> None:
    x = np.zeros((65, 65), dtype=np.float32)
    x[32, 32] = 1
    level = corruptions._streak(x, 10, 3, 0.0)
    weights = np.exp(-0.5 * (np.arange(21) / 3) ** 2)
    np.testing.assert_allclose(level[32, 32:11:-1], weights / weights.sum(), atol=1e-6)  # what lies right comes here
    for degrees in (-45, -20, 0, 45, 90):
        streak = corruptions._streak(x, 15, 12, degrees).astype(np.float64)
        assert streak.sum() == pytest.approx(1, abs=1e-5)
        rows, columns = np.nonzero(streak > 1e-4)
        across = (rows - 32) * np.cos(np.deg2rad(degrees)) - (columns - 32) * np.sin(np.deg2rad(degrees))
        assert np.abs(across).max() <= np.sqrt(0.5) + 1e-9  # each tap on the nearest pixel


@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_blur_equals_the_loop_it_stands_for(severity: int) -> None:
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    x = clean()[60:110, 50:120]
    height, width = x.shape[:2]
    rng = RNG(5)
    smooth = ndimage.gaussian_filter(x.astype(np.float64), (sigma, sigma, 0), mode="nearest")
    pixels = np.floor(smooth * 255 + 1e-3).astype(np.uint8)
    for _ in range(rounds):
        size = (2, height - 2 * reach, width - 2 * reach)
        down, right = rng.integers(-reach, reach, size=size)
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                dy, dx = (shift[row - reach - 1, column - reach - 1] for shift in (down, right))
                here, there = pixels[row, column], pixels[row + dy, column + dx]
                here[...], there[...] = there, here  # the original's swap: of views, so that it copies one way
    reference = ndimage.gaussian_filter(pixels / 255, (sigma, sigma, 0), mode="nearest")
    ours = CORRUPTIONS["glass_blur"](x, severity, RNG(5))
    np.testing.assert_allclose(ours, reference, atol=5e-6)


def test_brightness_equals_the_way_through_hsv() -> None:
    from skimage.color import hsv2rgb, rgb2hsv

    x = np.concatenate([clean(), np.zeros((2, SIDE, 3), np.float32)])
    for severity, amount in enumerate((0.1, 0.2, 0.3, 0.4, 0.5), start=1):
        hsv = rgb2hsv(x)
        hsv[..., 2] = np.clip(hsv[..., 2] + amount, 0, 1)
        np.testing.assert_allclose(CORRUPTIONS["brightness"](x, severity, RNG(0)), hsv2rgb(hsv), atol=1e-5)


@pytest.mark.parametrize(("severity", "quality"), list(enumerate((25, 18, 15, 10, 7), start=1)))
def test_jpeg_compression_uses_the_qualities_of_the_paper(severity: int, quality: int) -> None:
    file = io.BytesIO()
    with Image.open(io.BytesIO(photo())) as image:
        image.save(file, "JPEG", quality=quality)
    assert np.array_equal(values(file.getvalue()), values(made("jpeg_compression", severity)))


@pytest.mark.parametrize(("severity", "share"), list(enumerate((0.6, 0.5, 0.4, 0.3, 0.25), start=1)))
def test_pixelate_leaves_so_many_columns_and_rows(severity: int, share: float) -> None:
    x = values(made("pixelate", severity))
    for axis in (0, 1):
        changes = np.diff(x, axis=axis).any(axis=(1 - axis, 2)).sum()
        assert changes + 1 == pytest.approx(int(SIDE * share), abs=2)  # two neighbours may happen to be alike


@pytest.mark.parametrize("decay", [1.4, 2.0])
def test_the_plasma_fills_its_range_and_wraps_around(decay: float) -> None:
    field = corruptions._plasma(RNG(1), decay)
    assert (field.min(), field.max()) == (0, 1)
    inside, seam = np.abs(np.diff(field, axis=0)), np.abs(field[-1] - field[0])
    assert seam.mean() < 2 * inside.mean()  # a map that doesn't wrap jumps by tens of times as much
    assert np.abs(np.diff(corruptions._plasma(RNG(1), 3.0), axis=0)).mean() < inside.mean()


def test_fog_pulls_towards_grey_and_never_darkens_white() -> None:
    assert values(made("fog", 5)).std((0, 1)).sum() < clean().std((0, 1)).sum()
    white = values(corrupt(png(np.full((9, 9, 3), 255)), "fog", 3))
    # (1 + c p) / (1 + c) for a plasma p from 0 to 1 and c = 2.5
    assert white.min() == pytest.approx(1 / 3.5, abs=0.05)
    assert white.max() == pytest.approx(1, abs=0.05)


def test_snow_and_frost_are_white_things_on_a_dark_picture() -> None:
    dark = png(np.full((SIDE, SIDE, 3), 20))
    for name in ("snow", "frost"):
        result = values(corrupt(dark, name, 3))
        assert result.mean() > 40 / 255
        assert np.ptp(result.mean(2)) > 0.3
        assert np.ptp(result, axis=2).max() < 0.2  # no colours, frost is a little blue


# ---------------------------------------------------------------------------------------------- names and sets


def test_the_fifteen_are_those_of_the_paper_and_each_is_in_one_family() -> None:
    own = [name for family, names in FAMILIES.items() if family != "all" for name in names]
    assert own == list(CORRUPTIONS) == list(FAMILIES["all"])
    assert len(own) == 15


def test_a_specification_names_one_a_family_all_or_several() -> None:
    assert parse("fog@3") == [("fog", 3)]
    assert parse("noise@4-5") == [(name, level) for name in FAMILIES["noise"] for level in (4, 5)]
    assert len(parse("all@1-5")) == 75
    assert parse("fog@3, weather@3") == [("fog", 3), ("snow", 3), ("frost", 3), ("brightness", 3)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fogg@3", "did you mean 'fog'"),
        ("gausian_noise@3", "did you mean 'gaussian_noise'"),
        ("digitl@1", "did you mean 'digital'"),
        ("", "no corruption ''"),
        ("fog", "fog@3 or fog@1-5"),
        ("fog@", "fog@3 or fog@1-5"),
        ("fog@0", "severity 0 of fog is outside 1 to 5; the nearest is 1"),
        ("fog@99999999999999999999", "outside 1 to 5; the nearest is 5"),
        ("all@1-6", "severity 6 of all is outside 1 to 5; the nearest is 5"),
        ("fog@-1", "severity '' of fog is not a number"),
        ("fog@2.5", "severity '2.5' of fog is not a number"),
        ("fog@²", "is not a number"),
        ("fog@5-1", "write fog@1-5"),
    ],
)
def test_a_wrong_specification_is_answered_with_what_was_likely_meant(text: str, words: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse(text)
    assert words in caught.value.message


@pytest.mark.parametrize("severity", [0, 6, -1, True, 3.0, "3", None])
def test_a_severity_is_a_whole_number_from_one_to_five(severity: Any) -> None:
    with pytest.raises(InvalidConfig, match="1 to 5"):
        corrupt(photo(), "fog", severity)


def test_a_family_is_no_corruption_of_one_image() -> None:
    with pytest.raises(InvalidConfig, match=r"no corruption 'noise'; did you mean '\w+_noise'"):
        corrupt(photo(), "noise", 3)


def test_a_corrupted_set_reads_nothing_until_asked_and_keeps_what_it_is() -> None:
    asked: list[int] = []

    def read(i: int) -> bytes:
        asked.append(i)
        return photo(("chelsea.png", "coffee.png", "rocket.jpg")[i])

    given = LabelledSet(
        name="photos/test",
        classes=("cat", "thing"),
        keys=("a.png", "b.png", "c.jpg"),
        labels=np.array([0, 1, 1]),
        read=read,
        role="choosing",
        notes=("Three photographs.",),
    )
    foggy = corrupted(given, "fog", 3, seed=4)
    twice = corrupted(foggy, "frost", 1)
    part = foggy.take(np.array([2]))
    assert asked == []
    assert (foggy.name, twice.name) == ("photos/test+fog@3", "photos/test+fog@3+frost@1")
    assert (foggy.keys, foggy.classes, foggy.role) == (given.keys, given.classes, "choosing")
    assert np.array_equal(foggy.labels, given.labels)
    assert foggy.notes[0] == "Three photographs."
    assert "fog at severity 3 (seed 4)" in foggy.notes[1]
    assert "drawn" in twice.notes[2]
    assert part.read(0) == foggy.read(2) == corrupt(photo("rocket.jpg"), "fog", 3, seed=4)
    assert asked == [2, 2]


def test_a_set_with_an_unknown_corruption_fails_before_any_image_is_read() -> None:
    given = LabelledSet(name="n", classes=("a", "b"), keys=("k",), labels=np.array([0]), read=lambda _: b"")
    with pytest.raises(InvalidConfig, match="did you mean 'motion_blur'"):
        corrupted(given, "motion", 3)
    with pytest.raises(InvalidConfig, match="nearest is 5"):
        corrupted(given, "motion_blur", 7)
