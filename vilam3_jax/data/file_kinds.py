"""Identifies files by content; the suffix decides only where the content is ambiguous.

The readers cover the formats in which scans and images are stored. Any other file (phone photos, archives,
failed downloads, exports of other programs) is named, with advice on what to do with it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import struct
import zlib
from typing import Literal

from vilam3_jax.data.image_headers import is_jpeg_ls
from vilam3_jax.data.nifti import pair_header
from vilam3_jax.data.volume_io import wrap_file_errors
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path

Reader = Literal["dicom", "nifti", "nifti pair", "nrrd", "metaimage", "image"]

_START_BYTES = 1 << 16  # ISO 9660 has its signature at 32769
_DECOMPRESSED_BYTES = 1 << 13
_FETCH = "fetch or export it again"
_SCAN_OR_IMAGE = "give a PNG, JPEG, DICOM or NIfTI file"


@dataclasses.dataclass(frozen=True)
class FileKind:
    """The kind of a file."""

    name: str  # for messages, such as "NIfTI volume" or "HEIC photo"
    reader: Reader | None = None  # the reader of this kind; None: unsupported
    advice: str = ""  # what to do with an unsupported file, an imperative without a full stop; "" otherwise


# Unsupported kinds by advice.
_broken = functools.partial(FileKind, advice=_FETCH)
_image = functools.partial(FileKind, advice="convert it to PNG or JPEG")
_volume = functools.partial(FileKind, advice="convert it to NIfTI (.nii.gz)")
_array = functools.partial(FileKind, advice="save the array in it as NIfTI with its affine")
_archive = functools.partial(FileKind, advice="unpack it and give the file or folder inside")
_video = functools.partial(FileKind, advice="save the frame to look at as PNG")
_document = functools.partial(FileKind, advice="save the image in it as PNG")
_slide = functools.partial(FileKind, advice="export the region to look at as PNG")
_derived = functools.partial(FileKind, advice="give the scan that it was made from")
_other = functools.partial(FileKind, advice=_SCAN_OR_IMAGE)

EMPTY = _broken("empty file")
FOLDER = FileKind("folder", advice="give a file in it")
DICOM = FileKind("DICOM file", "dicom")
DICOM_WITHOUT_PREAMBLE = FileKind("DICOM file without preamble", "dicom")
DICOMDIR = FileKind("DICOMDIR (index of a DICOM file set)", "dicom")
NIFTI = FileKind("NIfTI volume", "nifti")
NIFTI_PAIR = FileKind("NIfTI pair of .hdr and .img", "nifti pair")
ANALYZE = FileKind(
    "Analyze 7.5 pair of .hdr and .img, which does not state where left is",
    advice="convert it to NIfTI (.nii.gz) where it is known",
)
NRRD = FileKind("NRRD volume", "nrrd")
NRRD_DETACHED = FileKind("NRRD header with its data in another file", "nrrd")
METAIMAGE = FileKind("MetaImage volume", "metaimage")
PNG, JPEG, WEBP, BMP, GIF, TIFF = (
    FileKind(f"{name} image", "image") for name in ("PNG", "JPEG", "WebP", "BMP", "GIF", "TIFF")
)
WHOLE_SLIDE = _slide("whole-slide image")
GIT_LFS = FileKind("Git LFS pointer, not the file itself", advice="run `git lfs pull` where it came from")
GIT_ANNEX = FileKind("git-annex pointer, not the file itself", advice="run `git annex get` first")
GIT_XET = FileKind("Git Xet pointer, not the file itself", advice="fetch the file itself")
WEB_PAGE = FileKind("web page (HTML), not the file itself", advice="fetch it again, logged in if needed")
STORE_ERROR = FileKind("error message of an object store, not the file itself", advice="fetch it again")
STAND_INS = (GIT_LFS, GIT_ANNEX, GIT_XET, WEB_PAGE, STORE_ERROR)  # found in place of the file
TEXT = _other("text file")
UNKNOWN = _other("file of an unknown kind")

_MAT = _array("MATLAB file")
_NPY = _array("NumPy file (.npy), which has no orientation or spacing")
_NPZ = _array("NumPy archive (.npz), which has no orientation or spacing")
_HDF5 = _array("HDF5 file")
_MGH = _volume("FreeSurfer volume (MGH)")
_MESH = _derived("surface mesh")
_TRACTS = _derived("tractogram")
_CHECKPOINT = _other("model checkpoint")
_PDF = _document("PDF document")
_PICKLE = FileKind("Python pickle, never opened as it can run code", advice="save it as NIfTI or PNG")
_ZEROS = FileKind("file of zero bytes", advice="it was not written or fetched to the end; fetch it again")
_ENCRYPTED = FileKind("encrypted file", advice="decrypt it first")
_RAW_NUMBERS = FileKind("file of raw numbers", advice="give the header (.mhd or .nhdr) that belongs to it")
_COMPANION = FileKind("macOS companion file (._)", advice="give the file without `._` in its name")
_LONE_IMG = FileKind("voxels (.img) without a usable .hdr", advice="put the .hdr of the same name beside it")
_SHORTCUT = FileKind("Windows shortcut", advice="give the file that it points to")

# (offset, signatures, kind): the first match wins, so ambiguous short signatures are last.
_SIGNATURES: tuple[tuple[int, bytes | tuple[bytes, ...], FileKind], ...] = (
    (128, b"DICM", DICOM),
    (0, b"DICM", _broken("DICOM file that lost its preamble of 128 bytes")),
    (0, b"NRRD00", NRRD),
    (0, b"\x89PNG\r\n\x1a\n", PNG),
    (0, b"\x8aMNG\r\n\x1a\n", _video("MNG animation")),
    (0, b"\xff\xd8\xff", JPEG),
    (0, (b"GIF87a", b"GIF89a"), GIF),
    (0, (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TIFF),
    (0, b"IIU\0", _image("Panasonic raw photo")),
    (0, b"IIRO", _image("Olympus raw photo")),
    (0, b"II\xbc\x01", _image("JPEG XR image")),
    (0, (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"), _image("JPEG 2000 image")),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", _image("JPEG XL image")),
    (0, b"8BPS", _image("Photoshop image (PSD)")),
    (0, b"gimp xcf", _image("GIMP image (XCF)")),
    (0, b"\x76\x2f\x31\x01", _image("OpenEXR image")),
    (0, (b"#?RADIANCE", b"#?RGBE"), _image("Radiance HDR image")),
    (0, b"qoif", _image("QOI image")),
    (0, b"DDS ", _image("DDS texture")),
    (0, b"FUJIFILMCCD-RAW", _image("Fujifilm raw photo")),
    (0, b"icns", _image("Apple icon")),
    (0, b"\xd7\xcd\xc6\x9a", _image("Windows metafile")),
    (40, b" EMF", _image("Windows metafile")),
    (0, b"SIMPLE  =", _image("FITS image")),
    (0, b"%PDF", _PDF),
    (0, (b"%!PS", b"\xc5\xd0\xd3\xc6"), _document("PostScript document")),
    (0, b"{\\rtf", _document("RTF document")),
    (0, b"AT&TFORM", _document("DjVu document")),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _document("old Microsoft Office document")),
    (0, (b"MATLAB 5.0 MAT-file", b"MATLAB 7.3 MAT-file"), _MAT),
    (0, b"\x89HDF\r\n\x1a\n", _HDF5),
    (512, b"\x89HDF\r\n\x1a\n", _HDF5),
    (0, (b"CDF\x01", b"CDF\x02"), _volume("NetCDF file (MINC 1)")),
    (0, b"\x93NUMPY", _NPY),
    (0, b"MATRIX7", _volume("ECAT 7 volume")),
    (0, b"!INTERFILE", _volume("Interfile header")),
    (0, b"# === DATA DESCRIPTION FILE", _volume("Philips PAR/REC volume")),
    (0, b"#!/usr/local/fdf", _volume("Varian FDF volume")),
    (0, b"# vtk DataFile", _volume("VTK file")),
    (0, b"mrtrix image", _volume("MRtrix volume")),
    (0, b"CTDATA-HEADER_V1", _volume("Scanco volume")),
    (0, (b"mrtrix tracks", b"TRACK\0"), _TRACTS),
    (0, b"ZISRAWFILE", _slide("Zeiss CZI microscope file")),
    (0, b"\xda\xce\xbe\x0a", _slide("Nikon ND2 microscope file")),
    (0, (b"\xff\xff\xfe", b"ply\n", b"ply\r\n"), _MESH),  # the first is FreeSurfer's
    (0, b"\x1a\x45\xdf\xa3", _video("Matroska or WebM video")),
    (0, b"FLV\x01", _video("Flash video")),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", _video("Windows Media video")),
    (0, (b"\0\0\x01\xba", b"\0\0\x01\xb3"), _video("MPEG video")),
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
    (0, b"\0\x05\x16\x07", _COMPANION),
    (0, b"\0\0\0\x01Bud1", _other("macOS folder settings (.DS_Store)")),
    (0, b"L\0\0\0\x01\x14\x02\0", _SHORTCUT),
    (0, (b"Salted__", b"-----BEGIN PGP MESSAGE"), _ENCRYPTED),
    (0, b"version https://git-lfs", GIT_LFS),
    (0, b"/annex/objects/", GIT_ANNEX),
    (0, b"# xet version", GIT_XET),
    (0, b"\xff\x0a", _image("JPEG XL image")),
)

_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
_RIFF = {b"WEBP": WEBP, b"AVI ": _video("AVI video"), b"WAVE": _other("WAV sound")}
# Brands of ISO base media files; any other is a video.
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), _image("AVIF image")),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), _image("HEIC photo")),
    **dict.fromkeys((b"mif1", b"msf1", b"heif"), _image("HEIF photo")),
    b"crx ": _image("Canon raw photo"),
    b"jxl ": _image("JPEG XL image"),
    b"jp2 ": _image("JPEG 2000 image"),
    b"M4A ": _other("MPEG-4 sound"),
}
_BMP_HEADER_SIZES = [size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124)]
# Formats without a signature: used only where the content is unknown.
_SUFFIXES = {
    ".nhdr": _volume("damaged NRRD header"),
    **dict.fromkeys((".raw", ".zraw"), _RAW_NUMBERS),
    ".rec": _volume("Philips PAR/REC volume"),
    **dict.fromkeys((".brik", ".head"), _volume("AFNI volume")),
    **dict.fromkeys((".vmr", ".vtc"), _volume("BrainVoyager volume")),
    ".2dseq": _volume("Bruker volume"),
    ".mnc": _volume("MINC volume"),
    ".mat": _MAT,
    ".mgh": _MGH,
    ".mrxs": WHOLE_SLIDE,
    **dict.fromkeys((".stl", ".obj"), _MESH),
    ".tga": _image("TGA image"),
    ".pcx": _image("PCX image"),
    **dict.fromkeys((".onnx", ".pb"), _CHECKPOINT),
    **dict.fromkeys((".dll", ".exe"), _other("program")),
}
_MGH_SUFFIXES = (".mgh", ".mgz", ".mgh.gz")
_SLIDE_SUFFIXES = (".svs", ".ndpi", ".scn", ".bif", ".qptiff", ".afi")
_RAW_PHOTO_SUFFIXES = (".dng", ".cr2", ".nef", ".arw", ".pef", ".srw", ".3fr", ".iiq", ".nrw")
_PROMISED = {  # suffix -> format that the content does not match
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
_DICOMDIR_CLASS = b"\x02\0\x02\0UI\x14\x001.2.840.10008.1.3.10"  # element (0002,0002), explicit VR
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # with a length of 4 bytes
_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())


def identify(path: PathLike) -> FileKind:
    """Identifies a file by its first 64 KiB; the .img of a pair by the .hdr beside it.

    Raises `UserError` for a missing or unreadable file, `UnavailableError` if disk or network fail.
    """
    path = as_path(path)
    with wrap_file_errors(path):
        if path.is_dir():
            return FOLDER
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
        if header := pair_header(path):
            with header.open("rb") as file:
                kind = identify_bytes(file.read(_START_BYTES), header.name)
            if kind in (NIFTI, NIFTI_PAIR, ANALYZE):  # the reader rejects NIFTI, a single file, here
                return kind
    return identify_bytes(start, path.name)


def identify_bytes(start: bytes, name: str) -> FileKind:
    """Identifies a file by its first 64 KiB; with less, some kinds remain unknown.

    `name` is used only where the content is ambiguous.
    """
    name = name.lower()
    return _by_content(start, name) or _by_suffix(name)


def refusal(path: PathLike, kind: FileKind) -> UserError:
    """The error for an unsupported file: its kind and what to do, in one sentence."""
    return UserError(f"{path}: {explain(kind)}")


def explain(kind: FileKind) -> str:
    """The kind and what to do, including an image given for a volume or the reverse."""
    if kind.reader == "image":
        return f"{kind.name}, not a scan; give a NIfTI, NRRD, MetaImage or DICOM file"
    if kind.reader is not None:
        return f"{kind.name}, not an image; open it as a scan"
    return f"{kind.name}; {kind.advice or _SCAN_OR_IMAGE}"


def _by_content(start: bytes, name: str) -> FileKind | None:
    if not start:
        return EMPTY
    for offset, signatures, kind in _SIGNATURES:
        if start.startswith(signatures, offset):
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
    if start[:2] == b"BM" and start[14:18] in _BMP_HEADER_SIZES:
        return BMP
    if start[:4] == b"\0\0\0\x01" and len(start) >= 28 and name.endswith(_MGH_SUFFIXES):
        return _MGH
    if kind := _nifti(start):
        return kind
    if _is_bare_dicom(start):
        return DICOM_WITHOUT_PREAMBLE
    if kind := _checkpoint(start) or _icon(start):
        return kind
    if re.search(rb"%PDF-\d\.\d", start[:1024]):  # readers search for it there
        return _PDF
    return _text(start, name) or (None if start.strip(b"\0") else _ZEROS)


def _by_suffix(name: str) -> FileKind:
    stem = name.removesuffix(".gz")
    suffix = stem[stem.rfind(".") :] if "." in stem else ""
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    if suffix == ".img":
        return _LONE_IMG
    if suffix in _PROMISED:
        return _broken(f"file named {suffix} without {_PROMISED[suffix]} data inside")
    return UNKNOWN


def _refined(kind: FileKind, start: bytes, name: str) -> FileKind:
    """Distinguishes kinds with a common signature."""
    if kind is DICOM and _DICOMDIR_CLASS in start:
        return DICOMDIR
    if kind is NRRD and re.search(rb"^data ?file:", start, re.MULTILINE | re.IGNORECASE):
        header = re.split(rb"\r?\n\r?\n", start, maxsplit=1)[0]
        return NRRD_DETACHED if re.search(rb"^data ?file:", header, re.MULTILINE | re.IGNORECASE) else NRRD
    if kind is TIFF:
        if name.endswith(_SLIDE_SUFFIXES) or b"Aperio" in start:
            return WHOLE_SLIDE
        if name.endswith(_RAW_PHOTO_SUFFIXES) or start[8:10] == b"CR":
            return _image("raw photo of a camera")
    if kind is JPEG and is_jpeg_ls(start):
        return _image("JPEG-LS image")
    if kind is JPEG and name.endswith(".mrxs"):
        return WHOLE_SLIDE
    if kind is _HDF5 and name.endswith((".mnc", ".mnc2")):
        return _volume("MINC 2 volume")
    return kind


def _is_bare_dicom(start: bytes) -> bool:
    """Whether the file starts with DICOM elements in ascending order, as in old archives."""
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


def _element(start: bytes, offset: int, order: str) -> tuple[int, int] | None:
    """(tag, end) of the element at `offset`; None if it is not a valid element."""
    if len(start) < offset + 8:
        return None
    group, element = struct.unpack_from(f"{order}HH", start, offset)
    vr, value = start[offset + 4 : offset + 6], offset + 8
    if vr in _LONG_VRS:
        if len(start) < offset + 12:
            return None
        length, value = struct.unpack_from(f"{order}I", start, offset + 8)[0], offset + 12
    elif vr in _SHORT_VRS:
        length = struct.unpack_from(f"{order}H", start, offset + 6)[0]
    elif order == "<":  # big endian is always explicit
        length = struct.unpack_from("<I", start, offset + 4)[0]
    else:
        return None
    if length % 2 or value + length > len(start):
        return None
    return group << 16 | element, value + length


def _nifti(start: bytes) -> FileKind | None:
    if start[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c") and len(start) >= 348:  # 348 in both byte orders
        return {b"n+1\0": NIFTI, b"ni1\0": NIFTI_PAIR}.get(start[344:348], ANALYZE)
    if start[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c"):  # 540
        return {b"n+2\0": NIFTI, b"ni2\0": NIFTI_PAIR}.get(start[4:8])
    return None


def _gzip(start: bytes, name: str) -> FileKind:
    try:
        decompressed = _decompressed_start(start)
    except zlib.error:
        return _broken("damaged gzip file")
    if decompressed.startswith(b"\x1f\x8b"):
        return _archive("file that was compressed twice with gzip")
    inner = name if name.endswith(".mgz") else name.removesuffix(".gz")
    kind = _by_content(decompressed, inner) or _by_suffix(inner)
    if kind is EMPTY:
        return _broken("gzip file with nothing inside")
    if kind.reader in ("nifti", "nifti pair") or kind is ANALYZE or kind is _MGH:
        return kind
    if kind.name == "tar archive":
        return _archive("tar.gz archive")
    if kind in (UNKNOWN, TEXT):
        return _archive("gzip-compressed file")
    if kind.reader is not None:
        return _archive(f"gzip-compressed file with a {kind.name} inside")
    return FileKind(f"gzip-compressed {kind.name}", advice=kind.advice)


def _decompressed_start(start: bytes) -> bytes:
    """The first bytes inside a gzip file, which may consist of many small members."""
    found = b""
    while start.startswith(b"\x1f\x8b") and len(found) < _DECOMPRESSED_BYTES:
        member = zlib.decompressobj(wbits=31)
        found += member.decompress(start, _DECOMPRESSED_BYTES - len(found))
        start = member.unused_data
    return found


def _zip(start: bytes) -> FileKind:
    if start[6:7] and start[6] & 1:
        return FileKind(
            "encrypted zip archive", advice="unpack it with its password and give the file or folder inside"
        )
    length = int.from_bytes(start[26:28], "little")
    first = start[30 : 30 + length]
    if first.endswith(b".npy"):
        return _NPZ
    if first.endswith(b"data.pkl") or first.endswith(b".data/serialization_id"):
        return FileKind("PyTorch file", advice="save the array in it as NIfTI or PNG")
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
    """A Windows icon or cursor, checked by its first entry because the signature is too short."""
    if start[:4] not in (b"\0\0\1\0", b"\0\0\2\0") or len(start) < 22:
        return None
    count, offset = struct.unpack_from("<H", start, 4)[0], struct.unpack_from("<I", start, 18)[0]
    is_entry = start[9] == 0 and 0 < count <= 256 and 6 + 16 * count <= offset < 1 << 24
    return _image("Windows icon") if is_entry else None


def _text(start: bytes, name: str) -> FileKind | None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) and len(start) % 2 == 0:
        return TEXT  # UTF-16
    head = start[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"\w+\s*=", head) and re.search(rb"^NDims\s*=\s*\d", head, re.MULTILINE):
        return METAIMAGE  # binary voxels may follow
    if re.match(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s+\d+|P7\nWIDTH|P[Ff]\n\d", head):
        return _image("PNM image")
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
        return FileKind("DICOM data as JSON", advice="export it as a DICOM file")
    if re.match(rb'\{|\[\s*[\[{"\d\]-]', lower):
        return _other("JSON text")
    if lower.startswith(b"data:image/") or head.startswith((b"iVBORw0KGgo", b"/9j/")):
        return FileKind("image as base64 text", advice="decode it to a PNG or JPEG file")
    if re.fullmatch(rb"[^\n]*\.git/annex/objects/[^\n]*\n?", head):
        return GIT_ANNEX  # a symbolic link stored as a file
    if re.match(rb"type\s*=\s*(string|integer|float)-attribute", lower):
        return _volume("AFNI volume")
    if name.endswith(".obj") and re.search(rb"^v ", head, re.MULTILINE):
        return _MESH
    if name.endswith((".csv", ".tsv")):
        return _other("table of text (CSV)")
    return TEXT


def _xml(lower: bytes) -> FileKind:
    for mark, kind in (
        (b"<svg", _image("SVG drawing")),
        (b"<vtkfile", _volume("VTK file")),
        (b"<gifti", _MESH),
        (b"<nativedicommodel", FileKind("DICOM data as XML", advice="export it as a DICOM file")),
        (b"<error>", STORE_ERROR),
    ):
        if mark in lower:
            return kind
    return _other("XML text")


def _is_plain(head: bytes) -> bool:
    """Whether this is text in UTF-8 or in an older European encoding."""
    if not head or _CONTROL.search(head):
        return False
    high = sum(byte >= 0x80 for byte in head)
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3 or high < 0.3 * len(head)  # the last character may be cut
    return True
