"""The cluster as data."""

from typing import Any

import pytest
import yaml

from synthia_vllm.cli.cluster import config_text
from synthia_vllm.cluster.config import check_agreement, check_environment, ray_environment, serve_config
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import DeploySettings, EngineSettings, Settings


def settings(**groups: Any) -> Settings:
    return Settings(model="demo", **groups)


def engine_of(config: dict[str, Any]) -> dict[str, Any]:
    return next(app for app in config["applications"] if app["name"] == "engine")


def gateway_of(config: dict[str, Any]) -> dict[str, Any]:
    return next(app for app in config["applications"] if app["name"] == "gateway")


def test_serve_accepts_the_config_as_it_is() -> None:
    from ray.serve.schema import ServeDeploySchema

    fixed = settings(cluster={"replicas": 2, "surge": True})
    scaled = settings(cluster={"replicas": 0}, scaling={"max_replicas": 4, "min_replicas": 0})
    for given in (fixed, scaled):
        ServeDeploySchema.model_validate(yaml.safe_load(config_text(given, ["--seed", "1"])))


def test_numbers_and_delays_change_without_new_replicas() -> None:
    """What is in `args` starts every replica anew."""
    one = serve_config(settings())
    two = serve_config(
        settings(
            cluster={"replicas": 3, "surge": True, "drain_s": 700, "health_period_s": 4},
            scaling={"max_replicas": 5, "target_load": 0.5},
        )
    )
    assert engine_of(one)["args"] == engine_of(two)["args"]
    assert gateway_of(one)["args"] == gateway_of(two)["args"]
    assert engine_of(two)["deployments"][0]["autoscaling_config"]["initial_replicas"] == 3


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
    routing = serve_config(settings(replicas={"routing": "round_robin"}))
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
    options = engine_of(
        serve_config(settings(cluster={"replicas": 2}, scaling={"max_replicas": 5, "target_load": 0.5}))
    )["deployments"][0]
    assert options["num_replicas"] == "auto"
    assert options["autoscaling_config"]["initial_replicas"] == 2
    assert options["autoscaling_config"]["policy"]["policy_kwargs"] == {"target_load": 0.5}


def test_a_gateway_knows_that_its_queue_wakes_replicas() -> None:
    """What it says of itself without a replica, `/ready`, depends on that."""

    def told(replicas: int, **scaling: Any) -> dict[str, Any]:
        config = serve_config(settings(cluster={"replicas": replicas}, scaling=scaling))
        found: dict[str, Any] = gateway_of(config)["args"]["settings"].get("scaling", {})
        return found

    assert told(1, min_replicas=0, max_replicas=4) == {"min_replicas": 0, "max_replicas": 4}
    assert told(2, min_replicas=2, max_replicas=4) == told(1, max_replicas=5) == {}


def test_the_applications_are_told_what_they_go_by() -> None:
    config = serve_config(
        settings(
            cluster={"replay": True, "gateways": 2, "address": "head:8265"},
            replicas={"max_generation_s": 500, "routing": "round_robin"},
        )
    )
    engine, gateway = engine_of(config)["args"]["settings"], gateway_of(config)["args"]["settings"]
    assert engine == {"model": "demo", "cluster": {"replay": True}, "replicas": {"max_generation_s": 500}}
    assert gateway["cluster"] == {"gateways": 2}
    assert gateway["replicas"] == {"max_generation_s": 500, "routing": "round_robin"}


def test_nodes_wait_for_a_head_that_comes_back() -> None:
    name = "RAY_gcs_rpc_server_reconnect_timeout_s"
    assert name not in ray_environment(settings()), "one that has forgotten everything is not waited for"
    durable = Settings(model="demo", deploy=DeploySettings(gcs_redis="redis:6379"))
    assert int(ray_environment(durable)[name]) >= 600


def test_a_replica_lives_longer_than_its_longest_stream() -> None:
    given = settings(cluster={"drain_s": 900}, replicas={"max_generation_s": 900})
    options = engine_of(serve_config(given))["deployments"][0]
    environment = ray_environment(given)
    assert options["graceful_shutdown_timeout_s"] > 900
    assert int(environment["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > 900


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ({"cluster": {"drain_s": 60}}, ("--cluster.drain-s 60", "--replicas.max-generation-s 600")),
        ({"replicas": {"handover_s": 700}}, ("--replicas.handover-s 700", "--cluster.drain-s 600")),
        ({"cluster": {"health_timeout_s": 4}}, ("--cluster.health-timeout-s 4", "--replicas.canary-deadline-s 10")),
        ({"cluster": {"replicas": 0}}, ("--cluster.replicas 0", "--scaling.max-replicas")),
        (
            {"cluster": {"replicas": 5}, "scaling": {"max_replicas": 4}},
            ("--cluster.replicas 5", "--scaling.max-replicas 4"),
        ),
        ({"scaling": {"min_replicas": 2, "max_replicas": 4}}, ("--cluster.replicas 1", "--scaling.min-replicas 2")),
    ],
)
def test_a_contradiction_names_both_options(groups: dict[str, Any], named: tuple[str, str]) -> None:
    with pytest.raises(SetupError) as raised:
        check_agreement(settings(**groups))
    assert all(option in str(raised.value) for option in named)


def test_the_defaults_agree() -> None:
    check_agreement(Settings())


def test_a_ray_without_its_environment_is_refused_by_name() -> None:
    with pytest.raises(SetupError, match="RAY_SERVE_ENABLE_HA_PROXY=1"):
        check_environment(settings(), {})
    enough = ray_environment(settings())
    check_environment(settings(), enough)
    with pytest.raises(SetupError, match=r"--replicas.max-generation-s 600 .* RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S 120"):
        check_environment(settings(), {**enough, "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "120"})
