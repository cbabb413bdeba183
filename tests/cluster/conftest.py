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


@pytest.fixture(scope="package")
def cluster(tmp_path_factory):
    """Three hosts and the login node, in network namespaces."""
    reason = missing()
    if reason is not None and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)
    if not are_built(["fused_adam"]):
        assert build_apart(catalogue()["zero2"].config, "cpu", dict(os.environ)) is None
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
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
def train(cluster, course, tmp_path):
    """Starts a run of `STEPS` steps on hosts of the cluster."""
    trainings: list[Training] = []

    def start(hostfile: str, *extra: str) -> Training:
        arguments = options(course, "--max-train-steps", str(STEPS), "--hostfile", cluster.hostfile(hostfile), *extra)
        trainings.append(Training(cluster, tmp_path / "runs" / "brave-otter-7", arguments))
        return trainings[-1]

    yield start
    for training in trainings:
        training.end()


@pytest.fixture
def on_one_host(course, tmp_path):
    """Trains the same on this machine alone; returns the run's folder."""

    def reference(ranks: int, *extra: str) -> Path:
        run = tmp_path / "alone" / "brave-otter-7"
        train_on_one_host(run, options(course, "--max-train-steps", str(STEPS), *extra), ranks)
        return run

    return reference
