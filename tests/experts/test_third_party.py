"""Third-party experts: TotalSegmentator with a stub of its API, the template, a card without a model."""

import configparser
import os
import pathlib
import re
import shutil
import subprocess
import sys
import venv

import nibabel as nib
import numpy as np
import pytest
import vilam3_experts
from vilam3_experts import descriptors
from vilam3_experts.annotate import annotate
from vilam3_experts.base import ExpertFailure, ExpertInputs, annotate_one
from vilam3_experts.engine.worker import create_expert
from vilam3_experts.weights import Weights

import vilam3_jax
from vilam3_jax.data.experts.host_client import ExpertHost
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.volumes import Volume, VolumeSource, load_volume
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import as_path

ROOT = pathlib.Path(__file__).parents[2]

# The parts of TotalSegmentator 2.18 that the expert uses, with its signatures.
STUB = {
    "__init__.py": "",
    "config.py": """
import os, pathlib
def get_weights_dir():
    return pathlib.Path(os.environ.get("TOTALSEG_WEIGHTS_PATH", "/nonexistent/results"))
def send_usage_stats(config, params):
    raise AssertionError("usage statistics were sent")
""",
    "libs.py": """
def download_url_and_unpack(url, config_dir):
    raise AssertionError("weights were downloaded")
def download_model_with_license_and_unpack(task_name, config_dir):
    raise AssertionError("weights were downloaded")
def download_pretrained_weights(task):
    download_url_and_unpack("https://example.invalid", None)
""",
    "map_to_binary.py": """
class_map = {
    "total": {1: "spleen", 2: "kidney_right", 117: "costal_cartilages"},
    "body": {1: "body_trunc", 2: "body_extremities"},
    "lung_vessels": {1: "lung_vessels"},
    "lung_nodules": {1: "lung"},
    "liver_vessels": {1: "liver_vessels"},
}
""",
    "python_api.py": """
import sys
import nibabel as nib
import numpy as np
from totalsegmentator import libs
from totalsegmentator.config import send_usage_stats
def totalsegmentator(input, output=None, ml=False, nr_thr_resamp=1, nr_thr_saving=6, fast=False,
                     nora_tag="None", preview=False, task="total", roi_subset=None, statistics=False,
                     radiomics=False, crop_path=None, body_seg=False, force_split=False,
                     output_type="nifti", quiet=False, verbose=False, test=0, skip_saving=False,
                     device="gpu", license_number=None):
    assert isinstance(input, nib.Nifti1Image) and output is None and ml and device in ("gpu", "cpu")
    print("TotalSegmentator talks on standard output")
    if task == "body":
        libs.download_pretrained_weights(300)
    if task == "lung_vessels":
        sys.exit(1)
    send_usage_stats({}, {})
    voxels = np.asanyarray(input.dataobj)
    labels = np.zeros(voxels.shape, np.uint8)
    labels[voxels > 0] = 2
    labels[voxels > 50] = 117 if task == "total" else 9
    if task == "lung_nodules":
        labels = labels[:-1]
    turned = nib.as_closest_canonical(input).affine @ np.diag([-1, 1, 1, 1])
    turned[:3, 3] = (input.affine @ [labels.shape[0] - 1, 0, 0, 1])[:3]
    return nib.Nifti1Image(labels[::-1].copy(), turned)
""",
}


@pytest.fixture(scope="session")
def stub_path(tmp_path_factory):
    """Folder of an installed distribution with the API of TotalSegmentator 2.18.0, and one of weights."""
    folder = tmp_path_factory.mktemp("stub")
    (folder / "totalsegmentator").mkdir()
    for name, text in STUB.items():
        (folder / "totalsegmentator" / name).write_text(text)
    info = folder / "totalsegmentator-2.18.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: TotalSegmentator\nVersion: 2.18.0\n")
    weights = folder / "weights" / "Dataset291" / "fold_0"
    weights.mkdir(parents=True)
    (weights / "checkpoint_final.pth").write_bytes(b"weights")
    return folder


@pytest.fixture
def ct(tmp_path):
    """A CT whose right half is dense."""
    voxels = np.full((8, 6, 5), -1000, np.int16)
    voxels[4:] = 100
    voxels[3] = 20
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0])), tmp_path / "ct.nii.gz")
    return tmp_path / "ct.nii.gz"


@pytest.fixture
def expert(stub_path, monkeypatch):
    """The expert, with the stub in place of its package."""
    monkeypatch.syspath_prepend(str(stub_path))
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", "")
    yield create_expert(descriptors.TOTALSEGMENTATOR, Weights(folder=as_path(stub_path / "weights")))


@pytest.fixture(autouse=True)
def _no_package_stays():
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "totalsegmentator"]:
        del sys.modules[name]


def ask(expert, path, task):
    d = descriptors.TOTALSEGMENTATOR
    return annotate_one(expert, d, ExpertInputs.of(load_volume(path)), d.check_args(task), weights_sha256="")


def test_a_task_is_an_argument_and_its_map_comes_back_on_the_grid(expert, ct):
    record = ask(expert, ct, "total")
    assert record.reason == ""
    expected = np.zeros((8, 6, 5), int)
    expected[3], expected[4:] = 2, 117
    np.testing.assert_array_equal(record.label_map(), expected)  # the package flipped the first axis
    assert record.label_names == {2: "kidney right", 117: "costal cartilages"}
    assert len(record.weights_sha256) == 64 and record.args == "total"


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("body", r"no weights of task 'body'.*totalseg_download_weights -t body"),
        ("lung_vessels", r"refused task 'lung_vessels' \(exit code 1\)"),
        ("lung_nodules", r"\(7, 6, 5\) voxels is not on the grid"),
        ("liver_vessels", r"ids without a name: \[2, 9\]"),
        ("trunk_cavities", r"has no task 'trunk_cavities'"),
    ],
)
def test_what_goes_wrong_is_a_failure_with_its_reason(expert, ct, task, reason):
    record = ask(expert, ct, task)
    assert record.status == "failed" and re.search(reason, record.reason), record.reason


def test_neither_package_nor_weights_is_one_sentence(stub_path, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"not installed here .*separate environment"):
        create_expert(descriptors.TOTALSEGMENTATOR, Weights())
    monkeypatch.syspath_prepend(str(stub_path))
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", "")
    with pytest.raises(UserError, match="no weights of TotalSegmentator"):
        create_expert(descriptors.TOTALSEGMENTATOR, Weights(folder=as_path(tmp_path)))
    libs = sys.modules["totalsegmentator.libs"]
    del libs.download_url_and_unpack  # another version, whose downloads would not be blocked
    made = create_expert(descriptors.TOTALSEGMENTATOR, Weights(folder=as_path(stub_path / "weights")))
    scan = Volume(np.zeros((2, 2, 2), np.int16), np.eye(4), "scan")
    with pytest.raises(ExpertFailure, match="not known to stay offline"):
        made.run(scan, "total")


@pytest.fixture(scope="session")
def other_environment(tmp_path_factory, stub_path):
    """Another virtual environment with TotalSegmentator and vilam3-experts."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    roots = [pathlib.Path(m.__file__).parents[1] for m in (vilam3_jax, vilam3_experts)]
    libraries = pathlib.Path(np.__file__).parents[1]
    (site / "parts.pth").write_text("\n".join(map(str, (stub_path, *roots, libraries))) + "\n")
    return folder / "bin" / "python"


@pytest.mark.slow
def test_it_runs_in_an_environment_of_its_own_offline_and_live(other_environment, stub_path, ct, tmp_path):
    """This environment lacks TotalSegmentator; another one answers, offline and over a pipe."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(other_environment), "-m", "vilam3_experts"]
    weights = ["--weights", str(stub_path / "weights")]
    offline = [*command, "annotate", "--expert", "TOTALSEGMENTATOR", *weights]
    offline += ["--data", str(ct), "--out", str(tmp_path / "store")]
    done = subprocess.run(offline, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (key,) = AnnotationStore(tmp_path / "store").keys()
    record = AnnotationStore(tmp_path / "store").get(*key)
    assert record.version == "totalsegmentator-2.18.0-1" and record.args == "total"
    with ExpertHost([*command, "host", *weights], environment=environment) as host:
        live = host.ask("TOTALSEGMENTATOR", "total", input_key=key[0], inputs=[("", VolumeSource(str(ct)))])
    assert live.reason == "" and live.labels == record.labels and live.segments == record.segments


def test_a_card_without_a_model_says_so(tmp_path):
    for name, reason in (("VISTA2D", "is only a card"), ("ORGANS", "its masks are imported")):
        with pytest.raises(UserError, match=reason):
            create_expert(descriptors.get(name), Weights())


TEMPLATE = ROOT / "examples" / "template_expert"


def test_the_template_is_short_found_by_its_entry_point_and_runs(ct, tmp_path, monkeypatch):
    assert sum(len(f.read_text().splitlines()) for f in TEMPLATE.rglob("*.py")) < 60
    config = configparser.ConfigParser()
    config.read(TEMPLATE / "setup.cfg")
    (points,) = config["options.entry_points"].items()
    info = tmp_path / "site" / "template_expert-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: template-expert\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[{points[0]}]{points[1]}\n")
    monkeypatch.syspath_prepend(str(TEMPLATE))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert annotate(descriptors.get("BODY"), ct, tmp_path / "store").counts == {"annotated": 1}
    store = AnnotationStore(tmp_path / "store")
    (key,) = store.keys()
    assert key[1:] == ("BODY", "body") and store.get(*key).segments[0].voxels == 5 * 6 * 5


@pytest.mark.slow
def test_the_template_installs(ct, tmp_path):
    """Installed by pip, discovered by its entry point, run by the command."""
    source = tmp_path / "template"
    shutil.copytree(TEMPLATE, source)
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True)
    roots = [pathlib.Path(m.__file__).parents[1] for m in (vilam3_jax, vilam3_experts)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (target, *roots)))}
    command = [sys.executable, "-m", "vilam3_experts", "annotate", "--expert", "BODY", "--args", "air"]
    command += ["--data", str(ct), "--out", str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "BODY: 1 annotated" in done.stdout, done.stderr
    store = AnnotationStore(tmp_path / "store")
    (key,) = store.keys()
    (segment,) = store.get(*key).segments
    assert (segment.name, segment.voxels) == ("air", 3 * 6 * 5)
