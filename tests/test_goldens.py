"""Our student against recorded answers of PyTorch and transformers: same weights, same inputs.

scripts/make_goldens.py records them; test_parity.py asks PyTorch itself where it is installed.
"""

import numpy as np
import ours
import parity_cases as cases
import pytest

from sbs_jax.weights import names


def golden_of(name):
    with np.load(cases.GOLDENS / f"{name}.npz") as recorded:
        return dict(recorded)


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_are_transformers_s(name):
    config = cases.config(name)
    logits = ours.logits(config, cases.model(config)[1])
    np.testing.assert_allclose(logits, golden_of(name)["logits"], rtol=0, atol=1e-5)


# Each part of the long forms is part of another case.
LONG = ("relu_untied", "gated_tied")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.faults if name in LONG else ()) for name in cases.CASES],
)
def case(request):
    config = cases.config(request.param)
    return golden_of(request.param), ours.generated(config, cases.model(config)[1])


def test_greedy_generation_gives_the_same_tokens(case):
    golden, answers = case
    np.testing.assert_array_equal(answers["greedy"], golden["greedy"])


def test_beam_search_gives_the_same_tokens(case):
    golden, answers = case
    np.testing.assert_array_equal(answers["beam"], golden["beam"])
    np.testing.assert_array_equal(answers["more_beam"], golden["more_beam"])
    # If beam search equaled greedy, or no row ended, this would test nothing.
    assert (golden["beam"] != golden["greedy"]).any()
    assert (golden["beam"] == 1).any()
    assert not (golden["beam"][:, -1] == 0).all()


@pytest.mark.parametrize("name", [pytest.param("v1_0", marks=pytest.mark.faults), "v1_1"])
def test_ten_updates_stay_together(name, tmp_path):
    config, golden = cases.config(name), golden_of(name)
    losses, weights = ours.training(config, cases.model(config)[1], tmp_path)
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-5, atol=0)
    before = cases.parameters(config)
    for step, mine in weights.items():
        for each in names.of(mine):
            theirs = golden[f"weights_{step}/{each.hugging_face}"]
            theirs = theirs.T if each.transposed else theirs
            np.testing.assert_allclose(mine[each.ours], theirs, rtol=1e-4, atol=1e-7, err_msg=each.ours)
            # Weights hardly move in one step: compare their changes too.
            moved, expected = mine[each.ours] - before[each.ours], theirs - before[each.ours]
            assert np.linalg.norm(moved - expected) < 1e-3 * np.linalg.norm(expected), (step, each.ours)
