"""Relative links of the Markdown files lead to a file and a heading, by GitHub's rules."""

import functools
import importlib.util
import itertools
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), ROOT / "experts/README.md", *ROOT.glob("docs/**/*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
CODE = ("vilam3_jax", "experts", "configs", "launch", "examples", "benchmarks", "tests")


@functools.cache
def tokens(page):
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


@functools.cache
def anchors(page):
    """The anchors that GitHub gives to the headings: punctuation removed, repetitions numbered."""
    found = {}
    parsed = tokens(page)
    for opening, inline in itertools.pairwise(parsed):
        if opening.type == "heading_open":
            text = "".join(
                child.content for child in inline.children if child.type in ("text", "code_inline")
            )
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = found[slug] = found.get(slug, -1) + 1
            if count:
                found[f"{slug}-{count}"] = 0
    return set(found)


def targets(page):
    for token in tokens(page):
        for child in token.children or ():
            if target := child.attrGet("href") or child.attrGet("src"):
                yield unquote(target)


def problem(page, target):
    """Why a link leads nowhere, or None."""
    if re.match(r"[a-z][a-z0-9+.-]*:", target):
        return None
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
        return f"{target}: no such file"
    if not file.is_relative_to(ROOT):
        return f"{target}: outside the repository"
    if anchor and file.suffix == ".md" and anchor not in anchors(file):
        return f"{target}: no such heading; there are {sorted(anchors(file))}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page):
    assert not [reason for target in targets(page) if (reason := problem(page, target))]


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text(
        "# QLoRA: frozen kernels in 8 or 4 bits\n\n## `vilam3 plan`, and more_so\n\n## Same\n\n## Same\n"
    )
    good = ["qlora-frozen-kernels-in-8-or-4-bits", "vilam3-plan-and-more_so", "same", "same-1"]
    bad = ["other.md#vilam3-plan", "other.md#same-2", "missing.md", "#here"]
    links = [*(f"other.md#{anchor}" for anchor in good), *bad, "https://example.org/missing.md"]
    page.write_text(
        "`[code](no.md)`\n\n| table |\n|---|\n" + "".join(f"| [link\\|text]({link}) |\n" for link in links)
    )
    assert list(targets(page)) == links
    assert [target for target in targets(page) if problem(page, target)] == bad


@pytest.fixture
def site():
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs/conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "link,expected,in_repository",
    [
        ("[a](page.md#b)", "[a](../page.md#b)", "[a](../page.md#b)"),
        ("[`a`](CHANGELOG.md#b)", "[`a`](../changelog.md#b)", "[`a`](../changelog.md#b)"),
        (
            "[a](configs/pods.py)",
            "[a](../../configs/pods.py)",
            "[a](https://host/us/blob/main/configs/pods.py)",
        ),
        ("[a](configs)", "a", "[a](https://host/us/blob/main/configs)"),
        ("[a](https://other/x.md)", "[a](https://other/x.md)", "[a](https://other/x.md)"),
        ("`[a](configs)` [a](#b)", "`[a](configs)` [a](#b)", "`[a](configs)` [a](#b)"),
        ("```\n[a](configs)\n```", "```\n[a](configs)\n```", "```\n[a](configs)\n```"),
    ],
)
def test_links_on_the_site(site, link, expected, in_repository):
    link = link.replace("(page.md", "(docs/page.md")
    site.CITATION.pop("repository-code", None)
    assert site.for_site(link, "README.md", "docs/formats/page.md") == expected
    site.CITATION["repository-code"] = "https://host/us"
    assert site.for_site(link, "README.md", "docs/formats/page.md") == in_repository


def test_navigation_of_the_site(site):
    index = "[x](x.md)\n## One\n[y](y.md#a), [x](x.md), `[n](n.md)`\n## Two\n[z](z/index.md), [w](z/w.md)\n"
    assert [tree.split() for tree in site.toctrees(index)] == [
        ["```{toctree}", ":hidden:", ":maxdepth:", "1", "x", "```"],
        ["```{toctree}", ":hidden:", ":caption:", "One", "y", "```"],
        ["```{toctree}", ":hidden:", ":caption:", "Two", "z/index", "```"],
    ]


def test_pages_that_the_code_names():
    for folder in CODE:
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".sh", ".md", ".yaml") and file != Path(__file__):
                text = file.read_text(encoding="utf-8")
                for name in re.findall(r"\bdocs/(?:\w+/)*\w+\.md\b(?! of )", text):
                    assert (ROOT / name).is_file(), f"{file.relative_to(ROOT)} names {name}"
