"""One streaming causal transformer, shared by the codec, the temporal LM and the depth LM.

Pre-norm blocks (RMSNorm, Zhang & Sennrich 2019) of grouped-query attention (Ainslie et al. 2023)
with rotary positions (RoPE, Su et al. 2021) and a sliding window, and SwiGLU feed-forward layers
(Shazeer 2020); what else pretrained language models have is described by the config. `forward` is
the offline pass used in training; `step` continues a call from a ring key-value cache of fixed
shape and gives the same output for any chunking.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:  # its kernel where that package is installed
    from flash_attn import flash_attn_func as flash_attention
except ImportError:
    flash_attention = None

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


@dataclass(frozen=True)
class LayerKind:
    """Where some layers of a stack differ from others, as Gemma's local and global ones do."""

    frequencies: tuple[float, ...]  # RoPE's, radians a position; half a head's width of them
    window: int | None = None  # positions attended to, where fewer than the stack's context

    def __post_init__(self) -> None:
        object.__setattr__(self, "frequencies", tuple(self.frequencies))


@dataclass(frozen=True)
class TransformerConfig:
    dim: int
    num_layers: int
    num_heads: int
    context: int  # positions that a query attends to, its own included
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    dropout: float = 0.0  # of what a layer adds to its residual stream, in training
    head_width: int | None = None  # by default `dim` over the heads
    activation: str = "silu"  # of the feed-forward gate: SwiGLU; "gelu_tanh": GeGLU
    query_key_norm: bool = False  # RMSNorm of each head's queries and keys, before RoPE
    norms_after: bool = False  # RMSNorm also of what attention and feed-forward add
    kinds: tuple[LayerKind, ...] = ()  # empty: one, by `rope_theta` and `context`
    pattern: tuple[int, ...] = ()  # each layer's place in `kinds`; empty: the first
    recompute: bool = False  # what is within a layer, in the backward pass, not to be stored

    def __post_init__(self) -> None:
        kinds = (k if isinstance(k, LayerKind) else LayerKind(**k) for k in self.kinds)
        object.__setattr__(self, "kinds", tuple(kinds))
        object.__setattr__(self, "pattern", tuple(self.pattern))
        if min(self.dim, self.num_layers, self.num_heads, self.context, self.head_dim) < 1:
            raise ValueError(f"transformer sizes must be positive: {self}")
        if (self.head_width is None and self.dim % self.num_heads) or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} must be an even multiple of {self.num_heads} heads")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"{self.num_heads} heads cannot share {self.kv_heads} key-value heads")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation}: one of {', '.join(ACTIVATIONS)}")
        if any(2 * len(kind.frequencies) != self.head_dim for kind in self.kinds):
            raise ValueError(f"a layer's kind has a frequency for two of {self.head_dim} places")
        if self.pattern and (len(self.pattern) != self.num_layers or not self.kinds):
            raise ValueError(f"pattern {self.pattern}: a kind for each of {self.num_layers} layers")

    @property
    def head_dim(self) -> int:
        return self.head_width or self.dim // self.num_heads

    @property
    def windows(self) -> tuple[int, ...]:
        """Positions that a query of each kind of layer attends to, its own included."""
        windows = [kind.window or self.context for kind in self.kinds] or [self.context]
        return tuple(min(window, self.context) for window in windows)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def hidden_dim(self) -> int:
        # Of the feed-forward layer; by default 8/3 of `dim`, in multiples of 32.
        return self.ffn_dim or -(-8 * self.dim // 3 // 32) * 32


@functools.lru_cache(maxsize=8)  # a copy to a GPU would be waited for at every step
def rotary_frequencies(config: TransformerConfig, device: torch.device) -> tuple[Tensor, ...]:
    """Radians a position of each kind of layer, `[head_dim]` float64; negative in the first half,
    for `apply_rotary`."""
    options = {"device": device, "dtype": torch.float64}
    found = [torch.tensor(kind.frequencies, **options) for kind in config.kinds]
    if not found:
        exponents = torch.arange(0, config.head_dim, 2, **options)
        found = [config.rope_theta ** (-exponents / config.head_dim)]
    return tuple(torch.cat((-radians, radians)) for radians in found)


def rotary_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of RoPE, `[..., head_dim]` float32, for integer positions `[...]`.
    Angles are in float64: after hours at 50 Hz a float32 angle would be off by 0.1 rad."""
    angles = positions[..., None] * frequencies
    return angles.cos().float(), angles.sin().float()


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, whose call alone costs a streaming step too much."""
    return x if x.dtype == dtype else x.to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of the last axis of `x` `[B, T, H, D]`; tables `[B or 1, T, 1, D]`."""
    precise = _as(x, torch.float32)
    swapped = torch.roll(precise, x.shape[-1] // 2, dims=-1)
    return _as(torch.addcmul(precise * cos, swapped, sin), x.dtype)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, context: int) -> Tensor:
    """Causal attention in which each query sees `context` keys, its own included: q `[B, T, H, D]`;
    k, v `[B, T, H_kv, D]` → `[B, T, H, D]`. Time and memory grow with `T * context`."""
    if flash_attention and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return flash_attention(q, k, v, causal=True, window_size=(context - 1, 0))
    length, grouped = q.shape[1], q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if length <= context:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif length <= 2 * context:
        i = torch.arange(length, device=q.device)
        distance = i[:, None] - i[None, :]
        mask = (distance >= 0) & (distance < context)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    else:
        out = _blockwise_attention(q, k, v, context, grouped)
    return out.transpose(1, 2)


def _blockwise_attention(q: Tensor, k: Tensor, v: Tensor, context: int, grouped: bool) -> Tensor:
    """Exact windowed attention in blocks of `context` queries, each over its block and the last."""
    length = q.shape[2]
    blocks = -(-length // context)
    padding = blocks * context - length
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (blocks, context)) for x in (q, k, v))
    # [B, H, blocks, 2 * context, D]: the block before (zeros for the first one), then the block.
    k, v = (torch.cat((F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x), dim=3) for x in (k, v))
    query = torch.arange(context, device=q.device)[:, None] + context
    key = torch.arange(2 * context, device=q.device)[None, :]
    mask = ((key <= query) & (query - key < context)).expand(blocks, -1, -1).clone()
    mask[0, :, :context] = False
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * blocks, H, ., D]
    mask = mask.repeat(q.shape[0] // blocks, 1, 1)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    out = out.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)
    return out[:, :, :length]


class TransformerState:
    """Ring key-value cache of a call, one row a slot; preallocated and changed in place.

    `keys` and `values` are `[layers, B, capacity, H_kv, D]`; `position` `[B]` counts the positions
    that each slot has consumed, and alone says which entries are valid. A reset writes zeros, since
    an attention weight of 0 does not hide what is not a number. `places` are views of each layer's
    keys and values, written as `[B * capacity, H_kv, D]`, read as `[B, H_kv, capacity, D]`."""

    def __init__(self, config, batch_size: int, max_chunk: int, device, dtype) -> None:
        # The first query of a chunk still needs `context` keys when the last one is written. In
        # multiples of 8, or a GPU's attention would pad the mask anew in every layer.
        capacity = -(-(config.context + max_chunk - 1) // 8) * 8
        shape = (config.num_layers, batch_size, capacity, config.kv_heads, config.head_dim)
        self.max_chunk = max_chunk
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.position = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.ring = torch.arange(capacity, device=device)
        self.rows = capacity * torch.arange(batch_size, device=device)[:, None]
        self.frequencies = rotary_frequencies(config, self.position.device)
        pairs = zip(self.keys, self.values, strict=True)
        self.places = [[(x.flatten(0, 1), x.transpose(1, 2)) for x in pair] for pair in pairs]

    def reset(self, mask: Tensor | None = None) -> None:
        """Forgets everything in the slots where `mask` `[B]` bool is true (all of them if None)."""
        if mask is None:
            mask = torch.ones_like(self.position, dtype=torch.bool)
        self.position.masked_fill_(mask, 0)
        for cache in (self.keys, self.values):
            cache.masked_fill_(mask[:, None, None, None], 0)


@dataclass
class StepPlan:
    """What the layers of one step share. `kinds`, of each kind of layer: cosines, sines and the
    mask `[B, 1, S, capacity]`, 0, or -inf for keys that a query does not attend to."""

    index: Tensor  # [B * S] places of the new keys, among those of all slots
    kinds: list[tuple[Tensor, Tensor, Tensor]]


class RMSNorm(nn.RMSNorm):
    """With weights in the input's precision: under autocast mixed ones have no fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, _as(self.weight, x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention with RoPE; one fused projection for queries, keys and values."""

    def __init__(self, config: TransformerConfig, kind: int) -> None:
        super().__init__()
        self.config, self.kind, self.window = config, kind, config.windows[kind]
        heads = config.num_heads + 2 * config.kv_heads
        self.qkv = nn.Linear(config.dim, heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)
        if config.query_key_norm:
            self.query_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.key_norm = RMSNorm(config.head_dim, eps=config.norm_eps)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        qkv = self.qkv(x).unflatten(-1, (-1, c.head_dim))  # [B, T, H + 2 H_kv, D]
        qk, v = qkv.split((c.num_heads + c.kv_heads, c.kv_heads), dim=2)
        if c.query_key_norm:
            q, k = qk.split((c.num_heads, c.kv_heads), dim=2)
            qk = torch.cat((self.query_norm(q), self.key_norm(k)), dim=2)
        q, k = apply_rotary(qk, cos, sin).split((c.num_heads, c.kv_heads), dim=2)
        return q, k, v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        return self.out(windowed_attention(q, k, v, self.window).flatten(2))

    def step(self, x: Tensor, places: list, plan: StepPlan) -> Tensor:
        cos, sin, mask = plan.kinds[self.kind]
        q, *new = self.project(x, cos, sin)
        for (written, _), rows in zip(places, new, strict=True):
            written.index_copy_(0, plan.index, _as(rows.flatten(0, 1), written.dtype))
        k, v = (_as(read, q.dtype) for _, read in places)
        grouped = self.config.kv_heads != self.config.num_heads
        q = q.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return self.out(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """A gated layer (Shazeer 2020): `down(silu(gate(x)) * up(x))`, gate and up in one projection;
    GeGLU with `gelu_tanh` in place of silu."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class Block(nn.Module):
    def __init__(self, config: TransformerConfig, kind: int = 0) -> None:
        super().__init__()
        norm = functools.partial(RMSNorm, config.dim, eps=config.norm_eps)
        after = norm if config.norms_after else nn.Identity
        self.attention_norm, self.attention_norm_after = norm(), after()
        self.ffn_norm, self.ffn_norm_after = norm(), after()
        self.attention = Attention(config, kind)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heard = self.attention(self.attention_norm(x), cos, sin)
        x = x + self.dropout(self.attention_norm_after(heard))
        return x + self.dropout(self.ffn_norm_after(self.ffn(self.ffn_norm(x))))

    def step(self, x: Tensor, places: list, plan: StepPlan) -> Tensor:
        heard = self.attention.step(self.attention_norm(x), places, plan)
        x = x + self.attention_norm_after(heard)
        return x + self.ffn_norm_after(self.ffn(self.ffn_norm(x)))


class StreamingTransformer(nn.Module):
    """A stack of blocks and a final norm, `[B, T, D]` → `[B, T, D]`, causal within a window."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        pattern = config.pattern or (0,) * config.num_layers
        self.blocks = nn.ModuleList(Block(config, kind) for kind in pattern)
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Normal weights of deviation 1/sqrt(fan in); residual outputs scaled down with depth."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, Block):
            for layer in (module.attention.out, module.ffn.down):
                layer.weight.data.mul_((2 * self.config.num_layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None, :, None]
        kinds = rotary_frequencies(self.config, x.device)
        tables = [rotary_tables(positions, frequencies) for frequencies in kinds]
        again = self.config.recompute and torch.is_grad_enabled()
        for block in self.blocks:
            inputs = x, *tables[block.attention.kind]
            x = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
        return self.norm(x)

    def init_state(self, batch_size: int, max_chunk: int = 16) -> TransformerState:
        """A fresh state for `batch_size` slots; chunks over `max_chunk` positions are split."""
        weight = self.blocks[0].attention.out.weight
        return TransformerState(self.config, batch_size, max_chunk, weight.device, weight.dtype)

    def plans(self, state: TransformerState, steps: int) -> list[StepPlan]:
        """What `step_by` needs for positions 0 … `steps` - 1, one at a time."""
        state.reset()
        plans = []
        for _ in range(steps):
            plans.append(self._plan(1, self.norm.weight.dtype, state))
            state.position.add_(1)
        state.reset()
        return plans

    def step_by(self, x: Tensor, state: TransformerState, plan: StepPlan) -> Tensor:
        """The positions `[B, S, D]` → `[B, S, D]` that `plan` is for, after those before it. For
        short sequences over and over, where making plans would take as long as the steps; `state`
        need not be reset: a plan sees what its own sequence has written."""
        for block, places in zip(self.blocks, state.places, strict=True):
            x = block.step(x, places, plan)
        return self.norm(x)

    def step(self, x: Tensor, state: TransformerState, active: Tensor | None = None) -> Tensor:
        """Continues each slot by the chunk `x` `[B, S, D]` → `[B, S, D]`; `state` moves on. Where
        `active` `[B]` bool is false the slot does not advance and its output is meaningless: what
        it writes lies behind every window, where its next chunk goes."""
        if x.shape[1] > state.max_chunk:
            chunks = x.split(state.max_chunk, dim=1)
            return torch.cat([self.step(chunk, state, active) for chunk in chunks], dim=1)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = self.step_by(x, state, self._plan(x.shape[1], dtype, state))
        state.position.add_(1 if active is None else active, alpha=x.shape[1])
        return y

    def _plan(self, length: int, dtype, state: TransformerState) -> StepPlan:
        capacity = state.ring.shape[0]
        chunk = state.ring[:length]
        positions = state.position[:, None] + chunk  # [B, S]
        last = positions[:, -1:]
        # How long ago each ring place was written, once this chunk is; over `last`: never.
        age = ((last - state.ring) % capacity)[:, None]  # [B, 1, capacity]
        newest = (length - 1 - chunk)[:, None]  # that each query sees, [S, 1]
        kinds = []
        for window, frequencies in zip(self.config.windows, state.frequencies, strict=True):
            oldest = torch.minimum(newest + (window - 1), last[..., None])  # [B, S, 1]
            hidden = (age < newest) | (age > oldest)
            # Made a float here: a bool mask would be made one again in every layer.
            mask = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None]
            kinds.append((*rotary_tables(positions[..., None], frequencies), mask))
        return StepPlan((state.rows + positions % capacity).flatten(), kinds)
