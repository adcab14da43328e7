"""The Ray engine on a cluster of several local nodes, with kills of actors and nodes."""

import os
import pathlib
import signal
import threading
import time

import faulty
import pytest
from test_engines import digest_of, folder, log, reasons  # noqa: F401 (a fixture)
from vilam3_experts import audit
from vilam3_experts.annotate import Engine, annotate

from vilam3_jax.data.experts.store import AnnotationStore

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Three nodes: the head without room for workers, the others with room for one each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("FAULTY_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAULTY_SECONDS", "0.05")
    paths = [str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    small = {"object_store_memory": 100 << 20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **small})
    try:
        made.workers = [made.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
        made.wait_for_nodes()
        ray.init(address=made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def parent(pid):
    return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_for_runs(tmp_path, count):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if (tmp_path / "log").exists() and sum(" run " in line for line in lines(tmp_path)) >= count:
            return
        time.sleep(0.1)
    raise AssertionError("the actors do not start")


def lines(tmp_path):
    return (tmp_path / "log").read_text().splitlines()


def test_killed_actors_and_nodes_lose_nothing(cluster, folder, tmp_path):  # noqa: F811
    data = folder(300, faulty.KILLS, faulty.DECLINES, faulty.OOM)
    told = []

    def kill():
        wait_for_runs(tmp_path, 20)
        worker = int(lines(tmp_path)[-1].split()[0])
        os.kill(parent(parent(worker)), signal.SIGKILL)  # the actor
        told.append("actor")
        wait_for_runs(tmp_path, 120)
        cluster.remove_node(cluster.workers[0], allow_graceful=False)
        told.append("node")

    killer = threading.Thread(target=kill)
    killer.start()
    engine = Engine("ray", workers=3)
    summary = annotate(faulty.FAULTY, data, tmp_path / "store", engine=engine, audit=tmp_path / "audit")
    killer.join()
    assert told == ["actor", "node"]
    # Records that an actor committed before it was killed are skipped when its block is run again.
    assert summary.counts["annotated"] + summary.counts["skipped"] + summary.counts["failed"] == 303
    assert len(AnnotationStore(tmp_path / "store")) == 303
    assert [reason.partition(",")[0] for reason in reasons(tmp_path / "store")] == [
        "its process was ended by signal 9 (SIGKILL)",
        "no film of this kind",
    ]
    assert audit.verify(tmp_path / "audit").ok
    runs = len(log(tmp_path))
    again = annotate(faulty.FAULTY, data, tmp_path / "store", engine=engine)
    assert again.counts == {"skipped": 303} and len(log(tmp_path)) == runs
    os.environ.pop("FAULTY_SECONDS")
    local = annotate(faulty.FAULTY, data, tmp_path / "local", engine=Engine(workers=2))
    assert local.counts["annotated"] == 301
    assert AnnotationStore(tmp_path / "store").digest() == AnnotationStore(tmp_path / "local").digest()
