"""The tree as one HTML page: no script, nothing loaded from anywhere, thumbnails inside.

Images come from WebDataset shards; one that can't be read is left out and counted, never fatal.
"""

from __future__ import annotations

import base64
import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from prototypes.bank import PrototypeBank
from prototypes.cache import FeatureCache
from prototypes.hierarchy import CONCEPT, LEVELS, MODE, THEME, Hierarchy
from prototypes.vectors import unit

__all__ = ["nearest_keys", "page", "thumbnails"]

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_BYTES, MAX_PIXELS = 32 << 20, 80_000_000

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777; --bar: #4a7fb5; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1.5rem; }
h1 { font-size: 1.35rem; margin: 0 0 .3rem; } p { margin: .2rem 0 1rem; max-width: 60rem; }
small, .soft { color: var(--soft); font-size: .85rem; font-weight: normal; }
table { border-collapse: collapse; margin: 0 0 1.2rem; } td, th { text-align: left; padding: .1rem 1.2rem .1rem 0; }
details { border-top: 1px solid var(--line); } details > div { padding: 0 0 .8rem 1.1rem; }
summary { cursor: pointer; padding: .45rem 0; font-weight: 600; }
.concepts { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: .9rem 1.4rem; }
.concept { min-width: 0; } .concept h3 { font-size: 1rem; margin: .2rem 0; overflow-wrap: anywhere; }
.mode { display: flex; flex-wrap: wrap; gap: 3px; border-left: 3px solid var(--line); }
.mode { margin: .35rem 0; padding-left: .5rem; }
.mode small { flex-basis: 100%; overflow-wrap: anywhere; } .set { display: flex; gap: 1px; margin-right: 5px; }
.set img { width: 56px; height: 56px; object-fit: cover; border-radius: 3px; display: block; }
.bar { display: inline-block; width: 3rem; height: .5rem; background: var(--line); border-radius: 3px; }
.bar { overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--bar); }
"""


def nearest_keys(tree: Hierarchy, bank: PrototypeBank, cache: FeatureCache, count: int) -> dict[int, list[str]]:
    """For every prototype of a mode (bank row): the keys of its nearest members, at most `count`, nearest first."""
    rows = cache.rows(tree.keys)
    found: dict[int, list[str]] = {}
    of_node: dict[int, list[int]] = {}
    for row in bank.rows(MODE):
        of_node.setdefault(int(bank.node[row]), []).append(int(row))
    for node, members in zip(tree.nodes(MODE), tree.groups(MODE), strict=True):
        prototypes = of_node.get(int(node), [])
        if not prototypes:
            continue
        image = bank.centre(np.asarray(cache.image[rows[members]], np.float32))
        cosine = image @ unit(bank.visual[prototypes] - bank.visual_mean).T
        own = cosine.argmax(axis=1)
        for i, row in enumerate(prototypes):
            mine = np.flatnonzero(own == i)
            best = mine[np.argsort(-cosine[mine, i], kind="stable")][:count]
            found[row] = [tree.keys[members[j]] for j in best]
    return found


def thumbnails(shards: Sequence[Path], keys: Iterable[str], side: int) -> tuple[dict[str, bytes], int]:
    """Square JPEGs of `side` pixels for the keys found in the shards, and how many could not be decoded.

    A key is `SHARD/NAME` or `NAME`, where SHARD.tar holds NAME.jpg. Raises ValueError for a file that is no shard.
    """
    wanted, found, damaged = set(keys), {}, 0
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    key = _key(shard, member.name, wanted)
                    if key is None or key in found or not member.isfile() or member.size > MAX_BYTES:
                        continue
                    file = archive.extractfile(member)
                    try:
                        found[key] = _square(file.read() if file else b"", side)
                    except Exception:  # any parser's own error: one bad image must not cost the page
                        damaged += 1
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{shard} is no readable tar file ({error}); give WebDataset shards (.tar).") from error
    return found, damaged


def _key(shard: Path, name: str, wanted: set[str]) -> str | None:
    path = PurePosixPath(name)
    if path.suffix.lower() not in SUFFIXES:
        return None
    stem = str(path.parent / path.name.partition(".")[0])
    for key in (f"{shard.stem}/{stem}", stem):
        if key in wanted:
            return key
    return None


def _square(data: bytes, side: int) -> bytes:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS}")
        image.draft("RGB", (2 * side, 2 * side))
        small = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=72)
    return out.getvalue()


def page(
    tree: Hierarchy,
    bank: PrototypeBank,
    nearest: Mapping[int, Sequence[str]] | None = None,
    images: Mapping[str, bytes] | None = None,
) -> str:
    """The whole page. `nearest` and `images` as the other functions here return them; without them, names only."""
    nearest, images = nearest or {}, images or {}
    sizes = tree.sizes
    of_node: dict[int, list[int]] = {}
    for row in bank.rows(MODE):
        of_node.setdefault(int(bank.node[row]), []).append(int(row))

    def mode(node: int, number: int) -> str:
        prototypes = of_node.get(node, [])
        head = f"<small>mode {number}: {sizes[node]:,} pairs, {_count(len(prototypes), 'prototype')}</small>"
        return f'<div class="mode">{head}{"".join(map(strip, prototypes))}</div>'

    def strip(row: int) -> str:
        shown = [key for key in nearest.get(row, ()) if key in images]
        tags = "".join(
            f'<img alt="" title="{escape(key)}" src="data:image/jpeg;base64,{base64.b64encode(images[key]).decode()}">'
            for key in shown
        )
        return f'<div class="set">{tags}</div>' if tags else ""

    def concept(node: int) -> str:
        modes = "".join(mode(int(child), i) for i, child in enumerate(tree.children(node), 1))
        title = f"{escape(tree.names[node])} <small>{sizes[node]:,} pairs {_bar(tree.kappa[node])}</small>"
        return f'<div class="concept"><h3>{title}</h3>{modes}</div>'

    def theme(node: int, open_: bool) -> str:
        below = tree.children(node)
        inside = "".join(concept(int(child)) for child in below)
        counts = f"{sizes[node]:,} pairs, {_count(len(below), 'concept')} {_bar(tree.kappa[node])}"
        return (
            f"<details{' open' if open_ else ''}><summary>{escape(tree.names[node])} <small>{counts}</small></summary>"
            f'<div class="concepts">{inside}</div></details>'
        )

    themes = sorted((int(node) for node in tree.nodes(THEME)), key=lambda node: -sizes[node])
    rows = "".join(
        f"<tr><th>{LEVELS[level]}</th><td>{len(tree.nodes(level)):,}</td><td>{len(bank.rows(level)):,}</td>"
        f"<td>{int(np.median(sizes[tree.nodes(level)])):,}</td></tr>"
        for level in (THEME, CONCEPT, MODE)
    )
    dropped = "; ".join(f"{count:,} {escape(str(why))}" for why, count in tree.facts.get("dropped", {}).items())
    source = escape(f"{tree.facts.get('source', '')} under {tree.facts.get('model', tree.fingerprint[:16])}")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width"><title>Prototype tree</title>'
        f"<style>{STYLE}</style></head><body><h1>Prototype tree</h1>"
        f"<p>{len(tree.keys):,} pairs of {source}. Dropped: {dropped or 'nothing'}. "
        "Themes are clusters of images and captions together, concepts of captions, modes of images; the strips are "
        "the images nearest to each prototype. The bar is structure complexity.</p>"
        "<table><tr><th></th><th>nodes</th><th>prototypes</th><th>median pairs</th></tr>"
        f"{rows}</table>{''.join(theme(node, i == 0) for i, node in enumerate(themes))}</body></html>\n"
    )


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def _bar(kappa: float) -> str:
    return f'<span class="bar" title="complexity {kappa:.2f}"><i style="width:{100 * kappa:.0f}%"></i></span>'
