"""What a run did, and whether another did the same."""

import torch
from safetensors.torch import load_file
from transformers.trainer_callback import TrainerState

# Plain gradient descent, unclipped: unlike Adam's, its steps show a gradient that is off by a factor. In float64, where
# only transformers' own casts to float32 round.
PLAIN = {
    "optim": "sgd",
    "learning_rate": 0.005,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
}
LOGGED = ("loss", "ntp_loss", "forward_kl", "reverse_kl", "forward_kl_slot_0", "reverse_kl_slot_1", "grad_norm_latents")


def weights(run_dir):
    """What was trained, of a run or a checkpoint; adapters and latents where LoRA was."""
    return load_file(next(run_dir.glob("*model.safetensors")))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def history(run_dir):
    return TrainerState.load_from_json(str(run_dir / "trainer_state.json")).log_history


def logs(run_dir):
    """One entry for each step that was logged, without what the clock says."""
    timed = ("samples_per_second", "tokens_per_second", "peak_memory_gib", "model_tflops_per_second")
    return [{k: v for k, v in entry.items() if k not in timed} for entry in history(run_dir) if "loss" in entry]


def evaluations(run_dir):
    return [entry for entry in history(run_dir) if "eval_rows" in entry]


def assert_same_trajectory(ours, expected, tolerance=2e-6):
    """Losses of every step, and the weights at the end, up to rounding."""
    ours_logs, expected_logs = logs(ours), logs(expected)
    assert [entry["step"] for entry in ours_logs] == [entry["step"] for entry in expected_logs]
    for a, b in zip(ours_logs, expected_logs, strict=True):
        for name in LOGGED:
            if name in a and name in b:
                torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)
    a, b = weights(ours), weights(expected)
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
