"""The client of `benchmarks.loop`, a process of its own: sends what comes on standard input, and tells the status.

python -m benchmarks.loop_client PORT PATH CONTENT-ENCODING [SECONDS]

Says `ready` before it sends. With SECONDS it leaves after so long, whatever has come by then.
"""

import socket
import sys
import time
from http.client import HTTPConnection, HTTPException

_PATIENCE_S = 300.0


def main(port: str, path: str, encoding: str, stay: str = "") -> None:
    body = sys.stdin.buffer.read()
    connection = HTTPConnection("127.0.0.1", int(port), timeout=_PATIENCE_S)
    print("ready", flush=True)
    connection.request("POST", path, body, {"content-type": "application/json", "content-encoding": encoding})
    if stay:
        time.sleep(float(stay))
        assert isinstance(connection.sock, socket.socket)
        connection.sock.close()
        print("left", flush=True)
        return
    reply = connection.getresponse()
    try:
        length = f"{len(reply.read()) / 1000:.0f} kB"
    except HTTPException:
        length = "cut"
    print(f"{reply.status}, {length}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
