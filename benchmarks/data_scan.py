"""How many files a second does `vilam3 data scan` look at, and in how much memory?

Run: python benchmarks/data_scan.py [--files=20000] [--workers=N] [--folder=DIR]

Prints files a second and core by the clock, and by CPU time of all processes: the latter is what a machine
that has nothing else to do reaches, as long as its disk keeps up.

Writes a folder of CT series of 250 slices: headers of about 150 elements with a sequence and private blocks,
512 x 512 pixels of 16 bits. The pixels are holes in sparse files: a scan that read them would show in the
time, and the disk holds only the headers. A folder that is there is used again.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from vilam3_jax.data.limits import Limits
from vilam3_jax.data.scan import report
from vilam3_jax.data.scan.collect import collect

SLICES = 250
PIXEL_BYTES = 512 * 512 * 2
ELEMENTS = 100  # of the dictionary, beside those that are set by name and the private ones
_VALUES = {
    "LO": "A text of usual length",
    "SH": "SHORT TEXT",
    "DS": "1.25",
    "IS": "12",
    "DA": "20240131",
    "TM": "101530.25",
    "US": 3,
    "CS": "CODE",
}
# Stand in the template where every file has its own text of the same length.
_INSTANCE, _SERIES, _STUDY = "2.25.1000000001", "2.25.2000000001", "2.25.3000000001"
_POSITION, _NUMBER = "7654.3", "987654"


def template() -> bytes:
    """One CT file up to its pixels."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, _INSTANCE
    header.SeriesInstanceUID, header.StudyInstanceUID = _SERIES, _STUDY
    header.Modality, header.BodyPartExamined, header.ImageType = (
        "CT",
        "CHEST",
        ["ORIGINAL", "PRIMARY", "AXIAL"],
    )
    header.PatientName, header.PatientID, header.InstanceNumber = "Test^Person", "0001", _NUMBER
    header.Rows = header.Columns = 512
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 1
    header.ImagePositionPatient = ["-200", "-200", _POSITION]
    header.ImageOrientationPatient, header.PixelSpacing = [1, 0, 0, 0, 1, 0], ["0.78125", "0.78125"]
    header.SliceThickness, header.RescaleSlope, header.RescaleIntercept = "1.3", "1", "-1024"
    header.RescaleType, header.WindowCenter, header.WindowWidth = "HU", "40", "400"
    header.FrameOfReferenceUID, header.PatientPosition = "2.25.4", "HFS"
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "RPID16", "RADLEX", "CT CHEST"
    header.ProcedureCodeSequence = [code, code]
    plain = (
        (tag, entry[0])
        for tag, entry in DicomDictionary.items()
        if 0x00080000 < tag < 0x00280000 and entry[0] in _VALUES and entry[1] == "1" and tag not in header
    )
    for _, (tag, vr) in zip(range(ELEMENTS), plain, strict=False):
        header.add_new(tag, vr, _VALUES[vr])
    for group in (0x0009, 0x0029):
        block = header.private_block(group, "SCANNER MAKER 01", create=True)
        for offset in range(10):
            block.add_new(offset, "LO", f"private text {offset}")
    header.PixelData = bytes(PIXEL_BYTES)
    buffer = io.BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()[:-PIXEL_BYTES]


def write_files(folder: Path, count: int) -> None:
    """Writes `count` slices in folders of one series, four series a study."""
    start = template()
    for number in range(count):
        series, slice_ = divmod(number, SLICES)
        own = {
            _INSTANCE: f"2.25.1{number:09d}",
            _SERIES: f"2.25.2{series:09d}",
            _STUDY: f"2.25.3{series // 4:09d}",
            _POSITION: f"{slice_ * 1.3:06.1f}",
            _NUMBER: f"{slice_ + 1:06d}",
        }
        content = start
        for text, value in own.items():
            content = content.replace(text.encode(), value.encode())
        place = folder / f"{series:05d}"
        if slice_ == 0:
            place.mkdir(parents=True, exist_ok=True)
        with open(place / f"{slice_:05d}", "wb") as file:
            file.write(content)
            file.truncate(len(content) + PIXEL_BYTES)


def measure(folder: Path, workers: int) -> None:
    """Scans `folder` and prints what it took."""
    start = time.perf_counter()
    found = collect(folder, workers, Limits())
    text = report.to_text(report.to_json(found, time.perf_counter() - start))
    seconds = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in used)
    files = len(found.files)
    print(text)
    print(
        f"{files} files, {seconds:.1f} s, {workers} workers: {files / seconds:.0f} files/s, "
        f"{files / seconds / workers:.0f} files/s/core by the clock, {files / cpu:.0f} by CPU time; "
        f"peak memory {used[0].ru_maxrss >> 10} MiB, of the largest worker {used[1].ru_maxrss >> 10} MiB"
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", help="where the files lie or are written (default: a temporary folder)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary) / str(options.files)
        if not folder.exists():
            write_files(folder, options.files)
        measure(folder, options.workers)


if __name__ == "__main__":
    main(sys.argv[1:])
