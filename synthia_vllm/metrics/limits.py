"""Whether the limits are shared between gateways, as configured."""

from prometheus_client import Counter, Gauge

SHARED_UP = Gauge("synthia_limits_shared_up", "0 while the shared limits in Redis can't be reached; 1 with none.")
FALLBACKS = Counter(
    "synthia_limits_fallback_total", "Decisions made without Redis or the ledger, by what is then done.", ["mode"]
)
