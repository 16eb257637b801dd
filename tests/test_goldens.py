"""Our student against recorded answers of PyTorch and transformers: same weights, same inputs.

scripts/make_goldens.py records them; test_parity.py asks PyTorch itself where it is installed.
"""

import numpy as np
import ours
import parity_cases as cases
import pytest

from sbs_jax.weights import names


@pytest.fixture(scope="module", params=list(cases.CASES))
def case(request):
    with np.load(cases.GOLDENS / f"{request.param}.npz") as recorded:
        golden = dict(recorded)
    config = cases.config(request.param)
    return golden, ours.answers(config, cases.model(config)[1])


def test_logits_are_transformers_s(case):
    golden, answers = case
    np.testing.assert_allclose(answers["logits"], golden["logits"], rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("name", cases.TRAINED)
def test_ten_updates_stay_together(name, tmp_path):
    config = cases.config(name)
    with np.load(cases.GOLDENS / f"{name}.npz") as recorded:
        golden = dict(recorded)
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
