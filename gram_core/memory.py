"""What a session remembers: frozen view features of earlier images, balanced over what zero-shot called them.

A memory holds no prompt and no pixel, so nothing that was tuned drifts: every request is tuned from the checkpoint, on
the memory's images and its own (docs/method.md, sessions). No class keeps more than its quota, however often it was
claimed, so that a stream of one class, or a caller who floods it, can't drive the others out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from gram_core.errors import InvalidMemory

CAPACITY = 128
WINDOW = 32  # latest images, whatever they are: which classes come now
LEAST_QUOTA = 4
MOST = 1_000_000  # images or classes of a memory that is taken back
MOST_HEADER = 2**21  # bytes
FORMAT = 1
RECENT = 0.9  # weight of the past in the mean image of the latest requests, per image
UNIT = 1e-3  # how far from length 1 an imported feature may be


@dataclass(frozen=True, eq=False)
class Kept:
    """One image: its views (V, D), the original first, its hash, and the class that zero-shot gave it."""

    views: Tensor
    sha256: bytes
    label: int


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Features (M, V, D) of what a memory held, originals first, and the images' hashes; which of them are balanced,
    and how many came after those of the latest (0 for the last one, -1 for one that is not among them)."""

    views: Tensor
    sha256: tuple[bytes, ...]
    balanced: tuple[bool, ...]
    age: tuple[int, ...]

    def without(self, sha256: Sequence[bytes], views: int) -> Snapshot:
        """The images that are not among these, with the first so many of their views; none where it has fewer."""
        own = set(sha256)
        rows = [n for n, digest in enumerate(self.sha256) if digest not in own]
        if views > self.views.shape[1]:
            rows = []
        return Snapshot(
            self.views[rows, :views],
            tuple(self.sha256[n] for n in rows),
            tuple(self.balanced[n] for n in rows),
            tuple(self.age[n] for n in rows),
        )


class Memory:
    """At most `capacity` images of `classes` classes, `views` views of `dim` numbers each; and, whatever their class,
    the latest `WINDOW`, which say what comes now.

    The quota of a class is ceil(capacity / classes), at least 4. Beyond it an image takes the place of its class's
    oldest with probability quota / images seen of that class (reservoir sampling, Vitter, ACM TOMS 1985), drawn from
    the image's own hash, so that the same stream fills the same memory. Not safe under threads.
    """

    def __init__(self, classes: int, *, views: int, dim: int, capacity: int = CAPACITY) -> None:
        if min(classes, views, dim, capacity) < 1:
            raise ValueError("a memory needs at least one class, view, dimension and image.")
        self.classes, self.views, self.dim, self.capacity = classes, views, dim, capacity
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._kept: list[Kept] = []  # balanced, oldest first
        self._latest: deque[Kept] = deque(maxlen=min(WINDOW, self.capacity))
        self._claimed = [0] * self.classes  # distinct images offered, by class
        self._first = torch.zeros(self.dim, dtype=torch.float64)  # sum of the first images' features
        self._firsts = 0
        self._recent = torch.zeros(self.dim, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def quota(self) -> int:
        """Most images of one class."""
        return min(self.capacity, max(LEAST_QUOTA, math.ceil(self.capacity / self.classes)))

    @property
    def nbytes(self) -> int:
        """Bytes of features held."""
        return len(self._rows()) * self.views * self.dim * 4

    @property
    def most_bytes(self) -> int:
        """Bytes of features when full."""
        return (self.capacity + min(WINDOW, self.capacity)) * self.views * self.dim * 4

    @property
    def counts(self) -> list[int]:
        """Images that are held balanced, by class."""
        found = [0] * self.classes
        for kept in self._kept:
            found[kept.label] += 1
        return found

    @property
    def drift(self) -> float | None:
        """1 - cosine between the mean image of the first `capacity` images and that of the latest; None without any.

        0 is no drift; a rough meter, to compare with itself."""
        if self._firsts == 0:
            return None
        return float(1 - F.cosine_similarity(self._first, self._recent, dim=0).clamp(-1, 1))

    @property
    def digest(self) -> bytes:
        """32 bytes that tell what is held, and in which order it came doesn't matter."""
        parts = [b"".join(sorted(kept.sha256 for kept in each)) for each in (self._kept, self._latest)]
        return hashlib.sha256(b"memory" + b"latest".join(parts)).digest()

    def snapshot(self) -> Snapshot:
        """What is held now; later additions don't change it."""
        rows = self._rows()
        views = torch.stack([k.views for k in rows.values()]) if rows else torch.zeros(0, self.views, self.dim)
        balanced = {kept.sha256 for kept in self._kept}
        age = {kept.sha256: n for n, kept in enumerate(reversed(self._latest))}
        return Snapshot(views, tuple(rows), tuple(h in balanced for h in rows), tuple(age.get(h, -1) for h in rows))

    def _rows(self) -> dict[bytes, Kept]:
        return {kept.sha256: kept for kept in (*self._kept, *self._latest)}

    def add(self, views: Tensor, sha256: Sequence[bytes], labels: Sequence[int]) -> int:
        """Offer images: features (B, V, D), hashes, zero-shot labels. Returns how many were taken.

        Images with other than this memory's views are not taken, nor those that are there already.
        """
        if views.shape[1:] != (self.views, self.dim):
            return 0
        held = set(self._rows())
        rows = views.detach().to("cpu", torch.float32)
        taken = 0
        for row, digest, label in zip(rows, sha256, labels, strict=True):
            if digest in held or not bool(row.isfinite().all()):
                continue
            self._watch(row[0])
            image = Kept(row.clone(), digest, int(label))
            taken += self._take(image)
            self._latest.append(image)
            held.add(digest)
        return taken

    def _watch(self, original: Tensor) -> None:
        feature = original.double()
        if self._firsts < self.capacity:
            self._first += feature
            self._firsts += 1
        self._recent = RECENT * self._recent + (1 - RECENT) * feature

    def _take(self, image: Kept) -> bool:
        label = image.label
        self._claimed[label] += 1
        own = [n for n, kept in enumerate(self._kept) if kept.label == label]
        if len(own) >= self.quota:
            drawn = hashlib.sha256(image.sha256 + self._claimed[label].to_bytes(8, "big")).digest()
            if int.from_bytes(drawn[:8], "big") >= 2**64 * self.quota // self._claimed[label]:
                return False
            del self._kept[own[0]]
        elif len(self._kept) >= self.capacity:  # more classes than capacity / 4: the fullest gives way
            counts = self.counts
            fullest = max(range(self.classes), key=counts.__getitem__)
            if counts[fullest] <= len(own):
                return False
            del self._kept[next(n for n, kept in enumerate(self._kept) if kept.label == fullest)]
        self._kept.append(image)
        return True

    # ---- on disk and on the wire ----

    def dump(self, bound: dict[str, str]) -> bytes:
        """As safetensors; `bound` says what it belongs to (model, class set) and comes back from `restore`."""
        state = {
            "format": FORMAT, "classes": self.classes, "views": self.views, "dim": self.dim, "capacity": self.capacity,
            "claimed": self._claimed, "firsts": self._firsts, "sha256": [digest.hex() for digest in self._rows()],
            "balanced": [kept.sha256.hex() for kept in self._kept], "latest": [k.sha256.hex() for k in self._latest],
            "bound": bound,
        }  # fmt: skip
        tensors = {
            "views": self.snapshot().views,
            "labels": torch.tensor([kept.label for kept in self._rows().values()], dtype=torch.int64),
            "first": self._first,
            "recent": self._recent,
        }
        return save(tensors, {"gram_memory": json.dumps(state)})

    @classmethod
    def restore(cls, data: bytes) -> tuple[Memory, dict[str, str]]:
        """What `dump` wrote; raises InvalidMemory, whatever else the bytes are."""
        try:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length]) if 2 <= length <= min(MOST_HEADER, len(data) - 8) else {}
            state = json.loads(header["__metadata__"]["gram_memory"])
            tensors = load(data)
            return _checked(cls, state, tensors)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError):
            raise InvalidMemory(
                "this is no session that this server exported; expected its bytes as they were."
            ) from None


def _checked(cls: type[Memory], state: Any, tensors: dict[str, Tensor]) -> tuple[Memory, dict[str, str]]:
    """A memory from parts that may be anything; raises ValueError, KeyError or TypeError."""
    sizes = {name: state[name] for name in ("classes", "views", "dim", "capacity", "firsts", "format")}
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in sizes.values()) or sizes["format"] != FORMAT:
        raise ValueError
    views, labels = tensors["views"], tensors["labels"]
    count, claimed = len(labels), state["claimed"]
    hashes = [bytes.fromhex(text) for text in state["sha256"]]
    if sizes["classes"] != len(claimed) or sizes["firsts"] < 0:
        raise ValueError
    shaped = tuple(views.shape) == (count, sizes["views"], sizes["dim"]) and tensors["first"].shape == (sizes["dim"],)
    if not shaped or max(sizes["capacity"], len(claimed)) > MOST:
        raise ValueError  # before anything is made of sizes that only the header claims
    memory = cls(sizes["classes"], views=sizes["views"], dim=sizes["dim"], capacity=sizes["capacity"])
    shapes = {"views": (count, memory.views, memory.dim), "labels": (count,), "first": (memory.dim,),
              "recent": (memory.dim,)}  # fmt: skip
    kinds = {"views": torch.float32, "labels": torch.int64, "first": torch.float64, "recent": torch.float64}
    if set(tensors) != set(shapes) or len(hashes) != count or any(len(h) != 32 for h in hashes):
        raise ValueError
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name] or tensor.dtype != kinds[name] or not bool(tensor.isfinite().all()):
            raise ValueError
    if count and float((views.norm(dim=-1) - 1).abs().max()) > UNIT:
        raise ValueError
    if count and (int(labels.min()) < 0 or int(labels.max()) >= memory.classes):
        raise ValueError
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**62 for n in claimed):
        raise ValueError
    rows = {h: Kept(v.clone(), h, int(y)) for v, h, y in zip(views, hashes, labels.tolist(), strict=True)}
    memory._kept = [rows[bytes.fromhex(text)] for text in state["balanced"]]
    latest = [rows[bytes.fromhex(text)] for text in state["latest"]]
    memory._latest.extend(latest)
    held = len({kept.sha256 for kept in memory._kept}), len({kept.sha256 for kept in memory._latest})
    if held != (len(memory), len(latest)) or set(memory._rows()) != set(hashes) or len(rows) != count:
        raise ValueError
    if max(memory.counts) > memory.quota or len(memory) > memory.capacity:
        raise ValueError
    memory._claimed, memory._firsts = list(claimed), min(sizes["firsts"], memory.capacity)
    memory._first, memory._recent = tensors["first"].clone(), tensors["recent"].clone()
    bound = state["bound"]
    if not isinstance(bound, dict) or not all(isinstance(v, str) for v in bound.values()):
        raise ValueError
    return memory, bound
