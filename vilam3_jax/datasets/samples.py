"""Sample images for trying the whole system: what one sample is, and how a folder of samples is read.

Two commands write such a folder, with the same `samples.json`, so that one dataset builder reads either:
`vilam3_jax.datasets.samples` (real images out of pinned public packages) and
`vilam3_jax.datasets.phantoms` (generated, no network).
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from etils import epath

from vilam3_jax.errors import UserError
from vilam3_jax.paths import PathLike, as_path, read_bytes, write_text_atomic

INDEX_NAME = "samples.json"
INDEX_VERSION = 1
_MAX_INDEX_BYTES = 64 << 20

Kind = Literal["ct", "mr", "film"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image or volume, with what is known of it.

    Attributes:
      name: unique in the folder, for example `totalsegmentator_ct`.
      path: the image file; for a DICOM series the folder that holds its slices.
      kind: `ct` and `mr` are volumes (`vilam3_jax.data.volumes.load_volume`); `film` is one 2-D picture
        (`vilam3_jax.data.images.load_film`; JPEG, PNG or a single DICOM film).
      modality: in words for prompts: `CT`, `MRI`, `chest X-ray` or `brain MRI slice`.
      patient: the subject. Samples of one subject share it.
      split_group: what must stay on one side of a train/held-out split. Never smaller than a patient: two templates
        averaged from the same people are two files but one group.
      licence: as the package states it, or `none stated`.
      origin: where the data comes from, package and version included, or `generated`.
      body_region: `abdomen`, `chest` or `head`.
      label_map: integer label volume on the grid of `path`, or None.
      label_names: label id -> name. Ids of the map that are missing here have no name and are not spoken of.
        A label that is named here but has no voxel in the map is *known to be absent*.
      label_source: whose word the labels or the class are: `TotalSegmentator reference map`, `radiologist mask`,
        `reference brain mask`, `class name of the film`, `generated label map`; None without labels.
      class_name: what a film shows (`normal`, `pneumonia`, `glioma`, `meningioma`, `pituitary`, `no tumor`), or None.
      window: display window (centre, width) in the volume's own units (HU for CT); None: scale by percentiles.
    """

    name: str
    path: epath.Path
    kind: Kind
    modality: str
    patient: str
    split_group: str
    licence: str
    origin: str
    body_region: str
    label_map: epath.Path | None = None
    label_names: dict[int, str] | None = None
    label_source: str | None = None
    class_name: str | None = None
    window: tuple[float, float] | None = None


def write_index(folder: PathLike, samples: list[Sample], assets: dict[str, dict[str, Any]]) -> None:
    """Writes `samples.json`; paths are stored relative to `folder`, so the folder may be moved.

    Args:
      folder: where the files lie; every path of the samples must be inside.
      samples: in the order in which `read_samples` shall return them.
      assets: name -> {"path": relative path, "licence": ..., "origin": ...} of files that are not images.
    """
    folder = as_path(folder)

    def relative(path: epath.Path | None) -> str | None:
        return None if path is None else path.relative_to(folder).as_posix()

    rows = []
    for sample in samples:
        row = {f.name: getattr(sample, f.name) for f in dataclasses.fields(Sample)}
        row |= {"path": relative(sample.path), "label_map": relative(sample.label_map)}
        rows.append(row)
    index = {"schema_version": INDEX_VERSION, "samples": rows, "assets": assets}
    write_text_atomic(folder / INDEX_NAME, json.dumps(index, indent=1) + "\n")


def _read_index(folder: epath.Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    if not path.exists():
        raise UserError(
            f"{path}: no such file; make the folder with `python -m vilam3_jax.datasets.samples --out {folder}` or "
            f"`python -m vilam3_jax.datasets.phantoms --out {folder}`"
        )
    try:
        index = json.loads(read_bytes(path, _MAX_INDEX_BYTES))
        version = index["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a samples index ({error!r}); write the folder again") from error
    if version != INDEX_VERSION:
        raise UserError(f"{path}: schema version {version}, this program reads {INDEX_VERSION}; write the folder again")
    return index


def read_samples(folder: PathLike) -> list[Sample]:
    """Reads the samples of a folder written by `fetch` or `make_phantoms`.

    Raises:
      UserError: no or damaged `samples.json`, or a file it names is missing.
    """
    folder = as_path(folder)
    samples = []
    for row in _read_index(folder)["samples"]:
        try:
            values = {f.name: row[f.name] for f in dataclasses.fields(Sample)}
            names, window = values["label_names"], values["window"]
            values["path"] = folder / values["path"]
            values["label_map"] = None if values["label_map"] is None else folder / values["label_map"]
            values["label_names"] = None if names is None else {int(k): str(v) for k, v in names.items()}
            values["window"] = None if window is None else (float(window[0]), float(window[1]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / INDEX_NAME}: damaged record {row!r:.80} ({error!r}); write the folder again") from error
        sample = Sample(**values)
        for path in (sample.path, sample.label_map):
            if path is not None and not path.exists():
                raise UserError(f"{path}: missing, sample {sample.name} needs it; write the folder again")
        samples.append(sample)
    return samples


def asset(folder: PathLike, name: str) -> epath.Path:
    """Path of a file that is not an image: weights, reports, a language model.

    Raises:
      UserError: the folder has no asset of that name; the message lists those it has.
    """
    folder = as_path(folder)
    assets = _read_index(folder)["assets"]
    if name not in assets:
        raise UserError(f"{folder}: no asset {name!r}; it has {', '.join(sorted(assets)) or 'none'}")
    path = folder / assets[name]["path"]
    if not path.exists():
        raise UserError(f"{path}: missing, asset {name} needs it; write the folder again")
    return path
