"""The cached transformer against the offline one, and the offline one against a slow loop."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from streamed import StreamedLinear, stream_weights
from transformer import StreamingTransformer, TransformerConfig, windowed_attention

CONTEXT = 8


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = TransformerConfig(dim=32, num_layers=3, num_heads=4, num_kv_heads=2, context=CONTEXT)
    return StreamingTransformer(config).eval()


def slow_attention(q, k, v, context):
    """One query, one head at a time, straight from the definition."""
    out = torch.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                seen = range(max(0, i - context + 1), i + 1)
                scores = torch.stack([q[b, i, h] @ k[b, j, h // group] for j in seen])
                weights = (scores / math.sqrt(q.shape[-1])).softmax(0)
                values = [v[b, j, h // group] for j in seen]
                out[b, i, h] = sum(w * value for w, value in zip(weights, values, strict=True))
    return out


@pytest.mark.parametrize("length", [1, 5, 8, 9, 16, 17, 37])
def test_windowed_attention_is_the_definition(length):
    torch.manual_seed(length)
    q = torch.randn(2, length, 4, 6)
    k, v = torch.randn(2, 2, length, 2, 6)
    expected = slow_attention(q, k, v, CONTEXT)
    torch.testing.assert_close(windowed_attention(q, k, v, CONTEXT), expected, atol=1e-5, rtol=1e-5)


def rotate_complex(x, theta=10_000.0):
    """RoPE as Su et al. write it: multiplication by e^{i m theta_j}; x [T, H, D]."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[-1])
    angle = torch.arange(x.shape[0], dtype=torch.float64)[:, None, None] * frequencies
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(1j * angle)
    return torch.cat((z.real, z.imag), dim=-1).float()


def slow_block(block, x):
    """One block on `x` [T, D], written out anew."""
    c = block.attention.config

    def norm(layer, y):
        return y / (y.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * layer.weight

    y = norm(block.attention_norm, x) @ block.attention.qkv.weight.T
    q, k, v = y.view(len(x), -1, c.head_dim).split((c.num_heads, c.kv_heads, c.kv_heads), dim=1)
    q, k = rotate_complex(q), rotate_complex(k)
    a = slow_attention(q[None], k[None], v[None], c.context)[0]
    x = x + a.flatten(1) @ block.attention.out.weight.T
    gate, up = (norm(block.ffn_norm, x) @ block.ffn.gate_up.weight.T).chunk(2, dim=-1)
    return x + (silu(gate) * up) @ block.ffn.down.weight.T


@torch.no_grad()
def test_block_is_the_papers_formulas(model):
    x = torch.randn(1, 20, 32)
    expected = x[0]
    for block in model.blocks:
        expected = slow_block(block, expected)
    torch.testing.assert_close(model(x)[0], model.norm(expected), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 60, [60], [7, 1, 30, 2, 20], [3] * 20])
@pytest.mark.parametrize("max_chunk", [1, 4, 16])
def test_cached_equals_uncached(model, chunks, max_chunk):
    x = torch.randn(2, 60, 32)
    state = model.init_state(2, max_chunk=max_chunk)
    out = torch.cat([model.step(part, state) for part in x.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(out, model(x), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_slots_are_independent_and_reset(model):
    """Slot 1 idles and starts over at step 20: each slot equals its own offline pass."""
    x = torch.randn(2, 45, 32)
    state = model.init_state(2, max_chunk=2)
    seen, outputs = ([], []), ([], [])
    for t in range(45):
        if t == 20:
            state.reset(torch.tensor([False, True]))
            seen[1].clear(), outputs[1].clear()
        active = torch.tensor([True, t % 3 != 0])
        out = model.step(x[:, t : t + 1], state, active)
        for slot in range(2):
            if active[slot]:
                seen[slot].append(x[slot, t])
                outputs[slot].append(out[slot, 0])
    for slot in range(2):
        expected = model(torch.stack(seen[slot])[None])[0]
        torch.testing.assert_close(torch.stack(outputs[slot]), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_resting_slot_is_untouched_by_chunks_of_any_length(model):
    """What it writes meanwhile is behind every window, for long rests and shorter chunks too."""
    generator = torch.Generator().manual_seed(3)
    state = model.init_state(2, max_chunk=4)
    seen, outputs = ([], []), ([], [])
    for number in range(40):
        length = int(torch.randint(1, 5, (1,), generator=generator))
        x = torch.randn(2, length, 32, generator=generator)
        active = torch.tensor([number % 7 < 3, number % 5 != 1])
        out = model.step(x, state, active)
        for slot in active.nonzero()[:, 0].tolist():
            seen[slot].append(x[slot])
            outputs[slot].append(out[slot])
    for slot in range(2):
        expected = model(torch.cat(seen[slot])[None])[0]
        torch.testing.assert_close(torch.cat(outputs[slot]), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_full_reset_forgets(model):
    x = torch.randn(1, 12, 32)
    state = model.init_state(1)
    first = model.step(x, state)
    state.reset()
    torch.testing.assert_close(model.step(x, state), first, atol=0, rtol=0)


@pytest.mark.parametrize("length", [6, 14, 40])
def test_causal_and_windowed(model, length):
    """The gradient of one output reaches the receptive field of the stacked windows, no further."""
    x = torch.randn(1, length, 32, requires_grad=True)
    model(x)[0, length - 2].sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    field = 3 * (CONTEXT - 1) + 1
    expected = torch.zeros(length, dtype=torch.bool)
    expected[max(0, length - 1 - field) : length - 1] = True
    assert torch.equal(reached, expected)


@torch.no_grad()
def test_hours_into_a_call(model):
    """Output depends on relative positions only, also where float32 angles would have drifted."""
    x = torch.randn(1, 20, 32)
    state = model.init_state(1)
    first = model.step(x, state)
    state.reset()
    state.position.fill_(10_000_000)
    state.keys.zero_(), state.values.zero_()
    # Empty keys of the "past" are visible here, so compare once they have left the window.
    late = model.step(torch.cat((x, x, x, x), dim=1), state)
    plain = model(torch.cat((x, x, x, x), dim=1))
    torch.testing.assert_close(late[:, -20:], plain[:, -20:], atol=1e-4, rtol=1e-3)
    assert first.shape == x.shape


@pytest.mark.parametrize(
    "sizes", [{"dim": 30}, {"num_heads": 3}, {"context": 0}, {"num_kv_heads": 3}]
)
def test_config_refuses_nonsense(sizes):
    with pytest.raises(ValueError):
        TransformerConfig(**{"dim": 32, "num_layers": 1, "num_heads": 4, "context": 8, **sizes})


def test_recomputed_layers_have_the_same_gradients(model):
    """Dropout's draws too; and less is stored."""
    config = dataclasses.replace(model.config, dropout=0.3)
    x, found = torch.randn(2, 20, 32), []
    for recompute in (False, True):
        again = StreamingTransformer(dataclasses.replace(config, recompute=recompute))
        again.load_state_dict(model.state_dict())
        stored = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):  # noqa: B023
            out = again(x)
        out.square().sum().backward()
        found.append((out, [p.grad for p in again.parameters()], len(stored)))
    assert torch.equal(found[0][0], found[1][0]) and found[1][2] < found[0][2] / 4
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_steps_by_plans_are_steps_from_a_reset(model):
    """Sequence after sequence, without a reset: nothing of the one before is seen."""
    length = 5
    state, fresh = model.init_state(2, max_chunk=1), model.init_state(2, max_chunk=1)
    plans = model.plans(state, length)
    for seed in range(3):
        x = torch.randn(2, length, model.config.dim, generator=torch.Generator().manual_seed(seed))
        fresh.reset()
        for i, plan in enumerate(plans):
            expected = model.step(x[:, i : i + 1], fresh)
            assert torch.equal(model.step_by(x[:, i : i + 1], state, plan), expected)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_streamed_weights_are_the_same_weights(bias):
    """Exact halves are packed, others laid out by columns; long inputs go the ordinary way."""
    torch.manual_seed(0)
    wide, narrow = nn.Linear(32, 96, bias=bias), nn.Linear(96, 32, bias=bias)
    plain = nn.Sequential(wide, nn.ModuleList([narrow]))
    plain[0].half().float()
    fast = copy.deepcopy(plain)
    stream_weights(fast)
    packs = "fbgemm" in torch.backends.quantized.supported_engines
    assert isinstance(fast[0], StreamedLinear) == packs
    assert not isinstance(fast[1][0], StreamedLinear)
    for name, weight in plain.state_dict().items():
        assert torch.equal(fast.state_dict()[name], weight)
    for rows in (1, 2, StreamedLinear.FEW_ROWS + 1):
        x = torch.randn(1, rows, 32)
        torch.testing.assert_close(fast[0](x), plain[0](x), atol=1e-5, rtol=1e-5)
        x = torch.randn(1, rows, 96)
        torch.testing.assert_close(fast[1][0](x), plain[1][0](x), atol=1e-5, rtol=1e-5)


def test_streamed_weights_without_packing_are_laid_out_by_columns(monkeypatch):
    monkeypatch.delattr(torch, "fbgemm_linear_fp16_weight_fp32_activation", raising=False)
    model = nn.Sequential(nn.Linear(32, 96), nn.Linear(96, 32)).half().float()
    stream_weights(model)
    assert not any(isinstance(layer, StreamedLinear) for layer in model)
    assert not model[0].weight.is_contiguous() and model[1].weight.is_contiguous()
