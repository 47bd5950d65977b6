"""Run a script as one of several processes, and make sure that none of gloo's threads outlives it.

Such a thread may free a tensor while the interpreter is being torn down, which aborts the process: seldom, but more
often on a busy machine. So the threads are counted, which fails every time.

    torchrun --nproc_per_node=2 rank.py SCRIPT ARGUMENTS
"""

import runpy
import sys
from pathlib import Path

sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    threads = [thread.read_text().strip() for thread in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads
