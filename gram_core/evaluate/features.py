"""What the image tower says of labelled images: computed once, kept on disk, shared by every method.

Features come from `Classifier.see`, the code that serves requests, so they have the served bits. An image that can't
be decoded is counted and left out, never fatal.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gram_core.classifier import Classifier, Seen
from gram_core.errors import InvalidData, InvalidImage
from gram_core.evaluate.labelled import LabelledSet
from gram_core.evaluate.store import Store, key_of
from gram_core.images import decode
from gram_core.views import Prepared

FORMAT = 1  # raise it when preprocessing or views change what a feature is
GROUP = 32  # images whose features are computed, and kept, together
UNREADABLE = "unreadable_file"
TIMED = 4  # images that are computed again, to time and to check them


@dataclass(frozen=True)
class Views:
    """A way of looking at an image: `count` views, crops of `scale` of the area, drawn by `seed`."""

    count: int
    scale: tuple[float, float]
    seed: int


PLAIN = Views(1, (1.0, 1.0), 0)  # the original alone

Progress = Callable[[int], None]


class Features:
    """The features of one set under one classifier: `prepare` them once, then `load` any of them."""

    def __init__(self, classifier: Classifier, store: Store, given: LabelledSet) -> None:
        self.classifier = classifier
        self.store = store
        self.given = given
        self.skipped: Counter[str] = Counter()
        self._identities: list[bytes] = []
        self._sha256: list[bytes] = []

    @property
    def labels(self) -> NDArray[np.int64]:
        """(M,) labels of the images that could be read."""
        return self.given.labels

    @property
    def digest(self) -> str:
        """Hash over the content and the labels of the images, in order."""
        content = b"".join(self._identities) + self.given.labels.tobytes()
        return hashlib.sha256(content).hexdigest()

    def prepare(self, kinds: Sequence[Views], progress: Progress | None = None) -> None:
        """Compute and keep what is missing; leave out, and count, images that can't be read."""
        wanted = list(dict.fromkeys([PLAIN, *kinds]))
        known: list[int] = []
        for start in range(0, len(self.given), GROUP):
            rows = range(start, min(start + GROUP, len(self.given)))
            known += [row for row in self._group(rows, wanted)]
            if progress is not None:
                progress(len(rows))
        if not known:
            raise InvalidData(
                f"set {self.given.name!r}: none of its {len(self.given)} images can be read "
                f"({', '.join(f'{count} {code}' for code, count in sorted(self.skipped.items()))})."
            )
        self.given = self.given.take(np.array(known, dtype=np.int64))

    def load(self, rows: Sequence[int], kind: Views = PLAIN) -> Seen:
        """Features (n, V, D) of the images at `rows`.

        Raises InvalidData when the cache holds them no longer, or cut off.
        """
        keys = [self._key(self._identities[row], kind) for row in rows]
        found = self.store.get(keys)
        dim = self.classifier.backbone.joint_dim
        if any(key not in found or len(found[key][1]) != kind.count * dim * 4 for key in keys):
            raise InvalidData(
                f"the cache lacks features of set {self.given.name!r}, or holds them cut off. Delete the cache file."
            )
        raw = np.stack([np.frombuffer(found[key][1], dtype=np.float32) for key in keys])
        values = torch.from_numpy(raw.reshape(len(rows), kind.count, dim)).to(self.classifier.backbone.device)
        return Seen(values, tuple(self._sha256[row] for row in rows))

    def decode_ms(self) -> float:
        """Milliseconds that decoding and preprocessing an image takes now: the median of three repeats."""
        encoded = [self.given.read(row) for row in self._timed()]
        took = []
        for _ in range(3):
            started = time.perf_counter()
            for data in encoded:
                self.classifier.prepare(decode(data))
            took.append((time.perf_counter() - started) * 1000 / len(encoded))
        return round(float(np.median(took)), 3)

    def measure(self, kind: Views) -> dict[str, float]:
        """Milliseconds an image takes now, by stage (`views`, `image`): the median of three repeats.

        The features so computed must be the kept ones: a cache made by other code must not speak for this one.
        Raises InvalidData when they differ by more than rounding.
        """
        rows = self._timed()
        images = [image for row in rows if isinstance(image := self._decode(row), Prepared)]
        cut, tower = [], []
        for _ in range(3):
            started = time.perf_counter()
            seen = self._see(images, kind)
            fresh = seen.views.cpu()  # waits for the device
            cut.append(seen.cut_ms)
            tower.append((time.perf_counter() - started) * 1000 - seen.cut_ms)
        kept = self.load(rows, kind).views.cpu()
        if fresh.shape != kept.shape or (fresh - kept).abs().max() > 1e-4:
            raise InvalidData(
                f"the cached features of set {self.given.name!r} are not what this version computes. "
                "Delete the cache file, or name another folder with --cache."
            )
        laps = {"views": cut, "image": tower}
        return {name: round(float(np.median(values)) / len(rows), 3) for name, values in laps.items()}

    # ---- inside ----

    def _timed(self) -> list[int]:
        """Images to measure on: enough to fill the tower's fixed shape, so that padding is not counted."""
        count = min(max(TIMED, self.classifier.backbone.image_chunk), len(self.given))
        return [round(float(at)) for at in np.linspace(0, len(self.given) - 1, count)]

    def _group(self, rows: Sequence[int], kinds: Sequence[Views]) -> Iterator[int]:
        """Make sure that the features of `rows` are kept; the rows that can be read, in order."""
        identities = {row: identity for row in rows if (identity := self._identity(row)) is not None}
        keys = {(row, kind): self._key(identity, kind) for row, identity in identities.items() for kind in kinds}
        have = self.store.has(list(keys.values()))
        missing = sorted({row for (row, _), key in keys.items() if key not in have})
        if missing:
            with ThreadPoolExecutor(2) as pool:
                decoded = dict(zip(missing, pool.map(self._decode, missing), strict=True))
            for row in [row for row, image in decoded.items() if image == UNREADABLE]:
                self.skipped[UNREADABLE] += 1  # for this run: the file may be there again in the next
                del decoded[row], identities[row]
            fresh: dict[str, tuple[object, bytes]] = {}
            for kind in kinds:
                own = {keys[row, kind]: image for row, image in decoded.items() if keys[row, kind] not in have}
                fresh |= {key: ({"error": code}, b"") for key, code in own.items() if isinstance(code, str)}
                fresh |= self._compute({k: i for k, i in own.items() if isinstance(i, Prepared)}, kind)
            self.store.put(fresh)
        headers = self.store.headers([keys[row, kinds[0]] for row in identities])
        for row, identity in identities.items():
            header = headers[keys[row, kinds[0]]]
            if "error" in header:
                self.skipped[header["error"]] += 1
                continue
            self._identities.append(identity)
            self._sha256.append(bytes.fromhex(header["sha256"]))
            yield row

    def _identity(self, row: int) -> bytes | None:
        try:
            return self.given.identity(row) if self.given.identity else hashlib.sha256(self.given.read(row)).digest()
        except OSError:
            self.skipped[UNREADABLE] += 1
            return None

    def _key(self, identity: bytes, kind: Views) -> str:
        backbone = self.classifier.backbone
        return key_of(
            "features",
            format=FORMAT,
            model=backbone.fingerprint,
            device=backbone.device.type,
            dtype=str(backbone.dtype),
            shapes=[backbone.image_chunk, backbone.view_chunk],
            image=identity.hex(),
            views=kind.count,
            scale=list(kind.scale) if kind.count > 1 else None,
            seed=kind.seed if kind.count > 1 else None,
        )

    def _decode(self, row: int) -> Prepared | str:
        try:
            return self.classifier.prepare(decode(self.given.read(row)))
        except InvalidImage as error:
            return error.code
        except OSError:
            return UNREADABLE

    def _see(self, images: Sequence[Prepared], kind: Views) -> Seen:
        return self.classifier.see(images, kind.count, kind.seed, kind.scale)

    def _compute(self, images: dict[str, Prepared], kind: Views) -> dict[str, tuple[object, bytes]]:
        if not images:
            return {}
        arrays = self._see(list(images.values()), kind).views.float().cpu().numpy()
        return {
            key: ({"sha256": image.sha256.hex()}, array.tobytes())
            for (key, image), array in zip(images.items(), arrays, strict=True)
        }
