"""The cluster over HTTP: what is shown, who may see it, and what draining answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from urllib.parse import quote

import httpx
import pytest
from pydantic import TypeAdapter

from tests.api.fake_cluster import JOINING, NODE, STATUS, FakeCluster
from tllm.cluster.status import ClusterStatus

Serve = Callable[..., httpx.Client]


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def client(serve: Serve, cluster: FakeCluster) -> httpx.Client:
    return serve(cluster=cluster)


def refusal(response: httpx.Response) -> tuple[int, str | None]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert response.headers["x-should-retry"] == "false"
    return response.status_code, error["code"]


def test_the_status_crosses_unchanged(client: httpx.Client) -> None:
    response = client.get("/tllm/v1/cluster")
    assert response.headers["content-type"] == "application/json"
    assert TypeAdapter(ClusterStatus).validate_json(response.content) == STATUS
    shown = response.json()
    assert shown["nodes"][0]["state"] == "ready"
    assert shown["nodes"][2]["rtt_s"] is None


@pytest.mark.parametrize("node", [NODE.id, NODE.name])
def test_a_node_is_drained_and_undrained_by_id_or_name(client: httpx.Client, cluster: FakeCluster, node: str) -> None:
    for verb, state in (("drain", "draining"), ("drain", "draining"), ("undrain", "ready")):
        response = client.post(f"/tllm/v1/nodes/{node}/{verb}")
        assert response.status_code == 200, response.text
        assert response.json()["id"] == NODE.id
        assert response.json()["state"] == state
        assert [one.state for one in cluster.current.nodes] == [state, "ready", "ready"]


def test_a_name_may_contain_anything(client: httpx.Client) -> None:
    response = client.post(f"/tllm/v1/nodes/{quote('old laptop/2', safe='')}/drain")
    assert response.json()["id"] == "n-00000003"


@pytest.mark.parametrize("verb", ["drain", "undrain"])
def test_an_unknown_node_is_a_404_that_names_those_there_are(client: httpx.Client, verb: str) -> None:
    response = client.post(f"/tllm/v1/nodes/nobody/{verb}")
    assert refusal(response) == (404, "node_not_found")
    assert "'mini', 'm3pro', 'old laptop/2'" in response.text


@pytest.mark.parametrize("verb", ["drain", "undrain"])
def test_a_node_that_leaves_meanwhile_is_a_404(client: httpx.Client, cluster: FakeCluster, verb: str) -> None:
    cluster.gone.add(NODE.id)
    assert refusal(client.post(f"/tllm/v1/nodes/{NODE.id}/{verb}")) == (404, "node_not_found")


@pytest.mark.parametrize("verb", ["drain", "undrain"])
def test_a_name_of_two_nodes_is_a_conflict_that_names_their_ids(
    client: httpx.Client, cluster: FakeCluster, verb: str
) -> None:
    cluster.current = replace(STATUS, nodes=tuple(replace(node, name="twin") for node in STATUS.nodes[:2]))
    response = client.post(f"/tllm/v1/nodes/twin/{verb}")
    assert refusal(response) == (409, "ambiguous_node")
    assert "'n-00000001', 'n-00000002'" in response.text
    assert client.post(f"/tllm/v1/nodes/n-00000002/{verb}").status_code == 200


def test_a_node_that_the_model_needs_is_not_drained(client: httpx.Client, cluster: FakeCluster) -> None:
    cluster.needed.add(NODE.id)
    response = client.post(f"/tllm/v1/nodes/{NODE.id}/drain")
    assert refusal(response) == (409, "node_needed")
    assert "6 GB more" in response.text
    assert cluster.current == STATUS


def test_all_of_it_needs_the_key(serve: Serve, cluster: FakeCluster) -> None:
    client = serve(cluster=cluster, api_keys=("k",))
    for method, path in (
        ("GET", "/tllm/v1/cluster"),
        ("POST", f"/tllm/v1/nodes/{NODE.id}/drain"),
        ("POST", f"/tllm/v1/nodes/{NODE.id}/undrain"),
        ("GET", "/tllm/v1/join"),
    ):
        assert client.request(method, path).status_code == 401
    assert cluster.current == STATUS
    assert client.get("/tllm/v1/cluster", headers={"authorization": "Bearer k"}).status_code == 200


def test_joining_tells_three_things(client: httpx.Client) -> None:
    shown = client.get("/tllm/v1/join").json()
    assert shown == {"cluster": "tllm-demo", "grpc_port": 25001, "fingerprint": JOINING.fingerprint}


@pytest.mark.parametrize("headers", [{"host": "rebound.example"}, {"origin": "https://evil.example"}])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/tllm/v1/cluster"), ("GET", "/tllm/v1/join"), ("POST", f"/tllm/v1/nodes/{NODE.id}/drain")],
)
def test_pages_of_other_sites_are_refused(
    client: httpx.Client, cluster: FakeCluster, headers: dict[str, str], method: str, path: str
) -> None:
    assert client.request(method, path, headers=headers).status_code == 403
    assert cluster.current == STATUS


def test_a_drain_is_no_get(client: httpx.Client, cluster: FakeCluster) -> None:
    assert client.get(f"/tllm/v1/nodes/{NODE.id}/drain").status_code == 405
    assert cluster.current == STATUS


def test_a_server_without_a_cluster_says_so(serve: Serve) -> None:
    client = serve()
    assert refusal(client.get("/tllm/v1/cluster")) == (404, "no_cluster")
    assert refusal(client.get("/tllm/v1/join")) == (404, "no_cluster")
    assert refusal(client.post("/tllm/v1/nodes/mini/drain")) == (404, "no_cluster")
