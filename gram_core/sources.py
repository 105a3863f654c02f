"""What lies on disk: folders of images, WebDataset shards, tables. Nothing is unpacked, unpickled or decoded.

It says where the bytes of a sample lie and what goes wrong on reading, in one sentence; what the samples mean (labels,
captions) is for its callers to say.
"""

from __future__ import annotations

import csv
import io
import os
import re
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gram_core.errors import InvalidData

Parts = tuple[str, ...]
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_COLUMNS = ("image", "file", "filename", "path", "filepath", "image_path")
TABLES = (".csv", ".tsv")


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turn what goes wrong on opening into one sentence."""
    try:
        yield
    except OSError as error:
        raise InvalidData(
            f"{path} can't be read: {error.strerror or error}; expected {expected}. Check the path and its permissions."
        ) from None
    except (zipfile.BadZipFile, tarfile.TarError, ValueError, TypeError, csv.Error, NotImplementedError) as error:
        raise InvalidData(
            f"{path} can't be read: {error}; expected {expected}. It may be cut off or of another kind: copy it again."
        ) from None


def some(items: Iterable[object], limit: int = 5) -> str:
    """A short list in words."""
    shown = [str(item) for item in items]
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more" if len(shown) > limit else "")


def clutter(parts: Iterable[str]) -> bool:
    """Whether this is something that systems leave behind."""
    return any(p.startswith(".") or p in ("__MACOSX", "Thumbs.db", "desktop.ini") for p in parts)


def walk(root: Path) -> tuple[list[Parts], list[Parts]]:
    """Files and folders below `root` by their path from there, unsorted, without clutter; links are followed once."""
    files: list[Parts] = []
    folders: list[Parts] = []
    todo: list[tuple[Parts, frozenset[tuple[int, int]]]] = [((), frozenset())]
    while todo:
        inner, above = todo.pop()
        here = root.joinpath(*inner)
        with reading(here, "a folder of images"):
            stat = here.stat()
            above |= {(stat.st_dev, stat.st_ino)}
            with os.scandir(here) as entries:
                for entry in entries:
                    path = (*inner, entry.name)
                    if clutter(path[-1:]):
                        continue
                    if not entry.is_dir():
                        files.append(path)
                    elif ((target := entry.stat()).st_dev, target.st_ino) not in above:  # else a link back up: a loop
                        folders.append(path)
                        todo.append((path, above))
    return files, folders


@dataclass(frozen=True, eq=False)
class Archive:
    """A zip file, which stays open as long as something reads from it; its members by their path, without clutter."""

    path: Path
    file: zipfile.ZipFile = field(repr=False)
    members: Mapping[Parts, zipfile.ZipInfo] = field(repr=False)

    @property
    def files(self) -> list[Parts]:
        return [parts for parts, member in self.members.items() if not member.is_dir()]

    @property
    def folders(self) -> set[Parts]:
        """Every folder, whether or not it is a member of its own."""
        return {p[:i] for p, member in self.members.items() for i in range(1, len(p) + member.is_dir())}

    def read(self, parts: Parts, limit: int | None = None) -> bytes:
        """The bytes of a file, no more than `limit` of them, from any thread; OSError where they can't be had."""
        try:
            with self.file.open(self.members[parts]) as member:
                return member.read(-1 if limit is None else limit)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise OSError(f"{self.path}: {'/'.join(parts)} can't be read: {error}") from error


def open_zip(path: Path) -> Archive:
    """Raises InvalidData for what is no zip file, or one with a password."""
    with reading(path, "a zip file of class folders"):
        file = zipfile.ZipFile(path)
    members = {tuple(m.filename.replace("\\", "/").strip("/").split("/")): m for m in file.infolist()}
    archive = Archive(path, file, {parts: member for parts, member in members.items() if not clutter(parts)})
    if any(archive.members[parts].flag_bits & 1 for parts in archive.files):
        raise InvalidData(f"{path} asks for a password; expected a plain zip file. Unpack it and give the folder.")
    return archive


def expand(pattern: str) -> list[str]:
    """`name-{0000..0003}.tar` as its four names; anything else as it is."""
    if (found := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)) is None:
        return [pattern]
    low, high = found.groups()
    numbers = [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return [full for n in numbers for full in expand(pattern[: found.start()] + n + pattern[found.end() :])]


def index_shard(shard: Path) -> tuple[Mapping[str, Mapping[str, tuple[int, int]]], bool]:
    """Sample -> suffix -> (offset, size) of what lies in the file whole, and whether that is all of it."""
    samples: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    whole = False
    with reading(shard, "an uncompressed .tar shard"), shard.open("rb") as file:
        length = shard.stat().st_size
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    key, dot, suffix = member.name.removeprefix("./").rpartition(".")
                    inside = member.offset_data + member.size <= length
                    if member.isfile() and dot and inside and not clutter(key.split("/")):
                        samples[key][f".{suffix.lower()}"] = (member.offset_data, member.size)
                file.seek(tar.offset)  # tarfile takes a damaged header for the end, which is a block of zeros
                whole = file.read(512) == bytes(512)
        except tarfile.ReadError:
            if not samples:
                raise
    return samples, whole


def read_at(shard: Path, offset: int, size: int) -> bytes:
    """Bytes of a shard; raises OSError where it ends too early."""
    with shard.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise OSError(f"{shard} ends before byte {offset + size}")
    return content


def read_table(path: Path, expected: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a table in small letters, and its other lines that aren't empty, with their numbers."""
    with reading(path, expected):
        text = path.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ";" if first.count(";") > first.count(",") else ","
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    return [cell.lower() for cell in lines[0][1]] if lines else [], lines[1:]
