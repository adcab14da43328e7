"""Builders of DICOM images and lookup tables, and the window functions, for tests of DICOM pixels."""

from __future__ import annotations

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    generate_uid,
)

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
TAGS8 = {"Rows": 16, "Columns": 16, "SamplesPerPixel": 1, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
COLOURS = np.random.default_rng(3).integers(0, 256, (6, 8, 3)).astype(np.uint8)
TAGS_COLOURS = TAGS8 | {"Rows": 6, "Columns": 8, "SamplesPerPixel": 3, "PlanarConfiguration": 0}


def dataset(pixels, photometric="MONOCHROME2", *, syntax=ExplicitVRLittleEndian, **tags):
    """An image in memory: `pixels` is [H, W], [H, W, 3] or bytes of the given Rows and Columns."""
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = syntax
    d.SOPClassUID, d.SOPInstanceUID = DigitalXRayImageStorageForPresentation, generate_uid()
    d.Modality, d.PhotometricInterpretation = "DX", photometric
    d.PixelRepresentation = 0
    if isinstance(pixels, np.ndarray):
        d.Rows, d.Columns = pixels.shape[:2]
        d.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
        d.BitsAllocated = d.BitsStored = 8 * pixels.dtype.itemsize
        d.HighBit = d.BitsStored - 1
        d.PixelRepresentation = int(pixels.dtype.kind == "i")
        if pixels.ndim == 3:
            d.PlanarConfiguration = 0
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        pixels = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    d.PixelData = pixels + b"\0" * (len(pixels) % 2)
    d["PixelData"].VR = "OB" if tags.get("BitsAllocated", d.get("BitsAllocated")) == 8 else "OW"
    for key, value in tags.items():
        if value is None:
            d.pop(key, None)
        else:
            setattr(d, key, value)
    if syntax.is_encapsulated and not d.PixelData.startswith(b"\xfe\xff\x00\xe0"):
        d.PixelData = encapsulate([pixels])
    if syntax.is_encapsulated:
        d["PixelData"].VR = "OB"
        d["PixelData"].is_undefined_length = True
    return d


def save(path, d):
    d.save_as(path, enforce_file_format=True)
    return path


def with_text(path, d, old, new):
    """Writes an image and replaces bytes of the file, for values that pydicom does not write."""
    raw = save(path, d).read_bytes()
    assert raw.count(old) == 1 and len(old) == len(new)
    path.write_bytes(raw.replace(old, new))
    return path


def lut(entries, first=0, bits=16, vr="US", descriptor_vr="US"):
    item = Dataset()
    item.add_new("LUTDescriptor", descriptor_vr, [len(entries) % 65536, first, bits])
    item.add_new("LUTData", vr, entries if vr == "US" else np.asarray(entries, "<u2").tobytes())
    return item


def palette_tags(tables, bits=16, first=0, segmented=False):
    tags = {}
    for colour, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, first, bits]
        key = f"{colour}PaletteColorLookupTableData"
        tags[f"Segmented{key}" if segmented else key] = table
    return tags


def curve(centre, width, function, x):
    """PS3.3 C.11.2.1.2.1 and C.11.2.1.3, for outputs of 0 to 255, in the notation of the standard."""
    if function == "LINEAR":
        if x <= centre - 0.5 - (width - 1) / 2:
            return 0
        if x > centre - 0.5 + (width - 1) / 2:
            return 255
        return ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255
    if function == "LINEAR_EXACT":
        return (
            0
            if x <= centre - width / 2
            else 255
            if x > centre + width / 2
            else (x - centre) / width * 255 + 127.5
        )
    return 255 / (1 + np.exp(-4 * (x - centre) / width))
