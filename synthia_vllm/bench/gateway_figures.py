"""What a running gateway tells of itself."""

import json
import urllib.request
from typing import Any

from prometheus_client.parser import text_string_to_metric_families


def resumes(url: str, key: str | None = None) -> dict[str, int]:
    """Requests that lost a replica, by `reason: result`."""
    found: dict[str, int] = {}
    for family in text_string_to_metric_families(_get(f"{url}/metrics", key)):
        if family.name == "synthia_stream_resumes":
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    found[f"{sample.labels['reason']}: {sample.labels['result']}"] = int(sample.value)
    return found


def state(url: str, key: str | None = None) -> dict[str, Any]:
    """`/admin/state`."""
    found: dict[str, Any] = json.loads(_get(f"{url}/admin/state", key))
    return found


def _get(url: str, key: str | None) -> str:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as reply:
        body: bytes = reply.read()
        return body.decode()
