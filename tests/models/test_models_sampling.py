import pytest
import torch

from lightsparse.models.sampling import GREEDY, Sampling, sample

LOGITS = torch.randn(4, 37, generator=torch.Generator().manual_seed(0))


def draws(how: Sampling, count: int = 200, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([sample(logits, how, generator) for _ in range(count)], dim=1)


def test_top_k_draws_only_from_the_likeliest():
    allowed = LOGITS.topk(5).indices
    for row, drawn in enumerate(draws(Sampling(2.0, top_k=5))):
        assert set(drawn.tolist()) == set(allowed[row].tolist())
    assert torch.equal(sample(LOGITS, Sampling(top_k=1)), sample(LOGITS, GREEDY))
    assert sample(LOGITS, Sampling(top_k=500)).shape == (4,)


def test_top_p_draws_from_the_fewest_tokens_that_hold_the_share():
    share, order = LOGITS.softmax(-1).sort(-1, descending=True)
    for row, drawn in enumerate(draws(Sampling(top_p=0.5), 2000)):
        count = int((share[row].cumsum(0) < 0.5).sum()) + 1
        assert set(drawn.tolist()) == set(order[row, :count].tolist())
    assert torch.equal(sample(LOGITS, Sampling(top_p=1e-6)), sample(LOGITS, GREEDY))


def test_top_p_is_a_share_of_what_top_k_leaves():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Among the first two the shares are 4/7 and 3/7: the first alone holds less than 0.6, and more than 0.5.
    assert set(draws(Sampling(top_k=2, top_p=0.6), logits=logits)[0].tolist()) == {0, 1}
    assert set(draws(Sampling(top_k=2, top_p=0.5), logits=logits)[0].tolist()) == {0}


@pytest.mark.parametrize("how", [{}, {"top_p": 1.0}, {"top_k": 3}])
def test_temperature_sharpens_the_draw(how):
    logits, generator = torch.tensor([[2.0, 1.0, 0.0]]).expand(4000, 3), torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        share = (sample(logits, Sampling(temperature, **how), generator) == 0).float().mean().item()
        assert share == pytest.approx((logits[0] / temperature).softmax(0)[0].item(), abs=0.03)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_values_out_of_range_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**fields)
