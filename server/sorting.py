"""Images into one folder per label. Nothing is ever overwritten, and no label can name a folder elsewhere."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*\ud800-\udfff]')  # on some system or other
MOST_BYTES = 200  # of a folder's name: systems take 255, and a number may follow
HOW = ("copy", "move", "link")


class Sorter:
    """Puts images into `root`/LABEL/ by `how`: `copy`, `move`, or `link` (symbolic, to where the image is)."""

    def __init__(self, root: Path, labels: Sequence[str], how: str = "copy") -> None:
        self.root, self.how = root, how
        self.folders = folder_names(labels)

    def put(self, image: Path, label: str) -> Path:
        """Where the image is now; raises OSError."""
        folder = self.root / self.folders[label]
        folder.mkdir(parents=True, exist_ok=True)
        for name in _names(image):
            try:
                self._place(image, folder / name)
            except FileExistsError:
                continue
            return folder / name
        raise AssertionError

    def _place(self, image: Path, target: Path) -> None:
        if self.how == "link":
            target.symlink_to(image.absolute())
            return
        if self.how == "move":
            try:
                os.link(image, target, follow_symlinks=False)
            except FileExistsError:
                raise
            except OSError:  # another file system, or one without links
                _copy(image, target)
            image.unlink()
            return
        _copy(image, target)


def folder_names(labels: Sequence[str]) -> dict[str, str]:
    """A folder for each label: a plain name that no other label has, even where case does not count."""
    taken: set[str] = set()
    made: dict[str, str] = {}
    for label in labels:
        plain = UNSAFE.sub("_", label).strip(". ") or "_"
        plain = plain.encode()[:MOST_BYTES].decode(errors="ignore")
        name, number = plain, 1
        while name.casefold() in taken:
            number += 1
            name = f"{plain}-{number}"
        taken.add(name.casefold())
        made[label] = name
    return made


def _names(image: Path) -> Iterator[str]:
    yield image.name
    number = 0
    while True:
        number += 1
        yield f"{image.stem}-{number}{image.suffix}"


def _copy(image: Path, target: Path) -> None:
    with image.open("rb") as source, target.open("xb") as copy:
        try:
            shutil.copyfileobj(source, copy)
        except BaseException:
            target.unlink()  # half an image
            raise
    shutil.copystat(image, target)
