"""The requests of `soak.py`: good, bad, given up, too large, slow; an endless stream drawn by a seed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.traffic import Ask, chunks, classify, head, post, slowly

SHARES = {"good": 0.70, "bad": 0.10, "cancelled": 0.10, "oversize": 0.05, "slow": 0.05}
FORMS: tuple[tuple[float, int, dict[str, Any]], ...] = (  # of good requests: share, images, adaptation
    (0.85, 1, {"method": "none"}),
    (0.13, 1, {"method": "tpt", "scope": "image", "views": 4}),
    (0.02, 8, {}),
)
NEW = 0.1  # of good requests bring a list of classes that nobody sent before
USUAL = 20  # lists that the others share
CANCEL_S = 0.1


class Requests:
    """An endless stream of requests of every kind.

    New lists of classes are drawn from a finite vocabulary of made-up words: the tokenizer keeps words that it has met,
    up to a bound that a soak would not reach.
    """

    def __init__(self, photos: Sequence[bytes], limits: dict[str, int], seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.photos = photos
        syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
        self.words = [a + b for a in syllables[:40] for b in syllables[30:]]
        self.usual = [self._names() for _ in range(USUAL)]
        self.bad = list(bad_requests(photos[0]))
        self.oversize = list(oversize_requests(limits["max_body_bytes"], limits["max_image_bytes"]))

    def __iter__(self) -> Iterator[Ask]:
        kinds, shares = list(SHARES), list(SHARES.values())
        while True:
            kind = kinds[self.rng.choice(len(kinds), p=shares)]
            if kind == "bad":
                yield self.bad[self.rng.integers(len(self.bad))]
            elif kind == "oversize":
                yield self.oversize[self.rng.integers(len(self.oversize))]
            elif kind == "slow":
                yield slowly(self._good("slow"), 20, float(self.rng.uniform(0.2, 1.0)))
            else:
                yield self._good(kind)

    def _good(self, kind: str) -> Ask:
        _, size, adaptation = FORMS[self.rng.choice(len(FORMS), p=[form[0] for form in FORMS])]
        chosen = [self.photos[k] for k in self.rng.choice(len(self.photos), size, False)]
        names = self._names() if self.rng.random() < NEW else self.usual[self.rng.integers(USUAL)]
        cancel = float(self.rng.uniform(0.0, CANCEL_S)) if kind == "cancelled" else None
        return classify(kind, chosen, {"classes": names, "adaptation": adaptation}, cancel_s=cancel)

    def _names(self) -> list[str]:
        return [self.words[k] for k in self.rng.choice(len(self.words), 10, False)]


def bad_requests(photo: bytes) -> Iterator[Ask]:
    """One of each; what is answered is in the report by name."""
    names = {"classes": ["cat", "dog"]}
    yield classify("bad: half a JPEG", [photo[: len(photo) // 2]], names, expected=(422,))
    yield classify("bad: text for an image", [b"not an image"], names, expected=(415,))
    thin = io.BytesIO()
    Image.new("RGB", (1, 20_000)).save(thin, "PNG")
    yield classify("bad: 1 x 20000 pixels", [thin.getvalue()], names, expected=(422,))
    yield classify("bad: no classes", [photo], {"classes": []}, expected=(422,))
    yield classify("bad: unknown field", [photo], {**names, "adaptaton": {}}, expected=(422,))
    yield classify("bad: brace in a template", [photo], {**names, "templates": ["{:>9}"]}, expected=(422,))
    question = {**names, "images": ["AAA"]}
    yield post("bad: base64", "application/json", json.dumps(question).encode(), expected=(400,))
    question["images"] = ["http://127.0.0.1/x.jpg"]
    yield post("bad: a URL", "application/json", json.dumps(question).encode(), expected=(422,))
    yield post("bad: nested arrays", "application/json", b"[" * 20_000, expected=(400, 422))
    yield post("bad: pickle", "application/x-pickle", b"\x80\x04.", expected=(415,))


def oversize_requests(body: int, image: int) -> Iterator[Ask]:
    """Above the cap by declaration, by arrival, and by one image of a body that is within it."""
    media = "application/octet-stream"
    zeros = bytes(65_536)
    declared = (head(media, f"Content-Length: {body + 1}"), *(zeros for _ in range(body // len(zeros) + 1)))
    yield Ask("oversize: declared", declared, pause_s=1.0, expected=(413,))  # as long as curl waits for a 100
    arriving = (head(media, "Transfer-Encoding: chunked"), *chunks(bytes(body + 1)))
    yield Ask("oversize: chunked", arriving, expected=(413,))
    yield classify(
        "oversize: one image", [b"\xff\xd8\xff" + bytes(image)], {"classes": ["cat", "dog"]}, expected=(413,)
    )


def with_token(ask: Ask, token: str) -> Ask:
    """The same form with a replay token for its adaptation."""
    lines, _, body = ask.pieces[0].partition(b"\r\n\r\n")
    start = body.rindex(b'{"classes"')
    question, end = json.JSONDecoder().raw_decode(body[start:].decode())
    question["adaptation"] = {"replay": token}
    body = body[:start] + json.dumps(question).encode() + body[start + end :]
    media = next(line for line in lines.decode().split("\r\n") if line.startswith("Content-Type: "))
    return post(ask.kind, media.removeprefix("Content-Type: "), body)
