"What a command costs, as a ratio to another one: seconds say more about the machine than about it."

import resource
import subprocess
import sys


def measure_cost(call):
    "What a call returns, and the processor time of the processes that it started and waited for."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = call()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def import_pandas():
    "The twin of a light command: what nearly every stage needs before it knows its own options."
    subprocess.run([sys.executable, "-c", "import pandas"], check=True)


def costs_at_most(times, call, twin=import_pandas, tries=3):
    "Whether a call costs at most so many times its twin, the better of some interleaved tries."
    for _ in range(tries):
        if measure_cost(call)[1] <= times * measure_cost(twin)[1]:
            return True
    return False
