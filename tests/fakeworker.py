"""Stand-ins for the edit worker, to inject what a real one cannot be made to do on demand. Run with `python -m`."""

from __future__ import annotations

import json
import os
import sys
import time


def say(line: str) -> None:
    """One line on stdout, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


how = os.environ.get("KBSYNC_FAKE", "die")
job = json.loads(sys.stdin.readline())
say(json.dumps({"phase": "targets", "done": 1, "total": 2}))
if how == "sleep":
    time.sleep(600)
elif how == "chatter":
    say("a library writes to stdout")
    say(json.dumps({"error": {"type": "EditError", "message": "no", "hint": "try", "exit_code": 1}}))
elif how == "wait":
    sys.stdin.read()
else:
    sys.stderr.write("CUDA error: an illegal memory access\n")
    os._exit(134)
