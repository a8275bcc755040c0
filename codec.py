"""The neural audio codec: 24 kHz mono speech ↔ 50 Hz codes, strictly causal, no look-ahead.

A hybrid with almost all arithmetic in matrix products: frames of 120 samples (200 Hz) → causal
ConvNeXt blocks (Liu et al. 2022) → frames of 480 samples (50 Hz) → a causal sliding-window
transformer → a split quantizer (Défossez et al. 2024, Moshi: a semantic codebook beside an
acoustic residual VQ, Zeghidour et al. 2021) → the same, mirrored. The algorithmic latency is one
frame, 20 ms.

Inside the model tensors are channels-last, `[B, time, C]`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

import training
from training import UserError, fingerprint, load_checkpoint
from transformer import StreamingTransformer, TransformerConfig, TransformerState


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of a `Codec`; stored in every checkpoint."""

    sample_rate: int = 24_000
    hop: int = 480  # samples a frame: 50 Hz
    front_stride: int = 120  # samples a front frame: 200 Hz
    front_dim: int = 192
    encoder_front_blocks: int = 1
    encoder_dim: int = 320
    encoder_layers: int = 2
    decoder_front_dim: int = 256
    decoder_front_blocks: int = 2
    decoder_dim: int = 320
    decoder_layers: int = 2
    num_heads: int = 4
    context: int = 64  # attention window in frames
    kernel: int = 7  # of the ConvNeXt blocks, in front frames
    expansion: int = 3  # of the ConvNeXt blocks
    semantic_dim: int = 64
    acoustic_dim: int = 64
    codebook_sizes: tuple[int, ...] = (1024,) * 8  # codebook 0 is semantic
    codebook_decay: float = 0.99

    def __post_init__(self) -> None:
        object.__setattr__(self, "codebook_sizes", tuple(self.codebook_sizes))
        if self.hop % self.front_stride:
            raise ValueError(f"hop {self.hop} must be a multiple of front_stride")
        if len(self.codebook_sizes) < 2 or min(self.codebook_sizes) < 2:
            raise ValueError("a semantic and at least one acoustic codebook are needed")

    @classmethod
    def tiny(cls) -> CodecConfig:
        """About 6M parameters: streams in a small part of real time on one CPU core."""
        return cls()

    @classmethod
    def base(cls) -> CodecConfig:
        """About 65M parameters, 64 codebooks: the full recipe, for one H200."""
        return cls(
            front_dim=384,
            encoder_front_blocks=4,
            encoder_dim=512,
            encoder_layers=6,
            decoder_front_dim=512,
            decoder_front_blocks=6,
            decoder_dim=512,
            decoder_layers=8,
            num_heads=8,
            context=250,
            semantic_dim=256,
            acoustic_dim=256,
            codebook_sizes=(1024,) * 64,
        )

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.hop

    @property
    def num_codebooks(self) -> int:
        return len(self.codebook_sizes)

    def transformer(self, dim: int, layers: int) -> TransformerConfig:
        return TransformerConfig(dim, layers, self.num_heads, self.context)


class ConvState:
    """The last inputs of a causal convolution, `[B, n, C]`, changed in place."""

    def __init__(self, batch_size: int, length: int, channels: int, device, dtype) -> None:
        self.buffer = torch.zeros(batch_size, length, channels, device=device, dtype=dtype)

    def extend(self, x: Tensor, active: Tensor | None) -> Tensor:
        """The chunk `x` `[B, S, C]` behind what came before it, `[B, n + S, C]`."""
        extended = torch.cat((self.buffer, x), dim=1)
        tail = extended[:, extended.shape[1] - self.buffer.shape[1] :]
        if active is not None:
            tail = torch.where(active[:, None, None], tail, self.buffer)
        self.buffer.copy_(tail)
        return extended

    def reset(self, mask: Tensor | None = None) -> None:
        if mask is None:
            self.buffer.zero_()
        else:
            self.buffer.masked_fill_(mask[:, None, None], 0)


class FrameConv(nn.Module):
    """A causal convolution over two neighbouring frames as one matrix product.

    With `in_frames` front frames folded into one it is a strided convolution of kernel 2 × stride;
    with `out_frames` unfolded from one it is a transposed convolution of kernel 2 × stride, trimmed
    so that nothing looks ahead. `[B, T * in_frames, C_in]` → `[B, T * out_frames, C_out]`.
    """

    def __init__(self, in_dim: int, out_dim: int, in_frames: int = 1, out_frames: int = 1) -> None:
        super().__init__()
        self.in_frames, self.out_frames = in_frames, out_frames
        self.in_features = in_dim * in_frames
        self.linear = nn.Linear(2 * self.in_features, out_dim * out_frames)

    def init_state(self, batch_size: int) -> ConvState:
        weight = self.linear.weight
        return ConvState(batch_size, 1, self.in_features, weight.device, weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(F.pad(self._fold(x), (0, 0, 1, 0)))

    def step(self, x: Tensor, state: ConvState, active: Tensor | None = None) -> Tensor:
        return self._convolve(state.extend(self._fold(x), active))

    def _fold(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.in_frames)).flatten(2)

    def _convolve(self, x: Tensor) -> Tensor:
        y = self.linear(torch.cat((x[:, :-1], x[:, 1:]), dim=-1))
        return y.unflatten(2, (self.out_frames, -1)).flatten(1, 2)


class ConvNeXtBlock(nn.Module):
    """Causal depthwise convolution, norm, pointwise MLP, scaled residual; `[B, T, C]` → same."""

    def __init__(self, dim: int, kernel: int, expansion: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, expansion * dim)
        self.down = nn.Linear(expansion * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), 0.1))

    def init_state(self, batch_size: int) -> ConvState:
        weight = self.depthwise.weight
        length, dim = self.depthwise.kernel_size[0] - 1, self.depthwise.in_channels
        return ConvState(batch_size, length, dim, weight.device, weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._block(x, F.pad(x, (0, 0, self.depthwise.kernel_size[0] - 1, 0)))

    def step(self, x: Tensor, state: ConvState, active: Tensor | None = None) -> Tensor:
        return self._block(x, state.extend(x, active))

    def _block(self, x: Tensor, extended: Tensor) -> Tensor:
        y = self.depthwise(extended.transpose(1, 2)).transpose(1, 2)
        return x + self.scale * self.down(F.gelu(self.up(self.norm(y))))


class StreamState:
    """The states of a chain of layers, one a layer, in order."""

    def __init__(self, layers: list[ConvState | TransformerState]) -> None:
        self.layers = layers

    def reset(self, mask: Tensor | None = None) -> None:
        """Starts the slots where `mask` `[B]` bool is true anew (all of them if None)."""
        for layer in self.layers:
            layer.reset(mask)


class CausalChain(nn.ModuleList):
    """Causal layers in a row, each with `forward`, `init_state` and `step`."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x

    def init_state(self, batch_size: int) -> StreamState:
        return StreamState([layer.init_state(batch_size) for layer in self])

    def step(self, x: Tensor, state: StreamState, active: Tensor | None = None) -> Tensor:
        for layer, layer_state in zip(self, state.layers, strict=True):
            x = layer.step(x, layer_state, active)
        return x


def build_encoder(config: CodecConfig) -> CausalChain:
    """Front frames of samples `[B, T / 120, 120]` → `[B, F, D]`."""
    c = config
    front = [
        ConvNeXtBlock(c.front_dim, c.kernel, c.expansion) for _ in range(c.encoder_front_blocks)
    ]
    return CausalChain(
        [
            FrameConv(c.front_stride, c.front_dim),
            *front,
            FrameConv(c.front_dim, c.encoder_dim, in_frames=c.hop // c.front_stride),
            StreamingTransformer(c.transformer(c.encoder_dim, c.encoder_layers)),
        ]
    )


def build_decoder(config: CodecConfig) -> CausalChain:
    """Quantized frames `[B, F, D]` → front frames of samples `[B, F * 4, 120]`."""
    c = config
    front = [
        ConvNeXtBlock(c.decoder_front_dim, c.kernel, c.expansion)
        for _ in range(c.decoder_front_blocks)
    ]
    return CausalChain(
        [
            StreamingTransformer(c.transformer(c.decoder_dim, c.decoder_layers)),
            FrameConv(c.decoder_dim, c.decoder_front_dim, out_frames=c.hop // c.front_stride),
            *front,
            FrameConv(c.decoder_front_dim, c.front_stride),
        ]
    )


class Codebook(nn.Module):
    """One codebook in fp32, learnt by exponential moving averages (van den Oord et al. 2017, A.1).

    `forward` only reads; `update` moves the codes and is called after the step was found finite.
    """

    def __init__(self, size: int, dim: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("embedding", torch.randn(size, dim))
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("embedding_sum", torch.zeros(size, dim))
        # ‖e‖² / 2, kept because a streaming step would spend more on it than on the search itself.
        self.register_buffer("half_norms", torch.empty(size), persistent=False)
        self.register_load_state_dict_post_hook(lambda book, _: book.refresh())
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Call whenever `embedding` has changed."""
        self.half_norms.copy_(0.5 * self.embedding.float().pow(2).sum(-1))

    def forward(self, x: Tensor) -> Tensor:
        """The nearest code of each vector: `[..., d]` → `[...]` int64."""
        with torch.autocast(x.device.type, enabled=False):
            scores = x.float() @ self.embedding.float().t() - self.half_norms
            return scores.argmax(-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """`[...]` int64 → `[..., d]`."""
        return F.embedding(codes, self.embedding)

    @torch.no_grad()
    def restart_statistics(self) -> None:
        """Statistics that stand for the codes as they are, as after an export."""
        self.cluster_size.fill_(1.0)
        self.embedding_sum.copy_(self.embedding)

    @torch.no_grad()
    def initialise(self, candidates: Tensor, generator: torch.Generator) -> None:
        """k-means (Lloyd) on `candidates` `[N, d]`; ranks that have the same get the same."""
        size = self.embedding.shape[0]
        self.embedding.copy_(_draw(candidates, size, generator))
        self.refresh()
        for _ in range(10):
            codes = self(candidates)
            counts, sums = self._statistics(candidates, codes)
            filled = counts > 0
            self.embedding[filled] = sums[filled] / counts[filled, None]
            self.refresh()
        mean_size = candidates.shape[0] / size
        self.cluster_size.fill_(mean_size)
        self.embedding_sum.copy_(self.embedding * mean_size)

    @torch.no_grad()
    def update(self, x: Tensor, codes: Tensor, candidates: Tensor, generator) -> None:
        """One EMA step; unused codes restart from `candidates`, with fresh statistics.

        Args:
            x: `[N, d]` vectors of this rank, codes: `[N]` theirs.
            candidates: `[M, d]` vectors of all ranks, the same on every rank.
            generator: in the same state on every rank.
        """
        counts, sums = self._statistics(x, codes)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embedding_sum.lerp_(sums, 1 - self.decay)
        mean_size = self.cluster_size.mean()
        dead = self.cluster_size < 0.1 * mean_size
        fresh = _draw(candidates, self.embedding.shape[0], generator)
        self.cluster_size.copy_(torch.where(dead, mean_size, self.cluster_size))
        self.embedding_sum.copy_(torch.where(dead[:, None], fresh * mean_size, self.embedding_sum))
        self.embedding.copy_(self.embedding_sum / self.cluster_size[:, None])
        self.refresh()

    def _statistics(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.zeros_like(self.cluster_size)
        counts.index_add_(0, codes, torch.ones_like(codes, dtype=counts.dtype))
        sums = torch.zeros_like(self.embedding_sum).index_add_(0, codes, x.float())
        return counts, sums


def _draw(candidates: Tensor, size: int, generator: torch.Generator) -> Tensor:
    index = torch.randint(candidates.shape[0], (size,), generator=generator)
    return candidates[index.to(candidates.device)]


def gather_candidates(x: Tensor, limit: int = 8192) -> Tensor:
    """Up to `limit` vectors of the clips `[B, F, d]` of all ranks → `[N, d]`, in joint order.

    The sampler deals clips out in turn, so that clip `i` of rank `r` is the joint `i * ranks + r`.
    """
    x = x.contiguous().float()
    if torch.distributed.is_initialized():
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x)
        x = torch.stack(parts, dim=1).flatten(0, 1)
    return x.flatten(0, 1)[:limit]


@dataclass
class Quantized:
    """What the quantizer gives in training.

    `features` `[B, F, D]` for the decoder (straight-through), `semantic` `[B, F, d]` the quantized
    semantic features (straight-through), `codes` `[B, K, F]`, `commitment` a scalar, `residuals`
    per codebook the vectors `[B, F, d]` that it quantized, `used` `[B, K]` bool.
    """

    features: Tensor
    semantic: Tensor
    codes: Tensor
    commitment: Tensor
    residuals: list[Tensor]
    used: Tensor


class SplitQuantizer(nn.Module):
    """A semantic codebook in parallel with an acoustic residual VQ, each in a space of its own."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        c = config
        self.semantic_in = nn.Linear(c.encoder_dim, c.semantic_dim)
        self.acoustic_in = nn.Linear(c.encoder_dim, c.acoustic_dim)
        dims = [c.semantic_dim] + [c.acoustic_dim] * (c.num_codebooks - 1)
        self.codebooks = nn.ModuleList(
            Codebook(size, dim, c.codebook_decay)
            for size, dim in zip(c.codebook_sizes, dims, strict=True)
        )
        self._is_initialised = False

    def encode(self, hidden: Tensor, num_codebooks: int) -> Tensor:
        """`[B, F, D]` → codes `[B, K, F]` int64."""
        codes = [self.codebooks[0](self.semantic_in(hidden))]
        residual = self.acoustic_in(hidden)
        for codebook in self.codebooks[1:num_codebooks]:
            codes.append(codebook(residual))
            residual = residual - codebook.lookup(codes[-1])
        return torch.stack(codes, dim=1)

    def lookup(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[B, K, F]` → semantic `[B, F, d]` and acoustic `[B, F, d]` vectors."""
        semantic = self.codebooks[0].lookup(codes[:, 0])
        acoustic = semantic.new_zeros(*semantic.shape[:2], self.acoustic_in.out_features)
        for k in range(1, codes.shape[1]):
            acoustic = acoustic + self.codebooks[k].lookup(codes[:, k])
        return semantic, acoustic

    def forward(self, hidden: Tensor, num_codebooks: Tensor) -> tuple[Tensor, Tensor, Quantized]:
        """Quantizes with gradients; sample `b` uses its first `num_codebooks[b]` codebooks."""
        used = torch.arange(len(self.codebooks), device=hidden.device) < num_codebooks[:, None]
        with torch.autocast(hidden.device.type, enabled=False):
            semantic_in = self.semantic_in(hidden.float())
            acoustic_in = self.acoustic_in(hidden.float())
            semantic, acoustic, info = self._quantize(semantic_in, acoustic_in, used)
            if not self.is_initialised:  # vectors pass as they are until there are codes for them
                return semantic_in, acoustic_in, replace(info, commitment=0 * info.commitment)
            return semantic, acoustic, info

    @property
    def is_initialised(self) -> bool:
        """Whether the codebooks stand for data; until then training goes on unquantized."""
        if not self._is_initialised:
            self._is_initialised = bool(self.codebooks[-1].cluster_size.sum() > 0)
        return self._is_initialised

    def _quantize(self, semantic_in: Tensor, acoustic_in: Tensor, used: Tensor):
        codes = [self.codebooks[0](semantic_in)]
        semantic = self.codebooks[0].lookup(codes[0])
        residuals = [semantic_in]
        losses = [F.mse_loss(semantic_in, semantic)]
        total = torch.zeros_like(acoustic_in)
        for k, codebook in enumerate(self.codebooks[1:], start=1):
            residual = acoustic_in - total
            codes.append(codebook(residual))
            residuals.append(residual)
            chosen = codebook.lookup(codes[-1])
            weight = used[:, k, None, None].float()
            distance = (residual - chosen).pow(2).mean((1, 2))
            losses.append((distance * weight[:, 0, 0]).sum() / used[:, k].sum().clamp(min=1))
            total = total + chosen * weight
        semantic = semantic_in + (semantic - semantic_in).detach()
        acoustic = acoustic_in + (total - acoustic_in).detach()
        info = Quantized(
            features=acoustic,
            semantic=semantic,
            codes=torch.stack(codes, dim=1),
            commitment=torch.stack(losses).mean(),
            residuals=[r.detach() for r in residuals],
            used=used,
        )
        return semantic, acoustic, info

    def resume_from_codes(self) -> None:
        """Lets training go on from codes whose statistics were not stored, as in an export."""
        if not self.is_initialised:
            for codebook in self.codebooks:
                codebook.restart_statistics()

    @torch.no_grad()
    def update(self, info: Quantized, generator: torch.Generator) -> None:
        """Moves the codebooks by one EMA step, or starts them by k-means the first time."""
        if not self.is_initialised:
            return self._initialise(info, generator)
        for k, codebook in enumerate(self.codebooks):
            candidates = gather_candidates(info.residuals[k])
            mask = info.used[:, k]
            x = info.residuals[k][mask].flatten(0, 1)
            codebook.update(x, info.codes[mask, k].flatten(), candidates, generator)

    def _initialise(self, info: Quantized, generator: torch.Generator) -> None:
        semantic, residual = (gather_candidates(x) for x in info.residuals[:2])
        self.codebooks[0].initialise(semantic, generator)
        for codebook in self.codebooks[1:]:
            codebook.initialise(residual, generator)
            residual = residual - codebook.lookup(codebook(residual))


class Codec(nn.Module):
    """Encoder, split quantizer and decoder. `fingerprint` names what its codes mean."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.quantizer = SplitQuantizer(config)
        self.semantic_out = nn.Linear(config.semantic_dim, config.decoder_dim)
        self.acoustic_out = nn.Linear(config.acoustic_dim, config.decoder_dim)
        self.decoder = build_decoder(config)
        # Start near silence: an output louder than speech would cost the first steps.
        self.decoder[-1].linear.weight.data.mul_(0.1)
        self._stored_fingerprint: str | None = None

    # -- checkpoints ---------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str | torch.device = "cpu") -> Codec:
        """Loads a run folder, a step folder or a shipped folder, in float32, for inference.

        Raises:
            UserError: nothing complete there, or not a codec.
        """
        checkpoint = load_checkpoint(path, with_trainer=False)
        model = cls(codec_config(checkpoint.config, path))
        model.load_tensors(checkpoint.tensors, path)
        model._stored_fingerprint = codec_fingerprint(model.config, checkpoint.tensors)
        return model.to(device).eval().requires_grad_(False)

    def load_tensors(self, tensors: dict[str, Tensor], path: str | Path) -> None:
        """Fills the model from stored tensors; EMA statistics may be absent (an export)."""
        statistics = ("cluster_size", "embedding_sum")
        try:
            missing, unexpected = self.load_state_dict(tensors, strict=False)
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise UserError(f"{path}: weights do not fit the config: {first}") from error
        missing = [name for name in missing if not name.endswith(statistics)]
        if missing or unexpected:
            name = (missing + unexpected)[0]
            raise UserError(f"{path}: weights do not fit the config, first at {name}")

    def export_tensors(self, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """The tensors that ship: in `dtype`, without what only training needs."""
        statistics = ("cluster_size", "embedding_sum")
        return {
            name: tensor.detach().to("cpu", dtype)
            for name, tensor in self.state_dict().items()
            if not name.endswith(statistics)
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 over config and tensors of encoder and quantizer, as stored or as they are."""
        return self._stored_fingerprint or codec_fingerprint(self.config, self.state_dict())

    # -- offline -------------------------------------------------------------------------------

    def _frames(self, audio: Tensor) -> Tensor:
        """`[B, 1, T]` → front frames `[B, F * 4, 120]`, the last frame filled up with zeros."""
        if audio.dim() != 3 or audio.shape[1] != 1:
            raise ValueError(f"audio must be [B, 1, T], not {list(audio.shape)}")
        audio = F.pad(audio[:, 0], (0, -audio.shape[-1] % self.config.hop))
        return audio.unflatten(1, (-1, self.config.front_stride))

    def _synthesize(self, hidden: Tensor) -> Tensor:
        """Decoder input `[B, F, D]` → audio `[B, 1, F * 480]`."""
        return self.decoder(hidden).flatten(1)[:, None]

    def _hidden(self, codes: Tensor) -> Tensor:
        semantic, acoustic = self.quantizer.lookup(codes)
        return self.semantic_out(semantic) + self.acoustic_out(acoustic)

    @torch.no_grad()
    def encode(self, audio: Tensor, num_codebooks: int = 8) -> Tensor:
        """Audio `[B, 1, T]` float32 in [-1, 1] at 24 kHz → codes `[B, K, ceil(T / 480)]` int64."""
        return self.quantizer.encode(self.encoder(self._frames(audio)), num_codebooks)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[B, K, F]`, any K from 1 → audio `[B, 1, F * 480]` float32."""
        return self._synthesize(self._hidden(codes))

    def forward(self, audio: Tensor, num_codebooks: Tensor) -> tuple[Tensor, Quantized]:
        """The training pass: `[B, 1, T]` (T a multiple of 480) → reconstruction, `Quantized`."""
        hidden = self.encoder(self._frames(audio))
        semantic, acoustic, info = self.quantizer(hidden, num_codebooks)
        return self._synthesize(self.semantic_out(semantic) + self.acoustic_out(acoustic)), info

    # -- streaming -----------------------------------------------------------------------------

    def init_encoder_state(self, batch_size: int) -> StreamState:
        return self.encoder.init_state(batch_size)

    def init_decoder_state(self, batch_size: int) -> StreamState:
        return self.decoder.init_state(batch_size)

    @torch.no_grad()
    def encode_step(
        self,
        audio: Tensor,
        state: StreamState,
        num_codebooks: int = 8,
        active: Tensor | None = None,
    ) -> Tensor:
        """Continues each slot by whole frames of audio `[B, 1, S * 480]` → codes `[B, K, S]`.

        Raises:
            ValueError: audio is not a whole number of frames.
        """
        if audio.shape[-1] % self.config.hop or audio.shape[-1] == 0:
            raise ValueError(f"audio must be whole frames of {self.config.hop} samples")
        hidden = self.encoder.step(self._frames(audio), state, active)
        return self.quantizer.encode(hidden, num_codebooks)

    @torch.no_grad()
    def decode_step(
        self, codes: Tensor, state: StreamState, active: Tensor | None = None
    ) -> Tensor:
        """Continues each slot by codes `[B, K, S]` → audio `[B, 1, S * 480]`."""
        return self.decoder.step(self._hidden(codes), state, active).flatten(1)[:, None]


def codec_config(stored: dict, path: str | Path) -> CodecConfig:
    """The config of a checkpoint's `config.json`. Raises UserError for another kind of model."""
    return training.config_of(CodecConfig, "codec", stored, path)


def stored_config(config: CodecConfig) -> dict:
    """What goes into `config.json`."""
    return training.stored_config("codec", config)


def codec_fingerprint(config: CodecConfig, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over what the codes depend on: encoder and quantizer, not the decoder."""
    fields = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if not name.startswith("decoder")
    }
    statistics = ("cluster_size", "embedding_sum")
    parts = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(("encoder.", "quantizer.")) and not name.endswith(statistics)
    }
    return fingerprint(fields, parts)


class PhoneHead(nn.Module):
    """Reads phones off quantized semantic features; used in training only.

    Convolutions that see 7 frames to each side: a causal code cannot know the phone that begins
    with it, so neighbouring codes are read together. `[B, F, d]` → logits `[B, F, num_phones]`.
    """

    def __init__(self, semantic_dim: int, num_phones: int, width: int = 192) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(semantic_dim, width, 7, padding=3),
            nn.GELU(),
            nn.Conv1d(width, width, 5, padding=2),
            nn.GELU(),
            nn.Conv1d(width, num_phones, 5, padding=2),
        )

    def forward(self, semantic: Tensor) -> Tensor:
        return self.layers(semantic.transpose(1, 2)).transpose(1, 2)


class MelLoss(nn.Module):
    """Multi-scale log-mel L1 distance in fp32, after DAC (Kumar et al. 2023, section 3.4)."""

    def __init__(
        self,
        sample_rate: int = 24_000,
        windows: tuple[int, ...] = (2048, 1024, 512, 256, 128),
        mels: tuple[int, ...] = (128, 96, 64, 32, 16),
        floor: float = 1e-3,
    ) -> None:
        super().__init__()
        self.windows, self.floor = windows, floor
        for window, bands in zip(windows, mels, strict=True):
            filters = torchaudio.functional.melscale_fbanks(
                window // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate
            )
            self.register_buffer(f"filters_{window}", filters, persistent=False)
            self.register_buffer(f"window_{window}", torch.hann_window(window), persistent=False)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """Audio `[B, 1, T]` twice → a scalar, the mean over scales."""
        with torch.autocast(estimate.device.type, enabled=False):
            both = torch.cat((estimate.float(), target.float()))[:, 0]
            return torch.stack([self._scale(both, window) for window in self.windows]).mean()

    def _scale(self, both: Tensor, window: int) -> Tensor:
        taper = getattr(self, f"window_{window}")
        spectrum = torch.stft(both, window, window // 4, window=taper, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        magnitude = (power + 1e-9).sqrt().transpose(1, 2) / taper.sum()  # [2 B, frames, bins]
        mel = torch.log10(
            (magnitude @ getattr(self, f"filters_{window}")).clamp(min=0) + self.floor
        )
        estimate, target = mel.chunk(2)
        return F.l1_loss(estimate, target)


def waveform_loss(estimate: Tensor, target: Tensor) -> Tensor:
    """‖x − y‖² / ‖x‖² per sample, averaged: it makes phase learnable. Audio `[B, 1, T]` twice.

    The floor under the denominator (−40 dB RMS) keeps near-silence from dominating the batch.
    """
    estimate, target = estimate.float(), target.float()
    energy = target.square().mean((1, 2)).clamp(min=1e-4)
    return ((estimate - target).square().mean((1, 2)) / energy).mean()


def si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019), per clip `[B]`."""
    estimate, target = (
        x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (estimate, target)
    )
    energy = target.square().sum(1, keepdim=True).clamp(min=1e-8)
    projection = (estimate * target).sum(1, keepdim=True) / energy * target
    noise = (estimate - projection).square().sum(1).clamp(min=1e-8)
    return 10 * torch.log10(projection.square().sum(1).clamp(min=1e-8) / noise)
