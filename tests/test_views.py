"""Views: seeded by content, right in geometry, independent of place and company."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from gram_core.backbone import Backbone
from gram_core.images import DecodedImage
from gram_core.views import Box, boxes, cut, prepare

SHA = bytes(range(32))


def test_equal_images_and_seeds_get_equal_boxes_and_others_do_not() -> None:
    drawn = boxes(SHA, (100, 80), 9, 0, (0.08, 1.0))
    assert drawn == boxes(SHA, (100, 80), 9, 0, (0.08, 1.0))
    assert drawn != boxes(SHA, (100, 80), 9, 1, (0.08, 1.0))
    assert drawn != boxes(SHA[::-1], (100, 80), 9, 0, (0.08, 1.0))
    assert len(drawn) == 8


def test_more_views_only_add_views() -> None:
    assert boxes(SHA, (100, 80), 5, 0, (0.08, 1.0)) == boxes(SHA, (100, 80), 64, 0, (0.08, 1.0))[:4]


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1), (3, 2), (480, 640)])
def test_boxes_lie_inside_any_image(size: tuple[int, int]) -> None:
    for box in boxes(SHA, size, 64, 0, (0.08, 1.0)):
        assert 0 <= box.top <= box.top + box.height <= size[0]
        assert 0 <= box.left <= box.left + box.width <= size[1]
        assert box.height > 0
        assert box.width > 0


def test_areas_fill_the_scale_and_half_are_mirrored() -> None:
    drawn = boxes(SHA, (300, 300), 2001, 0, (0.25, 0.75))
    areas = np.array([b.height * b.width / 90_000 for b in drawn])
    assert areas.min() > 0.24
    assert areas.max() < 0.76
    assert abs(areas.mean() - 0.5) < 0.02  # standard error 0.003
    assert abs(np.mean([b.flip for b in drawn]) - 0.5) < 0.06  # standard error 0.011


def test_a_view_shows_its_box(tiny: Backbone) -> None:
    """A white square on black: the crop of exactly that square is white, mirrored or not."""
    array = np.zeros((64, 96, 3), np.uint8)
    array[16:48, 40:72] = 255
    image = DecodedImage(rgb=Image.fromarray(array), width=96, height=64, format="png", notes=(), sha256=SHA)
    ready = prepare(tiny, image)
    white, left = cut(tiny, ready, [Box(16, 40, 32, 32, True), Box(16, 24, 32, 32, False)])
    assert torch.equal(white, torch.ones_like(white))  # (1 - 0.5) / 0.5
    assert torch.equal(left[:, :, :15], -torch.ones_like(left[:, :, :15]))
    assert torch.equal(left[:, :, 17:], torch.ones_like(left[:, :, 17:]))


def test_the_original_is_open_clips_preprocessing(tiny: Backbone, make_image: Callable[..., DecodedImage]) -> None:
    image = make_image(3, size=(90, 70))
    assert torch.equal(prepare(tiny, image).original, tiny.preprocess(image.rgb))


def test_a_large_image_is_reduced_before_it_is_cut(tiny: Backbone, make_image: Callable[..., DecodedImage]) -> None:
    ready = prepare(tiny, make_image(0, size=(1200, 600)))
    assert tuple(ready.pixels.shape) == (3, 128, 256)
    assert (ready.width, ready.height) == (1200, 600)
    small = prepare(tiny, make_image(0, size=(120, 60)))
    assert tuple(small.pixels.shape) == (3, 60, 120)


def test_no_crops_make_no_views(tiny: Backbone, make_image: Callable[..., DecodedImage]) -> None:
    assert cut(tiny, prepare(tiny, make_image()), []).shape == (0, 3, 32, 32)
