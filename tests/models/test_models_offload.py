"""Layers whose inputs wait in main memory: the same gradients bit for bit, each copy once, in order and waited for.

No GPU is asked for. `Slow` stands in for the copies: what it copies arrives only when it is waited for, and what is let
go before that is overwritten, as another tensor in the same memory would.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightsparse.attention.sliding_window import SlidingWindowAttention, SlidingWindowConfig
from lightsparse.models import ModelConfig, Transformer, offload, transformer
from lightsparse.models.transformer import context_for

VOCAB, DEPTH, TOKENS, WIDTH = 37, 5, 40, 24
GARBAGE = 1e30


class Slow:
    """Copies that are done when they are waited for. `events` has what happened: ("out"|"back"|"wait", copy number)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.numbers: dict[int, int] = {}  # address of a copy in main memory → its number
        self.away: list[torch.Tensor] = []  # all of them
        self.on_device: list[weakref.ref] = []  # what has been copied out or came back

    def out(self, x):
        there = torch.full_like(x, GARBAGE)
        number = self.numbers[there.data_ptr()] = len(self.numbers)
        self.away.append(there)
        self.on_device.append(weakref.ref(x))
        self.events.append(("out", number))
        return there, (number, weakref.ref(x), there)

    def back(self, there):
        number = self.numbers[there.data_ptr()]
        x = torch.full_like(there, GARBAGE)
        self.on_device.append(weakref.ref(x))
        self.events.append(("back", number))
        return x, (number, lambda: there, x)

    def wait(self, mark):
        number, source, target = mark
        self.events.append(("wait", number))
        source = source()
        assert source is not None, "a tensor was let go while it was copied out"
        target.copy_(source)

    def count(self, event: str) -> list[int]:
        return [number for happened, number in self.events if happened == event]

    def alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.on_device)


@pytest.fixture
def slow(monkeypatch) -> Slow:
    made = Slow()
    monkeypatch.setattr(transformer, "copies_of", lambda device: made)
    return made


def built(activation_checkpointing, *, chunk=1000, dropout=0.0, depth=DEPTH) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        depth=depth,
        embed_dim=WIDTH,
        heads=3,
        kv_heads=1,
        head_dim=8,
        dropout=dropout,
        activation_checkpointing=activation_checkpointing,
        chunk=chunk,
    )
    return Transformer(
        config, lambda shape: SlidingWindowAttention(SlidingWindowConfig(window=11, block=8), shape), vocab_size=VOCAB
    )


def some_tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def loss_of(model: Transformer) -> torch.Tensor:
    tokens = some_tokens()
    return model.loss_sum(model(tokens, context_for(tokens, seed=3)).hidden, tokens)


def gradients(model: Transformer) -> list[torch.Tensor]:
    loss_of(model).backward()
    return [parameter.grad for parameter in model.parameters()]


@contextmanager
def saved():
    """Entries of what autograd saves within, by storage."""
    kept: dict[int, torch.Tensor] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


# ---- the same numbers


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [1000, 16])
def test_gradients_are_those_of_inputs_that_stay_bit_for_bit(slow, dropout, chunk):
    for away, stays in zip(
        gradients(built("offload", dropout=dropout, chunk=chunk)),
        gradients(built(True, dropout=dropout, chunk=chunk)),
        strict=True,
    ):
        assert torch.equal(away, stays)
    assert slow.count("out")


def test_a_backward_pass_may_be_taken_twice(slow):
    model = built("offload")
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    for parameter, first in zip(model.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, 2 * first)


def test_two_forward_passes_before_one_backward_pass_keep_their_own(slow):
    model = built("offload")
    (loss_of(model) + loss_of(model)).backward()
    plain = built(True)
    (loss_of(plain) + loss_of(plain)).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


# ---- what is where, and when


def test_every_input_but_the_last_goes_out_once_and_comes_back_once_in_reverse_order(slow):
    model = built("offload")
    loss = loss_of(model)
    assert slow.count("out") == list(range(DEPTH - 1)) and slow.count("back") == []
    slow.events.clear()
    loss.backward()
    assert slow.count("out") == [] and slow.count("back") == slow.count("wait") == list(range(DEPTH - 1))[::-1]


def test_the_next_input_starts_to_come_before_the_layer_behind_it_is_recomputed(slow):
    model = built("offload")
    for index, layer in enumerate(model.layers):
        layer.input_layernorm.register_forward_hook(
            lambda *given, index=index: slow.events.append(("compute", index)) if not torch.is_grad_enabled() else None
        )
    loss = loss_of(model)
    slow.events.clear()
    loss.backward()
    for index in range(1, DEPTH):
        assert slow.events.index(("back", index - 1)) < slow.events.index(("compute", index))
        assert slow.events.index(("compute", index)) < slow.events.index(("wait", index - 1))


def test_a_copy_out_has_the_whole_layer_for_itself(slow):
    model = built("offload")
    for index, layer in enumerate(model.layers):
        layer.mlp.register_forward_hook(lambda *given, index=index: slow.events.append(("compute", index)))
    loss_of(model)
    for index in range(DEPTH - 1):
        done = slow.events.index(("compute", index))
        assert slow.events.index(("out", index)) < done < slow.events.index(("wait", index))


def test_of_the_layers_only_the_last_input_stays_on_the_device(slow):
    stream = 2 * TOKENS * WIDTH
    beside = {}
    for setting in ("offload", True):
        model = built(setting)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with saved() as kept:
            loss = loss_of(model)
        beside[setting] = sum(
            tensor.untyped_storage().nbytes() // 4
            for address, tensor in kept.items()
            if address not in own and tensor.is_floating_point()
        )
        del loss
    assert beside[True] - beside["offload"] == (DEPTH - 1) * stream
    assert slow.alive() == 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_input_that_went_out_is_alive_after_the_forward_pass(slow, dropout):
    loss = loss_of(built("offload", dropout=dropout))
    assert slow.alive() == 0 and len(slow.away) == (DEPTH - 1) * (2 if dropout else 1)
    assert all((there < GARBAGE).all() for there in slow.away)  # each copy was waited for
    assert loss.requires_grad


def test_the_backward_pass_has_two_inputs_on_the_device_at_most(slow):
    model, most = built("offload"), []
    for layer in model.layers:
        layer.input_layernorm.register_forward_hook(
            lambda *given: most.append(slow.alive()) if not torch.is_grad_enabled() else None
        )
    loss = loss_of(model)
    most.clear()
    loss.backward()
    assert max(most) == 2 and slow.alive() == 0


def test_a_copy_that_nobody_takes_is_waited_for_before_its_memory_is_let_go(slow):
    model = built("offload")
    loss = loss_of(model)
    torch.autograd.grad(loss, list(model.layers[-1].parameters()), allow_unused=True)
    assert slow.count("back") == [DEPTH - 2]
    slow.events.clear()
    del loss
    gc.collect()
    assert slow.events == [("wait", DEPTH - 2)]


def test_without_gradients_nothing_is_copied(slow):
    model, tokens = built("offload"), some_tokens()
    with torch.no_grad():
        model(tokens, context_for(tokens))
    model(tokens, context_for(tokens, q_start=0), model.caches())
    model.requires_grad_(False)
    model(tokens, context_for(tokens))
    assert slow.events == []


# ---- what is refused


def test_on_a_cpu_it_is_refused_at_the_first_forward_pass_with_gradients():
    tokens, model = some_tokens(), built("offload")
    with pytest.raises(
        ValueError, match=r"^model\.activation_checkpointing is offload and the model is on cpu, .*=true"
    ):
        model(tokens, context_for(tokens))
    with torch.no_grad():
        model(tokens, context_for(tokens))  # a trained model is read anywhere


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"activation_checkpointing": "disk"}, r"is 'disk'; it must be true or false or offload$"),
        ({"activation_checkpointing": "offload", "depth": 1}, r"is offload and model\.depth is 1, .*=true$"),
    ],
)
def test_what_would_change_nothing_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=rf"^model\.activation_checkpointing {sentence}"):
        ModelConfig(**fields)


# ---- the stream of its own


class Runtime:
    """torch.cuda's part of it, writing down what is asked of which stream."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.running = "main"

    def Stream(self, device):
        return Lane(self, "side")

    def current_stream(self, device):
        return Lane(self, self.running)

    @contextmanager
    def stream(self, lane):
        before, self.running = self.running, lane.name
        yield
        self.running = before


class Lane:
    def __init__(self, runtime: Runtime, name: str) -> None:
        self.runtime, self.name = runtime, name

    def wait_stream(self, other):
        self.runtime.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.runtime.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.runtime.log.append(f"{self.name} marks")
        return "the mark"


def test_copies_run_beside_the_computation_and_each_waits_only_for_what_it_needs(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch, "get_device_module", lambda device: runtime)
    copies = offload.SideStream(torch.device("cpu"))
    monkeypatch.setattr(copies, "pinned_like", torch.empty_like)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "copy_" in str(function):
                runtime.log.append(f"{runtime.running} copies")
            elif "empty_like" in str(function):
                runtime.log.append(f"{runtime.running} makes")
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 3, 4)
    with Watch():
        there, mark = copies.out(x)
        copies.wait(mark)
        again, mark = copies.back(there)
        copies.wait(mark)
    one_way = ["main makes", "side waits for main", "side copies", "side marks", "main waits for the mark"]
    assert runtime.log == 2 * one_way
    assert torch.equal(again, x) and again.data_ptr() != x.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies of a GPU's own")
def test_on_cuda_gradients_are_bit_identical_and_memory_does_not_grow_with_the_depth():
    taken, found = {}, {}
    for setting, depth in ((True, 4), (True, 12), ("offload", 4), ("offload", 12)):
        torch.manual_seed(0)
        config = ModelConfig(depth=depth, embed_dim=256, heads=4, activation_checkpointing=setting)
        model = Transformer(
            config,
            lambda shape: SlidingWindowAttention(SlidingWindowConfig(window=128, block=64), shape),
            vocab_size=VOCAB,
        ).cuda()
        tokens = torch.randint(VOCAB, (1, 65536), generator=torch.Generator().manual_seed(1)).cuda()
        for _ in range(2):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            loss = model.loss_sum(model(tokens, context_for(tokens)).hidden, tokens)
            loss.backward()
            torch.cuda.synchronize()
        weights = sum(p.numel() for p in model.parameters()) * 8
        taken[setting, depth] = torch.cuda.max_memory_allocated() - weights
        found[setting, depth] = [p.grad.cpu() for p in model.parameters()]
        del model, loss
    stream = 65536 * 256 * 4
    for depth in (4, 12):
        assert all(map(torch.equal, found[True, depth], found["offload", depth]))
    assert taken[True, 12] - taken[True, 4] > 7 * stream
    assert taken["offload", 12] - taken["offload", 4] < 2 * stream
