"""`python tests/fsdp_on_cpu.py MODULE …`: run a module with FSDP2 on CPUs.

Accelerate by itself allows that on accelerators only.
"""

import runpy
import sys

from accelerate import state
from accelerate.utils import DistributedType

start = state.AcceleratorState.__init__


def with_fsdp(self, *args, **kwargs):
    start(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = plugin


state.AcceleratorState.__init__ = with_fsdp

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
