"""One settings tree: YAML file < files of secrets < environment (`SYNTHIA_…`) < command line.

`SYNTHIA_PROMPT__STYLE=script`, `--prompt.style script` and `prompt: {style: script}` in the file set the same field.
`SYNTHIA_SECRETS` names a folder with one file a secret (`access__secret`, `access__database`, …): what systemd's
credentials, Kubernetes' and Docker's secrets are.
"""

from synthia_vllm.settings.cluster import ClusterSettings, ReplicasSettings, ScalingSettings
from synthia_vllm.settings.data import SECRETS, dump
from synthia_vllm.settings.deploy import DeploySettings
from synthia_vllm.settings.gateway import LOOPBACK, AccessSettings, FairSettings, LimitsSettings, TimeoutSettings
from synthia_vllm.settings.kinds import Untold
from synthia_vllm.settings.load import load_settings, refuse_gateways_options, settings_of
from synthia_vllm.settings.model import EngineSettings, PromptSettings
from synthia_vllm.settings.names import field_of, fields_with, group_of, new_path, option_of, path_of
from synthia_vllm.settings.observing import LogSettings, MetricsSettings, SloSettings, SloTargets, TracingSettings
from synthia_vllm.settings.tree import CONFIG_VARIABLE, SECRETS_VARIABLE, Settings

__all__ = [
    "CONFIG_VARIABLE",
    "LOOPBACK",
    "SECRETS",
    "SECRETS_VARIABLE",
    "AccessSettings",
    "ClusterSettings",
    "DeploySettings",
    "EngineSettings",
    "FairSettings",
    "LimitsSettings",
    "LogSettings",
    "MetricsSettings",
    "PromptSettings",
    "ReplicasSettings",
    "ScalingSettings",
    "Settings",
    "SloSettings",
    "SloTargets",
    "TimeoutSettings",
    "TracingSettings",
    "Untold",
    "dump",
    "field_of",
    "fields_with",
    "group_of",
    "load_settings",
    "new_path",
    "option_of",
    "path_of",
    "refuse_gateways_options",
    "settings_of",
]
