"""The cluster as data."""

from typing import Any

import pytest
import yaml

from synthia_vllm.cli.cluster import config_text
from synthia_vllm.cluster.config import check_agreement, check_environment, ray_environment, serve_config
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import ClusterSettings, DeploySettings, EngineSettings, Settings


def settings(**cluster: Any) -> Settings:
    return Settings(model="demo", cluster=ClusterSettings(**cluster))


def engine_of(config: dict[str, Any]) -> dict[str, Any]:
    return next(app for app in config["applications"] if app["name"] == "engine")


def gateway_of(config: dict[str, Any]) -> dict[str, Any]:
    return next(app for app in config["applications"] if app["name"] == "gateway")


def test_serve_accepts_the_config_as_it_is() -> None:
    from ray.serve.schema import ServeDeploySchema

    for cluster in ({"replicas": 2, "surge": True}, {"max_replicas": 4, "min_replicas": 0, "replicas": 0}):
        ServeDeploySchema.model_validate(yaml.safe_load(config_text(settings(**cluster), ["--seed", "1"])))


def test_numbers_and_delays_change_without_new_replicas() -> None:
    """What is in `args` starts every replica anew."""
    one, two = serve_config(settings(replicas=1)), serve_config(settings(replicas=3, surge=True, drain_s=700))
    assert engine_of(one)["args"] == engine_of(two)["args"]
    assert engine_of(two)["deployments"][0]["num_replicas"] == 3


def test_what_another_command_reads_of_a_shared_file_starts_no_replica_anew() -> None:
    forked = settings().model_copy(update={"engine": EngineSettings(fork=True)})
    assert serve_config(forked) == serve_config(settings())


def test_an_option_of_the_engine_is_a_rollout_of_the_engine_only() -> None:
    before = serve_config(settings())
    after = serve_config(
        settings().model_copy(update={"engine": settings().engine.model_copy(update={"compile": True})})
    )
    assert engine_of(before)["args"] != engine_of(after)["args"]
    assert gateway_of(before) == gateway_of(after)
    routing = serve_config(settings(routing="round_robin"))
    assert engine_of(before)["args"] == engine_of(routing)["args"]


def test_no_secret_is_written_down() -> None:
    given = Settings(
        model="demo",
        access={"secret": "hush-hush", "database": "postgresql+psycopg://me:hush-hush@host/db"},  # type: ignore[arg-type]
        limits={"redis": "redis://:hush-hush@host"},  # type: ignore[arg-type]
    )
    text = config_text(given, [])
    assert "hush-hush" not in text
    assert "SYNTHIA_ACCESS__SECRET" in text


def test_scaling_has_its_policy_and_its_bounds() -> None:
    options = engine_of(serve_config(settings(replicas=2, max_replicas=5, target_load=0.5)))["deployments"][0]
    assert options["num_replicas"] == "auto"
    assert options["autoscaling_config"]["initial_replicas"] == 2
    assert options["autoscaling_config"]["policy"]["policy_kwargs"] == {"target_load": 0.5}


def test_a_gateway_knows_that_its_queue_wakes_replicas() -> None:
    """What it says of itself without a replica, `/ready`, depends on that."""

    def told(**cluster: Any) -> dict[str, Any]:
        found: dict[str, Any] = gateway_of(serve_config(settings(**cluster)))["args"]["settings"].get("cluster", {})
        return found

    assert told(min_replicas=0, max_replicas=4) == {"min_replicas": 0, "max_replicas": 4}
    assert told(min_replicas=2, replicas=2, max_replicas=4) == told(max_replicas=5) == {}


def test_nodes_wait_for_a_head_that_comes_back() -> None:
    name = "RAY_gcs_rpc_server_reconnect_timeout_s"
    assert name not in ray_environment(settings()), "one that has forgotten everything is not waited for"
    durable = Settings(model="demo", deploy=DeploySettings(gcs_redis="redis:6379"))
    assert int(ray_environment(durable)[name]) >= 600


def test_a_replica_lives_longer_than_its_longest_stream() -> None:
    options = engine_of(serve_config(settings(max_generation_s=900, drain_s=900)))["deployments"][0]
    environment = ray_environment(settings(max_generation_s=900, drain_s=900))
    assert options["graceful_shutdown_timeout_s"] > 900
    assert int(environment["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > 900


@pytest.mark.parametrize(
    ("cluster", "named"),
    [
        ({"drain_s": 60, "max_generation_s": 600}, ("--cluster.drain-s 60", "--cluster.max-generation-s 600")),
        ({"handover_s": 700}, ("--cluster.handover-s 700", "--cluster.drain-s 600")),
        ({"health_timeout_s": 4}, ("--cluster.health-timeout-s 4", "--cluster.canary-deadline-s 10")),
        ({"replicas": 0}, ("--cluster.replicas 0", "--cluster.max-replicas")),
        ({"replicas": 5, "max_replicas": 4}, ("--cluster.replicas 5", "--cluster.max-replicas 4")),
        ({"replicas": 1, "min_replicas": 2, "max_replicas": 4}, ("--cluster.replicas 1", "--cluster.min-replicas 2")),
    ],
)
def test_a_contradiction_names_both_options(cluster: dict[str, Any], named: tuple[str, str]) -> None:
    with pytest.raises(SetupError) as raised:
        check_agreement(settings(**cluster))
    assert all(option in str(raised.value) for option in named)


def test_the_defaults_agree() -> None:
    check_agreement(Settings())


def test_a_ray_without_its_environment_is_refused_by_name() -> None:
    with pytest.raises(SetupError, match="RAY_SERVE_ENABLE_HA_PROXY=1"):
        check_environment(settings(), {})
    enough = ray_environment(settings())
    check_environment(settings(), enough)
    with pytest.raises(SetupError, match=r"--cluster.max-generation-s 600 .* RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S 120"):
        check_environment(settings(), {**enough, "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "120"})
