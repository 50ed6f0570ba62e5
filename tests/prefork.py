"""Become a script, in a process that multiprocessing has forked with torch imported already."""

import functools
import os
import runpy
import sys
import traceback

import torch

# Apple's GPU does not survive a fork. (PyTorch's own function is a cached one, too.)
torch.backends.mps.is_available = functools.cache(lambda: False)


def run(script, args, cwd, environment, outputs):
    """Run a script as if it had been started from the shell; outputs: paths for what it prints."""
    os.chdir(cwd)
    os.environ.update(environment)
    for number, path in enumerate((os.devnull, *outputs)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.argv, status = [script, *args], 1
    sys.path.insert(0, os.path.dirname(script))
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except Exception:  # noqa: BLE001, what Python itself does with it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
