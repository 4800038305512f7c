"""How processes end, told between launchers and what they start."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time


def how_ended(code: int) -> str:
    """Returns the meaning of a process's exit code; negative ones are signals."""
    if code >= 0:
        return f"with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"ended by {name}{' (out of memory?)' if code == -signal.SIGKILL else ''}"


def tell_launcher(message: str) -> None:
    """Leaves an error where launchers look for it (the file torchrun names), so that they show it with their own."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):
        return
    content = {
        "message": {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
    }
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
