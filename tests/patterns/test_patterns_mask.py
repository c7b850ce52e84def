"""The interval rule: windows, sinks, causality and documents, written out token by token."""

from dataclasses import replace

import pytest
import torch
from pattern_definitions import documents
from torch.nn.attention.flex_attention import create_mask

from lightsparse.patterns import interval_mask


def may_read(i: int, j: int, ids: list[int], causal: bool, window: int | None, sinks: int) -> bool:
    if ids[i] != ids[j] or (causal and j > i):
        return False
    if window is None or (i - j < window if causal else abs(i - j) < window):
        return True
    return j - ids.index(ids[j]) < sinks


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("window", "sinks"), [(None, 0), (None, 3), (1, 0), (7, 0), (7, 3), (1, 1), (1000, 2), (1 << 40, 0)]
)
@pytest.mark.parametrize("q_start", [0, 17])
def test_a_token_reads_what_window_sinks_causality_and_documents_allow(window, sinks, causal, packed, q_start):
    n = 63
    ids = documents(n) if packed else None
    mask = interval_mask(n, q_start=q_start, causal=causal, window=window, sinks=sinks, documents=ids)
    of_samples = ids.tolist() if packed else [[0] * n]
    wanted = [
        [[[may_read(i, j, of, causal, window, sinks) for j in range(n)] for i in range(q_start, n)]]
        for of in of_samples
    ]
    assert mask.to_dense().tolist() == wanted
    assert (mask.num_queries, mask.num_keys) == (n - q_start, n)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_flex_attentions_mask_mod(causal, packed):
    n = 63
    mask = interval_mask(n, q_start=20, causal=causal, window=9, sinks=2, documents=documents(n) if packed else None)
    written_out = create_mask(mask, 2, 3, n - 20, n, device="cpu")
    assert torch.equal(written_out, mask.to_dense().expand(2, 3, -1, -1))


@pytest.mark.parametrize("packed", [False, True])
def test_a_part_of_the_queries_keeps_its_rule_and_its_explicit_mask(packed):
    n = 63
    mask = interval_mask(n, window=9, sinks=2, documents=documents(n) if packed else None)
    mask = replace(mask, dense=torch.rand(1, 2, n, n))
    part = mask.queries(11, 30)
    assert torch.equal(part.to_dense(), mask.to_dense()[:, :, 11:30])
    assert torch.equal(part.dense, mask.dense[:, :, 11:30])
    assert part.num_keys == n


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"window": 0}, "window is 0; a window counts tokens and must be at least 1"),
        ({"sinks": -1}, "sinks is -1; it counts tokens and must be at least 0"),
        ({"documents": torch.tensor([[1, 0, 0]])}, "document ids decrease along the sequence"),
        ({"window": 3, "sinks": 1, "documents": torch.tensor([[0, 1, 0]])}, "document ids decrease along the sequence"),
    ],
)
def test_wrong_values_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        interval_mask(3, **wrong)
