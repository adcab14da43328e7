"""Damaged inputs: a slice of the campaign of benchmarks/fuzz_readers.py, and its past findings."""

from __future__ import annotations

import dataclasses
import logging
import signal
import struct
import sys
import time
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import RLELossless

from vilam3_jax.data import dicom
from vilam3_jax.data.deidentify.codestreams import without_comments
from vilam3_jax.data.images import load_image
from vilam3_jax.data.intensity import as_stored_values
from vilam3_jax.data.limits import DEFAULT_LIMITS
from vilam3_jax.data.scan.collect import collect
from vilam3_jax.data.volumes import describe_volume, load_volume
from vilam3_jax.errors import UserError
from vilam3_jax.inference.images import open_image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SLICE = 306  # two inputs of each seed


@pytest.fixture(scope="module")
def fuzz():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import fuzz_readers

        yield fuzz_readers
    for name in [name for name in sys.modules if name.startswith("fuzz_")]:
        sys.modules.pop(name, None)


@pytest.fixture
def prepared(fuzz):
    """This process prepared like a worker."""
    limits, handler, disabled = (
        dataclasses.asdict(DEFAULT_LIMITS),
        signal.getsignal(signal.SIGALRM),
        logging.root.manager.disable,
    )
    fuzz.prepare_process()
    yield fuzz
    for name, value in limits.items():
        object.__setattr__(DEFAULT_LIMITS, name, value)
    signal.signal(signal.SIGALRM, handler)
    logging.disable(disabled)


# Past findings.


@pytest.mark.parametrize("far", [1e300, -1e300, 3.5e38])
def test_numbers_beyond_float32_do_not_become_infinite(tmp_path, far):
    """Found in a float64 NIfTI with one changed exponent byte."""
    values = np.array([1.5, -2.5, 7.0, far])
    stored = as_stored_values(values)
    assert stored is not None
    np.testing.assert_array_equal(stored, np.float32([1.5, -2.5, 7, 7 if far > 0 else -2.5]))
    path = tmp_path / "scan.nii"
    nib.Nifti1Image(np.resize(values, (3, 4, 5)), np.eye(4)).to_filename(path)
    volume = load_volume(path)
    assert np.isfinite(volume.voxels).all() and volume.valid is not None
    np.testing.assert_array_equal(volume.valid, np.abs(np.resize(values, (3, 4, 5))) < 1e38)


def test_a_pair_whose_voxels_are_missing(tmp_path):
    nib.Nifti1Pair(np.zeros((3, 4, 5), np.int16), np.eye(4)).to_filename(tmp_path / "scan.hdr")
    (tmp_path / "scan.img").unlink()
    for read in (load_volume, describe_volume):
        for name in ("scan.hdr", "scan.img"):
            with pytest.raises(UserError, match="scan"):
                read(tmp_path / name)


@pytest.mark.parametrize(
    ("stated", "damaged"),
    [
        (b"1.2.840.10008.1.2.4.80", b"1.2.840.10\x00\x008.1.2.4.80"),  # transfer syntax
        (b"MONOCHROME2 ", b"MONOCHR\x00\n\xffE2"),
    ],
)
def test_what_a_damaged_header_states_is_not_repeated(fuzz, tmp_path, stated, damaged):
    seed = next(seed for seed in fuzz.fuzz_seeds.all_seeds() if seed.name == "jls.dcm")
    path = tmp_path / seed.entry
    path.write_bytes(seed.files[seed.entry].replace(stated, damaged))
    for read in (dicom.read_image, load_volume, load_image):
        with pytest.raises(UserError) as error:
            read(path)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("tag", [b"\x02\0\x02\0", b"\x08\0\x16\0"])
def test_a_value_representation_that_does_not_exist(fuzz, tmp_path, tag):
    """The SOP class is read first."""
    seed = next(seed for seed in fuzz.fuzz_seeds.all_seeds() if seed.name == "explicit.dcm")
    path = tmp_path / seed.entry
    path.write_bytes(seed.files[seed.entry].replace(tag + b"UI", tag + b"U\x80"))
    for read in (load_volume, load_image, lambda path: open_image(path, None), dicom.survey):
        try:
            read(path)
        except UserError as error:
            assert str(error).isprintable()


def test_a_number_of_frames_that_no_integer_holds(fuzz, tmp_path):
    """The scan failed to serialise it for the process that groups series."""
    seed = next(seed for seed in fuzz.fuzz_seeds.all_seeds() if seed.name == "capture.dcm")
    path = tmp_path / seed.entry
    stated = struct.pack("<HHL2s", 0x28, 8, 2, b"2 ")
    assert stated in seed.files[seed.entry]
    path.write_bytes(seed.files[seed.entry].replace(stated, struct.pack("<HHL4s", 0x28, 8, 4, b"1e30")))
    found = collect(tmp_path, 1, DEFAULT_LIMITS)
    assert len(found.files) == 1
    for read in (load_image, load_volume):
        with pytest.raises(UserError, match=r"capture\.dcm"):
            read(path)


def test_a_jpeg_of_no_bits(fuzz, tmp_path):
    """The decoder returns an empty image for it."""
    seed = next(seed for seed in fuzz.fuzz_seeds.all_seeds() if seed.name == "grey.jpeg")
    path = tmp_path / seed.entry
    stated = b"\xff\xc0\0\x0b\x08"
    assert stated in seed.files[seed.entry]
    path.write_bytes(seed.files[seed.entry].replace(stated, b"\xff\xc0\0\x0b\0"))
    with pytest.raises(UserError, match="damaged"):
        load_image(path)


def test_rle_segments_far_outside_the_frame_cost_no_memory():
    """De-identification zero-filled the gap before a segment, up to 4 GiB."""
    header = struct.pack("<16L", 2, 64, 1 << 31, *[0] * 13)
    frame = header + b"\x03abcd"
    data = encapsulate([frame])
    tracemalloc.start()
    with pytest.raises(ValueError, match="outside"):
        without_comments(data, RLELossless, 4)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_jpeg_ls_data_on_which_charls_loops(tmp_path):
    """Two bytes inserted into the scan, no end marker: CharLS 2.4 loops for 6 s."""
    source = get_testdata_file("SC_rgb_jls_lossy_line.dcm", read=True, download=False)
    frame = get_frame(source.PixelData, 0, number_of_frames=1)
    source.PixelData = encapsulate([frame[:82] + b"\xff\x7f" + frame[82:508]])
    source.save_as(tmp_path / "film.dcm")
    start = time.thread_time()
    with pytest.raises(UserError, match="cut short"):
        dicom.read_image(tmp_path / "film.dcm")
    assert time.thread_time() - start < 1


# The campaign.


def test_inputs_are_reproducible(fuzz):
    seeds, again = fuzz.fuzz_seeds.all_seeds(), fuzz.fuzz_seeds.all_seeds()
    assert seeds == again
    damaged = [fuzz.input_of(7, number, seeds)[1] for number in range(0, SLICE, 5)]
    assert damaged == [fuzz.input_of(7, number, again)[1] for number in range(0, SLICE, 5)]
    changed = [
        files != dict(seeds[n % len(seeds)].files)
        for n, files in zip(range(0, SLICE, 5), damaged, strict=True)
    ]
    assert np.mean(changed) > 0.9


def test_findings_are_noticed(prepared, tmp_path, monkeypatch):
    """A reader with every fault."""
    faults = {
        "crash": lambda path: 1 / 0,
        "hang": lambda path: [None for _ in iter(int, 1)],
        "memory": lambda path: np.ones(prepared.MEMORY_BYTES + (64 << 20), np.uint8).sum(),
        "message": lambda path: raise_(prepared.UserError(f"{path}: of Doe^Jane")),
        "result": lambda path: np.zeros((2, 2), np.int16),
        "fine": lambda path: np.zeros((2, 2), np.uint8),
    }
    monkeypatch.setattr(prepared, "entry_points", lambda seed: faults)
    monkeypatch.setattr(prepared, "CPU_SECONDS", 0.2)
    outcome = prepared.try_input(prepared.fuzz_seeds.all_seeds()[0], {}, tmp_path)
    assert {(finding.kind, finding.entry) for finding in outcome.findings} - {("hang", "memory")} == {
        (kind, kind) for kind in faults if kind != "fine"
    }


def raise_(error):
    raise error


def test_a_slice_of_the_campaign_finds_nothing(prepared, tmp_path):
    seeds = prepared.fuzz_seeds.all_seeds()
    accepted = 0
    for number in range(SLICE):
        outcome = prepared.try_input(*prepared.input_of(0, number, seeds), tmp_path)
        assert not outcome.findings, f"--reproduce={number}: {outcome.findings}"
        accepted += outcome.accepted
    assert accepted > SLICE / 10  # damage that is detected at once tests little


def test_undamaged_inputs_are_taken(prepared, tmp_path):
    for seed in prepared.fuzz_seeds.all_seeds():
        outcome = prepared.try_input(seed, dict(seed.files), tmp_path)
        assert not outcome.findings, seed.name
        assert outcome.accepted == (seed.name not in REFUSED), seed.name


REFUSED = {
    *(
        "series.nii",
        "colour.nii",
        "two_series",
        "pydicom_test-SR.dcm",
        "pydicom_rtplan.dcm",
        "pydicom_badVR.dcm",
    ),
    *("pydicom_nested_priv_SQ.dcm", "pydicom_UN_sequence.dcm"),  # no images
    *("moving.png", "pages.tiff", "ome.tiff", "moving.webp", "moving.gif"),
}
