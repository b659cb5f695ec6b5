"""What KubeRay takes as a RayService (ray.io/v1), as far as we use it: our own description of its CRD's fields.

Pod templates in it are Kubernetes' own and are checked as such.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(_Strict):
    mode: Literal["disabled", "token"]


class RedisPassword(_Strict):
    valueFrom: dict[Literal["secretKeyRef"], dict[str, Any]]


class GcsFaultToleranceOptions(_Strict):
    redisAddress: str
    redisPassword: RedisPassword | None = None


class AutoscalerOptions(_Strict):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: int
    resources: dict[str, Any]
    securityContext: dict[str, Any]


class HeadGroup(_Strict):
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class WorkerGroup(_Strict):
    groupName: str
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class RayCluster(_Strict):
    rayVersion: str
    authOptions: AuthOptions
    gcsFaultToleranceOptions: GcsFaultToleranceOptions | None = None
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: AutoscalerOptions | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)


class UpgradeStrategy(_Strict):
    type: Literal["NewCluster", "None", "NewClusterWithIncrementalUpgrade"]


class RayServiceSpec(_Strict):
    serveConfigV2: str
    upgradeStrategy: UpgradeStrategy
    excludeHeadPodFromServeSvc: bool
    rayClusterDeletionDelaySeconds: int = Field(ge=0)
    rayClusterConfig: RayCluster
