"""Stand-ins for the edit worker, to inject what a real one cannot be made to do on demand. Run with `python -m`."""

from __future__ import annotations

import json
import os
import sys
import time

how = os.environ.get("KBSYNC_FAKE", "die")
job = json.loads(sys.stdin.readline())
print(json.dumps({"phase": "targets", "done": 1, "total": 2}), flush=True)
if how == "sleep":
    time.sleep(600)
elif how == "chatter":
    print("a library writes to stdout", flush=True)
    print(json.dumps({"error": {"type": "EditError", "message": "no", "hint": "try", "exit_code": 1}}), flush=True)
elif how == "wait":
    sys.stdin.read()
else:
    print("CUDA error: an illegal memory access", file=sys.stderr, flush=True)
    os._exit(134)
