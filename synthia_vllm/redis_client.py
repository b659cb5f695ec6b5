"""The connections to Redis of all that gateways share: each question is asked once, and has so long to be answered."""

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

# Redis can't be reached, does not answer in time, or takes nothing.
REDIS_GONE = (RedisError, OSError, TimeoutError)


def open_redis(url: str, timeout: float) -> redis.asyncio.Redis:
    """Raises ValueError for what is no URL of a Redis. Nothing is asked yet."""
    return redis.asyncio.Redis.from_url(
        url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
    )
