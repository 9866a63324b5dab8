"""For all tests: one thread, since the models are tiny and threads of several processes get in each other's way."""

import torch

torch.set_num_threads(1)
