"""The neural audio codec: 24 kHz mono speech ↔ 50 Hz codes, strictly causal, no look-ahead.

A hybrid with almost all arithmetic in matrix products: frames of 120 samples (200 Hz) → causal
ConvNeXt blocks (Liu et al. 2022) → frames of 480 samples (50 Hz), log-mel spectra added → a causal
sliding-window transformer → a split quantizer (Défossez et al. 2024, Moshi: a semantic codebook
beside an acoustic residual VQ, Zeghidour et al. 2021) → the same, mirrored, and an inverse Fourier
transform (Siuzdak 2023, Vocos). Beside it a branch of the encoder that hears words, from log-mel
spectra, for codebook 0. The algorithmic latency is one frame, 20 ms.

Inside the model tensors are channels-last, `[B, time, C]`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

import checkpoints
from checkpoints import fingerprint, load_checkpoint
from command import UserError
from streamed import stream_weights
from transformer import StreamingTransformer, TransformerConfig, TransformerState

STATISTICS = ("cluster_size", "embedding_sum")  # of codebooks in training; an export has none


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of a `Codec`; stored in every checkpoint."""

    sample_rate: int = 24_000
    hop: int = 480  # samples a frame: 50 Hz
    front_stride: int = 120  # samples a front frame: 200 Hz
    front_dim: int = 192
    encoder_front_blocks: int = 1
    encoder_dim: int = 256
    encoder_layers: int = 2
    num_mels: int = 80  # bands in which both branches of the encoder hear, every 10 ms
    semantic_width: int = 256
    semantic_layers: int = 2
    decoder_front_dim: int = 256
    decoder_front_blocks: int = 2
    decoder_dim: int = 320
    decoder_layers: int = 3
    num_heads: int = 4
    context: int = 50  # attention window in frames; a training window has twice as many
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
        """9M parameters: streams in a small part of real time on one CPU core."""
        return cls()

    @classmethod
    def base(cls) -> CodecConfig:
        """67M parameters, 64 codebooks: the full recipe, for one H200. See train_codec.py."""
        return cls(
            front_dim=384,
            encoder_front_blocks=2,
            encoder_dim=512,
            encoder_layers=6,
            semantic_width=512,
            semantic_layers=3,
            decoder_front_dim=512,
            decoder_front_blocks=4,
            decoder_dim=512,
            decoder_layers=8,
            num_heads=8,
            context=100,
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
        extended = F.pad(x, (0, 0, self.depthwise.kernel_size[0] - 1, 0))
        return self._block(x, self.depthwise(extended.transpose(1, 2)).transpose(1, 2))

    def step(self, x: Tensor, state: ConvState, active: Tensor | None = None) -> Tensor:
        # Products and a sum: for so few frames a convolution costs more to set up than to run.
        windows = state.extend(x, active).unfold(1, self.depthwise.kernel_size[0], 1)
        weight, bias = self.depthwise.weight[:, 0], self.depthwise.bias
        return self._block(x, (windows * weight).sum(-1) + bias)

    def _block(self, x: Tensor, y: Tensor) -> Tensor:
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


class LogMel(nn.Module):
    """Causal log-mel spectra of front frames `[B, T / 120, 120]` → `[B, T / 240, mels]`, 100 Hz.

    Each is of the last 20 ms (Hann window). Words are easier to hear in them than in the waveform.
    """

    window, hop, floor = 480, 240, 1e-5

    def __init__(self, sample_rate: int, mels: int) -> None:
        super().__init__()
        filters = torchaudio.functional.melscale_fbanks(
            self.window // 2 + 1, 40.0, 8000.0, mels, sample_rate, norm="slaney"
        )
        self.register_buffer("filters", filters * 1000, persistent=False)
        self.register_buffer("taper", torch.hann_window(self.window), persistent=False)

    def init_state(self, batch_size: int) -> ConvState:
        return ConvState(batch_size, 1, self.hop, self.filters.device, self.filters.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._spectra(F.pad(self._fold(x), (0, 0, 1, 0)))

    def step(self, x: Tensor, state: ConvState, active: Tensor | None = None) -> Tensor:
        return self._spectra(state.extend(self._fold(x), active))

    def _fold(self, x: Tensor) -> Tensor:
        return x.flatten(1).unflatten(1, (-1, self.hop))

    def _spectra(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            frames = torch.cat((x[:, :-1], x[:, 1:]), dim=-1).float() * self.taper
            power = torch.fft.rfft(frames).abs().square()
            # About zero mean and unit deviation for speech.
            return ((power @ self.filters + self.floor).log() + 4.0) / 4.0


class SpectralHead(nn.Module):
    """Front frames → samples by way of short spectra: `[B, T, C]` → `[B, T, stride]`.

    As in Vocos (Siuzdak 2023, section 3.3) each bin's magnitude is an exponential: from its low to
    its high bins speech falls by 40 dB and more, which a linear layer cannot follow. A frame is two
    strides long, under a Hann window, and overlaps the next one by half; its second half is the
    head's guess of what follows, so that nothing waits.
    """

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.bins = stride + 1
        self.linear = nn.Linear(dim, 3 * self.bins)
        bins, samples = torch.arange(self.bins), torch.arange(2 * stride)
        # Start quiet and tilted like speech: flat to about 600 Hz, then 6 dB less an octave.
        self.linear.weight.data.mul_(0.5)
        self.linear.bias.data.zero_()
        self.linear.bias.data[: self.bins] = (0.03 / (1 + bins / 6) + 3e-4).log()
        # The inverse real Fourier transform under the window, where learning starts.
        angles = math.pi / stride * bins[:, None] * samples
        twice = torch.full((self.bins, 1), 2.0)
        twice[0] = twice[-1] = 1.0
        waves = torch.cat((twice * angles.cos(), -twice * angles.sin()))
        # Hann between the samples: the first one, too, is this frame's to form.
        window = (math.pi / (2 * stride) * (samples + 0.5)).sin().square()
        self.synthesis = nn.Parameter(waves * window / (2 * stride) ** 0.5)

    def init_state(self, batch_size: int) -> ConvState:
        waves = self.synthesis
        return ConvState(batch_size, 1, waves.shape[1] // 2, waves.device, waves.dtype)

    def forward(self, x: Tensor) -> Tensor:
        now, later = self._frames(x)
        return now + F.pad(later, (0, 0, 1, 0))[:, :-1]

    def step(self, x: Tensor, state: ConvState, active: Tensor | None = None) -> Tensor:
        now, later = self._frames(x)
        return now + state.extend(later, active)[:, :-1]

    def _frames(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves of every windowed frame, `[B, T, stride]` each, in fp32."""
        # In fp32: half precision would round a magnitude by as much as 3 %.
        with torch.autocast(x.device.type, enabled=False):
            spectra = self.linear(x.float())
            magnitudes = spectra[..., : self.bins].clamp(max=4.0).exp()
            parts = spectra[..., self.bins :].unflatten(-1, (2, -1)) * magnitudes[..., None, :]
            return (parts.flatten(-2) @ self.synthesis).chunk(2, dim=-1)


class Fork(nn.ModuleList):
    """Causal branches over the same input, their outputs side by side: `[B, F, sum of widths]`."""

    def forward(self, x: Tensor) -> Tensor:
        return self._join([branch(x) for branch in self])

    def init_state(self, batch_size: int) -> StreamState:
        return StreamState([branch.init_state(batch_size) for branch in self])

    def step(self, x: Tensor, state: StreamState, active: Tensor | None = None) -> Tensor:
        parts = [b.step(x, s, active) for b, s in zip(self, state.layers, strict=True)]
        return self._join(parts)

    def _join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=-1)


class SumFork(Fork):
    """Causal branches over the same input, their outputs added: `[B, F, width of each]`."""

    def _join(self, parts: list[Tensor]) -> Tensor:
        return sum(parts[1:], start=parts[0])


def build_encoder(config: CodecConfig) -> Fork:
    """Front frames of samples `[B, T / 120, 120]` → semantic and acoustic `[B, F, S + D]`.

    Two branches that share nothing. In one trunk the phone loss, whose gradient is ten times that
    of the balanced reconstruction, left the acoustic levels untaught; a shared front of the
    waveform, its gradient scaled down, heard 31 % of phones.
    """
    c = config
    semantic = [
        LogMel(c.sample_rate, c.num_mels),
        FrameConv(c.num_mels, c.semantic_width, in_frames=c.hop // LogMel.hop),
        StreamingTransformer(c.transformer(c.semantic_width, c.semantic_layers)),
    ]
    front = [
        ConvNeXtBlock(c.front_dim, c.kernel, c.expansion) for _ in range(c.encoder_front_blocks)
    ]
    waveform = [
        FrameConv(c.front_stride, c.front_dim),
        *front,
        FrameConv(c.front_dim, c.encoder_dim, in_frames=c.hop // c.front_stride),
    ]
    spectra = [
        LogMel(c.sample_rate, c.num_mels),
        FrameConv(c.num_mels, c.encoder_dim, in_frames=c.hop // LogMel.hop),
    ]
    acoustic = [SumFork([CausalChain(waveform), CausalChain(spectra)])]
    acoustic.append(StreamingTransformer(c.transformer(c.encoder_dim, c.encoder_layers)))
    return Fork([CausalChain(semantic), CausalChain(acoustic)])


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
            SpectralHead(c.decoder_front_dim, c.front_stride),
        ]
    )


class Codebook(NamedTuple):
    """One codebook, to read: codes `[n, d]`, and ‖e‖² / 2 `[n]`, on which a streaming step would
    spend more than on the search itself."""

    embedding: Tensor
    half_norms: Tensor

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest code of each vector: `[..., d]` → `[...]` int64."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() @ self.embedding.float().t() - self.half_norms).argmax(-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """`[...]` int64 → `[..., d]`."""
        return F.embedding(codes, self.embedding)


def half_norms(codes: Tensor) -> Tensor:
    """‖e‖² / 2 of `[..., d]`."""
    return 0.5 * codes.float().pow(2).sum(-1)


class CodebookStack(nn.Module):
    """Codebooks of one size, learnt by exponential moving averages (van den Oord et al. 2017, A.1).

    Their buffers are rows of one fp32 tensor each, `[K, n, d]` and `[K, n]`: on a GPU 64 codebooks
    that move one by one are thousands of launches. Nothing here waits for the device. `levels` is
    their place among the quantizer's, which stores the buffers under a name a codebook.
    """

    stored = ("embedding", *STATISTICS)

    def __init__(self, count: int, size: int, dim: int, decay: float, first: int = 0) -> None:
        super().__init__()
        self.levels, self.decay = slice(first, first + count), decay
        codes = torch.stack([torch.randn(size, dim) for _ in range(count)])
        self.register_buffer("embedding", codes, persistent=False)
        self.register_buffer("cluster_size", torch.zeros(count, size), persistent=False)
        self.register_buffer("embedding_sum", torch.zeros_like(codes), persistent=False)
        self.register_buffer("half_norms", half_norms(codes), persistent=False)
        # Which codebooks stand for data; until then training goes on unquantized. Known to the
        # host, which would otherwise wait for the device.
        self.started = [False] * count

    def books(self) -> list[Codebook]:
        """The codebooks one by one; their tensors are views."""
        rows = zip(self.embedding.unbind(), self.half_norms.unbind(), strict=True)
        return [Codebook(*row) for row in rows]

    @property
    def is_initialised(self) -> bool:
        return all(self.started)

    @torch.no_grad()
    def loaded(self) -> None:
        """Call when the stored buffers have been filled."""
        self.half_norms.copy_(half_norms(self.embedding))
        self.started = (self.cluster_size.sum(-1) > 0).tolist()

    @torch.no_grad()
    def restart_statistics(self, row: int) -> None:
        """Statistics that stand for a codebook's codes as they are, as after an export."""
        self.cluster_size[row].fill_(1.0)
        self.embedding_sum[row].copy_(self.embedding[row])
        self.started[row] = True

    @torch.no_grad()
    def initialise(self, left: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Starts those codebooks that stand for nothing yet by k-means, each on what the ones
        before it leave of the vectors `left` `[N, d]`.

        `draws` `[K, n or more]` in [0, 1) choose the codes that k-means starts from; ranks that
        have the same get the same. Returns what the last codebook leaves, and `[K, n]` bool, the
        codes that began anew.
        """
        fresh = torch.zeros_like(self.cluster_size, dtype=torch.bool)
        for row, book in enumerate(self.books()):
            if not self.started[row]:
                self._k_means(row, book, left, draws[row])
                fresh[row] = True
            left = left - book.lookup(book.nearest(left))
        return left, fresh

    def _k_means(self, row: int, book: Codebook, candidates: Tensor, draws: Tensor) -> None:
        """Lloyd's algorithm on `candidates` `[N, d]`."""
        codes, size = book.embedding, len(book.embedding)
        places = (draws[:size] * len(candidates)).long().clamp(max=len(candidates) - 1)
        codes.copy_(candidates[places])
        book.half_norms.copy_(half_norms(codes))
        for _ in range(10):
            nearest = book.nearest(candidates)
            ones = torch.ones_like(nearest, dtype=torch.float32)
            counts = codes.new_zeros(size).index_add_(0, nearest, ones)
            sums = torch.zeros_like(codes).index_add_(0, nearest, candidates)
            means = sums / counts.clamp(min=1)[:, None]
            codes.copy_(torch.where(counts[:, None] > 0, means, codes))
            book.half_norms.copy_(half_norms(codes))
        mean_size = len(candidates) / size
        self.cluster_size[row].fill_(mean_size)
        self.embedding_sum[row].copy_(codes * mean_size)
        self.started[row] = True

    @torch.no_grad()
    def update(
        self,
        vectors: Tensor,
        codes: Tensor,
        used: Tensor,
        draws: Tensor,
        skip: Tensor | None = None,
    ) -> Tensor:
        """One EMA step; dead codes restart from vectors drawn, with fresh statistics.

        Args:
            vectors: `[K, B, F, d]` of this rank, codes: `[K, B, F]` theirs.
            used: `[K, B]` bool, the clips that count at each level.
            draws: `[K, n or more]` in [0, 1), which of the vectors that count on any rank a dead
                code restarts from; the same on every rank.
            skip: scalar; if not 0 nothing changes.

        Returns:
            `[K, n]` bool, the codes that restarted.
        """
        counts, sums = self._statistics(vectors, codes, used)
        fresh, some = drawn_vectors(vectors, used, draws[:, : counts.shape[1]])
        if dist.is_initialized():
            parts = torch.cat((sums, fresh, counts[..., None]), dim=-1)
            dist.all_reduce(parts)
            sums, fresh, counts = parts.split((sums.shape[-1], fresh.shape[-1], 1), dim=-1)
            counts = counts[..., 0]
        moves = (1 - self.decay) * some  # a level that nobody used stays where it is
        sizes = self.cluster_size.lerp(counts, moves)
        sums = self.embedding_sum.lerp(sums, moves[..., None])
        mean_size = sizes.mean(-1, keepdim=True)
        dead = (sizes < 0.1 * mean_size) & (some > 0)
        sizes = torch.where(dead, mean_size, sizes)
        sums = torch.where(dead[..., None], fresh * mean_size[..., None], sums)
        codes = sums / sizes[..., None]
        if skip is not None:
            skipped = skip != 0
            dead = dead & ~skipped
            sizes = torch.where(skipped, self.cluster_size, sizes)
            sums = torch.where(skipped, self.embedding_sum, sums)
            codes = torch.where(skipped, self.embedding, codes)
        self._set(codes, sizes, sums)
        return dead

    @torch.no_grad()
    def follow(self, other: CodebookStack, weight: Tensor, restarted: Tensor) -> None:
        """Moves by the scalar `weight` towards `other`'s statistics; takes codes over that just
        `restarted` `[K, n]`.

        The code is then the mean of all vectors that it stood for within both averages. Between
        the old and the new place of a code that jumped there would be nothing.
        """
        sizes = self.cluster_size.lerp(other.cluster_size, weight)
        sizes = torch.where(restarted, other.cluster_size, sizes)
        sums = self.embedding_sum.lerp(other.embedding_sum, weight)
        sums = torch.where(restarted[..., None], other.embedding_sum, sums)
        codes = torch.where(weight > 0, sums / sizes[..., None], self.embedding)  # bit for bit
        self._set(codes, sizes, sums)
        self.started = list(other.started)

    def _set(self, codes: Tensor, sizes: Tensor, sums: Tensor) -> None:
        self.embedding.copy_(codes)
        self.cluster_size.copy_(sizes)
        self.embedding_sum.copy_(sums)
        self.half_norms.copy_(half_norms(codes))

    def _statistics(self, vectors: Tensor, codes: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        """How many vectors each code stood for, `[K, n]`, and their sums, `[K, n, d]`."""
        levels, size, dim = self.embedding.shape
        level = torch.arange(levels, device=codes.device)[:, None]
        # What does not count goes to a level of its own behind the last.
        rows = (codes + size * torch.where(used, level, levels)[..., None]).flatten()
        ones = torch.ones_like(rows, dtype=torch.float32)
        counts = ones.new_zeros((levels + 1) * size).index_add_(0, rows, ones)
        sums = ones.new_zeros((levels + 1) * size, dim).index_add_(0, rows, vectors.flatten(0, 2))
        return counts.view(-1, size)[:levels], sums.view(-1, size, dim)[:levels]


def drawn_vectors(vectors: Tensor, used: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Those at `draws` `[K, n]` in [0, 1) among the vectors `[K, B, F, d]` whose clip is `used`
    `[K, B]`; of all ranks in joint order: zeros where another rank has it, so that their sum is it.

    The sampler deals clips out in turn, so that clip `i` of rank `r` is the joint `i * ranks + r`.
    Returns `[K, n, d]`, and `[K, 1]`: 1.0 where any clip is used, else 0.0.
    """
    rank, ranks = 0, 1
    if dist.is_initialized():
        rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks > 1:
        parts = [torch.empty_like(used, dtype=torch.uint8) for _ in range(ranks)]
        dist.all_gather(parts, used.to(torch.uint8).contiguous())
        used = torch.stack(parts, dim=-1).flatten(1)  # [K, B * ranks]
    frames = vectors.shape[2]
    order = used.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    count = used.sum(1, keepdim=True) * frames
    place = torch.minimum((draws * count).long(), count - 1).clamp(min=0)  # among those used
    clip = order.gather(1, place.div(frames, rounding_mode="floor"))
    level = torch.arange(len(vectors), device=vectors.device)[:, None]
    local = clip.div(ranks, rounding_mode="floor")
    drawn = vectors[level, local, place.remainder(frames)]
    if ranks > 1:
        drawn = drawn * (clip.remainder(ranks) == rank)[..., None]
    return drawn, (count > 0).float()


def gather_candidates(x: Tensor, limit: int = 8192) -> Tensor:
    """Up to `limit` vectors of the clips `[B, F, d]` of all ranks → `[N, d]`, in joint order."""
    x = x.contiguous().float()
    if dist.is_initialized():
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        x = torch.stack(parts, dim=1).flatten(0, 1)
    return x.flatten(0, 1)[:limit]


@dataclass
class Quantized:
    """What the quantizer gives in training.

    `semantic` and, but for the semantic branch alone, `acoustic` `[B, F, d]` quantized features
    (straight-through), `codes` `[B, K, F]`, `commitment` a scalar, `residuals` per stack of
    codebooks the vectors `[levels, B, F, d]` that it quantized, `used` `[B, K]` bool.
    """

    semantic: Tensor
    acoustic: Tensor | None
    codes: Tensor
    commitment: Tensor
    residuals: list[Tensor]
    used: Tensor


class SplitQuantizer(nn.Module):
    """A semantic codebook in parallel with an acoustic residual VQ, each in a space of its own.

    Codebooks live in stacks of one size, the semantic one in a stack of its own, and are stored
    one by one, as `codebooks.K.embedding` and so on.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        c = config
        self.widths = (c.semantic_width, c.encoder_dim)
        self.semantic_in = nn.Linear(c.semantic_width, c.semantic_dim)
        self.acoustic_in = nn.Linear(c.encoder_dim, c.acoustic_dim)
        first, *others = c.codebook_sizes
        self.stacks = nn.ModuleList([CodebookStack(1, first, c.semantic_dim, c.codebook_decay)])
        for size, same in itertools.groupby(others):
            place, count = self.stacks[-1].levels.stop, len(list(same))
            stack = CodebookStack(count, size, c.acoustic_dim, c.codebook_decay, place)
            self.stacks.append(stack)

    @property
    def codebooks(self) -> list[Codebook]:
        """All of them, the semantic one first."""
        return [book for stack in self.stacks for book in stack.books()]

    def _stored(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Names in checkpoints, with the rows that they stand for."""
        for stack in self.stacks:
            for row, k in enumerate(range(stack.levels.start, stack.levels.stop)):
                for name in stack.stored:
                    yield f"{prefix}codebooks.{k}.{name}", getattr(stack, name)[row]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self._stored(prefix))

    @torch.no_grad()
    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        for name, row in self._stored(prefix):
            given = state.pop(name, None)
            if given is None:
                missing.append(name)
            elif given.shape != row.shape:
                errors.append(f"{name} is {list(given.shape)}, not {list(row.shape)}")
            else:
                row.copy_(given)
        for stack in self.stacks:
            stack.loaded()
        rest = (missing, unexpected, errors)
        super()._load_from_state_dict(state, prefix, metadata, strict, *rest)

    def encode(self, hidden: Tensor, num_codebooks: int) -> Tensor:
        """`[B, F, S + D]` → codes `[B, K, F]` int64."""
        semantic, acoustic = hidden.split(self.widths, dim=-1)
        first, *others = self.codebooks
        codes = [first.nearest(self.semantic_in(semantic))]
        residual = self.acoustic_in(acoustic)
        for book in others[: num_codebooks - 1]:
            codes.append(book.nearest(residual))
            residual = residual - book.lookup(codes[-1])
        return torch.stack(codes, dim=1)

    def lookup(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[B, K, F]` → semantic `[B, F, d]` and acoustic `[B, F, d]` vectors."""
        first, *others = self.codebooks
        semantic = first.lookup(codes[:, 0])
        acoustic = semantic.new_zeros(*semantic.shape[:2], self.acoustic_in.out_features)
        for book, level in zip(others, codes.unbind(1)[1:], strict=False):
            acoustic = acoustic + book.lookup(level)
        return semantic, acoustic

    def forward(self, hidden: Tensor, num_codebooks: Tensor) -> Quantized:
        """Quantizes with gradients; sample `b` uses its first `num_codebooks[b]` codebooks."""
        total = self.stacks[-1].levels.stop
        used = torch.arange(total, device=hidden.device) < num_codebooks[:, None]
        semantic, acoustic = hidden.split(self.widths, dim=-1)
        first = self.quantize_semantic(semantic)
        with torch.autocast(hidden.device.type, enabled=False):
            vectors = self.acoustic_in(acoustic.float())
            quantized, codes, commitment, residuals = self._quantize_acoustic(vectors, used)
        return Quantized(
            semantic=first.semantic,
            acoustic=quantized,
            codes=torch.cat((first.codes, codes), dim=1),
            commitment=first.commitment + commitment,
            residuals=[*first.residuals, *residuals],
            used=used,
        )

    def quantize_semantic(self, semantic: Tensor) -> Quantized:
        """The semantic codebook alone, with gradients: `[B, F, S]` → codes `[B, 1, F]`."""
        (book,) = self.stacks[0].books()
        with torch.autocast(semantic.device.type, enabled=False):
            vectors = self.semantic_in(semantic.float())
            codes = book.nearest(vectors)
            used = torch.ones(len(codes), 1, dtype=torch.bool, device=codes.device)
            quantized, commitment = vectors, 0 * vectors.sum()
            if self.stacks[0].is_initialised:  # vectors pass as they are until there are codes
                chosen = book.lookup(codes)
                commitment = F.mse_loss(vectors, chosen)
                quantized = vectors + (chosen - vectors).detach()
        residuals = [vectors.detach()[None]]
        return Quantized(quantized, None, codes[:, None], commitment, residuals, used)

    def _quantize_acoustic(
        self, vectors: Tensor, used: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The residual VQ over `[B, F, d]`; `used` `[B, K]` counts the semantic codebook too.

        Returns quantized vectors, codes, commitment and residuals as in `Quantized`. The commitment
        is, per clip, the sum over the levels that it uses, as in DAC (Kumar et al. 2023): a mean
        would pull the less the more levels there are.
        """
        books = self.codebooks[1:]
        with torch.no_grad():
            # What enters each level, and what the last one leaves: in place, level by level.
            residuals = vectors.new_empty(len(books) + 1, *vectors.shape)
            residuals[0] = vectors
            counted = used[:, 1:].t().float()  # [K - 1, B]
            codes = []
            for book, weight, before, after in zip(
                books, counted[..., None, None], residuals[:-1], residuals[1:], strict=True
            ):
                codes.append(book.nearest(before))
                torch.addcmul(before, book.lookup(codes[-1]), weight, value=-1, out=after)
            codes = torch.stack(codes, dim=1)
        slices = [stack.levels for stack in self.stacks[1:]]
        parts = [residuals[s.start - 1 : s.stop - 1] for s in slices]
        if not self.stacks[-1].started[-1]:
            return vectors, codes, 0 * vectors.sum(), parts
        return (
            vectors - residuals[-1],
            codes,
            summed_squares(vectors, residuals[1:], counted),
            parts,
        )

    @property
    def is_initialised(self) -> bool:
        """Whether every codebook stands for data."""
        return all(stack.is_initialised for stack in self.stacks)

    def resume_from_codes(self, stored: Collection[str]) -> None:
        """Lets training go on from codes whose statistics are not among the tensors `stored` (names
        within the quantizer), as in an export."""
        for stack in self.stacks:
            for row, k in enumerate(range(stack.levels.start, stack.levels.stop)):
                codes, sizes = f"codebooks.{k}.embedding", f"codebooks.{k}.cluster_size"
                if codes in stored and sizes not in stored:
                    stack.restart_statistics(row)

    @torch.no_grad()
    def update(
        self,
        info: Quantized,
        draws: Tensor,
        freeze_semantic: bool = False,
        skip: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Moves the codebooks of `info` by one EMA step, or starts them by k-means at first.

        `draws` `[K, size of the largest]` in [0, 1), the same on every rank, choose the vectors
        that codes start from. With `freeze_semantic` codebook 0 stays as it is; where the scalar
        `skip` is not 0, all of them, once they have started.
        Returns, per stack of `info`, `[levels, size]` bool: the codes that began anew; None where
        it stood still.
        """
        restarted = []
        stacks = self.stacks[: len(info.residuals)]
        # Here alone the device is waited for: once, or as often as the first steps are skipped.
        if skip is not None and not all(s.is_initialised for s in stacks) and bool(skip):
            return restarted
        left = None  # what a stack that has just started leaves for the next one
        for stack, vectors in zip(stacks, info.residuals, strict=True):
            levels = stack.levels
            if levels.start == 0 and freeze_semantic:
                restarted.append(None)
            elif stack.is_initialised:
                codes, used = info.codes[:, levels].transpose(0, 1), info.used[:, levels].t()
                restarted.append(stack.update(vectors, codes, used, draws[levels], skip))
            else:
                if left is None or levels.start < 2:
                    left = gather_candidates(vectors[0])
                left, fresh = stack.initialise(left, draws[levels])
                restarted.append(fresh)
        return restarted


def summed_squares(vectors: Tensor, errors: Tensor, counted: Tensor) -> Tensor:
    """Mean over clips of the sum over levels of mean(`errors`²), with its gradient in `vectors`.

    vectors: `[B, F, d]`, errors: `[K, B, F, d]`, which are `vectors` less constants, counted:
    `[K, B]`. Written out, because autograd would keep and pass `errors` several times.
    """
    scale = 1.0 / vectors.numel()
    value = scale * (torch.linalg.vector_norm(errors, dim=(2, 3)).square() * counted).sum()
    pull = torch.bmm(counted.t()[:, None], errors.flatten(2).transpose(0, 1))  # [B, 1, F * d]
    product = (vectors * (2 * scale * pull).view_as(vectors)).sum()
    return value + (product - product.detach())


def count_parameters(model: Codec) -> dict[str, float]:
    """Millions of numbers by part: what gradients teach, and the codes, which averages do."""
    parts = {
        "semantic encoder": [model.encoder[0], model.quantizer.semantic_in],
        "acoustic encoder": [model.encoder[1], model.quantizer.acoustic_in],
        "decoder": [model.semantic_out, model.acoustic_out, model.decoder],
    }
    counts = {
        name: sum(p.numel() for module in modules for p in module.parameters()) / 1e6
        for name, modules in parts.items()
    }
    counts["codebooks"] = sum(b.embedding.numel() for b in model.quantizer.codebooks) / 1e6
    return counts


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
        if torch.device(device).type == "cpu":
            stream_weights(model)
        return model.to(device).eval().requires_grad_(False)

    def load_tensors(self, tensors: dict[str, Tensor], path: str | Path) -> None:
        """Fills the model from stored tensors; EMA statistics may be absent (an export)."""
        try:
            missing, unexpected = self.load_state_dict(tensors, strict=False)
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise UserError(f"{path}: weights do not fit the config: {first}") from error
        missing = [name for name in missing if not name.endswith(STATISTICS)]
        if missing or unexpected:
            name = (missing + unexpected)[0]
            raise UserError(f"{path}: weights do not fit the config, first at {name}")

    def export_tensors(self, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """The tensors that ship: in `dtype`, without what only training needs."""
        return {
            name: tensor.detach().to("cpu", dtype)
            for name, tensor in self.state_dict().items()
            if not name.endswith(STATISTICS)
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

    def forward_semantic(self, audio: Tensor) -> Quantized:
        """The training pass of codebook 0 alone, many times cheaper than all of it."""
        return self.quantizer.quantize_semantic(self.encoder[0](self._frames(audio)))

    def forward(self, audio: Tensor, num_codebooks: Tensor) -> tuple[Tensor, Quantized]:
        """The training pass: `[B, 1, T]` (T a multiple of 480) → reconstruction, `Quantized`."""
        info = self.quantizer(self.encoder(self._frames(audio)), num_codebooks)
        hidden = self.semantic_out(info.semantic) + self.acoustic_out(info.acoustic)
        return self._synthesize(hidden), info

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


class AveragedCodec:
    """An exponential average of a codec's weights over the steps, with codebooks that fit it.

    Its codebooks average the statistics of the trained ones, not their codes: a code is the mean of
    the vectors that it stood for while these weights were averaged. `model` is for inference.
    """

    def __init__(self, model: Codec, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(
        self, model: Codec, restarted: list[Tensor | None], skip: Tensor | None = None
    ) -> None:
        """Call after a step; `restarted` is what the quantizer's `update` returned, none if it
        stood still. Where the scalar `skip` is not 0 nothing moves."""
        moves = 1 if skip is None else (skip == 0).to(self.steps.dtype)
        self.steps += moves
        # A short run, or the start of one, must not average in the random weights of step 0: until
        # the decay is reached it is (1 + steps) / (10 + steps).
        weight = (9 / (10 + self.steps)).clamp(min=1 - self.decay) * moves
        # What is frozen stays bit for bit: a mean loses the sign of a zero, and so the fingerprint.
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        moving = [pair for pair in pairs if pair[1].requires_grad]
        own, theirs = [own for own, _ in moving], [theirs for _, theirs in moving]
        steps = torch._foreach_sub(theirs, own)
        torch._foreach_mul_(steps, weight)
        torch._foreach_add_(own, steps)
        stacks = zip(self.model.quantizer.stacks, model.quantizer.stacks, restarted, strict=False)
        for mine, theirs, mask in stacks:
            if mask is not None:
                mine.follow(theirs, weight, mask)

    def state_dict(self) -> dict:
        """Without the weights: they are the checkpoint's own."""
        return {"steps": int(self.steps), "decay": self.decay}

    def load_state_dict(self, state: dict) -> None:
        self.steps.fill_(state["steps"])
        self.decay = state["decay"]


def codec_config(stored: dict, path: str | Path) -> CodecConfig:
    """The config of a checkpoint's `config.json`. Raises UserError for another kind of model."""
    return checkpoints.config_of(CodecConfig, "codec", stored, path)


def stored_config(config: CodecConfig) -> dict:
    """What goes into `config.json`."""
    return checkpoints.stored_config("codec", config)


def codec_fingerprint(config: CodecConfig, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over what the codes depend on: encoder and quantizer, not the decoder."""
    fields = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if not name.startswith("decoder")
    }
    parts = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(("encoder.", "quantizer.")) and not name.endswith(STATISTICS)
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
