"""The pieces of the router: exact ties, tables, noise of the right law, and churn."""

from __future__ import annotations

import math

import torch

from lightsparse.attention.selection.router import Noise, best, gate_entropy, index_churn, listed, logistic_noise


def test_the_best_are_at_most_k_candidates_and_ties_go_to_the_lower_index():
    g = torch.Generator().manual_seed(0)
    for columns, most in ((1, 1), (7, 3), (40, 5), (40, 40), (40, 99)):
        scores = torch.randint(-2, 3, (2, 3, 5, columns), generator=g).double()  # many ties
        among = torch.rand(2, 1, 5, columns, generator=g) < 0.6
        among[0, 0, 0] = False
        found = best(scores, among, most)
        for place in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
            row, allowed = scores[*place].tolist(), among[place[0], 0, place[2]].tolist()
            order = sorted((j for j in range(columns) if allowed[j]), key=lambda j: (-row[j], j))
            assert found[*place].nonzero().flatten().tolist() == sorted(order[:most])


def test_equal_scores_choose_the_first_blocks():
    among = torch.ones(1, 20, dtype=torch.bool)
    assert best(torch.zeros(1, 20), among, 4).nonzero()[:, 1].tolist() == [0, 1, 2, 3]


def test_a_table_lists_what_is_chosen_in_ascending_order():
    chosen = torch.tensor([[True, False, True, True], [False] * 4, [False, False, False, True]])
    assert listed(chosen, 3).tolist() == [[0, 2, 3], [-1, -1, -1], [3, -1, -1]]
    assert listed(chosen, 6).shape == (3, 6) and listed(chosen, 6).dtype == torch.int32


def test_noise_is_logistic_finite_and_the_same_wherever_it_is_computed():
    rows, columns = torch.arange(300), torch.arange(200)
    noise = Noise(seed=7, layer=1, samples=torch.tensor([3, 11]))
    x = logistic_noise(noise, 2, rows, columns)
    assert x.shape == (2, 2, 300, 200) and x.isfinite().all()
    for level in (0.05, 0.3, 0.5, 0.9):  # σ of standard logistic noise is uniform
        assert abs(float((torch.sigmoid(x) < level).float().mean()) - level) < 0.005
    part = logistic_noise(Noise(7, 1, torch.tensor([11])), 2, rows[50:60], columns[:9])
    assert torch.equal(part, x[1:, :, 50:60, :9])
    for other in (Noise(8, 1, noise.samples), Noise(7, 2, noise.samples), Noise(7, 1, noise.samples + 1)):
        correlation = torch.corrcoef(torch.stack([x.flatten(), logistic_noise(other, 2, rows, columns).flatten()]))
        assert abs(float(correlation[0, 1])) < 0.02


def test_entropy_is_largest_for_an_open_question_and_finite_for_a_settled_one():
    entropy = gate_entropy(torch.tensor([0.0, 2.0, -2.0, 200.0, -200.0]))
    p = 1 / (1 + math.exp(-2))
    right = -p * math.log(p) - (1 - p) * math.log(1 - p)
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), right, right, 0.0, 0.0]))


def test_churn_counts_the_entries_that_only_one_table_has():
    before = torch.tensor([[[[0, 1, -1], [0, 2, 3]]]], dtype=torch.int32)
    assert float(index_churn(before, before)) == 0
    assert float(index_churn(before, torch.nn.functional.pad(before, (0, 2), value=-1))) == 0
    after = torch.tensor([[[[0, -1, -1], [1, 2, -1]]]], dtype=torch.int32)
    assert abs(float(index_churn(before, after)) - 4 / 6) < 1e-6  # common: 0 and 2; of six entries four are single
    assert float(index_churn(before, before + 10 * (before >= 0))) == 1
