"""The 15 corruptions of ImageNet-C, made on the fly: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations", ICLR 2019, section 4; their code is github.com/hendrycks/robustness, Apache-2.0.

The severity parameters are those of that repository's `create_c/make_imagenet_c.py`; the code is our own. They are for
images of 224 pixels, so every image is first brought to a short side of 224: one of 32 pixels is disturbed as a
photograph of 224 would be. **That is not CIFAR-10-C**, which has parameters of its own for 32 pixels: figures made here
can be compared with each other, not with published ones. What else differs from the published files:

- `frost` is a stand-in: the original pastes photographs of frost; this draws crystals, blended by the same weights.
- `motion_blur` and `snow` use ImageMagick's one-sided Gaussian line, worked out here instead of called.
- Results are rounded and kept as PNG; the original cuts fractions off and saves a JPEG of quality 85.
- Images need not be square; plasma, which wraps around, is tiled along a side longer than 256.

A result depends on the image's bytes, the corruption, its severity and the seed, and on nothing else: not on order,
neighbours or threads. Another machine's floating point may round a few samples to the next grey level.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Final, Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from gram_core.errors import InvalidConfig
from gram_core.evaluate.labelled import LabelledSet
from gram_core.images import decode

__all__ = ["CORRUPTIONS", "FAMILIES", "FORMAT", "SEVERITIES", "SIDE", "Corruption", "corrupt", "corrupted", "parse"]

FORMAT: Final = 1  # raise it when the same arguments give other pictures
SIDE: Final = 224  # pixels of the short side, for which the parameters are meant
MAX_ASPECT: Final = 4  # of what is kept: the longer side of a stripe is cut to this
SEVERITIES: Final = (1, 2, 3, 4, 5)
_MAP: Final = 256  # side of the plasma and frost maps

Floats = NDArray[np.floating]  # float32 where speed matters
# (H, W, 3) in [0, 1], a severity and the image's own generator; the result may leave [0, 1], the caller clips.
Corruption = Callable[[Floats, int, Generator], Floats]


def corrupt(data: bytes, name: str, severity: int, seed: int = 0) -> bytes:
    """Disturb one encoded JPEG, PNG or WEBP image; give a PNG whose short side is `SIDE`.

    Raises `InvalidImage` as `decode` does, and `InvalidConfig` for an unknown name or severity.
    """
    _check(name, severity)
    image = decode(data)
    digest = hashlib.sha256(image.sha256 + f"{name}@{severity}/{seed}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    pixels = np.asarray(_resized(image.rgb), dtype=np.float32) / 255
    file = BytesIO()
    Image.fromarray(_bytes(CORRUPTIONS[name](pixels, severity, rng))).save(file, "PNG", compress_level=1)
    return file.getvalue()


def corrupted(given: LabelledSet, name: str, severity: int, seed: int = 0) -> LabelledSet:
    """The set with every image disturbed as it is read; nothing is read now. Keys, labels and role stay."""
    _check(name, severity)
    read = given.read
    note = (
        f"Images carry the corruption {name} at severity {severity} (seed {seed}), made on the fly at a short side of "
        f"{SIDE} pixels with ImageNet-C's parameters; not comparable with published ImageNet-C or CIFAR-10-C figures."
    )
    if name == "frost":
        note += " The frost is drawn, where the original pastes photographs."
    return replace(
        given,
        name=f"{given.name}+{name}@{severity}",
        read=lambda i: corrupt(read(i), name, severity, seed),
        notes=(*given.notes, note),
    )


def parse(text: str) -> list[tuple[str, int]]:
    """Read `fog@3`, `noise@1-5`, `all@5` or several of them with commas: (name, severity) pairs, each once.

    >>> parse("fog@3,noise@5")
    [('fog', 3), ('gaussian_noise', 5), ('shot_noise', 5), ('impulse_noise', 5)]
    """
    pairs: dict[tuple[str, int], None] = {}
    for term in (term.strip() for term in text.split(",")):
        name, _, levels = term.partition("@")
        _known(name, [*CORRUPTIONS, *FAMILIES])
        if not levels:
            raise InvalidConfig(f"corruption {term!r} names no severity; write {name}@3 or {name}@1-5.")
        first, dash, last = levels.partition("-")
        ends = [_level(level, name) for level in ([first, last] if dash else [first, first])]
        if ends[0] > ends[1]:
            raise InvalidConfig(f"severities {levels!r} of {name} run backwards; write {name}@{ends[1]}-{ends[0]}.")
        for each in FAMILIES.get(name, (name,)):
            pairs.update(dict.fromkeys((each, severity) for severity in range(ends[0], ends[1] + 1)))
    return list(pairs)


def _level(text: str, name: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise InvalidConfig(f"severity {text!r} of {name} is not a number; write {name}@3 or {name}@1-5.")
    return _ranged(int(text[:9]), name)


def _ranged(severity: int, name: str) -> int:
    if not isinstance(severity, int) or isinstance(severity, bool):
        raise InvalidConfig(f"severity {severity!r} of {name} is not a whole number; choose one from 1 to 5.")
    if severity not in SEVERITIES:
        near = min(max(severity, SEVERITIES[0]), SEVERITIES[-1])
        raise InvalidConfig(f"severity {severity} of {name} is outside 1 to 5; the nearest is {near}.")
    return severity


def _known(name: str, names: Sequence[str]) -> None:
    if name not in names:
        (near,) = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise InvalidConfig(f"no corruption {name!r}; did you mean {near!r}? Choose one of {', '.join(sorted(names))}.")


def _check(name: str, severity: int) -> None:
    _known(name, list(CORRUPTIONS))
    _ranged(severity, name)


def _resized(rgb: Image.Image) -> Image.Image:
    """Short side `SIDE`, aspect kept; of a longer stripe than `MAX_ASPECT` its middle."""
    width, height = (min(side, MAX_ASPECT * min(rgb.size)) for side in rgb.size)
    left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
    scale = SIDE / min(width, height)
    size = round(width * scale), round(height * scale)
    return rgb.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


def _bytes(values: Floats) -> NDArray[np.uint8]:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


# --- tools: filters, zoom, lookup, plasma


def _correlate(x: Floats, kernel: Floats, border: Literal["edge", "reflect", "symmetric"]) -> Floats:
    """Sum of kernel[k] x[p + k - centre] over k, in the first two axes; `border` as in `numpy.pad`."""
    (high, wide), (height, width) = kernel.shape, x.shape[:2]
    pads = [(high // 2, (high - 1) // 2), (wide // 2, (wide - 1) // 2)]
    padded = np.pad(x, [*pads, *[(0, 0)] * (x.ndim - 2)], mode=border).astype(np.float32)
    size = [-(-side // 32) * 32 for side in padded.shape[:2]]  # lengths that the transform likes; never wraps
    spectrum = np.fft.rfft2(kernel.astype(np.float32), s=size).conj().reshape(size[0], -1, *[1] * (x.ndim - 2))
    product = np.fft.rfft2(padded, s=size, axes=(0, 1)) * spectrum
    return np.fft.irfft2(product, s=size, axes=(0, 1))[:height, :width].astype(np.float32)


def _gaussian(x: Floats, sigma: float, *, truncate: float = 4, border: Literal["edge", "symmetric"] = "edge") -> Floats:
    """As `skimage.filters.gaussian` of float images: one axis after the other, cut at `truncate` sigmas."""
    radius = int(truncate * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    return _correlate(_correlate(x, weights[:, None], border), weights[None, :], border)


def _streak(x: Floats, radius: int, sigma: float, degrees: float) -> Floats:
    """ImageMagick's MotionBlurImage: half a Gaussian of 2 radius + 1 taps from each pixel on, along one direction."""
    reach = 2 * radius
    steps = np.arange(reach + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    down = np.ceil(steps * np.sin(np.deg2rad(degrees)) - 0.5).astype(int)
    right = np.ceil(steps * np.cos(np.deg2rad(degrees)) - 0.5).astype(int)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    np.add.at(kernel, (reach + down, reach + right), weights / weights.sum())
    return _correlate(x, kernel, "edge")


def _zoomed(x: Floats, factor: float) -> Floats:
    """The middle, enlarged to the size of x: `scipy.ndimage.zoom` of order 1, cut as the original cuts it."""
    for axis, side in enumerate(x.shape[:2]):
        kept = int(np.ceil(side / factor))
        large = round(kept * factor)
        at = (np.arange(side) + (large - side) // 2) * ((kept - 1) / (large - 1))
        low = np.minimum(at.astype(np.intp), kept - 2)
        share = (at - low).astype(np.float32).reshape(-1, *[1] * (x.ndim - 1 - axis))
        low += (side - kept) // 2
        below = x.take(low, axis)
        x = below + share * (x.take(low + 1, axis) - below)
    return x


def _lookup(x: Floats, rows: Floats, columns: Floats, *, repeat: bool) -> Floats:
    """x (H, W, C) at fractional places (H, W), bilinear; mirrored beyond the border, with or without repeating it."""
    height, width, channels = x.shape
    top, left = np.floor(rows).astype(np.intp), np.floor(columns).astype(np.intp)
    down, right = ((v - np.floor(v)).astype(np.float32)[..., None] for v in (rows, columns))
    above, below = (_mirror(top + i, height, repeat) * width for i in (0, 1))
    west, east = (_mirror(left + i, width, repeat) for i in (0, 1))
    flat = x.reshape(-1, channels)
    upper: Floats = flat[above + west] * (1 - right) + flat[above + east] * right
    lower: Floats = flat[below + west] * (1 - right) + flat[below + east] * right
    return upper + down * (lower - upper)


def _mirror(index: NDArray[np.intp], side: int, repeat: bool) -> NDArray[np.intp]:
    period = 2 * side - (0 if repeat else 2)
    index = index % period
    return np.minimum(index, period - int(repeat) - index)


def _plasma(rng: Generator, decay: float) -> Floats:
    """Diamond-square on a torus, (`_MAP`, `_MAP`) in [0, 1]: a point is the mean of four neighbours plus noise."""
    field = np.zeros((_MAP, _MAP))
    step, amount = _MAP, 100.0

    def rough(total: NDArray[np.float64]) -> NDArray[np.float64]:
        return total / 4 + amount * rng.uniform(-amount, amount, total.shape)

    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        field[half::step, half::step] = rough(pairs + np.roll(pairs, -1, 1))
        centres = field[half::step, half::step]
        field[::step, half::step] = rough(centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1))
        field[half::step, ::step] = rough(centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 0))
        step, amount = half, amount / decay
    field -= field.min()
    scaled: Floats = (field / field.max()).astype(np.float32)
    return scaled


def _tiled(field: Floats, shape: tuple[int, ...]) -> Floats:
    """A map that wraps around, continued to the height and width of `shape`."""
    rows, columns = (np.arange(side) % _MAP for side in shape[:2])
    return field[np.ix_(rows, columns)]


# --- noise


def gaussian_noise(x: Floats, severity: int, rng: Generator) -> Floats:
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return x + np.float32(deviation) * rng.standard_normal(x.shape, dtype=np.float32)


def shot_noise(x: Floats, severity: int, rng: Generator) -> Floats:
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return (rng.poisson(x * photons) / photons).astype(np.float32)


def impulse_noise(x: Floats, severity: int, rng: Generator) -> Floats:
    """Salt and pepper in equal parts; each of the three channels is hit on its own."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    draw = rng.random(x.shape, dtype=np.float32)
    return np.where(draw < share, (draw < share / 2).astype(np.float32), x)


# --- blur


def defocus_blur(x: Floats, severity: int, _rng: Generator) -> Floats:
    """A disk with a softened rim. The kernel is mirrored at its own edge, so that disks 8 and 10 gain 1% of light."""
    radius, soft = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    line = np.arange(-max(radius, 8), max(radius, 8) + 1) ** 2
    disk = (line[:, None] + line[None, :] <= radius**2).astype(np.float32)
    edge = 1 if radius <= 8 else 2
    weights = np.exp(-0.5 * (np.arange(-edge, edge + 1) / soft) ** 2)
    weights /= weights.sum()
    return _correlate(x, _correlate(disk / disk.sum(), np.outer(weights, weights), "reflect"), "reflect")


def glass_blur(x: Floats, severity: int, rng: Generator) -> Floats:
    """The original's loop, exactly. From the last pixel to the first each takes the value of a random neighbour: its
    "swap" of two NumPy views copies one way. A neighbour that had its turn already holds what it took itself, so the
    loop is a forest of pointers, followed here with doubling strides.
    """
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    height, width = x.shape[:2]
    flat = np.floor(_gaussian(x, sigma) * 255 + 1e-3).reshape(-1, 3)  # cut off as in the original, but for rounding
    index = np.arange(height * width).reshape(height, width)
    turn = slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1)
    for _ in range(rounds):
        took, had_turn = index.copy(), np.zeros(index.shape, dtype=bool)
        down, right = rng.integers(-reach, reach, size=(2, *index[turn].shape))
        took[turn] += down * width + right
        had_turn[turn] = True
        source, follow = took.ravel(), (had_turn & (took > index) & had_turn.ravel()[took]).ravel()
        while follow.any():
            source, follow = np.where(follow, source[source], source), follow & follow[source]
        flat = flat[source]
    return _gaussian(flat.reshape(x.shape) / 255, sigma)


def motion_blur(x: Floats, severity: int, rng: Generator) -> Floats:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    return _streak(x, radius, sigma, rng.uniform(-45, 45))


def zoom_blur(x: Floats, severity: int, _rng: Generator) -> Floats:
    end, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[severity - 1]
    factors = np.arange(1, end, step).tolist()
    total = x.copy()
    for factor in factors:
        total += _zoomed(x, factor)
    return total / (len(factors) + 1)


# --- weather


def snow(x: Floats, severity: int, rng: Generator) -> Floats:
    mean, deviation, zoom, threshold, radius, sigma, kept = (
        (0.1, 0.3, 3.0, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2.0, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4.0, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    flakes = _zoomed(rng.normal(mean, deviation, x.shape[:2]).astype(np.float32), zoom)
    flakes = np.where(flakes < threshold, np.float32(0), flakes).clip(0, 1)
    flakes = _streak(flakes, radius, sigma, rng.uniform(-135, -45))[..., None]
    grey = x @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    pale = kept * x + (1 - kept) * np.maximum(x, grey[..., None] * 1.5 + 0.5)
    return np.asarray(pale + flakes + np.rot90(flakes, 2), dtype=np.float32)


def frost(x: Floats, severity: int, rng: Generator) -> Floats:
    """A stand-in: ferns of ice on a hazy pane where the original pastes one of its photographs of frost."""
    kept, ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    haze, grain = (_tiled(_plasma(rng, decay), x.shape) for decay in (1.9, 1.3))
    pattern = np.clip(0.45 * haze + 0.25 * (grain - 0.5) + _ferns(haze, rng) * (0.3 + 0.7 * grain), 0, 1)
    dark, bright = np.array([[0.1, 0.15, 0.24], [0.9, 0.95, 1.0]], dtype=np.float32)
    pane: Floats = dark + (bright - dark) * pattern[..., None]
    return kept * x + ice * pane


def _ferns(haze: Floats, rng: Generator) -> Floats:
    """Feathered crystals, (H, W) in [0, 1): the hazier a place, the more of them grow there."""
    total = np.zeros_like(haze)
    for length in (60, 52, 44, 36, 28, 20, 16):
        image = Image.new("L", (4 * length + 2, 4 * length + 2))  # twice the size, for smooth lines
        draw, spine = ImageDraw.Draw(image), rng.uniform(0, 2 * np.pi)
        barbs = [(t, turn, rng.uniform(0.2, 0.8) * (length - t)) for t in range(0, length, 4) for turn in (-1, 1)]
        for start, turn, size in [(0, 0, length), *barbs]:  # ice branches at 60 degrees
            at = 2 * length + 2 * start * np.array([np.cos(spine), np.sin(spine)])
            angle = spine + turn * np.pi / 3
            draw.line([*at, *(at + 2 * size * np.array([np.cos(angle), np.sin(angle)]))], fill=255, width=2)
        stencil = np.asarray(image.resize((2 * length + 1,) * 2, Image.Resampling.BOX), dtype=np.float32) / 255
        seeds = rng.random(haze.shape) * length**2 < 3 * haze**2
        total += _correlate(rng.random(haze.shape) * seeds, stencil, "reflect")
    return 1 - np.exp(-_gaussian(total, 0.5))


def fog(x: Floats, severity: int, rng: Generator) -> Floats:
    amount, decay = ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[severity - 1]
    top = float(x.max())
    mist: Floats = amount * _tiled(_plasma(rng, decay), x.shape)[..., None]
    return (x + mist) * (top / (top + amount))


def brightness(x: Floats, severity: int, _rng: Generator) -> Floats:
    """HSV's value raised; with hue and saturation kept that scales the pixel, and turns black to grey."""
    value: Floats = x.max(-1, keepdims=True)
    raised = np.minimum(value + np.float32((0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]), 1)
    scaled: Floats = np.where(value > 0, x * (raised / np.maximum(value, np.float32(1e-9))), raised)
    return scaled


# --- digital


def contrast(x: Floats, severity: int, _rng: Generator) -> Floats:
    mean: Floats = x.mean((0, 1), dtype=np.float64).astype(np.float32)
    return (x - mean) * np.float32((0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]) + mean


def elastic_transform(x: Floats, severity: int, rng: Generator) -> Floats:
    """A random affine map, then a smooth random shift of every pixel (the original's 244 for 224 is kept)."""
    amount, sigma, jitter = (
        (244 * 2, 244 * 0.7, 244 * 0.1),
        (244 * 2, 244 * 0.08, 244 * 0.2),
        (244 * 0.05, 244 * 0.01, 244 * 0.02),
        (244 * 0.07, 244 * 0.01, 244 * 0.02),
        (244 * 0.12, 244 * 0.01, 244 * 0.02),
    )[severity - 1]
    height, width = x.shape[:2]
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    corners = np.array([[1, 1], [1, -1], [-1, -1]]) * (min(height, width) // 3) + [width // 2, height // 2]
    moved = corners + rng.uniform(-jitter, jitter, (3, 2))
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)  # (3, 2): where a pixel (x, y, 1) came from
    source = columns[..., None] * back[0] + rows[..., None] * back[1] + back[2]
    turned = _lookup(x, source[..., 1], source[..., 0], repeat=False)
    shift = amount * _gaussian(rng.uniform(-1, 1, (height, width, 2)), sigma, truncate=3, border="symmetric")
    return _lookup(turned, rows + shift[..., 0], columns + shift[..., 1], repeat=True)


def pixelate(x: Floats, severity: int, _rng: Generator) -> Floats:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    image = Image.fromarray(_bytes(x))
    small = image.resize((int(image.width * share), int(image.height * share)), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BOX), dtype=np.float32) / 255


def jpeg_compression(x: Floats, severity: int, _rng: Generator) -> Floats:
    file = BytesIO()
    Image.fromarray(_bytes(x)).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    with Image.open(file, formats=("JPEG",)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}
FAMILIES: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "all": tuple(CORRUPTIONS),
}
