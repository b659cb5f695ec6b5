"""Makes a batch file for `synthia-vllm batch requests.jsonl results.jsonl`: `python examples/batch.py < questions.txt`.

The batch runs offline, without a server, and goes on where it was interrupted.
"""

import json
import sys

for number, line in enumerate(filter(None, map(str.strip, sys.stdin)), start=1):
    body = {"model": "synthia", "messages": [{"role": "user", "content": line}], "max_tokens": 64}
    print(json.dumps({"custom_id": f"q{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}))
