"""Class names to unit text features: the class set and the exact fast text path.

Owns tokens, packs and the cache of class sets and their features. It knows nothing of images, losses or tuning.

The fast path gives `open_clip.encode_text`'s numbers for less work, because a causal tower read at its end-of-text
token (EOT) never sees what comes later, and because positions before the class name see no class:

1. nothing behind the EOT is computed;
2. the prefix shared by all texts of a pack (start token, context, ...) is computed once;
3. the remaining suffix tokens are packed without padding, grouped by length;
4. the last layer runs for the EOT rows only (keys and values excepted);
5. features at the start prompt are constants of the class set and are kept.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gram_core.backbone import Backbone, LayerWeights, TextWeights
from gram_core.errors import InvalidClasses, UnsupportedTower

DEFAULT_TEMPLATES = ("a photo of a {}.",)
START = "a photo of a"
START_TEMPLATE = START + " {}."
KEPT_PACKS = 32  # class sets whose packed tokens are kept
CHUNK = 512  # texts per pass: bounds the memory of a pass, whatever K is
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Pack:
    """Texts that share a prefix, without padding; the unit of one text pass.

    `prefix` (P,) ids; `suffix` (S,) ids sorted by suffix length, `at` (S,) their positions; `groups` one
    (first token, texts, length) for each length; `order` (K,) gives each text's place in that sorting.
    """

    prefix: Tensor
    suffix: Tensor
    at: Tensor
    groups: tuple[tuple[int, int, int], ...]
    order: Tensor

    def __len__(self) -> int:
        return len(self.order)


def pack(rows: Sequence[Sequence[int]], least_prefix: int = 1, device: torch.device | str = "cpu") -> Pack:
    """Pack token rows that are already cut at their EOT.

    The prefix is as long as all rows agree, but leaves every row at least its last token. `least_prefix` tokens
    must be common to all rows (the start token and a tuned context are).
    """
    shared = min(len(r) for r in rows) - 1
    first = rows[0]
    for row in rows:
        while shared and row[:shared] != first[:shared]:
            shared -= 1
    if shared < least_prefix:
        raise ValueError(f"the rows share {shared} tokens, expected at least {least_prefix}")
    lengths = torch.tensor([len(r) - shared for r in rows])
    by_length = torch.argsort(lengths, stable=True)
    suffix = [t for i in by_length.tolist() for t in rows[i][shared:]]
    at = [p for i in by_length.tolist() for p in range(shared, len(rows[i]))]
    groups, start = [], 0
    for length, count in zip(*torch.unique(lengths, return_counts=True), strict=True):
        groups.append((start, int(count), int(length)))
        start += int(count) * int(length)
    return Pack(
        prefix=torch.tensor(first[:shared], device=device),
        suffix=torch.tensor(suffix, device=device),
        at=torch.tensor(at, device=device),
        groups=tuple(groups),
        order=torch.argsort(by_length).to(device),
    )


def encode(weights: TextWeights, texts: Pack, context: Tensor | None = None) -> Tensor:
    """Features (E, K, D), unit norm, float32; equal to `open_clip.encode_text` up to rounding.

    `context` (E, N, W) replaces the token embeddings at positions 1..N (CoOp, Zhou et al., IJCV 2022, eq. 3);
    without it E is 1. Differentiable in `context`.
    """
    p = len(texts.prefix)
    ids = torch.cat([texts.prefix, texts.suffix])
    places = torch.cat([torch.arange(p, device=ids.device), texts.at])
    x = F.embedding(ids, weights.tokens)
    if context is None:
        x = x[None]
    else:
        n = context.shape[1]
        if n + 1 > p:
            raise ValueError(f"a context of {n} tokens needs a shared prefix of {n + 1}, the pack has {p}")
        e = len(context)
        x = torch.cat([x[:1].expand(e, -1, -1), context, x[n + 1 :].expand(e, -1, -1)], dim=1)
    x = (x + weights.positions[places]).to(weights.layers[0].qkv[0].dtype)

    ends = torch.cat(
        [
            torch.arange(count, device=ids.device) * length + (p + start + length - 1)
            for start, count, length in texts.groups
        ]
    )
    for layer in weights.layers[:-1]:
        x = _block(layer, weights.heads, x, p, texts.groups)
    x = _block(weights.layers[-1], weights.heads, x, p, texts.groups, ends)
    x = _norm(x, weights.final_norm)
    if weights.projection is not None:
        x = x @ weights.projection
        if weights.projection_bias is not None:
            x = x + weights.projection_bias
    return F.normalize(x.float(), dim=-1)[:, texts.order]


def _norm(x: Tensor, norm: tuple[Tensor, Tensor, float]) -> Tensor:
    weight, bias, eps = norm
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)


def _block(
    layer: LayerWeights,
    heads: int,
    x: Tensor,
    p: int,
    groups: tuple[tuple[int, int, int], ...],
    ends: Tensor | None = None,
) -> Tensor:
    """One transformer block on (E, P+S, W); with `ends` (K,), only those rows come out: (E, K, W)."""
    h = _norm(x, layer.norm1)
    weight, bias = layer.qkv
    w = x.shape[-1]
    queries = h if ends is None else h[:, ends]
    q = _heads(F.linear(queries, weight[:w], bias[:w]), heads)
    k, v = (_heads(t, heads) for t in F.linear(h, weight[w:], bias[w:]).chunk(2, dim=-1))
    mixed = _attend(q, k, v, p, groups, ends is not None)
    attended = F.linear(mixed.transpose(1, 2).flatten(2), *layer.out)
    x = x if ends is None else x[:, ends]
    x = x + (attended if layer.scale1 is None else attended * layer.scale1)
    up = layer.act(F.linear(_norm(x, layer.norm2), *layer.up))
    down = F.linear(up, *layer.down)
    return x + (down if layer.scale2 is None else down * layer.scale2)


def _heads(x: Tensor, heads: int) -> Tensor:
    e, tokens, _ = x.shape
    return x.reshape(e, tokens, heads, -1).transpose(1, 2)  # (E, H, tokens, d)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, p: int, groups: tuple[tuple[int, int, int], ...], only_ends: bool
) -> Tensor:
    """Causal attention (E, H, queries, d): the prefix sees itself, a suffix sees the prefix and itself."""
    q = q * q.shape[-1] ** -0.5
    kp, vp = k[:, :, :p], v[:, :, :p]
    ks, vs = k[:, :, p:], v[:, :, p:]
    out = []
    if not only_ends:
        scores = q[:, :, :p] @ kp.transpose(-1, -2)
        out.append(_softmax(scores.masked_fill(_future(p, q.device), -torch.inf)) @ vp)
        q = q[:, :, p:]
    to_prefix = q @ kp.transpose(-1, -2)  # one product for all texts
    e, h, _, d = q.shape
    row = 0
    for start, count, length in groups:
        size = 1 if only_ends else length
        mine = slice(row, row + count * size)
        theirs = slice(start, start + count * length)
        row += count * size
        keys = ks[:, :, theirs].reshape(e, h, count, length, d)
        values = vs[:, :, theirs].reshape(e, h, count, length, d)
        own = q[:, :, mine].reshape(e, h, count, size, d) @ keys.transpose(-1, -2)
        if not only_ends:
            own = own.masked_fill(_future(length, q.device), -torch.inf)
        shared = to_prefix[:, :, mine].reshape(e, h, count, size, p)
        weight = _softmax(torch.cat([shared, own], dim=-1))
        mixed = (weight[..., p:] @ values).flatten(2, 3)
        out.append(mixed + weight[..., :p].flatten(2, 3) @ vp)
    return torch.cat(out, dim=2)


def _softmax(scores: Tensor) -> Tensor:
    return scores.float().softmax(dim=-1).to(scores.dtype)


def _future(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


@dataclass(frozen=True, eq=False)
class ClassSet:
    """Class names with their texts, tokenized: immutable, hashable by content, shareable between requests.

    Attributes:
        names: K class names, in the caller's order.
        id: `cs_` and 32 hex digits over names, texts and the model's fingerprint; equal content, equal id.
        texts: number of texts behind the K baseline features.
        groups: for each pass over the baseline texts, its tokens (M, T) and the class (M,) of each text.
        tuned: tokens (K, T) of `a photo of a {name}.`, the texts a tuned context is put into.
        starts_at_baseline: whether those are exactly the baseline's texts.
    """

    names: tuple[str, ...]
    id: str
    texts: int
    groups: tuple[tuple[Tensor, Tensor], ...]
    tuned: Tensor
    starts_at_baseline: bool

    def __len__(self) -> int:
        return len(self.names)

    @property
    def tokens(self) -> int:
        """Tokens of the baseline's texts, their start and end included, padding not."""
        return sum(int((tokens != 0).sum()) for tokens, _ in self.groups)


class TextEncoder:
    """Texts of one backbone to features, with a cache of class sets and their features bounded in bytes.

    Safe under threads: class sets may be built anywhere; features are computed by whoever asks first.
    """

    def __init__(self, backbone: Backbone, cache_bytes: int = 2**28) -> None:
        self.backbone = backbone
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[tuple[str, str], tuple[Any, int]] = OrderedDict()  # with the bytes of each
        self._tuned: OrderedDict[tuple[str, int], list[Pack]] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()
        self.context_tokens = len(self._rows(backbone.tokenize([START]))[0]) - 2

    @property
    def held_bytes(self) -> int:
        """Bytes of tokens and features kept now."""
        return self._held

    def class_set(
        self, classes: Sequence[str] | Mapping[str, Sequence[str]], templates: Sequence[str] | None = None
    ) -> ClassSet:
        """Check and tokenize class names with templates, or a mapping from names to sentences.

        A template holds exactly one literal `{}`, replaced as text; an empty list of templates takes names verbatim.
        Raises InvalidClasses with a code and, where there is one, the index of the class.
        """
        names = [_clean(n, i) for i, n in enumerate(classes)]
        if not names:
            raise InvalidClasses("no class names; give at least one.")
        seen: dict[str, int] = {}
        for i, name in enumerate(names):
            if name in seen:
                raise InvalidClasses(
                    f"class {i} has the same name as class {seen[name]}; names must differ.",
                    code="duplicate_class",
                    index=i,
                )
            seen[name] = i
        if isinstance(classes, Mapping):
            if templates is not None:
                raise InvalidClasses(
                    "templates can't be given together with sentences per class; leave one of them out.",
                    code="templates_not_allowed",
                )
            sentences = [list(s) for s in classes.values()]
            for i, own in enumerate(sentences):
                if not own or not all(isinstance(s, str) and s.strip() for s in own):
                    raise InvalidClasses(f"class {i} needs at least one sentence, all of them text.", index=i)
            texts = [[s for own in sentences for s in own]]
            owners = torch.tensor([i for i, own in enumerate(sentences) for _ in own])
            key: object = sentences
        else:
            patterns = list(DEFAULT_TEMPLATES if templates is None else templates)
            for i, pattern in enumerate(patterns):
                if pattern.count("{}") != 1 or pattern.count("{") != 1 or pattern.count("}") != 1:
                    raise InvalidClasses(
                        f"template {i} must hold exactly one {{}} and no other brace.",
                        code="bad_template",
                        index=i,
                    )
            texts = [[p.replace("{}", n) for n in names] for p in (patterns or ["{}"])]
            owners = torch.arange(len(names))
            key = patterns
        content = json.dumps([names, key, self.backbone.fingerprint], ensure_ascii=False)
        digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        identity = f"cs_{digest}"
        return self._kept(identity, "tokens", lambda: self._class_set(identity, names, texts, owners))

    def _class_set(self, identity: str, names: list[str], texts: list[list[str]], owners: Tensor) -> ClassSet:
        """Tokenizing is a third of a millisecond a text, in Python: once for as long as it is kept."""
        groups = [(self._tokenize(each, owners), owners) for each in texts]
        start = [START_TEMPLATE.replace("{}", n) for n in names]
        tuned = groups[0][0] if texts == [start] else self._tokenize(start, torch.arange(len(names)))
        return ClassSet(
            names=tuple(names),
            id=identity,
            texts=sum(map(len, texts)),
            groups=tuple(groups),
            tuned=tuned,
            starts_at_baseline=len(groups) == 1 and torch.equal(groups[0][0], tuned),
        )

    def features(self, classes: ClassSet) -> Tensor:
        """Baseline class features (K, D): texts encoded, averaged per class, normalised again as open_clip does."""
        return self._kept(classes.id, "baseline", lambda: self._baseline(classes))

    def encode_afresh(self, classes: ClassSet) -> Tensor:
        """The baseline features, computed whether or not they are kept: for measuring what they cost."""
        with torch.no_grad():
            return self._baseline(classes)

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """Features (M, D) of plain sentences, not kept; those too long for the tower are cut off."""
        if not texts:
            return torch.zeros(0, self.backbone.joint_dim, device=self.backbone.device)
        return self._encode(self.backbone.tokenize(texts, cut=True))[0]

    def start_features(self, classes: ClassSet) -> Tensor:
        """Features (K, D) of `a photo of a {name}.`, the texts of a context before any tuning."""
        if classes.starts_at_baseline:
            return self.features(classes)
        return self._kept(classes.id, "start", lambda: self._encode(classes.tuned)[0])

    def has(self, classes: ClassSet) -> bool:
        """Whether the baseline features are in the cache."""
        return self.holds(classes.id)

    def holds(self, identity: str) -> bool:
        """The same by id."""
        return (identity, "baseline") in self._cache

    def start_context(self) -> Tensor:
        """Token embeddings (N, W) of `a photo of a`, where every context starts (CoOp, section 3.2)."""
        weights = self._weights()
        ids = self.backbone.tokenize([START])[0, 1 : 1 + self.context_tokens].to(weights.tokens.device)
        return weights.tokens[ids].clone()

    def encode_context(self, classes: ClassSet, context: Tensor) -> Tensor:
        """Class features (E, K, D) under a context (E, N, W); differentiable.

        Beyond `CHUNK` classes each chunk is recomputed in the backward pass, so memory stays bounded in K.
        """
        weights = self._weights()
        packs = self._tuned_packs(classes, context.shape[1] + 1)
        if len(packs) == 1 or not torch.is_grad_enabled() or not context.requires_grad:
            return torch.cat([encode(weights, p, context) for p in packs], dim=1)
        parts = [checkpoint(encode, weights, p, context, use_reentrant=False, preserve_rng_state=False) for p in packs]
        return torch.cat(parts, dim=1)

    # ---- inside ----

    def _weights(self) -> TextWeights:
        if self.backbone.text is None:
            raise UnsupportedTower(f"no context can be tuned here: {self.backbone.text_note}.")
        return self.backbone.text

    def _tokenize(self, texts: list[str], owners: Tensor) -> Tensor:
        try:
            return self.backbone.tokenize(texts)
        except InvalidClasses as error:
            owner = None if error.index is None else int(owners[error.index])
            raise InvalidClasses(
                f"class {owner} does not fit the text tower's {self.backbone.context_length} tokens with its context. "
                "Shorten the name or the template.",
                code=error.code,
                index=owner,
            ) from None

    def _rows(self, tokens: Tensor) -> list[list[int]]:
        """Token rows cut behind the position that is read."""
        weights = self.backbone.text
        ends = tokens.argmax(dim=-1) if weights is None else weights.read_at(tokens)
        return [row[: end + 1] for row, end in zip(tokens.tolist(), ends.tolist(), strict=True)]

    def _packs(self, tokens: Tensor, least_prefix: int = 1) -> list[Pack]:
        rows = self._rows(tokens)
        device = self.backbone.device
        return [pack(rows[i : i + CHUNK], least_prefix, device) for i in range(0, len(rows), CHUNK)]

    def _tuned_packs(self, classes: ClassSet, least_prefix: int) -> list[Pack]:
        key = (classes.id, least_prefix)
        with self._lock:
            if key in self._tuned:
                self._tuned.move_to_end(key)
                return self._tuned[key]
        packs = self._packs(classes.tuned, least_prefix)
        with self._lock:
            self._tuned[key] = packs
            while len(self._tuned) > KEPT_PACKS:
                self._tuned.popitem(last=False)
        return packs

    @torch.no_grad()
    def _encode(self, tokens: Tensor) -> Tensor:
        """(1, M, D) without gradient, by the exact path or open_clip's own."""
        if self.backbone.text is None:
            parts = [self.backbone.encode_tokens(tokens[i : i + 64]) for i in range(0, len(tokens), 64)]
            return torch.cat(parts)[None]
        return torch.cat([encode(self.backbone.text, p) for p in self._packs(tokens)], dim=1)

    def _baseline(self, classes: ClassSet) -> Tensor:
        if classes.texts == len(classes):
            return self._encode(classes.groups[0][0])[0]
        device = self.backbone.device
        total = torch.zeros(len(classes), self.backbone.joint_dim, device=device)
        count = torch.zeros(len(classes), 1, device=device)
        for tokens, owners in classes.groups:
            where = owners.to(device)
            total.index_add_(0, where, self._encode(tokens)[0])
            count.index_add_(0, where, count.new_ones(len(where), 1))
        return F.normalize(total / count, dim=-1)

    def _kept(self, identity: str, kind: str, make: Callable[[], T]) -> T:
        key = (identity, kind)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return cast(T, self._cache[key][0])
        value = make()
        size = _size(value)
        with self._lock:
            if key not in self._cache and size <= self.cache_bytes:
                self._cache[key] = value, size
                self._held += size
                while self._held > self.cache_bytes:
                    _, (_, old) = self._cache.popitem(last=False)
                    self._held -= old
        return value


def _size(value: object) -> int:
    if isinstance(value, ClassSet):
        tensors = {id(t): t for group in value.groups for t in group} | {id(value.tuned): value.tuned}
        return sum(map(_size, tensors.values())) + sum(map(sys.getsizeof, value.names))
    assert isinstance(value, Tensor)
    return value.numel() * value.element_size()


def _clean(name: object, index: int) -> str:
    if not isinstance(name, str):
        raise InvalidClasses(f"class names must be strings; class {index} is not.", index=index)
    text = unicodedata.normalize("NFC", name).strip()
    if not 1 <= len(text) <= 256:
        raise InvalidClasses(f"class {index} has {len(text)} characters; expected 1 to 256.", index=index)
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise InvalidClasses(f"class {index} holds a control character or a lone surrogate.", index=index)
    return text
