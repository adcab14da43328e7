"""Properties of every registered dataset, and the network block of these tests."""

import argparse
import ast
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vilam3_jax.datasets import prepare, registry
from vilam3_jax.datasets.dataset import Dataset
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

TESTS = Path(__file__).parent
OVERVIEW = TESTS.parents[1] / "docs" / "datasets.md"
# A documentation address of RFC 5737, unreachable even if the block fails.
NOWHERE = "192.0.2.1"


@pytest.fixture(params=sorted(registry.DATASETS))
def dataset(request):
    """The class of each registered dataset."""
    return registry.get(request.param)


def test_rows_are_sorted():
    assert list(registry.DATASETS) == sorted(registry.DATASETS)


def test_what_users_are_told(dataset):
    assert registry.get(dataset.name) is dataset
    assert re.fullmatch(r"[a-z][a-z0-9_]*", dataset.name)
    assert re.fullmatch(r"\d+\.\d+\.\d+", dataset.version)
    assert dataset.access in ("open", "registered", "credentialed")
    assert dataset.licence and dataset.__doc__ and dataset.splits is not Dataset.splits
    assert dataset.description and "\n" not in dataset.description
    assert len(dataset.instructions.split()) >= 10
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", config) for config in dataset.configs)


def test_variants_and_options(dataset):
    for config in dataset.configs or [""]:
        assert dataset(config=config).config == config
    with pytest.raises(UserError, match=dataset.name):
        dataset(config="no_such_variant")
    parser = argparse.ArgumentParser(add_help=False)
    dataset.add_arguments(parser)
    for action in parser._actions:
        assert action.help, f"{dataset.name}: {action.dest} is not explained"


def test_a_folder_without_the_files_is_refused_with_where_they_come_from(dataset, tmp_path):
    if dataset.source_is_file:
        pytest.skip("its source is one file, which the command line checks")
    for config in dataset.configs or [""]:
        with pytest.raises(UserError, match=re.escape(str(tmp_path))) as refused:
            dataset(config=config).splits(SourceFolder(tmp_path, dataset.instructions))
        if " missing" in str(refused.value):
            assert str(refused.value).endswith(" ".join(dataset.instructions.split()))


def test_every_dataset_is_built_in_this_folder():
    """Some test in this folder uses the class, so its twin is built with the network blocked."""
    named = set()
    for path in TESTS.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named.add(getattr(node, "id", None) or getattr(node, "attr", None))
    lacking = [name for name, (_, attribute) in registry.DATASETS.items() if attribute not in named]
    assert not lacking, "no test builds their twins"


def test_the_list_names_every_dataset():
    listed = {line.split()[0]: line for line in prepare.listing().splitlines()}
    assert set(listed) == {"quickstart", *registry.names()}
    for name in registry.DATASETS:
        found = registry.get(name)
        assert f" {found.access} " in listed[name] and f" {found.licence} " in listed[name]


def test_the_overview_has_every_dataset_as_it_is():
    page = OVERVIEW.read_text()
    lacking = []
    for name in registry.DATASETS:
        found = registry.get(name)
        variants = ", ".join(f"`{config}`" for config in found.configs)
        start = f"| `{name}` | {found.access} | {found.licence} | {variants} |"
        lacking += [] if start in page else [start]
    assert not lacking, f"{OVERVIEW.name} lacks rows that start so"
    assert set(re.findall(r"^\| `(\w+)` \| (?:open|reg|cred)", page, re.MULTILINE)) == set(registry.DATASETS)


def test_the_overview_links_every_page():
    text = OVERVIEW.read_text()
    pages = sorted(page.name for page in OVERVIEW.parent.glob("datasets_*.md"))
    assert [page for page in pages if f"]({page})" not in text] == []


# --- the block


def reach_out():
    socket.create_connection((NOWHERE, 80), timeout=1)


def send_datagram():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", (NOWHERE, 53))


def look_up():
    socket.getaddrinfo("example.org", 443)


@pytest.mark.parametrize("reach", [reach_out, send_datagram, look_up])
def test_the_network_is_blocked(reach, blocked_network):
    with pytest.raises(RuntimeError, match="reached for"):
        reach()
    assert len(blocked_network) == 1
    blocked_network.clear()


def test_the_network_is_blocked_in_processes_that_tests_start():
    code = f"import socket; socket.create_connection(('{NOWHERE}', 80), timeout=1)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        ended.returncode == 1 and f"NetworkBlocked: a test of datasets reached for {NOWHERE}" in ended.stderr
    )


def test_sockets_of_this_machine_work():
    one, other = socket.socketpair()
    with one, other, socket.create_server(("127.0.0.1", 0)) as server:
        one.sendall(b"x")
        assert other.recv(1) == b"x"
        socket.create_connection(server.getsockname(), timeout=5).close()
