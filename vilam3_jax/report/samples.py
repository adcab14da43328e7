"""Images and licences of the samples behind the evaluation."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import to_hex
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
from vilam3_jax.runtime import paths

SIDE = 288  # Pixels of the longer side: sharp on a phone, and two dozen images stay below 2 MB.
PLANES = ("sagittal", "coronal", "axial")
_CSS = {name: to_hex(rgb) for name, rgb in PALETTE}
_MAX_IMAGE_BYTES = 64 << 20
_PREPROCESSING = Preprocessing()  # The quickstart's models use the default.


@dataclasses.dataclass(frozen=True)
class RowImages:
    """Images shown with an evaluation row.

    Attributes:
      image: PNG of the slice or film.
      caption: its plane and index.
      overlay: PNG of the same slice with the expert's labels, or None.
      overlay_caption: names the expert.
      legend: (CSS colour, name) of the labels on the slice.
    """

    image: bytes
    caption: str
    overlay: bytes | None = None
    overlay_caption: str = ""
    legend: tuple[tuple[str, str], ...] = ()


class Licence(NamedTuple):
    """Number of samples with one origin, licence and modality."""

    origin: str
    licence: str
    modality: str
    samples: int


class Samples:
    """Reads `data/` and `annotations/` of a quickstart folder."""

    def __init__(self, folder: paths.PathLike) -> None:
        """Opens the datasets; decodes no image yet.

        Raises:
          UserError: no dataset below `folder/data`, or a damaged one.
        """
        root = paths.as_path(folder)
        store = root / "annotations"
        self._store = AnnotationStore(store) if store.is_dir() else None
        self._volume: tuple[str, volumes.Volume] | None = None
        self._examples: dict[str, tuple[Example, ExampleSource]] = {}
        self._samples: dict[tuple[str, str, str], set[str]] = collections.defaultdict(set)
        for path in datasets_in(root / "data"):
            for split in sorted(read_info(path)["splits"]):
                source = ExampleSource(path, split)
                for example in source:
                    meta = example.meta
                    if meta.get("qa"):
                        self._examples[example.id] = (example, source)
                    keys = ("origin", "licence", "modality")
                    origin, licence, modality = (str(meta.get(key) or "not stated") for key in keys)
                    sample = str(meta.get("sample") or meta.get("dataset") or example.id)
                    self._samples[origin, licence, modality].add(sample)

    def licences(self) -> list[Licence]:
        """Counts samples by origin, licence and modality, over all datasets."""
        return [Licence(*key, len(self._samples[key])) for key in sorted(self._samples)]

    def images(self, row: Mapping[str, Any]) -> RowImages:
        """Renders the slice or film of a row, and the labels of the expert that the model called.

        Raises:
          UserError: the dataset lacks the row's example, or an image is missing or damaged.
        """
        item = str(row["item"])
        name, _, question = item.rpartition("/q")
        if name not in self._examples:
            raise UserError(f"evaluation item {item!r}: no such example in the dataset; evaluate again")
        example, source = self._examples[name]
        ref = example.images[example.meta["qa"][int(question)].get("image", 0)]
        image, caption = self._render(ref, source)
        record = self._record(row, str(example.meta["input_key"]))
        if record is None or record.labels is None or ref.axis is None:
            return RowImages(images.encode_png(image), caption)
        overlay = expert_overlay(record, image, axis=ref.axis, index=ref.index)
        names = {i: name for i, name, *_ in visible_segments(record, axis=ref.axis, index=ref.index)}
        return RowImages(
            image=images.encode_png(image),
            caption=caption,
            overlay=images.encode_png(overlay),
            overlay_caption=f"labels of {record.expert}"
            + ("" if row.get("falsify_seed") is None else " (falsified)"),
            legend=tuple((_CSS[colour], label) for colour, label in legend(names, list(names)).items()),
        )

    def _record(self, row: Mapping[str, Any], input_key: str) -> Annotation | None:
        """The record shown to the model, falsified if its arm falsifies; None without a successful call."""
        calls = parse_turn(str(row.get("trigger") or "")).calls
        if not calls or self._store is None or row.get("expert_status") == "failed":
            return None
        record = self._store.get(input_key, calls[-1].expert, calls[-1].args)
        if record is None or record.status != "ok":
            return None
        seed = row.get("falsify_seed")
        return record if seed is None else falsified(record, int(seed))

    def _render(self, ref: ImageRef, source: ExampleSource) -> tuple[np.ndarray, str]:
        """(uint8 [H, W, 3] in physical proportions, caption)."""
        if ref.axis is None or ref.index is None:
            data = ref.data or paths.read_bytes(source.data_root / str(ref.path), _MAX_IMAGE_BYTES)
            film = images.decode_image(data)
            return _resize(film, film.shape[0], film.shape[1]), "2-D image"
        path = str(source.data_root / str(ref.path))
        if self._volume is None or self._volume[0] != path:
            self._volume = (path, volumes.load_volume(path, modality=ref.modality))
        volume = self._volume[1]
        image = _PREPROCESSING.slice_image(volume, ref.axis, ref.index, ref.window)
        across, up = [spacing for axis, spacing in enumerate(volume.spacing) if axis != ref.axis]
        height, width = image.shape[0] * float(up), image.shape[1] * float(across)
        return _resize(image, height, width), f"{PLANES[ref.axis]} slice {ref.index}"


def _resize(image: np.ndarray, height: float, width: float) -> np.ndarray:
    """Resizes the longer side to `SIDE` pixels, with the given proportions."""
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
