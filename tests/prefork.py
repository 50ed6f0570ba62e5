"""Run scripts in processes forked from this one, which has imported torch already.

Importing torch takes seconds, and the tests run the scripts a hundred times in processes of their
own. Reads lines of JSON from standard input: a job, which is answered with the new process's id, or
that id again, with whether to wait for the end, which is answered with its exit status, or `null`
while it runs. Nothing is computed here, so no thread of torch's exists when it forks.
"""

import functools
import json
import os
import runpy
import sys
import traceback

import torch._dynamo  # what an optimizer would import at its first step

# Apple's GPU does not survive a fork. (PyTorch's own function is a cached one, too.)
torch.backends.mps.is_available = functools.cache(lambda: False)


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


ended = {}
for line in sys.stdin:
    job = json.loads(line)
    if "script" in job:
        child = os.fork()
        if child == 0:
            run(job)
        ended.pop(child, None)  # of an earlier process with this id
        print(child, flush=True)
        continue
    child = job["pid"]
    if child not in ended:
        done, status = os.waitpid(child, 0 if job["wait"] else os.WNOHANG)
        if done:
            ended[child] = os.waitstatus_to_exitcode(status)
    print(json.dumps(ended.get(child)), flush=True)
