"""A Serve application that takes one request at a time and tells how many it ever had at once."""

import asyncio
import logging

from ray import serve
from starlette.requests import Request


@serve.deployment(max_ongoing_requests=1, ray_actor_options={"num_cpus": 0})
class Slow:
    def __init__(self) -> None:
        self.running = self.most = 0

    async def __call__(self, request: Request) -> int:
        logging.getLogger("slow_app").warning("asked for %s s", request.query_params["seconds"])
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(float(request.query_params["seconds"]))
        self.running -= 1
        return self.most


app = Slow.bind()
