"""The documentation site, built by `make docs`.

The pages are plain Markdown, because they are also read on GitHub. `index.md` is the only list of pages: the
navigation is built from its sections and links. Links that leave this folder are rewritten for the site.
"""

import os
import posixpath
import re
from pathlib import Path

import yaml

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # modules are imported for their docstrings only

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))

project = CITATION["title"]
author = ", ".join(person["name"] for person in CITATION["authors"])
version = release = str(CITATION["version"])

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
highlight_language = "none"
smartquotes = False
nitpicky = True
nitpick_ignore_regex = [
    # Other projects: their inventories would need the internet.
    (r"py:.*", r"(?!vilam3_).*"),
    # Type variables, and types of internal modules.
    (r"py:class", r".*\.(_\w+|AnyBatch|AnyLeaf|AnySized|AnySection|T)"),
    (r"py:class", r"vilam3_jax\.data\.(dicom\.grouping|loader_state|sample_reader|volume_slices)\..*"),
    (r"py:class", r"vilam3_jax\.(data\.experts\.verify\.after|plan\.compiler|plan\.hlo)\..*"),
    (r"py:class", r"vilam3_jax\.serving\.(answers|inputs|samples)\..*"),
    (r"py:class", r"vilam3_experts\.engine\.job\..*"),
]

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 4

default_role = "literal"  # single backticks in docstrings are code
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
autoclass_content = "both"  # arguments are described in `__init__`
autodoc_default_options = {"members": True, "exclude-members": "main"}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False  # else "a, b: both" is read as a name with a type
napoleon_custom_sections = [("Attributes", "params_style")]

# Files outside this folder that are pages of the site: file -> page, which is a stub here.
INCLUDED = {"README.md": "overview", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}

_CODE = r"^```.*?^```|(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)"
_LINK = r"\[(?P<text>(?:[^\[\]`]|`[^`]*`)*)\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)"
_CODE_OR_LINK = re.compile(f"{_CODE}|{_LINK}", re.DOTALL | re.MULTILINE)


def links(markdown):
    """Yields the matches of relative links, with groups text, path and anchor, that are not in code."""
    return (match for match in _CODE_OR_LINK.finditer(markdown) if match["path"])


def for_site(markdown, source, page):
    """Rewrites relative links for the site.

    Args:
      markdown: the text.
      source: the file that it is from, relative to the repository.
      page: the file that shows it, relative to the repository.
    """

    def rewrite(match):
        if not match["path"]:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["path"]))
        anchor = match["anchor"] or ""
        if path in INCLUDED:
            path = f"docs/{INCLUDED[path]}.md"
        elif not path.startswith("docs/"):
            if repository := CITATION.get("repository-code"):
                return f"[{match['text']}]({repository}/blob/main/{path}{anchor})"
            if (ROOT / path).is_dir():
                return match["text"]
        return f"[{match['text']}]({posixpath.relpath(path, posixpath.dirname(page))}{anchor})"

    return _CODE_OR_LINK.sub(rewrite, markdown)


def toctrees(markdown):
    """Hidden tables of contents of an index, one for each section: pages beside it, and indexes below it."""
    listed = set()
    introduction, *sections = re.split(r"^## ", markdown, flags=re.MULTILINE)
    for caption, text in [("", introduction), *(section.split("\n", 1) for section in sections)]:
        paths = (match["path"] for match in links(text))
        pages = dict.fromkeys(path[:-3] for path in paths if re.fullmatch(r"[^/]+\.md|[^/]+/index\.md", path))
        new = [page for page in pages if page not in listed]
        listed.update(new)
        if new:
            options = [":hidden:", f":caption: {caption}" if caption else ":maxdepth: 1"]
            yield "\n".join(["", "```{toctree}", *options, "", *new, "```", ""])


def read_source(app, docname, content):
    page = f"docs/{docname}.md"
    source = page
    for file, stub in INCLUDED.items():
        if docname == stub:
            source = file
            content[0] = (ROOT / file).read_text(encoding="utf-8")
            app.env.note_dependency(ROOT / file)
    content[0] = for_site(content[0], source, page)
    if posixpath.basename(docname) == "index":
        content[0] += "".join(toctrees(content[0]))


def plain_defaults(app, what, name, obj, options, signature, result):
    """Writes `...` for defaults such as `<factory>`, which Sphinx cannot parse."""
    return (re.sub(r"<[^<>]+>", "...", signature), result) if signature else None


def without_generated(app, what, name, obj, options, lines):
    """Removes what NamedTuple writes about a class and its fields."""
    if what == "class":
        lines[:] = [line for line in lines if not line.startswith("Create new instance of ")]


def skip_generated(app, what, name, obj, skip, options):
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number ") else None


def setup(app):
    app.connect("source-read", read_source)
    app.connect("autodoc-process-signature", plain_defaults)
    app.connect("autodoc-process-docstring", without_generated)
    app.connect("autodoc-skip-member", skip_generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
