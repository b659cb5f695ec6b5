"""Processes that are forked where vLLM would spawn them."""

import json
import subprocess
import sys
from pathlib import Path

_SERVER = """
import json, multiprocessing, os, sys

def tell(where):
    from vllm.utils.system_utils import get_mp_context

    told = {"parent": os.getppid(), "environment": os.environ.get("OF"), "loaded": "vllm.v1.engine.core" in sys.modules}
    if where == "child":
        os.environ["OF"] = "the child"
        grandchild = get_mp_context().Process(target=tell, args=("grandchild",))
        grandchild.start()
        grandchild.join()
        told["exit"] = grandchild.exitcode
    print(json.dumps({where: told}), flush=True)
    sys.exit(3)

if __name__ == "__main__":
    from synthia_vllm.engine import fork_server

    fork_server.start()
    from vllm.utils.system_utils import get_mp_context

    os.environ["OF"] = "the parent, after the start"
    child = get_mp_context().Process(target=tell, args=("child",))
    child.start()
    child.join()
    print(json.dumps({"exit": child.exitcode}))
"""


def test_children_of_children_come_from_one_server_with_their_parents_environment(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(_SERVER)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    found = {
        name: told
        for line in done.stdout.splitlines()
        if line.startswith("{")
        for name, told in json.loads(line).items()
    }
    child, grandchild = found["child"], found["grandchild"]
    assert child["parent"] == grandchild["parent"]
    assert child["loaded"]
    assert grandchild["loaded"]
    assert (child["environment"], grandchild["environment"]) == ("the parent, after the start", "the child")
    assert (found["exit"], child["exit"]) == (3, 3)
