"""Benchmarks run on two threads, the size of machine that their figures are quoted for."""

import torch

torch.set_num_threads(2)
