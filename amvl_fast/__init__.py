"""AMVL: multimodal language models that reason in continuous latents, and the fused ops that train them."""

from amvl_fast import reference
from amvl_fast.configuration import AMVLConfig
from amvl_fast.errors import AMVLError
from amvl_fast.modeling import AMVLModel, AMVLOutput
from amvl_fast.ops import DualKL, gaussian_dual_kl, gaussian_noise, sample_gaussian
from amvl_fast.prefix import Branch, Prefix, run_prompts

__version__ = "0.1.0"

__all__ = [
    "AMVLConfig",
    "AMVLError",
    "AMVLModel",
    "AMVLOutput",
    "Branch",
    "DualKL",
    "Prefix",
    "__version__",
    "gaussian_dual_kl",
    "gaussian_noise",
    "reference",
    "run_prompts",
    "sample_gaussian",
]
