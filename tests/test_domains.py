"""gram_core.domains: every restyling keeps the scene, changes the look, and is the same each time."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gram_core.domains import DOMAINS, SHORT
from gram_core.evaluate import corruptions


def scene(size: tuple[int, int] = (160, 140)) -> Image.Image:
    """A red disc on a green slope."""
    x, y = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    disc = (np.square(x) + np.square(y) < 0.3)[..., None]
    slope = np.stack([0 * x, 190 + 60 * y, 40 + 0 * x], axis=-1)
    return Image.fromarray(np.where(disc, np.array([220.0, 30, 30]), slope).astype(np.uint8))


@pytest.mark.parametrize("name", DOMAINS)
def test_a_restyling_is_an_rgb_image_that_depends_on_the_input_alone(name: str) -> None:
    image = scene()
    before = image.tobytes()
    first, again = DOMAINS[name](image), DOMAINS[name](image)
    assert (first.mode, first.size) == ("RGB", image.size)
    assert first.tobytes() == again.tobytes()
    assert image.tobytes() == before
    assert first.tobytes() != before
    assert DOMAINS[name](image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)).tobytes() != first.tobytes()


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("size", [(32, 32), (1, 1), (20, 300), (3, 128)])
def test_a_small_image_is_enlarged_in_its_own_shape(name: str, size: tuple[int, int]) -> None:
    styled = DOMAINS[name](scene(size))
    assert min(styled.size) == SHORT
    assert styled.width / styled.height == pytest.approx(size[0] / size[1], rel=0.01)


def test_pencil_and_contour_lose_the_colours_and_the_cartoon_keeps_few_strong_ones() -> None:
    image = scene()
    for name in ("pencil", "contour"):
        array = np.asarray(DOMAINS[name](image))
        assert (array == array[..., :1]).all()
        assert array.mean() > 200  # mostly paper
        assert array.min() < 200  # and some ink
    drawn = np.asarray(DOMAINS["cartoon"](image))
    colours = {tuple(pixel) for pixel in drawn.reshape(-1, 3).tolist()}
    assert len(colours) < len(set(map(tuple, np.asarray(image).reshape(-1, 3).tolist())))
    red = drawn[70, 80].astype(int)
    assert red[0] - red[1:].max() > 150  # the disc stays red


@pytest.mark.parametrize("name", DOMAINS)
def test_lines_stand_at_the_edge_of_the_disc_and_not_inside_of_it(name: str) -> None:
    grey = np.asarray(DOMAINS[name](scene()).convert("L"), np.float32)
    across = grey[70]  # from left to right through the centre; the disc's edges are near 37 and 123
    edges = min(across[30:45].min(), across[116:130].min())
    assert edges < across[70:90].min() - 20


def test_no_restyling_is_a_corruption_that_the_harness_measures_on() -> None:
    assert not set(DOMAINS) & set(corruptions.CORRUPTIONS)
