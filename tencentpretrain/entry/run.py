"""Runs a command and turns what it raises into an exit code. The only place that does."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable

from tencentpretrain.config.ended import tell_launcher
from tencentpretrain.errors import ResourceError, TencentPretrainError

INTERRUPTED = 130


def run_main(function: Callable[[], int | None], *, debug: bool | None = None) -> int:
    """Calls a command and returns its exit code; an error is a sentence on stderr.

    Args:
        debug: show the traceback of an error; default: whether --debug is on the command line.
    """
    debug = "--debug" in sys.argv if debug is None else debug
    try:
        return function() or 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, as with `| head`
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"error: {_rank()}{_sentence(error)}", file=sys.stderr)
        tell_launcher(_sentence(error))
        return exit_code(error)


def exit_code(error: BaseException) -> int:
    """Returns the exit code of an error."""
    if isinstance(error, TencentPretrainError):
        return error.exit_code
    if isinstance(error, MemoryError) or _is_resource(error):
        return ResourceError.exit_code
    return 1


def _rank() -> str:
    """Which of several processes speaks."""
    several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    return f"[rank {os.environ['RANK']}] " if several else ""


def _is_resource(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.EROFS)
    return type(error).__name__ == "OutOfMemoryError"  # torch's, named without importing torch


def _sentence(error: Exception) -> str:
    if isinstance(error, TencentPretrainError):
        return str(error)
    if isinstance(error, MemoryError):
        return "not enough memory; try a smaller --batch_size or --seq_length"
    if _is_resource(error):
        return f"{error}; free some space or memory, then run the same command again"
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" (in {last[0].name}, {last[0].filename}:{last[0].lineno})" if last else ""
    return f"unexpected {type(error).__name__}: {error}{place}; --debug shows the traceback"
