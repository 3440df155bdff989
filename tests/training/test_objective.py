"""Rows of the ablation table and the weights over the steps."""

import pytest

from amvl_fast.errors import AMVLError
from amvl_fast.objective import OBJECTIVES, Objective

ROWS = {  # name: (NTP, forward KL, reverse KL, stop-gradient) at the end of training
    "ntp": (1, 0, 0, True),
    "forward_kl": (0, 1, 0, True),
    "reverse_kl": (0, 0, 1, True),
    "ntp_forward_kl": (1, 1, 0, True),
    "ntp_reverse_kl": (1, 0, 1, True),
    "amvl_gamma_first": (1, 1, 1, True),
    "amvl": (1, 1, 1, True),
    "elbo": (1, 1, 0, False),
}


def test_every_row_of_the_table_has_a_name():
    assert set(OBJECTIVES) == {"no_latents", *ROWS}
    assert Objective("no_latents").at(3, 10) == {}


@pytest.mark.parametrize(("name", "row"), ROWS.items())
def test_a_name_switches_exactly_its_terms(name, row):
    end = Objective(name, beta=2.0, gamma=0.5, ntp_weight=3.0).at(99, 100)
    ntp, forward, reverse, stop = row
    expected = {"ntp_weight": 3.0 * ntp, "beta": 2.0 * forward, "gamma": 0.5 * reverse}
    ours = {"prior_ntp_weight": 0.0, "free_bits": 0.0, "num_posterior_samples": 1, "posterior_bound": "mean"}
    assert end == {**expected, **ours, "stop_gradient": stop}


def test_the_first_kl_warms_up_and_the_second_waits():
    amvl = Objective(beta=1.0, gamma=0.2, kl_warmup_steps=10, kl_delay_steps=40)
    weights = [amvl.at(step, 100) for step in range(100)]
    betas, gammas = [w["beta"] for w in weights], [w["gamma"] for w in weights]
    assert betas[:10] == pytest.approx([0.1 * i for i in range(1, 11)]) and set(betas[10:]) == {1.0}
    assert set(gammas[:40]) == {0.0} and gammas[40:50] == pytest.approx([0.02 * i for i in range(1, 11)])
    assert set(gammas[50:]) == {0.2}


def test_the_reverse_order_swaps_the_two():
    options = dict(beta=1.0, gamma=0.2, kl_warmup_steps=10, kl_delay_steps=40)
    swapped = Objective("amvl_gamma_first", **options).at(20, 100)
    assert swapped["gamma"] == 0.2 and swapped["beta"] == 0.0


def test_steps_below_one_are_shares_and_zero_means_at_once():
    share = Objective(kl_warmup_steps=0.1, kl_delay_steps=0.4)
    steps = Objective(kl_warmup_steps=20, kl_delay_steps=80)
    assert [share.at(s, 200) for s in range(200)] == [steps.at(s, 200) for s in range(200)]
    assert Objective(beta=0.7, kl_warmup_steps=0).at(0, 10)["beta"] == 0.7


def test_bad_values_are_refused():
    with pytest.raises(AMVLError, match="objective.name is 'vae'"):
        Objective("vae")
    with pytest.raises(AMVLError, match="objective.gamma is -0.1"):
        Objective(gamma=-0.1)


def test_samples_of_the_posterior_reach_the_model():
    options = Objective(num_posterior_samples=4, posterior_bound="importance").at(0, 10)
    assert (options["num_posterior_samples"], options["posterior_bound"]) == (4, "importance")
    with pytest.raises(AMVLError, match="num_posterior_samples is 0; it must be at least 1"):
        Objective(num_posterior_samples=0)
    with pytest.raises(AMVLError, match="posterior_bound='best' is not known; use one of"):
        Objective(posterior_bound="best")
