"""Images and licences of the samples behind the evaluation."""

from __future__ import annotations

import collections
import dataclasses
import io
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import to_hex
from PIL import Image

from vilam3_jax.data import images
from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.data.experts.falsify import falsified
from vilam3_jax.data.experts.grammar import parse_turn
from vilam3_jax.data.experts.overlays import PALETTE, expert_overlay, slice_legend
from vilam3_jax.data.experts.store import Annotation, AnnotationStore
from vilam3_jax.data.preprocessing import DEFAULT_PREPROCESSING, Preprocessing
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.data.render import ImageReader
from vilam3_jax.data.tfds_folder import datasets_in, read_info
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

SIDE = 288  # Pixels of the longer side: sharp on a phone, and two dozen images stay below 2 MB.
PLANES = ("sagittal", "coronal", "axial")
_CSS = {name: to_hex(rgb) for name, rgb in PALETTE}
_FILM_CACHE_BYTES = 64 << 20  # films are shown once, in the order of the page


@dataclasses.dataclass(frozen=True)
class RowImages:
    """Images shown with an evaluation row.

    Attributes:
      image: the encoded slice or film.
      caption: its plane and index.
      overlay: the same slice with the expert's labels, or None.
      overlay_caption: names the expert.
      falsified: whether the labels are deliberately wrong.
      legend: (CSS colour, name) of the labels on the slice.
    """

    image: bytes
    caption: str
    overlay: bytes | None = None
    overlay_caption: str = ""
    falsified: bool = False
    legend: tuple[tuple[str, str], ...] = ()


class Licence(NamedTuple):
    """Number of samples with one origin, licence and modality."""

    origin: str
    licence: str
    modality: str
    samples: int


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encodes [H, W, 3] uint8 as JPEG, a fifth of the size of a PNG; thin colored labels stay sharp."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=85, subsampling=0)
    return buffer.getvalue()


class Samples:
    """Reads the examples of prepared data, and what experts said about them."""

    def __init__(
        self,
        data: paths.PathLike,
        annotations: paths.PathLike | None = None,
        *,
        split: str | None = None,
        wanted: Collection[str] | None = None,
        preprocessing: Preprocessing = DEFAULT_PREPROCESSING,
        encode: Callable[[np.ndarray], bytes] = images.encode_png,
    ) -> None:
        """Opens the datasets; decodes no image yet.

        Args:
          data: folder that `vilam3 prepare` wrote.
          annotations: annotation store. If it is None or does not exist, no overlays are drawn.
          split: the only split to read; None: all.
          wanted: ids of the examples to keep in memory; None: all.
          preprocessing: how the model shows slices.
          encode: turns uint8 [H, W, 3] into the bytes of `RowImages`.

        Raises:
          UserError: no dataset in `data`, or a damaged one.
        """
        store = paths.as_path(annotations) if annotations is not None else None
        self._store = AnnotationStore(store) if store is not None and store.is_dir() else None
        self._reader = ImageReader(None, preprocessing, image_cache_bytes=_FILM_CACHE_BYTES)
        self._encode = encode
        self._examples: dict[str, tuple[Example, ExampleSource]] = {}
        self._samples: dict[tuple[str, str, str], set[str]] = collections.defaultdict(set)
        for path in datasets_in(data):
            for name in sorted(read_info(path)["splits"]):
                if split not in (None, name):
                    continue
                source = ExampleSource(path, name)
                for example in source:
                    meta = example.meta
                    if meta.get("qa") and (wanted is None or example.id in wanted):
                        self._examples[example.id] = (example, source)
                    keys = ("origin", "licence", "modality")
                    origin, licence, modality = (str(meta.get(key) or "not stated") for key in keys)
                    sample = str(meta.get("sample") or meta.get("dataset") or example.id)
                    self._samples[origin, licence, modality].add(sample)

    def licences(self) -> list[Licence]:
        """Counts samples by origin, licence and modality, over all datasets."""
        return [Licence(*key, len(self._samples[key])) for key in sorted(self._samples)]

    def place(self, row: Mapping[str, Any]) -> tuple[str, ImageRef]:
        """Identifies the image of a row: equal for all questions about one slice or film.

        Raises:
          UserError: the dataset lacks the row's example, or asks something else there by now.
        """
        example, source, position = self._find(row)
        qa = example.meta["qa"][position]
        if str(qa["question"]) != row.get("question"):
            raise UserError(f"evaluation item {row['item']!r}: the dataset was changed since; evaluate again")
        return str(source.data_root), example.images[qa.get("image", 0)]

    def _find(self, row: Mapping[str, Any]) -> tuple[Example, ExampleSource, int]:
        """(example, its dataset, position of the question) of a row."""
        item = str(row["item"])
        name, _, number = item.rpartition("/q")
        example, source = self._examples.get(name, (None, None))
        position = int(number) if number.isdecimal() else -1
        if example is None or source is None or not 0 <= position < len(example.meta["qa"]):
            raise UserError(f"evaluation item {item!r}: no such example in the dataset; evaluate again")
        return example, source, position

    def images(self, row: Mapping[str, Any]) -> RowImages:
        """Renders the slice or film of a row, and the labels of the expert that the model called.

        Raises:
          UserError: the dataset lacks the row's example, or an image is missing or damaged.
        """
        example, source, position = self._find(row)
        ref = example.images[example.meta["qa"][position].get("image", 0)]
        image, caption = self._render(ref, source)
        record = self._record(row, str(example.meta["input_key"]))
        if record is None or record.labels is None or ref.axis is None:
            return RowImages(self._encode(image), caption)
        is_false = row.get("falsify_seed") is not None
        overlay = expert_overlay(record, image, axis=ref.axis, index=ref.index)
        legend = slice_legend(record, axis=ref.axis, index=ref.index)
        return RowImages(
            image=self._encode(image),
            caption=caption,
            overlay=self._encode(overlay),
            overlay_caption=f"labels of {record.expert}{' (falsified)' if is_false else ''}",
            falsified=is_false,
            legend=tuple((_CSS[colour], label) for colour, label in legend.items()),
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
            if ref.data is None:
                film = self._reader.read(ref, source.data_root)
            else:  # may be pixels of `--decode-images`, which a reader of original sizes refuses
                film = images.decode_image(ref.data, alpha=self._reader.preprocessing.alpha)
            return _resize(film, film.shape[0], film.shape[1]), "2-D image"
        volume = self._reader.volume(ref, source.data_root)
        image = self._reader.preprocessing.slice_image(volume, ref.axis, ref.index, ref.window)
        across, up = [spacing for axis, spacing in enumerate(volume.spacing) if axis != ref.axis]
        height, width = image.shape[0] * float(up), image.shape[1] * float(across)
        return _resize(image, height, width), f"{PLANES[ref.axis]} slice {ref.index}"


def _resize(image: np.ndarray, height: float, width: float) -> np.ndarray:
    """Resizes the longer side to `SIDE` pixels, with the given proportions."""
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
