"""Models that compute in float64 throughout.

transformers' norms, rotary embeddings and eager softmax go through float32 whatever the model's dtype, which leaves
1e-9 of rounding between two exact ways of computing the same.
"""

import torch
from torch.overrides import TorchFunctionMode

CASTS = {torch.Tensor.to, torch.Tensor.type, torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax}


class Float64Throughout(TorchFunctionMode):
    """Where something would be cast to float32, it becomes float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in CASTS:
            args = [torch.float64 if argument is torch.float32 else argument for argument in args]
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*args, **kwargs)
