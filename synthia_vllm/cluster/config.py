"""The cluster as data: a Serve config, as `serve deploy` and KubeRay take it, and the environment that Ray needs.

What starts replicas anew when it changes is in the applications' `args`; numbers of replicas, delays and timeouts are
options of the deployments, which Serve changes while they run.
"""

import math
import operator
import os
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from synthia_vllm.errors import SetupError
from synthia_vllm.secret_urls import reveal
from synthia_vllm.settings import SECRETS as SETTINGS_SECRETS
from synthia_vllm.settings import ClusterSettings, Settings, dump, option_of

ENGINE, GATEWAY = "engine", "gateway"  # the applications
ENGINE_ROUTE = "/engine"
# `ray.serve.llm` makes the name from the class and the model's id, which is the same for every model of ours: with
# another one, another model would be another deployment, and not a rollout.
ENGINE_DEPLOYMENT, GATEWAY_DEPLOYMENT = "Engine:synthia", "GatewayReplica"
# Of the settings, what an engine replica is made from.
_ENGINE_GROUPS = ("model", "prompt", "engine", "tracing", "cluster", "replicas")
_ENGINE_FIELDS = {
    "cluster": ("accelerator", "pipeline_parallel_size", "cpus_per_replica", "replay"),
    "replicas": ("max_generation_s",),
}
_BOUNDS = ("min_replicas", "max_replicas")
_NOT_OF_APPLICATIONS = {"config": True, "deploy": True, "engine": {"fork"}}  # Ray starts vLLM's processes
# And of these groups, what a gateway goes by; `engine`: how long prompts may be.
_GATEWAY_FIELDS = {"cluster": ("gateways", "gateway_nodes"), "engine": ("max_model_len", "dtype")}
# Given to Ray's nodes in their environment, never written into a config: Serve shows those to everyone who asks.
# No key of engines elsewhere: a cluster's are its own.
SECRETS = {f"SYNTHIA_{'__'.join(path).upper()}": path for path in SETTINGS_SECRETS if path != ("upstream_key",)}
_HARD_STOP = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"
_SWITCHES = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING")
# From the decision to stop a replica until its port closes: our gateways hear of it within a tenth of a second, HAProxy
# needs a reload. Ray's default of 30 s would make every replica of a rollout wait for that long.
_DEREGISTRATION_S = 5
_GCS_AWAY_S = 600  # with its state in Redis, a head may take so long to come back; nodes wait no longer
_MARGIN_S = 15  # that what waits for something is given more than that


def serve_config(settings: Settings, vllm_options: Sequence[str] = ()) -> dict[str, Any]:
    """The Serve config; the same settings give the same, so that deploying it again changes nothing.

    `settings.model` has to be set. Raises SetupError where options contradict one another.
    """
    check_agreement(settings)
    return {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": settings.host,
            "port": settings.port,
            "keep_alive_timeout_s": math.ceil(settings.timeouts.idle),
        },
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": ENGINE,
                "route_prefix": ENGINE_ROUTE,
                "import_path": "synthia_vllm.cluster.apps:engine",
                "args": {"settings": _engine_settings(settings), "vllm_options": list(vllm_options)},
                "deployments": [{"name": ENGINE_DEPLOYMENT, **_engine_options(settings)}],
            },
            {
                "name": GATEWAY,
                "route_prefix": "/",
                "import_path": "synthia_vllm.cluster.apps:gateway",
                "args": {"settings": _gateway_settings(settings)},
                "deployments": [{"name": GATEWAY_DEPLOYMENT, **_gateway_options(settings.cluster)}],
            },
        ],
    }


def ray_environment(settings: Settings) -> dict[str, str]:
    """What every node of Ray needs in its environment before it starts, beside the secrets."""
    timeouts = settings.timeouts
    return {
        **dict.fromkeys(_SWITCHES, "1"),
        # Without a byte from a client that has to send one. A reply may take as long as it likes: `timeout server` is
        # unset, and while a client only reads, HAProxy does not wait for it.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(math.ceil(max(timeouts.headers, timeouts.body))),
        # Serve has no option for `timeout http-request`, the time that a request's headers may take as a whole. The
        # last line of its `defaults` section is this algorithm, so that one more line can follow.
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": f"leastconn\n    timeout http-request {math.ceil(timeouts.headers)}s",
        # An old HAProxy process lives on for its streams after each reload, at most so long.
        _HARD_STOP: str(math.ceil(max(settings.cluster.drain_s, settings.replicas.max_generation_s)) + _MARGIN_S),
        # Three times without HAProxy, and it is started again; at Ray's 10 s nobody would be served for half a minute.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_DEREGISTRATION_S),
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a process that takes no GPU may still look at them
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray starts a process at 0 and then lowers it to 15: each one that starts takes the engines' cores from them.
        "RAY_worker_niceness": "0",
        **({"RAY_gcs_rpc_server_reconnect_timeout_s": str(_GCS_AWAY_S)} if settings.deploy.gcs_redis else {}),
    }


def check_agreement(settings: Settings) -> None:
    """Raises SetupError for times and numbers that contradict one another; it names both and the cure."""
    bounds = [
        (operator.ge, "cluster.drain_s", "replicas.max_generation_s", "a stream that can't move would be cut"),
        (operator.le, "replicas.handover_s", "cluster.drain_s", "streams would be cut before they are handed over"),
        (
            operator.gt,
            "cluster.health_timeout_s",
            "replicas.canary_deadline_s",
            "Serve would stop a replica before its streams are moved",
        ),
    ]
    for holds, one, other, why in bounds:
        value, against = attrgetter(one, other)(settings)
        if not holds(value, against):
            word = "lower it, or raise" if holds is operator.le else "raise it, or lower"
            raise SetupError(
                f"{option_of(one)} {value:g} does not fit {option_of(other)} {against:g}: {why}; {word} the other"
            )
    replicas, scaling = settings.cluster.replicas, settings.scaling
    if scaling.max_replicas is None:
        if replicas < 1:
            raise SetupError(
                "--cluster.replicas 0: nothing would ever start; add --scaling.max-replicas for scaling from zero, or "
                "set at least 1"
            )
    elif not scaling.min_replicas <= replicas <= scaling.max_replicas:
        raise SetupError(
            f"--cluster.replicas {replicas}: has to be between --scaling.min-replicas {scaling.min_replicas} and "
            f"--scaling.max-replicas {scaling.max_replicas}"
        )


def check_environment(settings: Settings, environment: Mapping[str, str] = os.environ) -> None:
    """Raises SetupError where this process of a Ray cluster lacks what its nodes need; called by the builders there."""
    wanted = ray_environment(settings)
    for name in _SWITCHES:
        if environment.get(name) != "1":
            raise SetupError(
                f"--cluster.address: this Ray runs without {name}=1; start its nodes with the environment that "
                "`synthia-vllm cluster config` prints"
            )
    hard_stop, longest = float(environment.get(_HARD_STOP, 120)), settings.replicas.max_generation_s
    if hard_stop < longest:
        raise SetupError(
            f"--replicas.max-generation-s {longest:g} is more than {_HARD_STOP} {hard_stop:g} "
            f"of this Ray: HAProxy would cut streams; start its nodes with {_HARD_STOP}={wanted[_HARD_STOP]}"
        )


def secrets_of(settings: Settings) -> dict[str, str]:
    """The environment variables that carry what no config may hold; only those that are set."""
    found = {}
    for variable, path in SECRETS.items():
        value = reveal(attrgetter(".".join(path))(settings))
        if value is not None:
            found[variable] = value
    return found


def _engine_settings(settings: Settings) -> dict[str, Any]:
    dumped = _dump(settings)
    return _less({key: dumped[key] for key in _ENGINE_GROUPS if key in dumped}, _ENGINE_FIELDS)


def _gateway_settings(settings: Settings) -> dict[str, Any]:
    """All but what the gateway does not use or Serve can change while it runs."""
    dumped = _dump(settings)
    for name in ("port", "admin_port", "admin_host", "log_file", "drain_timeout"):
        dumped.pop(name, None)
    # A gateway without a replica is ready all the same where its queue is what wakes one.
    bounds = _BOUNDS if settings.scaling.scales_to_zero else ()
    return _less(dumped, {**_GATEWAY_FIELDS, "scaling": bounds})


def _less(dumped: dict[str, Any], fields: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """With no other fields of these groups, and no group that is empty then."""
    parts = {
        group: {name: value for name, value in dumped.get(group, {}).items() if name in of_group}
        for group, of_group in fields.items()
    }
    rest = {group: value for group, value in dumped.items() if group not in parts}
    return rest | {group: part for group, part in parts.items() if part}


def _dump(settings: Settings) -> dict[str, Any]:
    """What differs from the defaults, without the secrets, paths made absolute: a replica has another folder."""
    dumped = dump(settings, exclude=_NOT_OF_APPLICATIONS)
    for key in ("model", "tokenizer"):
        if dumped.get(key) and Path(dumped[key]).expanduser().is_dir():
            dumped[key] = str(Path(dumped[key]).expanduser().resolve())
    return dumped


def _engine_options(settings: Settings) -> dict[str, Any]:
    cluster, scaling = settings.cluster, settings.scaling
    options: dict[str, Any] = {
        # Serve refuses none that is more: with direct ingress it waits there unseen, our own questions too. So twice
        # what the gateways give on average; with affinity some replicas get more than others.
        "max_ongoing_requests": 2 * settings.replicas.max_requests_per_replica,
        "health_check_period_s": cluster.health_period_s,
        "health_check_timeout_s": cluster.health_timeout_s,
        "graceful_shutdown_timeout_s": cluster.drain_s + _DEREGISTRATION_S + _MARGIN_S,
        "graceful_shutdown_wait_loop_s": 1.0,
        "rolling_update_percentage": 0.01,  # one at a time
        "max_surge_percent": 1 if cluster.surge else 0,  # rounded up to one replica
    }
    if scaling.max_replicas is None:
        return {"num_replicas": cluster.replicas, **options}
    autoscaling = {
        "min_replicas": scaling.min_replicas,
        "initial_replicas": cluster.replicas,
        "max_replicas": scaling.max_replicas,
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
        "policy": {
            "policy_function": "synthia_vllm.cluster.autoscaling:TokenLoadPolicy",
            "policy_kwargs": {"target_load": scaling.target_load},
        },
    }
    return {"num_replicas": "auto", "autoscaling_config": autoscaling, **options}


def _gateway_options(cluster: ClusterSettings) -> dict[str, Any]:
    return {
        "num_replicas": cluster.gateways,
        "health_check_period_s": cluster.health_period_s,
        "health_check_timeout_s": cluster.health_timeout_s,
        "graceful_shutdown_timeout_s": cluster.drain_s + _DEREGISTRATION_S + _MARGIN_S,
        "graceful_shutdown_wait_loop_s": 1.0,
        "rolling_update_percentage": 0.01,
        "max_surge_percent": 1,  # a gateway is small, and without one nobody is served
    }
