"""Prompts that run once, and branches that read their keys and values."""

from amvl_fast.prefix.prefix import Branch, Prefix, run_prompts

__all__ = ["Branch", "Prefix", "run_prompts"]
