"""A cluster of two hosts on this machine."""

import os
from pathlib import Path

import pytest
from helpers.ray_work import HOST
from helpers.waiting import WAIT

TESTS = Path(__file__).resolve().parents[1]
# On a busy machine a process that is slow is not dead; one that is, is known to be so soon.
PATIENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": f"{WAIT}000",
    "RAY_worker_register_timeout_seconds": f"{WAIT}",
    "RAY_gcs_server_request_timeout_seconds": f"{WAIT}",
    "RAY_gcs_rpc_server_connect_timeout_s": f"{WAIT}",
    "RAY_gcs_server_port_wait_time_s": f"{WAIT}",
}


@pytest.fixture(scope="module")
def environment():
    """Workers find the helpers, nobody is told of the tests, and no cluster of the person's own is taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS, TESTS.parent))))
        for name, value in {"RAY_USAGE_STATS_ENABLED": "0", **PATIENT}.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def hosts(environment):
    """A cluster of two hosts with one CPU each; the tests' own process joins the first."""
    from ray.cluster_utils import Cluster

    hosts = Cluster(initialize_head=True, head_node_args=HOST)
    yield hosts
    hosts.shutdown()


@pytest.fixture
def two_hosts(hosts):
    """That cluster, whole again after a test that took a host away."""
    if not hosts.worker_nodes:
        hosts.add_node(**HOST)
    hosts.wait_for_nodes(timeout=WAIT)
    return hosts
