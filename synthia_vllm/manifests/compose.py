"""Docker Compose: gateway and engine, with PostgreSQL, Redis, Prometheus, Alertmanager and Grafana."""

from typing import Any

import yaml

from synthia_vllm.manifests.common import OF_RAY, image, rules, settings_file
from synthia_vllm.manifests.files import SHIPPED, Files, shipped, to_yaml
from synthia_vllm.manifests.sizing import Sizing, size
from synthia_vllm.settings import Settings, dump

_USER = "10001:10001"  # the Dockerfile's
_ENGINE_PORT = 8001
# Public images by tag; `docker compose config --resolve-image-digests` pins what was pulled.
_IMAGES = {
    "postgres": "postgres:17-alpine",
    "redis": "redis:7.4-alpine",
    "prometheus": "prom/prometheus:v3.5.0",
    "alertmanager": "prom/alertmanager:v0.28.1",
    "grafana": "grafana/grafana:12.1.0",
}
# What beside the engine may grow no further: a leak there is not the engine's end. Redis bounds itself below its own.
_MEMORY = {
    "gateway": "2g",
    "postgres": "1g",
    "redis": "384m",
    "prometheus": "2g",
    "alertmanager": "256m",
    "grafana": "512m",
}
_LOGGING = {"driver": "json-file", "options": {"max-size": "20m", "max-file": "5"}}
_SECRETS = ("access__secret", "access__database", "postgres_password", "metrics_key", "grafana_admin")
Object = dict[str, Any]


def render_compose(settings: Settings, vllm_options: list[str]) -> Files:
    """Raises SetupError for settings that contradict one another or do not fit what `deploy` says of the machine."""
    sizing = size(settings, several=False)
    return {
        "compose/compose.yaml": to_yaml(compose(settings, sizing, vllm_options)),
        "compose/engine.yaml": to_yaml(engine_settings(settings), comment="The engine's settings."),
        "compose/gateway.yaml": to_yaml(gateway_settings(settings), comment="The gateway's settings."),
        "compose/prometheus.yml": to_yaml(_prometheus(settings)),
        "compose/alertmanager.yml": to_yaml(_ALERTMANAGER, comment="Nobody is told yet: add your receiver."),
        **rules(settings),
        **shipped("grafana/provisioning"),
        **shipped("grafana/dashboards"),
    }


def compose(settings: Settings, sizing: Sizing, vllm_options: list[str]) -> Object:
    engine = _engine(settings, sizing, vllm_options)
    services = {
        "gateway": _gateway(settings, sizing),
        "engine": engine("cpu") | {"profiles": ["cpu"]},
        "engine-gpu": engine("cuda") | {"profiles": ["gpu"], "deploy": _gpus(sizing)},
        **_stores(),
        **_watching(),
    }
    bounds = {name: {"mem_limit": limit, "memswap_limit": limit} for name, limit in _MEMORY.items()}
    return {
        "name": "synthia",
        "services": {name: one | {"logging": _LOGGING} | bounds.get(name, {}) for name, one in services.items()},
        "networks": {
            "public": {},
            "engine": {"internal": True},
            "stores": {"internal": True},
            "watching": {"internal": True},
        },
        "volumes": {name: {} for name in ("engine-data", "gateway-data", "postgres", "prometheus", "grafana")},
        "secrets": {name: {"file": f"./secrets/{name}"} for name in _SECRETS},
    }


def engine_settings(settings: Settings) -> Object:
    """What the engine's process reads. It has no keys of its own: its network is the gateway's alone."""
    dumped: Object = dump(settings, include={"model", "prompt", "engine", "tracing", "drain_timeout"})
    own = {
        "host": "0.0.0.0",
        "port": _ENGINE_PORT,
        "insecure": True,
        "access": {"mode": "open"},
        "page": False,
        "openapi": False,
        "log_file": "-",
    }
    return dumped | own


def gateway_settings(settings: Settings) -> Object:
    dumped = settings_file(settings, without=(*OF_RAY, "engine", "model", "log_file"))
    own: Object = {"host": "0.0.0.0", "port": settings.port, "upstream": [f"http://engine:{_ENGINE_PORT}"]}
    limits = {"redis": "redis://redis:6379/0"} | dumped.pop("limits", {})
    return dumped | own | {"limits": limits, "log": {"format": "json"} | dumped.get("log", {})}


def _own(sizing: Sizing, command: list[str], config: str, port: int, flavour: str, name: str) -> Object:
    """What our two services share: no rights, a root file system that can't be written, a drain that is waited for."""
    return {
        "image": name,
        "build": {"context": "../..", "dockerfile": "deploy/container/Dockerfile", "target": flavour},
        "command": command,
        "environment": {"SYNTHIA_CONFIG": "/etc/synthia/settings.yaml"},
        "user": _USER,
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "tmpfs": ["/tmp"],
        "restart": "unless-stopped",
        "stop_grace_period": f"{sizing.grace_s}s",
        "healthcheck": {
            "test": ["CMD", "curl", "--fail", "--silent", "--output", "/dev/null", f"http://127.0.0.1:{port}/ready"],
            "interval": "10s",
            "timeout": "10s",
            "start_period": "30m",
        },
        "volumes": [f"./{config}:/etc/synthia/settings.yaml:ro"],
    }


def _gateway(settings: Settings, sizing: Sizing) -> Object:
    # The CPU image: a gateway has no use for CUDA's gigabytes.
    own = _own(sizing, ["gateway"], "gateway.yaml", settings.port, "cpu", image(settings, "cpu"))
    own["environment"]["SYNTHIA_SECRETS"] = "/run/secrets"
    own["volumes"].append("gateway-data:/data")
    return own | {
        # This machine only: TLS is for the proxy in front, see ../proxy.
        "ports": [f"127.0.0.1:{settings.port}:{settings.port}"],
        "networks": ["public", "engine", "stores", "watching"],
        "secrets": ["access__secret", "access__database"],
        "depends_on": {name: {"condition": "service_healthy"} for name in ("postgres", "redis")},
    }


def _engine(settings: Settings, sizing: Sizing, vllm_options: list[str]) -> Any:
    options = ["--", *vllm_options] if vllm_options else []

    def service(flavour: str) -> Object:
        own = _own(sizing, ["serve", *options], "engine.yaml", _ENGINE_PORT, flavour, image(settings, flavour))
        own["volumes"] += ["engine-data:/data", "${MODELS:-./models}:/models:ro"]
        return own | {"shm_size": "2gb", "networks": {"engine": {"aliases": ["engine"]}}}

    return service


def _gpus(sizing: Sizing) -> Object:
    device = {"driver": "nvidia", "count": max(sizing.gpus, 1), "capabilities": ["gpu"]}
    return {"resources": {"reservations": {"devices": [device]}}}


def _stores() -> Object:
    """Keys, the ledger and the limits. Redis has no password: only the gateway is on its network."""
    check = {"interval": "5s", "timeout": "5s", "retries": 12}
    return {
        "postgres": {
            "image": _IMAGES["postgres"],
            "environment": {
                "POSTGRES_USER": "synthia",
                "POSTGRES_DB": "synthia",
                "POSTGRES_PASSWORD_FILE": "/run/secrets/postgres_password",
            },
            "secrets": ["postgres_password"],
            "volumes": ["postgres:/var/lib/postgresql/data"],
            "networks": ["stores"],
            "restart": "unless-stopped",
            "healthcheck": {"test": ["CMD", "pg_isready", "-U", "synthia"], **check},
        },
        "redis": {
            "image": _IMAGES["redis"],
            "command": ["redis-server", "--save", "", "--appendonly", "no", "--maxmemory", "256mb"],
            "read_only": True,
            "networks": ["stores"],
            "restart": "unless-stopped",
            "healthcheck": {"test": ["CMD", "redis-cli", "ping"], **check},
        },
    }


def _watching() -> Object:
    return {
        "prometheus": {
            "image": _IMAGES["prometheus"],
            "command": [
                "--config.file=/etc/prometheus/prometheus.yml",
                "--storage.tsdb.path=/prometheus",
                "--storage.tsdb.retention.time=30d",
                "--storage.tsdb.retention.size=20GB",
            ],
            "volumes": [
                "./prometheus.yml:/etc/prometheus/prometheus.yml:ro",
                "../prometheus/rules:/etc/prometheus/rules:ro",
                "prometheus:/prometheus",
            ],
            "secrets": ["metrics_key"],
            "networks": ["watching"],
            "restart": "unless-stopped",
        },
        "alertmanager": {
            "image": _IMAGES["alertmanager"],
            "command": ["--config.file=/etc/alertmanager/alertmanager.yml", "--storage.path=/tmp"],
            "volumes": ["./alertmanager.yml:/etc/alertmanager/alertmanager.yml:ro"],
            "networks": ["watching", "public"],
            "restart": "unless-stopped",
        },
        "grafana": {
            "image": _IMAGES["grafana"],
            "environment": {
                "PROMETHEUS_URL": "http://prometheus:9090",
                "GF_SECURITY_ADMIN_PASSWORD__FILE": "/run/secrets/grafana_admin",
                "GF_ANALYTICS_REPORTING_ENABLED": "false",
            },
            "volumes": [
                "../grafana/provisioning:/etc/grafana/provisioning:ro",
                "../grafana/dashboards:/var/lib/grafana/dashboards/synthia:ro",
                "grafana:/var/lib/grafana",
            ],
            "secrets": ["grafana_admin"],
            "ports": ["127.0.0.1:3000:3000"],
            "networks": ["watching", "public"],
            "restart": "unless-stopped",
        },
    }


def _prometheus(settings: Settings) -> Object:
    """The shipped configuration with the gateway's address, its key, and where alerts go."""
    config: Object = yaml.safe_load((SHIPPED / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [f"gateway:{settings.port}"]}]
    job["authorization"] = {"credentials_file": "/run/secrets/metrics_key"}
    config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": ["alertmanager:9093"]}]}]}
    return config


_ALERTMANAGER = {
    "route": {"receiver": "nobody", "group_by": ["alertname"], "group_wait": "30s", "repeat_interval": "4h"},
    "receivers": [{"name": "nobody"}],
}
