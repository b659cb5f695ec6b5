"""Fails when a part of Ray that we use without its promise has moved. Checked on 2.60.0."""

import inspect

import ray
from ray.llm._internal.common.callbacks.base import CallbackCtx
from ray.serve._private.constants import RAY_SERVE_HAPROXY_BALANCE_ALGORITHM
from ray.serve._private.controller import ServeController
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
from ray.serve._private.long_poll import LongPollNamespace, LongPollState, UpdatedObject
from ray.serve.schema import Target, TargetGroup

from synthia_vllm.cluster.discovery import replica_urls
from synthia_vllm.cluster.private_ray import CHECKED_ON


def test_version_is_the_one_that_was_checked() -> None:
    assert ray.__version__ == CHECKED_ON


def test_the_controller_tells_where_replicas_are() -> None:
    assert "keys_to_snapshot_ids" in inspect.signature(ServeController.listen_for_change).parameters
    assert {"TARGET_GROUPS"} <= set(LongPollNamespace.__members__)
    assert {"TIME_OUT"} <= set(LongPollState.__members__)
    assert {"object_snapshot", "snapshot_id"} <= set(UpdatedObject.__dataclass_fields__)


def test_an_engine_can_do_without_a_process_that_fetches_models() -> None:
    assert CallbackCtx().run_init_node is True


def test_the_balance_algorithm_ends_haproxys_defaults() -> None:
    """`ray_environment` writes one more line of that section behind it."""
    assert RAY_SERVE_HAPROXY_BALANCE_ALGORITHM == "leastconn"
    defaults = HAPROXY_CONFIG_TEMPLATE.partition("\ndefaults\n")[2].partition("\nfrontend ")[0]
    assert defaults.rstrip().endswith("balance {{ config.balance_algorithm }}")


def test_only_the_replicas_of_one_application_are_listed() -> None:
    def group(app: str, protocol: str, *targets: Target) -> TargetGroup:
        return TargetGroup(targets=list(targets), route_prefix="/", protocol=protocol, app_name=app)

    one = Target(ip="10.0.0.1", port=30001, instance_id="", name="one")
    groups = [group("engine", "HTTP", one), group("engine", "gRPC", one), group("gateway", "HTTP", one)]
    assert replica_urls(groups, "engine", "/engine") == {"one": "http://10.0.0.1:30001/engine"}
    assert replica_urls([group("engine", "HTTP")], "engine", "/engine") == {}
