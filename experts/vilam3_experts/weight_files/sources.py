"""Download sources of the experts' weights, with their licences. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from vilam3_experts.xrv.members import load_table

_MODEL_ZOO = "https://api.ngc.nvidia.com/v2/models/nvidia/monaihosting"
_MB = 1_000_000


@dataclasses.dataclass(frozen=True)
class Download:
    """One file to fetch: a plain `url`, or a `path` in a repository of the Hugging Face hub.

    Attributes:
      file: target path below the expert's folder. Names from servers and archives are never used.
      megabytes: approximate size; at most twice that plus one megabyte is accepted.
      unpack: members of a zip archive, relative to its single top folder; extracted to the same paths below
        the expert's folder. The archive is deleted.
      convert: (pickled file, safetensors file) below the expert's folder. The pickled file is deleted.
    """

    file: str
    megabytes: float
    url: str = ""
    repo: str = ""
    path: str = ""
    unpack: tuple[str, ...] = ()
    convert: tuple[tuple[str, str], ...] = ()

    @property
    def max_bytes(self) -> int:
        return int((2 * self.megabytes + 1) * _MB)

    @property
    def results(self) -> tuple[str, ...]:
        """The resulting files, below the expert's folder."""
        converted = dict(self.convert)
        return tuple(converted.get(name, name) for name in self.unpack or (self.file,))

    @property
    def origin(self) -> str:
        return self.url or f"https://huggingface.co/{self.repo}: {self.path}"


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of all weights of an expert.

    `revision` is the version fetched, a commit for the hub; `licence` is that of the weights, as stated by
    their publisher.
    """

    name: str
    kind: Literal["url", "hub"]
    revision: str
    licence: str
    downloads: tuple[Download, ...]


def _bundle(name: str, version: str, megabytes: float) -> Download:
    """A bundle of MONAI's model zoo, at the URL that `monai.bundle download` uses."""
    return Download(
        f"{name}_v{version}.zip",
        megabytes,
        url=f"{_MODEL_ZOO}/{name}/versions/{version}/files/{name}_v{version}.zip",
        unpack=("configs/metadata.json", "configs/inference.json", "models/model.pt"),
        convert=(("models/model.pt", "models/model.safetensors"),),
    )


_VISTA3D_LICENCE = "NVIDIA OneWay Noncommercial License (NCLS v1)"
_VISTA3D_HF = "MONAI/VISTA3D-HF"

CXR = (
    Source(
        "release",
        "url",
        "torchxrayvision release v1",
        "Apache-2.0 (the code's); the training datasets have their own terms",
        tuple(
            Download(
                member.file,
                95 if member.architecture == "resnet50" else 29,
                url=member.url,
                convert=((member.file, member.weights_file),),
            )
            for member in load_table().members
        ),
    ),
)
VISTA3D = (
    Source(
        "hub",
        "hub",
        "90f09bc598474e4f3aafe851d573cfda91fab790",
        _VISTA3D_LICENCE,
        tuple(
            Download(path, megabytes, repo=_VISTA3D_HF, path=path)
            for path, megabytes in (
                ("metadata.json", 0.1),
                ("vista3d_pretrained_model/config.json", 0.1),
                ("vista3d_pretrained_model/model.safetensors", 875),
            )
        ),
    ),
    Source("bundle", "url", "0.5.4", _VISTA3D_LICENCE, (_bundle("vista3d", "0.5.4", 875),)),
)
BRATS = (
    Source(
        "bundle",
        "url",
        "0.5.2",
        "Apache-2.0 (the code's); trained on BraTS 2018, whose terms allow research",
        (_bundle("brats_mri_segmentation", "0.5.2", 60),),
    ),
)
