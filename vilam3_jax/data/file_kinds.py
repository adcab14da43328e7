"""What a file is, judged by its first bytes; the suffix only decides where the bytes leave it open.

The readers here cover what the field stores scans and pictures in. Everything else that people hand over
(phone photos, archives, failed downloads, exports of other programs) is named, with what to do about it.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import zlib
from typing import Literal

from vilam3_jax.data.image_headers import is_jpeg_ls
from vilam3_jax.data.nifti import pair_header
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path, check_passing

Reader = Literal["dicom", "nifti", "nifti pair", "nrrd", "metaimage", "picture"]

_START_BYTES = 1 << 16  # ISO 9660 has its mark at 32769
_UNPACKED_BYTES = 1 << 13

_AS_PICTURE = "convert it to PNG or JPEG"
_AS_VOLUME = "convert it to NIfTI (.nii.gz)"
_UNPACK = "unpack it and give the file or folder inside"
_FETCH = "fetch or export it again"
_SCAN_OR_PICTURE = "give a PNG, JPEG, DICOM or NIfTI file"


@dataclasses.dataclass(frozen=True)
class FileKind:
    """What a file is.

    Attributes:
      name: for people, such as "NIfTI volume" or "HEIC photo".
      reader: which reader takes it; None: it is not read.
      advice: what to do with a file that is not read, an imperative without a full stop; "" otherwise.
    """

    name: str
    reader: Reader | None = None
    advice: str = ""


EMPTY = FileKind("empty file", None, _FETCH)
FOLDER = FileKind("folder", None, "give a file in it")
DICOM = FileKind("DICOM file", "dicom")
DICOM_WITHOUT_PREAMBLE = FileKind("DICOM file without preamble", "dicom")
DICOMDIR = FileKind("DICOMDIR (index of a DICOM file set)", "dicom")
NIFTI = FileKind("NIfTI volume", "nifti")
NIFTI_PAIR = FileKind("NIfTI pair of .hdr and .img", "nifti pair")
ANALYZE = FileKind(
    "Analyze 7.5 pair of .hdr and .img, which does not say where left is",
    None,
    f"{_AS_VOLUME} where it is known",
)
NRRD = FileKind("NRRD volume", "nrrd")
NRRD_DETACHED = FileKind("NRRD header with its data in another file", "nrrd")
METAIMAGE = FileKind("MetaImage volume", "metaimage")
PNG, JPEG, WEBP, BMP, GIF, TIFF = (
    FileKind(f"{name} picture", "picture") for name in ("PNG", "JPEG", "WebP", "BMP", "GIF", "TIFF")
)
WHOLE_SLIDE = FileKind("whole-slide image", None, "export the region to look at as PNG")
GIT_LFS = FileKind("Git LFS pointer, not the file itself", None, "run `git lfs pull` where it came from")
GIT_ANNEX = FileKind("git-annex pointer, not the file itself", None, "run `git annex get` first")
GIT_XET = FileKind("Git Xet pointer, not the file itself", None, "fetch the file itself")
WEB_PAGE = FileKind(
    "web page (HTML), not the file itself", None, "fetch the file again, logged in if need be"
)
STORE_ERROR = FileKind("error message of an object store, not the file itself", None, "fetch it again")
STAND_INS = (GIT_LFS, GIT_ANNEX, GIT_XET, WEB_PAGE, STORE_ERROR)  # what lies there in place of the file
TEXT = FileKind("text file", None, _SCAN_OR_PICTURE)
UNKNOWN = FileKind("file of an unknown kind", None, _SCAN_OR_PICTURE)


def _picture(name: str) -> FileKind:
    return FileKind(name, None, _AS_PICTURE)


def _volume(name: str) -> FileKind:
    return FileKind(name, None, _AS_VOLUME)


def _archive(name: str) -> FileKind:
    return FileKind(name, None, _UNPACK)


def _video(name: str) -> FileKind:
    return FileKind(name, None, "save the frame to look at as PNG")


def _document(name: str) -> FileKind:
    return FileKind(name, None, "save the picture in it as PNG")


def _other(name: str) -> FileKind:
    return FileKind(name, None, _SCAN_OR_PICTURE)


_MAT = FileKind("MATLAB file", None, "save the array in it as NIfTI with its affine")
_NPY = FileKind(
    "NumPy array (.npy), which has no orientation or spacing", None, "save it as NIfTI with its affine"
)
_NPZ = FileKind(
    "NumPy archive (.npz), which has no orientation or spacing",
    None,
    "save its array as NIfTI with its affine",
)
_HDF5 = FileKind("HDF5 file", None, "save the array in it as NIfTI with its affine")
_MESH = FileKind("surface mesh", None, "give the scan that it was made from")
_TRACTS = FileKind("tractogram", None, "give the scan that it was made from")
_CHECKPOINT = FileKind("model checkpoint", None, _SCAN_OR_PICTURE)
_PICKLE = FileKind(
    "Python pickle, which is never opened because it can run programs", None, "save it as NIfTI or PNG"
)

_ENCRYPTED = FileKind("encrypted file", None, "decrypt it first")
_RAW_NUMBERS = FileKind("file of raw numbers", None, "give the header (.mhd or .nhdr) that belongs to it")

# (offset, bytes, kind), the first that matches. Ambiguous short marks stand last.
_MARKS: tuple[tuple[int, bytes, FileKind], ...] = (
    (128, b"DICM", DICOM),
    (0, b"DICM", FileKind("DICOM file that lost its preamble of 128 bytes", None, _FETCH)),
    (0, b"NRRD00", NRRD),
    (0, b"\x89PNG\r\n\x1a\n", PNG),
    (0, b"\x8aMNG\r\n\x1a\n", _video("MNG animation")),
    (0, b"\xff\xd8\xff", JPEG),
    (0, b"GIF87a", GIF),
    (0, b"GIF89a", GIF),
    (0, b"II*\0", TIFF),
    (0, b"MM\0*", TIFF),
    (0, b"II+\0", TIFF),
    (0, b"MM\0+", TIFF),
    (0, b"IIU\0", _picture("Panasonic raw photo")),
    (0, b"IIRO", _picture("Olympus raw photo")),
    (0, b"II\xbc\x01", _picture("JPEG XR picture")),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", _picture("JPEG 2000 picture")),
    (0, b"\xff\x4f\xff\x51", _picture("JPEG 2000 picture")),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", _picture("JPEG XL picture")),
    (0, b"8BPS", _picture("Photoshop picture (PSD)")),
    (0, b"gimp xcf", _picture("GIMP picture (XCF)")),
    (0, b"\x76\x2f\x31\x01", _picture("OpenEXR picture")),
    (0, b"#?RADIANCE", _picture("Radiance HDR picture")),
    (0, b"#?RGBE", _picture("Radiance HDR picture")),
    (0, b"qoif", _picture("QOI picture")),
    (0, b"DDS ", _picture("DDS texture")),
    (0, b"FUJIFILMCCD-RAW", _picture("Fujifilm raw photo")),
    (0, b"icns", _picture("Apple icon")),
    (0, b"\xd7\xcd\xc6\x9a", _picture("Windows metafile")),
    (40, b" EMF", _picture("Windows metafile")),
    (0, b"SIMPLE  =", _picture("FITS picture")),
    (0, b"%PDF", _document("PDF document")),
    (0, b"%!PS", _document("PostScript document")),
    (0, b"\xc5\xd0\xd3\xc6", _document("PostScript document")),
    (0, b"{\\rtf", _document("RTF document")),
    (0, b"AT&TFORM", _document("DjVu document")),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _document("old Microsoft Office document")),
    (0, b"MATLAB 5.0 MAT-file", _MAT),
    (0, b"MATLAB 7.3 MAT-file", _MAT),
    (0, b"\x89HDF\r\n\x1a\n", _HDF5),
    (512, b"\x89HDF\r\n\x1a\n", _HDF5),
    (0, b"CDF\x01", _volume("NetCDF file (MINC 1)")),
    (0, b"CDF\x02", _volume("NetCDF file (MINC 1)")),
    (0, b"\x93NUMPY", _NPY),
    (0, b"MATRIX7", _volume("ECAT 7 volume")),
    (0, b"!INTERFILE", _volume("Interfile header")),
    (0, b"# === DATA DESCRIPTION FILE", _volume("Philips PAR/REC volume")),
    (0, b"#!/usr/local/fdf", _volume("Varian FDF volume")),
    (0, b"# vtk DataFile", _volume("VTK file")),
    (0, b"mrtrix image", _volume("MRtrix volume")),
    (0, b"CTDATA-HEADER_V1", _volume("Scanco volume")),
    (0, b"mrtrix tracks", _TRACTS),
    (0, b"TRACK\0", _TRACTS),
    (0, b"ZISRAWFILE", FileKind("Zeiss CZI microscope file", None, WHOLE_SLIDE.advice)),
    (0, b"\xda\xce\xbe\x0a", FileKind("Nikon ND2 microscope file", None, WHOLE_SLIDE.advice)),
    (0, b"\xff\xff\xfe", _MESH),  # FreeSurfer
    (0, b"ply\n", _MESH),
    (0, b"ply\r\n", _MESH),
    (0, b"\x1a\x45\xdf\xa3", _video("Matroska or WebM video")),
    (0, b"FLV\x01", _video("Flash video")),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", _video("Windows Media video")),
    (0, b"\0\0\x01\xba", _video("MPEG video")),
    (0, b"\0\0\x01\xb3", _video("MPEG video")),
    (0, b"OggS", _video("Ogg file")),
    (0, b"ID3", _other("MP3 sound")),
    (0, b"PK\x05\x06", _archive("empty zip archive")),
    (0, b"PK\x07\x08", _archive("zip archive in parts")),
    (0, b"7z\xbc\xaf\x27\x1c", _archive("7z archive")),
    (0, b"Rar!\x1a\x07", _archive("RAR archive")),
    (257, b"ustar", _archive("tar archive")),
    (32769, b"CD001", _archive("disc image (ISO)")),
    (0, b"MSCF", _archive("Windows cabinet archive")),
    (0, b"BZh", _archive("bzip2-compressed file")),
    (0, b"\xfd7zXZ\0", _archive("xz-compressed file")),
    (0, b"\x28\xb5\x2f\xfd", _archive("Zstandard-compressed file")),
    (0, b"\x04\x22\x4d\x18", _archive("LZ4-compressed file")),
    (0, b"\x1f\x9d", _archive("compress (.Z) file")),
    (0, b"GGUF", _CHECKPOINT),
    (0, b"PAR1", _other("Parquet table")),
    (0, b"ARROW1", _other("Arrow table")),
    (0, b"SQLite format 3\0", _other("SQLite database")),
    (0, b"\x7fELF", _other("program")),
    (
        0,
        b"\0\x05\x16\x07",
        FileKind("macOS companion file (._)", None, "give the file without `._` in its name"),
    ),
    (0, b"\0\0\0\x01Bud1", _other("macOS folder settings (.DS_Store)")),
    (0, b"L\0\0\0\x01\x14\x02\0", FileKind("Windows shortcut", None, "give the file that it points to")),
    (0, b"Salted__", _ENCRYPTED),
    (0, b"-----BEGIN PGP MESSAGE", _ENCRYPTED),
    (0, b"version https://git-lfs", GIT_LFS),
    (0, b"/annex/objects/", GIT_ANNEX),
    (0, b"# xet version", GIT_XET),
    (0, b"\xff\x0a", _picture("JPEG XL picture")),
)

_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
_RIFF = {b"WEBP": WEBP, b"AVI ": _video("AVI video"), b"WAVE": _other("WAV sound")}
# Brands of ISO base media files; any other is a video.
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), _picture("AVIF picture")),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), _picture("HEIC photo")),
    **dict.fromkeys((b"mif1", b"msf1", b"heif"), _picture("HEIF photo")),
    b"crx ": _picture("Canon raw photo"),
    b"jxl ": _picture("JPEG XL picture"),
    b"jp2 ": _picture("JPEG 2000 picture"),
    b"M4A ": _other("MPEG-4 sound"),
}
# What has no mark of its own: believed only where the content is unknown.
_SUFFIXES = {
    ".nhdr": _volume("damaged NRRD header"),
    ".raw": _RAW_NUMBERS,
    ".zraw": _RAW_NUMBERS,
    ".rec": _volume("Philips PAR/REC volume"),
    ".brik": _volume("AFNI volume"),
    ".head": _volume("AFNI volume"),
    ".vmr": _volume("BrainVoyager volume"),
    ".vtc": _volume("BrainVoyager volume"),
    ".2dseq": _volume("Bruker volume"),
    ".mnc": _volume("MINC volume"),
    ".mat": _MAT,
    ".mgh": _volume("FreeSurfer volume (MGH)"),
    ".mrxs": WHOLE_SLIDE,
    ".stl": _MESH,
    ".obj": _MESH,
    ".tga": _picture("TGA picture"),
    ".pcx": _picture("PCX picture"),
    ".onnx": _CHECKPOINT,
    ".pb": _CHECKPOINT,
    ".dll": _other("program"),
    ".exe": _other("program"),
}
_SLIDE_SUFFIXES = (".svs", ".ndpi", ".scn", ".bif", ".qptiff", ".afi")
_RAW_PHOTO_SUFFIXES = (".dng", ".cr2", ".nef", ".arw", ".pef", ".srw", ".3fr", ".iiq", ".nrw")
_PROMISED = {  # suffix -> what it promises; the content was something else
    **dict.fromkeys((".dcm", ".dicom", ".ima"), "DICOM"),
    **dict.fromkeys((".nii", ".hdr"), "NIfTI"),
    ".nrrd": "NRRD",
    **dict.fromkeys((".mha", ".mhd"), "MetaImage"),
    ".png": "PNG",
    **dict.fromkeys((".jpg", ".jpeg"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    ".webp": "WebP",
    ".bmp": "BMP",
    ".gif": "GIF",
}


def identify(path: PathLike) -> FileKind:
    """Says what a file is by its first 64 KiB; for the .img of a pair, by the .hdr beside it.

    Raises:
      UserError: no such file, or not readable.
      UnavailableError: the disk or the network fails.
    """
    path = as_path(path)
    try:
        if path.is_dir():
            return FOLDER
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
        if header := pair_header(path):
            with header.open("rb") as file:
                kind = identify_bytes(file.read(_START_BYTES), header.name)
            if kind in (NIFTI, NIFTI_PAIR, ANALYZE):  # the reader refuses the first, which has its own voxels
                return kind
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # the last: no name for a file
        raise UserError(f"{path}: no such file; check the path") from error
    except OSError as error:
        check_passing(path, error)
        raise UserError(
            f"{path}: cannot be read ({error.strerror or 'no access'}); check the path"
        ) from error
    return identify_bytes(start, path.name)


def identify_bytes(start: bytes, name: str) -> FileKind:
    """Says what a file is.

    Args:
      start: its first bytes, 64 KiB or the whole file. With less, some kinds stay unknown.
      name: the file's name; its suffix only decides between kinds that the content allows.
    """
    name = name.lower()
    return _by_content(start, name) or _by_suffix(name)


def refusal(path: PathLike, kind: FileKind) -> UserError:
    """The error for a file that cannot be taken here: one sentence with what it is and what to do."""
    return UserError(f"{path}: {sentence(kind)}")


def sentence(kind: FileKind) -> str:
    """What the file is and what to do, where a picture was given for a scan or the other way round, too."""
    if kind.reader == "picture":
        return f"{kind.name}, not a scan; give a NIfTI, NRRD, MetaImage or DICOM file"
    if kind.reader is not None:
        return f"{kind.name}, not a picture; open it as a scan"
    return f"{kind.name}; {kind.advice or _SCAN_OR_PICTURE}"


def _by_content(start: bytes, name: str) -> FileKind | None:
    if not start:
        return EMPTY
    for offset, mark, kind in _MARKS:
        if start.startswith(mark, offset):
            return _refined(kind, start, name)
    if start.startswith(b"\x1f\x8b"):
        return _gzip(start, name)
    if start.startswith(b"PK\x03\x04"):
        return _zip(start)
    if start.startswith(b"RIFF") and start[8:12] in _RIFF:
        return _RIFF[start[8:12]]
    if start[4:8] == b"ftyp":
        return _iso_media(start)
    if start[4:8] in (b"moov", b"mdat", b"wide"):
        return _video("QuickTime video")
    if (
        start[:2] == b"BM"
        and len(start) > 17
        and struct.unpack_from("<I", start, 14)[0] in (12, 40, 52, 56, 64, 108, 124)
    ):
        return BMP
    return (
        _nifti(start)
        or _mgh(start, name)
        or (DICOM_WITHOUT_PREAMBLE if _is_bare_dicom(start) else None)
        or _checkpoint(start)
        or _icon(start)
        or _late_pdf(start)
        or _text(start, name)
        or _zeros(start)
    )


def _by_suffix(name: str) -> FileKind:
    stem = name.removesuffix(".gz")
    suffix = stem[stem.rfind(".") :] if "." in stem else ""
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    if suffix == ".img":
        return FileKind(
            "voxels (.img) without a usable .hdr", None, "put the .hdr of the same name beside it"
        )
    if suffix in _PROMISED:
        return FileKind(f"file named {suffix} without {_PROMISED[suffix]} data inside", None, _FETCH)
    return UNKNOWN


def _refined(kind: FileKind, start: bytes, name: str) -> FileKind:
    """Kinds that share a mark."""
    if kind is DICOM and _media_storage_class(start) == b"1.2.840.10008.1.3.10":
        return DICOMDIR
    if kind is NRRD and re.search(rb"^data ?file:", start, re.MULTILINE | re.IGNORECASE):
        header = re.split(rb"\r?\n\r?\n", start, maxsplit=1)[0]
        return NRRD_DETACHED if re.search(rb"^data ?file:", header, re.MULTILINE | re.IGNORECASE) else NRRD
    if kind is TIFF:
        if name.endswith(_SLIDE_SUFFIXES) or b"Aperio" in start:
            return WHOLE_SLIDE
        if name.endswith(_RAW_PHOTO_SUFFIXES) or start[8:10] == b"CR":
            return _picture("raw photo of a camera")
    if kind is JPEG and is_jpeg_ls(start):
        return _picture("JPEG-LS picture")
    if kind is JPEG and name.endswith(".mrxs"):
        return WHOLE_SLIDE
    if kind is _HDF5 and name.endswith((".mnc", ".mnc2")):
        return _volume("MINC 2 volume")
    return kind


def _media_storage_class(start: bytes) -> bytes:
    """(0002,0002) of the file meta information, which is always explicit little endian."""
    place = 132
    while len(start) >= place + 8:
        group, element = struct.unpack_from("<HH", start, place)
        if group != 2:
            break
        if start[place + 4 : place + 6] in (b"OB", b"UN", b"OW", b"SQ", b"UT"):
            length, value = int.from_bytes(start[place + 8 : place + 12], "little"), place + 12
        else:
            length, value = struct.unpack_from("<H", start, place + 6)[0], place + 8
        if element == 2:
            return start[value : value + length].rstrip(b"\0 ")
        place = value + length
    return b""


_VRS = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT "
    b"UV".split()
)


def _is_bare_dicom(start: bytes) -> bool:
    """Whether the file starts with DICOM elements in ascending order, as old archives have it."""
    for order in "<>":
        first = _element(start, 0, order)
        if first is None or first[0] >> 16 not in (0x0002, 0x0008):
            continue
        tag, after = first
        if after == len(start):
            return True
        following = _element(start, after, order)
        if following is not None and tag < following[0] <= 0x7FE0_FFFF and following[0] >> 16 <= 0x0028:
            return True
    return False


def _element(start: bytes, place: int, order: str) -> tuple[int, int] | None:
    """(tag, end) of the element at `place`; None where none can be."""
    if len(start) < place + 8:
        return None
    group, element = struct.unpack_from(f"{order}HH", start, place)
    vr, value = start[place + 4 : place + 6], place + 8
    if vr in (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"):
        if len(start) < place + 12:
            return None
        length, value = struct.unpack_from(f"{order}I", start, place + 8)[0], place + 12
    elif vr in _VRS:
        length = struct.unpack_from(f"{order}H", start, place + 6)[0]
    elif order == "<":  # big endian is always explicit
        length = struct.unpack_from("<I", start, place + 4)[0]
    else:
        return None
    if length % 2 or value + length > len(start):
        return None
    return group << 16 | element, value + length


def _nifti(start: bytes) -> FileKind | None:
    size = start[:4]
    if size in (b"\x5c\x01\0\0", b"\0\0\x01\x5c"):  # 348
        magic = start[344:348]
        if magic == b"n+1\0":
            return NIFTI
        if magic == b"ni1\0":
            return NIFTI_PAIR
        return ANALYZE if len(start) >= 348 else None
    if size in (b"\x1c\x02\0\0", b"\0\0\x02\x1c"):  # 540
        return {b"n+2\0": NIFTI, b"ni2\0": NIFTI_PAIR}.get(start[4:8])
    return None


def _mgh(start: bytes, name: str) -> FileKind | None:
    if len(start) < 28 or not name.endswith((".mgh", ".mgz", ".mgh.gz")):
        return None
    return _volume("FreeSurfer volume (MGH)") if start[:4] == b"\0\0\0\x01" else None


def _gzip(start: bytes, name: str) -> FileKind:
    try:
        unpacked = _unpacked_start(start)
    except zlib.error:
        return FileKind("damaged gzip file", None, _FETCH)
    if unpacked.startswith(b"\x1f\x8b"):
        return _archive("file that was compressed twice with gzip")
    inner = name if name.endswith(".mgz") else name.removesuffix(".gz")
    kind = _by_content(unpacked, inner) or _by_suffix(inner)
    if kind is EMPTY:
        return FileKind("gzip file with nothing inside", None, _FETCH)
    if kind.reader in ("nifti", "nifti pair") or kind is ANALYZE or kind.name.startswith("FreeSurfer volume"):
        return kind
    if kind.name == "tar archive":
        return _archive("tar.gz archive")
    if kind in (UNKNOWN, TEXT):
        return _archive("gzip-compressed file")
    if kind.reader is not None:
        return _archive(f"gzip-compressed file with a {kind.name} inside")
    return FileKind(f"gzip-compressed {kind.name}", None, kind.advice)


def _unpacked_start(start: bytes) -> bytes:
    """The first bytes inside a gzip file, which may consist of many small members."""
    unpacked = b""
    while start.startswith(b"\x1f\x8b") and len(unpacked) < _UNPACKED_BYTES:
        member = zlib.decompressobj(wbits=31)
        unpacked += member.decompress(start, _UNPACKED_BYTES - len(unpacked))
        start = member.unused_data
    return unpacked


def _zip(start: bytes) -> FileKind:
    if start[6:7] and start[6] & 1:
        return FileKind(
            "encrypted zip archive", None, "unpack it with its password and give the file or folder inside"
        )
    length = int.from_bytes(start[26:28], "little")
    first = start[30 : 30 + length]
    if first.endswith(b".npy"):
        return _NPZ
    if first.endswith(b"data.pkl") or first.endswith(b".data/serialization_id"):
        return FileKind("PyTorch file", None, "save the array in it as NIfTI or PNG")
    if first == b"[Content_Types].xml" or first.startswith((b"word/", b"ppt/", b"xl/", b"_rels/")):
        return _document("Microsoft Office document")
    if first == b"mimetype":
        return _document("OpenDocument or EPUB document")
    return _archive("zip archive")


def _iso_media(start: bytes) -> FileKind:
    size = max(16, int.from_bytes(start[:4], "big"))
    brands = [start[8:12], *(start[i : i + 4] for i in range(16, min(size, 256, len(start) - 3), 4))]
    kinds = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
    if not kinds:
        return _video("MPEG-4 or QuickTime video")
    heif = _BRANDS[b"mif1"]
    return next((kind for kind in kinds if kind is not heif), heif)


def _checkpoint(start: bytes) -> FileKind | None:
    if len(start) > 10 and start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 1 << 27:
        return _CHECKPOINT  # safetensors
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _PICKLE
    return None


def _icon(start: bytes) -> FileKind | None:
    """A Windows icon or cursor, by its first entry: its mark alone is too short."""
    if start[:4] not in (b"\0\0\1\0", b"\0\0\2\0") or len(start) < 22:
        return None
    count, place = struct.unpack_from("<H", start, 4)[0], struct.unpack_from("<I", start, 18)[0]
    is_entry = start[9] == 0 and 0 < count <= 256 and 6 + 16 * count <= place < 1 << 24
    return _picture("Windows icon") if is_entry else None


def _late_pdf(start: bytes) -> FileKind | None:
    """PDF readers look for the mark in the first 1024 bytes."""
    return _document("PDF document") if re.search(rb"%PDF-\d\.\d", start[:1024]) else None


def _text(start: bytes, name: str) -> FileKind | None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) and len(start) % 2 == 0:
        return TEXT  # UTF-16
    head = start[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"\w+\s*=", head) and re.search(rb"^NDims\s*=\s*\d", head, re.MULTILINE):
        return METAIMAGE  # whose voxels may follow at once
    if re.match(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s+\d+|P7\nWIDTH|P[Ff]\n\d", head):
        return _picture("PNM picture")
    if head.startswith(b"solid ") and (b"facet" in head or name.endswith(".stl")):
        return _MESH
    lower = head.lower()
    if lower.startswith((b"<!doctype html", b"<head", b"<body")) or b"<html" in lower[:512]:
        return WEB_PAGE
    if not _is_plain(head):
        return None
    if lower.startswith(b"<"):
        return _xml(lower)
    if re.match(rb'[\[{\s]*"[0-9a-f]{8}"\s*:\s*\{', lower):
        return FileKind("DICOM data as JSON", None, "export it as a DICOM file")
    if re.match(rb'\{|\[\s*[\[{"\d\]-]', lower):
        return _other("JSON text")
    if lower.startswith(b"data:image/") or head.startswith((b"iVBORw0KGgo", b"/9j/")):
        return FileKind("picture written as base64 text", None, "decode it to a PNG or JPEG file")
    if re.fullmatch(rb"[^\n]*\.git/annex/objects/[^\n]*\n?", head):
        return GIT_ANNEX  # a symbolic link that became a file
    if re.match(rb"type\s*=\s*(string|integer|float)-attribute", lower):
        return _volume("AFNI volume")
    if name.endswith(".obj") and re.search(rb"^v ", head, re.MULTILINE):
        return _MESH
    if name.endswith((".csv", ".tsv")):
        return _other("table of text (CSV)")
    return TEXT


def _xml(lower: bytes) -> FileKind:
    for mark, kind in (
        (b"<svg", _picture("SVG drawing")),
        (b"<vtkfile", _volume("VTK file")),
        (b"<gifti", _MESH),
        (b"<nativedicommodel", FileKind("DICOM data as XML", None, "export it as a DICOM file")),
        (b"<error>", STORE_ERROR),
    ):
        if mark in lower:
            return kind
    return _other("XML text")


def _is_plain(head: bytes) -> bool:
    """Whether these are letters in UTF-8 or in an older encoding of Europe."""
    if not head or _CONTROL.search(head):
        return False
    high = sum(byte >= 0x80 for byte in head)
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3 or high < 0.3 * len(head)  # a character may be cut at the end
    return True


def _zeros(start: bytes) -> FileKind | None:
    if start.strip(b"\0"):
        return None
    return FileKind("file of zero bytes", None, "it was not written or fetched to the end; fetch it again")
