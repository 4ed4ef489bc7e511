"""Processes of a stage that are shared or killed: copies of one that has imported everything.

What is tested is what they write, not how they begin: that is tests/test_launch.py and the smoke
recipes.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from torch.distributed import TCPStore

from recnb.launch import fork_processes
from recnb.stages import format_flags

WARM = """
ipykernel.kernelapp torch transformers transformers.modeling_utils transformers.trainer pandas
pyarrow.parquet peft transformers.models.llama.modeling_llama
transformers.models.qwen3.modeling_qwen3 trl.trainer.sft_trainer trl.trainer.grpo_trainer
matplotlib.pyplot recnb.training recnb.ranking
"""  # no stage: a module that runs as a command must not be imported before
COMMON = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents))}


def list_copies(wait):
    "Copies of this process's children that are still alive after so many seconds."
    forks = [child for child in psutil.Process().children() if "--forks" in child.cmdline()]
    copies = [copy for child in forks for copy in child.children()]
    return psutil.wait_procs(copies, timeout=wait)[1]


class Copies:
    "Starts stages in processes of their own, quickly."

    def __init__(self, forks):
        self.forks = forks  # environment; empty where no process can be copied

    def start(self, module, p, **environment):
        "A stage with these parameters, begun."
        env = {**os.environ, **self.forks, **COMMON, **environment}
        command = [sys.executable, "-m", "recnb.launch", *module.split(), *format_flags(p)]
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, env=env, **pipes)

    def start_all(self, module, p, processes, environment):
        "A stage, begun by so many processes."
        if processes == 1:
            return [self.start(module, p, **environment)]
        # their store is here, as it is torchrun's otherwise
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.store.port), **environment)
        shared.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
        shared.update(TORCHELASTIC_USE_AGENT_STORE="True")
        ranks = [dict(shared, RANK=str(i), LOCAL_RANK=str(i)) for i in range(processes)]
        return [self.start(module, p, **rank) for rank in ranks]

    def run(self, module, p, processes=1, **environment):
        "A stage, by so many processes; what the first said."
        started = self.start_all(module, p, processes, environment)
        said = [process.communicate(timeout=300)[1] for process in started]
        assert not any(process.returncode for process in started), "\n".join(said)[-3000:]
        return said[0]

    def refuse(self, module, p):
        "The one line with which a stage refuses these parameters."
        process = self.start(module, p)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 2 and said.count("\n") == 1, said
        return said

    def kill(self, module, p, ready, processes=1, **environment):
        "Begin a stage and kill it with signal 9 as soon as `ready()` holds."
        started = self.start_all(module, p, processes, environment)
        end = time.monotonic() + 120
        while started[0].poll() is None and time.monotonic() < end and not ready():
            time.sleep(0.002)
        for process in started:
            process.send_signal(signal.SIGKILL)
        said = [process.communicate()[1] for process in started]
        assert all(process.returncode == -9 for process in started), "\n".join(said)[-3000:]
        assert not list_copies(wait=10)  # they are killed just after


def count_lines(file):
    "Lines that a file has by now."
    return file.read_text().count("\n") if file.exists() else 0


def open_copies():
    "`Copies` as a fixture: other processes of these tests begin as usual."
    with fork_processes(WARM.split()):
        forks = {k: os.environ.pop(k) for k in ("RECNB_FORKS",) if k in os.environ}
        yield Copies(forks)
        os.environ.update(forks)
