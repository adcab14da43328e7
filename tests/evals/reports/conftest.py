"""Real reports, read from the torchxrayvision wheel, and the Java programs of pycocoevalcap."""

from __future__ import annotations

import importlib.util
import shutil
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest


@pytest.fixture(scope="session")
def iu_sections():
    """Label → text of each of the 3,955 reports of Indiana University."""
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None or spec.origin is None:
        pytest.skip("the reports come from torchxrayvision: pip install -e './experts[xrv]'")
    archive = Path(spec.origin).parent / "data/NLMCXR_reports.tgz"
    with tarfile.open(archive) as members:
        return [
            {
                element.get("Label"): " ".join((element.text or "").split())
                for element in ElementTree.fromstring(members.extractfile(member).read()).iter("AbstractText")
            }
            for member in sorted(members.getmembers(), key=lambda member: member.name)
            if member.name.endswith(".xml")
        ]


@pytest.fixture(scope="session")
def findings(iu_sections):
    """The findings of the reports that have them."""
    return [one["FINDINGS"] for one in iu_sections if one.get("FINDINGS")]


@pytest.fixture(scope="session")
def pairs(findings):
    """(references, hypotheses) of 600 items: each report against the next, which shares stock phrases.

    Every third item has a second reference, every twentieth hypothesis is empty, every tenth is exact.
    """
    references, hypotheses = [], []
    for index in range(600):
        own = [findings[index]]
        if index % 3 == 0:
            own.append(findings[index + 2])
        references.append(own)
        exact = findings[index] if index % 10 == 5 else findings[index + 1]
        hypotheses.append("" if index % 20 == 7 else exact)
    return references, hypotheses


@pytest.fixture(scope="session")
def tokenized_pairs(pairs):
    from vilam3_jax.evals.reports import ptb

    references, hypotheses = pairs
    return [[ptb.joined(one) for one in own] for own in references], [ptb.joined(one) for one in hypotheses]


@pytest.fixture(scope="session")
def java():
    if shutil.which("java") is None:
        pytest.skip("java is not installed")
    pytest.importorskip("pycocoevalcap", reason="pip install -e .[coco]")


@pytest.fixture(scope="session")
def java_tokens(java):
    """Texts → their tokens joined by spaces, from the Java program that pycocoevalcap starts."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenize(texts):
        # The program looks at the first letter of the next line, so a fixed one follows every text.
        lines = [line for text in texts for line in (text, "end")]
        found = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
        return [found[i][0] for i in range(0, len(lines), 2)]

    return tokenize
