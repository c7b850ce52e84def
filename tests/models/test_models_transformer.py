import pytest
import torch
import torch.nn.functional as F

from lightsparse.attention.core import AttentionConfig, AttentionCore, AttentionResult, AttentionShape
from lightsparse.attention.dense import DenseAttention, DenseConfig
from lightsparse.attention.sliding_window import SlidingWindowAttention, SlidingWindowConfig
from lightsparse.models import KVCache, ModelConfig, Transformer, context_for
from lightsparse.models.layers import SwiGLU

VOCAB = 37


class Reporting(AttentionCore):
    """Returns the mean value of all tokens, with a loss and stats that tell the layer."""

    Config = AttentionConfig

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.weight = torch.nn.Parameter(torch.ones(()))

    def attend(self, q, k, v, *, x, ctx):
        mean = v.mean(2, keepdim=True).repeat_interleave(q.shape[1] // v.shape[1], 1).expand_as(q)
        stats = {"density": torch.tensor(0.25), "layer": self.weight * self.shape.layer}
        mean = mean + 0 * (q.sum() + k.sum())  # every parameter enters the loss
        return AttentionResult(mean, aux_loss=self.weight * 2**self.shape.layer, stats=stats)


def reporting(shape: AttentionShape) -> Reporting:
    return Reporting(AttentionConfig(), shape)


def random_tokens(batch: int = 2, length: int = 21) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


def gradients(model, tokens, **context) -> list[torch.Tensor]:
    output = model(tokens, context_for(tokens, **context))
    loss = model.loss_sum(output.hidden, tokens.roll(-1, 1))
    if output.aux_loss is not None:
        loss = loss + output.aux_loss
    return list(torch.autograd.grad(loss, list(model.parameters())))


# ---- sizes


@pytest.mark.parametrize(
    ("fields", "widths"),
    [
        ({"depth": 4}, (256, 4, 4, 64, 704)),
        ({"depth": 12}, (768, 12, 12, 64, 2048)),
        ({"depth": 4, "embed_dim": 512, "heads": 8, "kv_heads": 2}, (512, 8, 2, 64, 1408)),
        ({"depth": 2, "embed_dim": 96, "heads": 4}, (96, 4, 4, 24, 256)),
        ({"depth": 2, "embed_dim": 96, "head_dim": 32, "mlp_dim": 100}, (96, 3, 3, 32, 100)),
        ({"depth": 2, "embed_dim": 96, "heads": 5, "head_dim": 10}, (96, 5, 5, 10, 256)),
    ],
)
def test_widths_left_out_follow_from_the_depth(fields, widths):
    assert ModelConfig(**fields).widths == widths


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"depth": 0}, "model.depth is 0"),
        ({"depth": 2, "heads": 0}, "model.heads is 0"),
        ({"depth": 2, "chunk": 0}, "model.chunk is 0"),
        ({"depth": 2, "norm_eps": 0.0}, "norm_eps"),
        ({"depth": 4, "kv_heads": 3}, "kv_heads must divide heads"),
        ({"depth": 4, "heads": 3}, "heads must divide embed_dim"),
        ({"depth": 4, "embed_dim": 100}, "no multiple of head_dim 64"),
        ({"depth": 4, "embed_dim": 36, "heads": 4}, "must be even"),
        ({"depth": 4, "head_dim": 33, "heads": 4}, "must be even"),
        ({"depth": 4, "layer_pattern": "SSXD"}, "letters S .* and L"),
        ({"depth": 4, "layer_pattern": ""}, "letters S .* and L"),
        ({"depth": 2, "layer_pattern": "SSD"}, "longer than model.depth 2"),
        ({"depth": 2, "layer_pattern": "LS"}, "model.local_window null; L layers need a window"),
        ({"depth": 2, "local_window": 8}, "model.local_window 8; L layers need a window"),
        ({"depth": 2, "layer_pattern": "LS", "local_window": 0}, "model.local_window is 0"),
    ],
)
def test_an_impossible_size_is_one_sentence(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        ModelConfig(**fields)
    assert "\n" not in str(error.value)


def test_the_layer_pattern_repeats_over_the_depth():
    config = ModelConfig(depth=6, embed_dim=16, heads=2, layer_pattern="SSSD")
    model = Transformer(config, reporting, vocab_size=VOCAB)
    kinds = [type(layer.self_attn.core) for layer in model.layers]
    assert kinds == [Reporting, Reporting, Reporting, DenseAttention, Reporting, Reporting]
    assert [layer.self_attn.core.shape.layer for layer in model.layers] == list(range(6))


def test_local_layers_read_their_window_whatever_attention_is_chosen():
    config = ModelConfig(depth=3, embed_dim=16, heads=2, layer_pattern="LSL", local_window=5)
    model = Transformer(config, reporting, vocab_size=VOCAB).eval()
    first = model.layers[0].self_attn.core
    assert [type(layer.self_attn.core).__name__ for layer in model.layers][1] == "Reporting"
    layout = first.layout(40, context_for(torch.zeros(1, 40, dtype=torch.long)), torch.device("cpu"))
    token = torch.arange(40)
    back = token[:, None] - token
    assert torch.equal(layout.to_dense()[0, 0], (back >= 0) & (back < 5))


def test_the_density_of_the_chosen_attention_is_told_apart():
    config = ModelConfig(depth=3, embed_dim=16, heads=2, layer_pattern="DSL", local_window=5)
    chosen = SlidingWindowConfig(window=20, sinks=0, block=4)
    model = Transformer(config, lambda shape: SlidingWindowAttention(chosen, shape), vocab_size=VOCAB).eval()
    tokens = torch.zeros(1, 64, dtype=torch.long)
    stats = model(tokens, context_for(tokens)).stats
    each = [layer.self_attn.core.layout(64, context_for(tokens), tokens.device).density() for layer in model.layers[1:]]
    assert stats["chosen_density"].item() == pytest.approx(each[0])
    assert stats["density"].item() == pytest.approx((1 + sum(each)) / 3)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_six_per_matrix_entry_and_twelve_per_key_and_channel(make_model, tied):
    model = make_model(depth=2, embed_dim=32, heads=4, kv_heads=2, mlp_dim=48, tie_embeddings=tied, vocab_size=VOCAB)
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + VOCAB * 32
    keys = 12 * 32 * (64 + 1) / 2 * 2
    actual, dense = model.flops_per_token(64, density=0.25)
    assert dense == pytest.approx(6 * matrices + keys)
    assert actual == pytest.approx(6 * matrices + keys / 4)


def test_a_bidirectional_token_reads_all_keys(make_model):
    causal, both = make_model(), make_model(causal=False)
    causal_keys = causal.flops_per_token(64, 1.0)[1] - causal.flops_per_token(64, 0.0)[0]
    both_keys = both.flops_per_token(64, 1.0)[1] - both.flops_per_token(64, 0.0)[0]
    assert both_keys / causal_keys == pytest.approx(64 / 32.5)


# ---- what it computes


def test_future_tokens_never_change_the_past(make_model):
    model, tokens = make_model(), random_tokens()
    changed = tokens.clone()
    changed[:, 13] = (changed[:, 13] + 1) % VOCAB
    before, after = (model(each, context_for(each)).hidden for each in (tokens, changed))
    assert torch.equal(before[:, :13], after[:, :13])
    assert (before[:, 13:] != after[:, 13:]).any(-1).all()


def test_a_bidirectional_model_reads_both_ways(make_model):
    model, tokens = make_model(causal=False), random_tokens()
    changed = tokens.clone()
    changed[:, 13] = (changed[:, 13] + 1) % VOCAB
    before, after = (model(each, context_for(each)).hidden for each in (tokens, changed))
    assert (before != after).any(-1).all()


def test_packed_documents_give_what_they_give_alone(make_model):
    model, tokens = make_model(), random_tokens(batch=1)
    documents = (torch.arange(21) >= 8).int()[None]
    packed = model(tokens, context_for(tokens, documents)).hidden
    alone = [model(part, context_for(part)).hidden for part in (tokens[:, :8], tokens[:, 8:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


def test_positions_count_from_the_start_of_each_document():
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    positions = context_for(tokens, documents).positions
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert context_for(tokens[:, 4:], documents, q_start=4).positions.tolist() == [[2, 0], [4, 5]]
    assert context_for(tokens[:, :2], q_start=4).positions.tolist() == [[4, 5]]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_decoding_with_a_cache_equals_the_full_forward(make_model, qk_norm):
    model, tokens = make_model(depth=3, qk_norm=qk_norm, layer_pattern="SD").eval(), random_tokens()
    with torch.no_grad():
        full = model(tokens, context_for(tokens)).hidden
        caches = [KVCache() for _ in model.layers]
        pieces = []
        for start, stop in [(0, 7), (7, 8), (8, 9), (9, 15), *((i, i + 1) for i in range(15, 21))]:
            piece = tokens[:, start:stop]
            pieces.append(model(piece, context_for(piece, q_start=start), caches).hidden)
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=1e-4, atol=1e-5)


def test_a_cache_out_of_step_with_the_context_is_refused(make_model):
    model, tokens = make_model(), random_tokens()
    caches = [KVCache() for _ in model.layers]
    model(tokens, context_for(tokens), caches)
    with pytest.raises(ValueError, match="q_start is 5 but the caches hold"):
        model(tokens[:, :1], context_for(tokens[:, :1], q_start=5), caches)


def test_stats_are_means_and_auxiliary_losses_sums_over_the_layers():
    config = ModelConfig(depth=4, embed_dim=16, heads=2, layer_pattern="SD")
    tokens = random_tokens()
    output = Transformer(config, reporting, vocab_size=VOCAB)(tokens, context_for(tokens))
    assert output.aux_loss.item() == 2**0 + 2**2
    assert output.stats["density"].item() == pytest.approx((0.25 + 1) / 2)
    assert output.stats["layer"].item() == pytest.approx(1.0)  # layers 0 and 2 report it
    assert not any(value.requires_grad for value in output.stats.values())


def test_a_dense_model_has_no_auxiliary_loss_and_density_one(make_model):
    tokens = random_tokens()
    output = make_model()(tokens, context_for(tokens))
    assert output.aux_loss is None
    assert output.stats["density"].item() == 1.0


@pytest.mark.parametrize(
    "fields", [{}, {"tie_embeddings": True}, {"qk_norm": False}, {"activation_checkpointing": True}], ids=str
)
def test_every_parameter_enters_the_loss(make_model, fields):
    model, tokens = make_model(**fields), random_tokens()
    grads = gradients(model, tokens)
    zero = [name for (name, _), grad in zip(model.named_parameters(), grads, strict=True) if not grad.abs().sum() > 0]
    assert zero == []


# ---- memory


@pytest.mark.parametrize("chunk", [5, 42, 1000])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_and_chunks_leave_the_gradients_alone(make_model, chunk, dropout):
    tokens = random_tokens()
    plain = make_model(dropout=dropout, chunk=1000)
    expected = gradients(plain, tokens, seed=7)
    saving = make_model(dropout=dropout, chunk=chunk, activation_checkpointing=True)
    for grad, expected_grad in zip(gradients(saving, tokens, seed=7), expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    if dropout:
        other = gradients(plain, tokens, seed=8)
        assert any(
            (grad - expected_grad).abs().max() > 1e-3 for grad, expected_grad in zip(other, expected, strict=True)
        )


def test_checkpointing_passes_auxiliary_losses_and_their_gradients():
    tokens = random_tokens()
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        config = ModelConfig(depth=3, embed_dim=16, heads=2, activation_checkpointing=checkpoint)
        found.append(gradients(Transformer(config, reporting, vocab_size=VOCAB), tokens))
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def saved_entries(model, tokens) -> int:
    """Entries of all tensors kept for the backward pass, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(tokens, context_for(tokens))  # held, so that no address is used twice
    return sum(kept.values()) if output.hidden.requires_grad else 0


@pytest.mark.parametrize(("dropout", "streams"), [(0.0, 1), (0.1, 2)])
def test_checkpointing_keeps_one_residual_stream_per_layer_with_dropout_two(make_model, dropout, streams):
    tokens = random_tokens(1, 256)
    stream = 256 * 32
    deep, shallow = (make_model(depth=depth, activation_checkpointing=True, dropout=dropout) for depth in (5, 3))
    assert (saved_entries(deep, tokens) - saved_entries(shallow, tokens)) / 2 <= (streams + 0.1) * stream
    plain = [make_model(depth=depth) for depth in (5, 3)]
    assert (saved_entries(plain[0], tokens) - saved_entries(plain[1], tokens)) / 2 > 6 * stream


def test_a_long_context_never_holds_its_logits_or_mlp_intermediates(make_model, largest_tensor):
    tokens, vocab, mlp = random_tokens(1, 1024), 800, 400

    def largest(chunk: int) -> int:
        model = make_model(vocab_size=vocab, mlp_dim=mlp, chunk=chunk)
        return largest_tensor(lambda: gradients(model, tokens))

    assert largest(64) <= max(1024 * 32, 64 * mlp, vocab * 32)
    assert largest(1024) >= 1024 * mlp


def test_bf16_weights_keep_the_rotation_in_fp32(make_model):
    model, tokens = make_model().bfloat16(), random_tokens()
    hidden = model(tokens, context_for(tokens)).hidden
    assert hidden.dtype == torch.bfloat16
    assert model.rotary(torch.arange(4)[None]).cos.dtype == torch.float32
    assert model.loss_sum(hidden, tokens).dtype == torch.float32


def test_autocast_gives_nearly_the_same_loss(make_model):
    model, tokens = make_model(qk_norm=True), random_tokens()
    exact = model.loss_sum(model(tokens, context_for(tokens)).hidden, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.loss_sum(model(tokens, context_for(tokens)).hidden, tokens)
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-2)
    rounded.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_the_same_seed_makes_the_same_weights_and_loss_starts_at_chance(make_model):
    one, two, other = make_model(seed=1), make_model(seed=1), make_model(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head_weight, other.head_weight)
    tokens = random_tokens(4, 64)
    loss = one.token_losses(one(tokens, context_for(tokens)).hidden, tokens.roll(-1, 1)).mean()
    assert loss.item() == pytest.approx(torch.tensor(VOCAB).log().item(), rel=0.05)


def test_the_dense_core_of_d_layers_does_not_drop(make_model):
    model = make_model(dropout=0.5, layer_pattern="SD")
    assert [layer.self_attn.core.config for layer in model.layers] == [DenseConfig(dropout=0.5), DenseConfig()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_mlp_is_silu_times_up_bit_for_bit(dtype):
    mlp = SwiGLU(24, 40, 0.02).to(dtype)
    x = torch.randn(3, 17, 24, dtype=dtype)
    results = []
    for function in (mlp, lambda x: mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))):
        given = x.clone().requires_grad_()
        out = function(given)
        results.append([out, *torch.autograd.grad(out.square().sum(), [given, *mlp.parameters()])])
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)
