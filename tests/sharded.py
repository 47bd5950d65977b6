"""Run a script under `accelerate`'s FSDP on processes without a GPU, for which `accelerate` would choose DDP.

accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 sharded.py SCRIPT ARGUMENTS
"""

import runpy
import sys

import torch
import torch.distributed.nn  # before the process group; see devices.py
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from reward_pipeline import prefix_sharing

PartialState._prepare_backend = lambda self, *others: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
prefix_sharing.share_prefixes = lambda model: False  # as on a GPU
torch.distributed.init_process_group("gloo")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
