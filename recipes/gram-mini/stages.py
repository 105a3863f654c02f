"""The stages of `build.py`, each a method that returns False when its result was already there."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from choosing import Labelled, accuracies, best_scale, choosing_sets, image_features, text_logits
from corpus import Corpus
from features import Classifier1000, build_features, traced, trunk_features
from finetune import finetune
from minilm import MiniLM
from numpy.typing import NDArray
from polish import Seen, polish
from root import build_root
from safetensors.torch import load_file, save_file
from settings import Settings
from sources import SOURCES, Source, read_source, require, split_keys
from teacher import Teacher, train_teacher
from text_tower import Texts, start_tokens, train_text
from torch import Tensor, nn
from towers import export, fold, load_mobilenet, new_clip
from views import build_views, load_views
from wordnet import WordNet
from words import build_words

log = logging.getLogger("gram-mini.stages")


@dataclass
class Recipe:
    """What every stage shares: settings and folders."""

    settings: Settings
    data: Path
    models: Path
    wordnet: Path
    work: Path
    out: Path

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Every source without its held-out part."""
        held = json.loads((self.work / "held_out.json").read_text(encoding="utf-8"))["held_out"]
        kept = {}
        for name in SOURCES:
            source, out = read_source(name, self.data), set(held[name])
            kept[name] = source.take([i for i, key in enumerate(source.keys) if key not in out])
        return kept

    @cached_property
    def mobilenet(self) -> dict[str, NDArray[np.float32]]:
        """The dequantised classifier."""
        with np.load(require(self.models / "mobilenet_v2_imagenet.npz", "MobileNetV2")) as arrays:
            return {name: arrays[name].astype(np.float32) for name in arrays.files}

    @cached_property
    def classifier(self) -> Classifier1000:
        """The classifier's last layer."""
        return Classifier1000(self.mobilenet)

    def split(self) -> bool:
        """Draw the held-out part of every source."""
        path = self.work / "held_out.json"
        if path.exists():
            return False
        cfg, held, counts = self.settings.images, {}, {}
        for name in SOURCES:
            source = read_source(name, self.data)
            fraction = cfg.held_out_flickr8k if name == "flickr8k" else cfg.held_out_other
            kept, out = split_keys(name, source.keys, fraction, self.settings.seed)
            held[name] = [source.keys[i] for i in out]
            counts[name] = {"towers": len(kept), "held_out": len(out)}
        content = {"seed": self.settings.seed, "counts": counts, "held_out": held}
        path.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")
        return True

    def views(self) -> bool:
        """Decode, crop and restyle the kept images."""
        if (self.work / "views.npy").exists():
            return False
        build_views(self.sources, self.settings, self.work)
        return True

    def features(self) -> bool:
        """Run the untouched classifier over the views."""
        if (self.work / "features.npy").exists():
            return False
        trunk = new_clip(self.settings).visual.trunk
        load_mobilenet(trunk, self.mobilenet)
        fold(trunk)
        build_features(trunk, load_views(self.work), self.settings.image_size, self.work)
        return True

    def words(self) -> bool:
        """Collect names, tree, caption nouns and glosses."""
        if (self.work / "words.json").exists():
            return False
        wnids = sorted({k.split("-")[0] for k in read_source("imagenet-samples", self.data).keys})
        lines = require(self.models / "imagenet_labels.txt", "ImageNet labels").read_text(encoding="utf-8").splitlines()
        labels = [f"{w}\t{line}" for w, line in zip(wnids, lines[1:], strict=True)]
        with np.load(require(self.models / "clip_vitb32_text_embeddings.npz", "CLIP text embeddings")) as arrays:
            clip = [str(x) for x in arrays["names"]]
        build_words(self.settings, self.sources, labels, clip, WordNet(self.wordnet), self.work)
        return True

    def sentences(self) -> bool:
        """Encode every text with the sentence encoder."""
        if (self.work / "sentences.safetensors").exists():
            return False
        words = json.loads((self.work / "words.json").read_text(encoding="utf-8"))
        encoder = MiniLM()
        captions = [c for five in words["captions"] for c in five]
        save_file(
            {
                "names": encoder.encode(words["names"]),
                "glosses": encoder.encode(words["glosses"]),
                "captions": encoder.encode(captions),
            },
            self.work / "sentences.safetensors",
        )
        return True

    @cached_property
    def corpus(self) -> Corpus:
        """Everything that training steps draw from."""
        views = load_views(self.work)
        return Corpus(self.work, views, self.sources, self.classifier, seed=self.settings.seed)

    @cached_property
    def clip_text(self) -> Tensor:
        """(N, 512) unit CLIP text features of the published names."""
        with np.load(require(self.models / "clip_vitb32_text_embeddings.npz", "CLIP text embeddings")) as arrays:
            return torch.nn.functional.normalize(torch.from_numpy(arrays["embeddings"].astype(np.float32)), dim=-1)

    @cached_property
    def choosing(self) -> list[Labelled]:
        """Small seeded subsets of the choosing sets, for the log and for the logit scale."""
        return choosing_sets(self.data, size=self.settings.images.size, limit=800, seed=self.settings.seed)

    def _fresh(self) -> nn.Module:
        """A CLIP whose folded image trunk is the classifier's."""
        torch.manual_seed(self.settings.seed)
        model = new_clip(self.settings)
        load_mobilenet(model.visual.trunk, self.mobilenet)
        fold(model.visual.trunk)
        return model

    def _teacher(self, model: nn.Module | None = None) -> Teacher:
        """The result of step A; its image projection is copied into `model`."""
        teacher = Teacher(self.settings, self.corpus.features.shape[1], self.corpus.name_vectors.shape[1])
        teacher.load_state_dict(load_file(self.work / "teacher.safetensors"))
        if model is not None:
            model.visual.head.proj.load_state_dict(teacher.project.state_dict())
        return teacher.eval()

    def teacher(self) -> bool:
        """Step A."""
        path = self.work / "teacher.safetensors"
        if path.exists():
            return False
        trunk, encoder = traced(self._fresh().visual.trunk, self.settings.image_size), MiniLM()
        seen = [trunk_features(trunk, s.pixels, self.settings.image_size).float() for s in self.choosing]
        said = [encoder.encode(s.classes) for s in self.choosing]

        @torch.no_grad()
        def report(teacher: Teacher) -> str:
            logits = [teacher.image(x) @ teacher.text(t).T for x, t in zip(seen, said, strict=True)]
            return accuracies(self.choosing, logits)

        save_file(train_teacher(self.corpus, self.clip_text, self.settings, report).state_dict(), path)
        return True

    def text(self) -> bool:
        """Step B."""
        path = self.work / "step-b.safetensors"
        if path.exists():
            return False
        model = self._fresh()
        teacher = self._teacher(model)
        start_tokens(model, Texts(self.corpus, self.settings.context).tokenizer)
        model.visual.eval()
        images = [image_features(model, s.pixels, self.settings.image_size) for s in self.choosing]

        def report(model: nn.Module) -> str:
            return accuracies(self.choosing, text_logits(model, images, self.choosing, self.settings.context))

        cfg = self.settings.text
        train_text(model, teacher.text, self.corpus, self.settings, steps=cfg.steps, lr=cfg.lr, report=report)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        return True

    def finetune(self) -> bool:
        """Step C."""
        path = self.work / "step-c.safetensors"
        if path.exists():
            return False
        model = self._fresh()
        teacher = self._teacher()
        model.load_state_dict(load_file(self.work / "step-b.safetensors"))

        said = [MiniLM().encode(s.classes) for s in self.choosing]

        @torch.no_grad()
        def report(model: nn.Module, teacher: Teacher) -> str:
            images = [image_features(model, s.pixels, self.settings.image_size) for s in self.choosing]
            ours = text_logits(model, images, self.choosing, self.settings.context)
            maps = [i @ teacher.eval().text(t).T for i, t in zip(images, said, strict=True)]
            return f"{accuracies(self.choosing, ours)}; by the map: {accuracies(self.choosing, maps)}"

        average = finetune(model, teacher, self.corpus, self.clip_text, self.settings, self.work / "step-c.pt", report)
        model.load_state_dict(average.mean["model"])
        teacher.load_state_dict(average.mean["teacher"])
        log.info("averaged weights: %s", report(model, teacher))
        cfg = self.settings.finetune
        # The tower lags behind the map that moved: a last look at texts alone, mostly at the names that images use.
        train_text(
            model,
            teacher.eval().text,
            self.corpus,
            self.settings,
            steps=cfg.polish_steps,
            lr=cfg.polish_lr,
            core_share=cfg.polish_core_share,
            report=lambda model: report(model, teacher),
        )
        save_file(teacher.state_dict(), self.work / "step-c-teacher.safetensors")
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        return True

    def polish(self) -> bool:
        """Step D."""
        path = self.work / "step-d.safetensors"
        if path.exists():
            return False
        cfg, size = self.settings.polish, self.settings.image_size
        model = self._fresh()
        model.load_state_dict(load_file(self.work / "step-c.safetensors"))
        model.visual.requires_grad_(False)
        teacher = self._teacher()
        teacher.load_state_dict(load_file(self.work / "step-c-teacher.safetensors"))
        images = [image_features(model, s.pixels, size).clone() for s in self.choosing]
        rows = Seen.choose(self.corpus, cfg.views, self.settings.seed)
        seen = Seen(rows, image_features(model, self.corpus.views.pixels[rows], size).clone())

        def report(model: nn.Module) -> str:
            return accuracies(self.choosing, text_logits(model, images, self.choosing, self.settings.context))

        polish(model, teacher.eval(), seen, self.corpus, self.settings, self.work / "step-d.pt", report)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        return True

    def export(self) -> bool:
        """Write the model in open_clip's format with a calibrated logit scale, the held-out list and checksums."""
        done = [self.work / f"step-{step}.safetensors" for step in "dcb"]
        state = load_file(next(path for path in done if path.exists()))
        model = self._fresh()
        model.load_state_dict(state)
        images = [image_features(model, s.pixels, self.settings.image_size) for s in self.choosing]
        scale = best_scale(self.choosing, text_logits(model, images, self.choosing, self.settings.context))
        log.info("logit scale %.1f", scale)
        state["logit_scale"] = torch.tensor(scale).log()
        export(state, self.settings, self.out)
        shutil.copyfile(self.work / "held_out.json", self.out / "held_out.json")
        return True

    def root(self) -> bool:
        """The root prototype of the exported model, then checksums of everything in its folder."""
        build_root(self.out, self.data)
        write_sums(self.out)
        return True


def write_sums(folder: Path) -> None:
    """SHA256SUMS over the folder's other files."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}" for n in names]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n", encoding="utf-8")
