"""Images of a source: in folders, or in a zip archive that is read without extraction."""

from __future__ import annotations

import dataclasses
import functools
import os
import zipfile
import zlib
from collections.abc import Sequence

from vilam3_jax.data import file_kinds
from vilam3_jax.data.examples import ImageRef, path_problem
from vilam3_jax.datasets.dataset import MAX_IMAGE_BYTES, Context, SkipItem
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_KIND_BYTES = 1 << 16
_OPEN_ARCHIVES = 4
# Errors of zipfile for members that are damaged, encrypted or compressed by an unknown method.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OverflowError)


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Location of a source's images. Picklable.

    Attributes:
      folder: folder below the root, "" for the root, or None.
      archive: zip archive below the root with the images that the folder lacks, or None.
    """

    folder: str | None = None
    archive: str | None = None

    def ref(self, context: Context, name: object) -> ImageRef:
        """The image that the source calls `name`; images of an archive are always stored in the record.

        Raises:
          SkipItem: `name` is not a path, or the file is missing, too large, damaged or not an image.
        """
        if not isinstance(name, str) or not name.strip():
            raise SkipItem("names no image")
        name = name.strip().replace("\\", "/")
        if reason := path_problem(name):
            raise SkipItem(reason)
        if self.folder is not None:
            path = f"{self.folder}/{name}" if self.folder else name
            if self.archive is None or paths.exists(paths.as_path(context.root) / path):
                return checked(context.image(path), name)
        if self.archive is None:
            raise SkipItem(f"image {name} is missing")
        return stored_image(_member(context, self.archive, name), name)


def find_image_files(source: SourceFolder, folders: Sequence[str], archives: Sequence[str]) -> ImageFiles:
    """Finds the images: the first existing one of `folders` and of `archives`.

    Raises:
      UserError: neither exists, or the archive is damaged.
    """
    folder, archive = source.find(*folders), source.find(*archives)
    if folder is None and archive is None:
        source.require([*folders, *archives])
    if archive is not None:
        _open_archive.cache_clear()  # the archive may have been replaced
        _open_archive(str(source.root), archive)
    return ImageFiles(folder, archive)


def stored_image(data: bytes, name: str) -> ImageRef:
    """An image stored in the record.

    Raises:
      SkipItem: `data` is not a supported image.
    """
    return checked(ImageRef(data=data), name)


def checked(image: ImageRef, name: str) -> ImageRef:
    """Returns `image` if its first bytes are those of an image, not of a web page or a broken download.

    Raises:
      SkipItem: they are not.
    """
    if image.data is not None:
        kind = file_kinds.identify_bytes(image.data[:_KIND_BYTES], name.rsplit("/", 1)[-1])
        if kind.reader != "image":
            raise SkipItem(f"image {name} is not an image file: {kind.name}")
    return image


def image_or_dicom(context: Context, path: str) -> ImageRef:
    """An image from `Context.image`; a DICOM file as a path, so that the loader applies its window.

    Raises:
      SkipItem: missing, too large, outside of the root, or not an image.
    """
    ref = context.image(path)
    if ref.data is not None and file_kinds.identify_bytes(ref.data[:_KIND_BYTES], path).reader == "dicom":
        return ImageRef(path=os.path.normpath(path.replace("\\", "/")))
    return checked(ref, path)


@functools.lru_cache(maxsize=_OPEN_ARCHIVES)
def _open_archive(root: str, archive: str) -> zipfile.ZipFile:
    """Opens an archive once per process: listing half a million members takes seconds."""
    path = paths.as_path(root) / archive
    try:
        return zipfile.ZipFile(path.open("rb"))
    except (*_ZIP_ERRORS, ValueError) as error:
        raise UserError(f"{path}: is not a zip archive ({error}); download it again") from error


def _member(context: Context, archive: str, name: str) -> bytes:
    path = context.file(archive)
    opened = _open_archive(context.root, archive)
    for member in (name, f"images/{name}"):
        try:
            info = opened.getinfo(member)
        except KeyError:
            continue
        if not 0 < info.file_size <= MAX_IMAGE_BYTES:
            raise SkipItem(f"image {name} has {info.file_size} bytes; up to {MAX_IMAGE_BYTES} are read")
        try:
            with opened.open(info) as file:
                data = file.read(MAX_IMAGE_BYTES + 1)
        except _ZIP_ERRORS as error:
            raise SkipItem(f"image {name} in {archive} is damaged ({type(error).__name__})") from error
        except OSError as error:
            paths.check_passing(path, error)
            raise SkipItem(f"image {name} in {archive} cannot be read") from error
        if len(data) > MAX_IMAGE_BYTES:
            raise SkipItem(f"image {name} is larger than its archive states")
        return data
    raise SkipItem(f"image {name} is not in {archive}")
