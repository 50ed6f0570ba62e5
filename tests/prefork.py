"""Run scripts in processes forked from this one, which has imported torch already.

Importing torch takes seconds, and the tests run the scripts a hundred times in processes of their
own. Reads a job a line from standard input, as JSON, and answers with the new process's id, then
with its exit status. Nothing is computed here, so no thread of torch's exists when it forks.
"""

import json
import os
import runpy
import sys
import traceback

import torch._dynamo  # noqa: F401, what an optimizer would import at its first step


def run(job):
    """Become the script, as if it had been started from the shell."""
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    for number, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.argv = [job["script"], *job["args"]]
    sys.path[0] = os.path.dirname(job["script"])
    status = 1
    try:
        runpy.run_path(job["script"], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except Exception:  # noqa: BLE001, what Python itself does with it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(json.loads(line))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
