"""What the battery says of nsa.yaml it must say of NSA's other kinds, too: keys of its own per branch, and means."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import battery
import pytest
import torch
from battery import ROTARY, Inputs, Shape, Variant, close, context, documents_at
from nsa_case import make, only, run, softmax_under, squeezed

from lightsparse.config.build import AttentionChoice


@dataclass(frozen=True)
class Kind(Variant):
    """nsa.yaml with other fields."""

    fields: tuple[tuple[str, str], ...] = ()

    @cached_property
    def choice(self) -> AttentionChoice:
        plain = Variant(self.name).choice
        return replace(plain, config=replace(plain.config, **dict(self.fields)))


OWN, MEAN = Kind("nsa", (("branch_kv", "own"),)), Kind("nsa", (("compress", "mean"),))
PROPERTIES = [
    (battery.passes_gradcheck, ()),
    (battery.rounds_like_dense_in_bf16, ()),
    (battery.never_sees_the_future, ()),
    (battery.never_sees_the_future_while_training, ()),
    (battery.keeps_documents_apart, ()),
    (battery.packs_like_separate_documents, ()),
    (battery.decodes_token_by_token, ()),
    (battery.decodes_from_a_cache, (Shape(90, 2, 4, 2, 32),)),
    (battery.chooses_again_what_it_chose, ()),
    (battery.grows_linearly, ()),
    (battery.equals_the_reference, (Shape(111, 2, 4, 2, 64),)),
]


@pytest.mark.parametrize("kind", [OWN, MEAN], ids=["own", "mean"])
@pytest.mark.parametrize(("check", "given"), PROPERTIES, ids=[check.__name__ for check, _ in PROPERTIES])
def test_the_battery_holds(kind, check, given):
    check(kind, *given)


def test_own_keys_and_values_are_projected_and_turned():
    """A summary's key is turned by the position of its last token, the window's by their own."""
    shape = Shape(111, 2, 4, 2, 32)
    given, documents = Inputs.random(shape), documents_at(111, 40, batch=2)
    core = make(shape, branch_kv="own")
    position = context(111, documents).positions

    def projected(of, x):
        return (part(x).unflatten(-1, (2, 32)).transpose(1, 2) for part in (of.k, of.v))

    t, same = torch.arange(111), documents[:, None, :, None] == documents[:, None, None]
    k, v = projected(core.window_keys.own, given.x)
    allowed = (t <= t[:, None]) & (t > t[:, None] - 21) & same
    right = softmax_under(given.q, ROTARY.rotated(k, position), v, allowed)
    close(run(only(core, "window"), given, documents).out, right, 1e-5, "the window")

    k, v = projected(core.summaries.own, given.x)
    k, v = squeezed(core.summaries.of_keys, k, 8, 4), squeezed(core.summaries.of_values, v, 8, 4)
    last = torch.arange(k.shape[2]) * 4 + 7
    allowed = (last <= t[:, None]) & same[..., last] & same[..., last - 7]
    right = softmax_under(given.q, ROTARY.rotated(k, position[:, last]), v, allowed)
    close(run(only(core, "compressed"), given, documents).out, right, 1e-5, "the summaries")


def test_decoding_keeps_of_its_own_keys_what_is_still_read():
    shape = Shape(140, 1, 4, 2, 16)
    core, given, states = make(shape, branch_kv="own"), Inputs.random(shape), {0: {}}
    for start, stop in ((0, 101), *((n, n + 1) for n in range(101, 140))):
        new, held = given.tokens(start, stop), given.tokens(0, stop)
        core(new.q, held.k, held.v, x=new.x, ctx=context(stop, q_start=start, states=states))
        assert states[0]["window"].shape[2] == stop - max(stop + 1 - 21, 0) // 16 * 16
        assert states[0]["summary_k"].shape[2] == (stop - 8) // 4 + 1
        assert states[0]["summary_tail"].shape[2] < 8
    assert sum(t.untyped_storage().nbytes() for t in states[0].values()) < 4 * 2 * 2 * 16 * (35 + 48 + 8)


@pytest.mark.parametrize("lost", ["summary_tail", "window"])
def test_decoding_without_the_states_of_earlier_tokens_is_refused(lost):
    shape = Shape(60, 1, 4, 2, 16)
    core, given, states = make(shape, branch_kv="own"), Inputs.random(shape), {0: {}}
    core(*given.tokens(0, 50).tensors()[:3], x=given.x[:, :50], ctx=context(50, states=states))
    del states[0][lost]
    new, held = given.tokens(50, 51), given.tokens(0, 51)
    with pytest.raises(ValueError, match=r"ctx.q_start is 50 but ctx.states holds no .* one KVCache per layer"):
        core(new.q, held.k, held.v, x=new.x, ctx=context(51, q_start=50, states=states))
