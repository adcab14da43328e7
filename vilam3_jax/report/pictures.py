"""Finds and draws what a row is about: its slice, the expert's labels on it; and lists the samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vilam3_jax.data import images, volumes
from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.data.experts.falsify import falsified
from vilam3_jax.data.experts.grammar import parse_turn
from vilam3_jax.data.experts.labels import visible_segments
from vilam3_jax.data.experts.overlays import PALETTE, expert_overlay, legend
from vilam3_jax.data.experts.store import Annotation, AnnotationStore
from vilam3_jax.data.preprocessing import Preprocessing
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.data.tfds_folder import datasets_in, read_info
from vilam3_jax.errors import UserError
from vilam3_jax.report.dialogues import Pictures
from vilam3_jax.runtime import paths

SIDE = 288  # pixels of the longer side: sharp enough on a phone, and two dozen of them stay below 2 MB
PLANES = ("sagittal", "coronal", "axial")
_CSS = {name: "rgb({:.0f} {:.0f} {:.0f})".format(*(255 * c for c in rgb)) for name, rgb in PALETTE}
_MAX_IMAGE_BYTES = 64 << 20
_PREPROCESSING = Preprocessing()  # the quickstart's models have the default


@dataclasses.dataclass(frozen=True)
class Licence:
    """Samples of one origin, licence and modality, by name."""

    origin: str
    licence: str
    modality: str
    samples: tuple[str, ...]


class Source:
    """Pictures and licences out of a quickstart folder: `data/` and `annotations/`."""

    def __init__(self, folder: paths.PathLike) -> None:
        """Opens the datasets; reads no image yet.

        Raises:
          UserError: no dataset below `folder/data`, or a damaged one.
        """
        root = paths.as_path(folder)
        data = root / "data"
        self._sources = [
            ExampleSource(path, split)
            for path in datasets_in(data)
            for split in sorted(read_info(path)["splits"])
        ]
        store = root / "annotations"
        self._store = AnnotationStore(store) if store.is_dir() else None
        self._volume: tuple[str, volumes.Volume] | None = None
        self._examples: dict[str, tuple[Example, ExampleSource]] = {}
        samples: dict[tuple[str, str, str], set[str]] = {}
        for source in self._sources:
            for example in source:
                meta = example.meta
                if meta.get("qa"):
                    self._examples[example.id] = (example, source)
                facts = (meta.get("origin"), meta.get("licence"), meta.get("modality"))
                origin, licence, modality = (str(fact or "not stated") for fact in facts)
                key = (origin, licence, modality)
                samples.setdefault(key, set()).add(
                    str(meta.get("sample") or meta.get("dataset") or example.id)
                )
        self._samples = samples

    def licences(self) -> list[Licence]:
        """Where the samples of all datasets came from, by origin."""
        return [Licence(*key, tuple(sorted(self._samples[key]))) for key in sorted(self._samples)]

    def pictures(self, row: Mapping[str, Any]) -> Pictures:
        """Draws the slice or film that a row asks about, and the labels of the expert that was called.

        Raises:
          UserError: the dataset does not have the row's example, or an image is missing or damaged.
        """
        item = str(row["item"])
        name = item.rsplit("/q", 1)[0]
        if name not in self._examples:
            raise UserError(f"evaluation item {item!r}: no such example in the dataset; evaluate again")
        example, source = self._examples[name]
        qa = example.meta["qa"][int(item.rsplit("/q", 1)[1])]
        ref = example.images[qa.get("image", 0)]
        shown, words = self._slice(ref, source)
        record = self._record(row, str(example.meta["input_key"]))
        if record is None or record.labels is None or ref.axis is None:
            return Pictures(images.encode_png(shown), words)
        coloured = expert_overlay(record, shown, axis=ref.axis, index=ref.index)
        visible = visible_segments(record, axis=ref.axis, index=ref.index)
        colours = legend({i: n for i, n, _, _ in visible}, [i for i, *_ in visible])
        false = "" if row.get("falsify_seed") is None else " (falsified)"
        return Pictures(
            image=images.encode_png(shown),
            image_words=words,
            overlay=images.encode_png(coloured),
            overlay_words=f"labels of {record.expert}{false}",
            legend=tuple((_CSS[colour], label) for colour, label in colours.items()),
        )

    def _record(self, row: Mapping[str, Any], input_key: str) -> Annotation | None:
        """What the expert said in this row, falsified as it was then; None if none was called."""
        calls = parse_turn(str(row.get("trigger") or "")).calls
        if not calls or self._store is None or row.get("expert_status") == "failed":
            return None
        called = calls[-1].expert, calls[-1].args
        record = self._store.get(input_key, *called)
        if record is None or record.status != "ok":
            return None
        if row.get("falsify_seed") is not None:
            record = falsified(record, int(row["falsify_seed"]))
        return record

    def _slice(self, ref: ImageRef, source: ExampleSource) -> tuple[np.ndarray, str]:
        """(uint8 [H, W, 3] in true proportions, what it is)."""
        if ref.axis is None or ref.index is None:
            data = ref.data or paths.read_bytes(source.data_root / str(ref.path), _MAX_IMAGE_BYTES)
            film = images.decode_image(data)
            return _fit(film, film.shape[0], film.shape[1]), "2-D image"
        volume = self._load(str(source.data_root / str(ref.path)), ref.modality)
        shown = _PREPROCESSING.slice_picture(volume, ref.axis, ref.index, ref.window)
        across, up = [spacing for axis, spacing in enumerate(volume.spacing) if axis != ref.axis]
        height, width = shown.shape[0] * float(up), shown.shape[1] * float(across)
        return _fit(shown, height, width), f"{PLANES[ref.axis]} slice {ref.index}"

    def _load(self, path: str, modality: str | None) -> volumes.Volume:
        if self._volume is None or self._volume[0] != path:
            self._volume = (path, volumes.load_volume(path, modality=modality))
        return self._volume[1]


def _fit(picture: np.ndarray, height: float, width: float) -> np.ndarray:
    """Resizes to `SIDE` on the longer side, with the given proportions."""
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
