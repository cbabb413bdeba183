"""One cluster for all tests here, and what is trained on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from codeparrot_ds.engine.operators import are_built, build_apart
from tests.cluster.cluster import Cluster, missing
from tests.cluster.trainings import Training, options, train_on_one_host
from tests.torture.kills import lay_course
from tools.ds_configs import catalogue

STEPS = 40
OTHER_PORT = 2222


@pytest.fixture(scope="package")
def cluster(tmp_path_factory):
    """Three hosts and the login node, in network namespaces."""
    yield from _started(tmp_path_factory)


@pytest.fixture(scope="package")
def on_another_port(tmp_path_factory):
    """The same, with sshd on port 2222."""
    yield from _started(tmp_path_factory, ssh_port=OTHER_PORT)


def _started(tmp_path_factory, **options):
    reason = missing()
    if reason is not None and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)
    if not are_built(["fused_adam"]):
        assert build_apart(catalogue()["zero2"].config, "cpu", dict(os.environ)) is None
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="session")
def course(tmp_path_factory) -> Path:
    """A corpus, a tokenizer and a shape; the validation split is large enough for a signal in an evaluation."""
    return lay_course(tmp_path_factory.mktemp("course"), validation_documents=100)


@pytest.fixture
def train(course, tmp_path):
    """Starts a run of `STEPS` steps on hosts of a cluster."""
    trainings: list[Training] = []

    def start(cluster: Cluster, hostfile: str, *extra: str, **variables: str) -> Training:
        arguments = options(course, "--max-train-steps", str(STEPS), "--hostfile", cluster.hostfile(hostfile), *extra)
        trainings.append(Training(cluster, tmp_path / "runs" / "brave-otter-7", arguments, variables))
        return trainings[-1]

    yield start
    for training in trainings:
        training.end()


@pytest.fixture(scope="session")
def on_one_host(course, tmp_path_factory):
    """Trains the same on this machine alone, once for all tests; returns the run's folder."""
    runs: dict[tuple[int, tuple[str, ...]], Path] = {}

    def reference(ranks: int, *extra: str) -> Path:
        if (ranks, extra) not in runs:
            run = tmp_path_factory.mktemp("alone") / "brave-otter-7"
            train_on_one_host(run, options(course, "--max-train-steps", str(STEPS), *extra), ranks)
            runs[ranks, extra] = run
        return runs[ranks, extra]

    return reference
