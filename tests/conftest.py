"""What all tests have in common."""

import os

import torch

# Tests run in two processes, on small tensors: threads of their own would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
