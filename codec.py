"""The neural audio codec: 24 kHz mono speech ↔ 50 Hz codes, strictly causal, no look-ahead.

A hybrid with almost all arithmetic in matrix products: frames of 120 samples (200 Hz) → causal
ConvNeXt blocks (Liu et al. 2022) → frames of 480 samples (50 Hz), log-mel spectra added → a causal
sliding-window transformer → a split quantizer (Défossez et al. 2024, Moshi: a semantic codebook
beside an acoustic residual VQ, Zeghidour et al. 2021) → the same, mirrored, and an inverse Fourier
transform (Siuzdak 2023, Vocos). Beside it the semantic branch of the encoder, from log-mel spectra
alone, for codebook 0. The algorithmic latency is one frame, 20 ms. Tensors inside are `[B, T, C]`.
"""

import copy
import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

import checkpoints
from command import UserError, atomic_write, first_line
from quantizer import STATISTICS, Quantized, SplitQuantizer
from streamed import stream_weights
from transformer import StreamingTransformer, TransformerConfig

AGENT_DECODER = "agent.safetensors"  # in a codec's folder, beside the general one
CODES = "encoder.", "quantizer."  # tensors on which the codes depend


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
    num_mels: int = 80  # bands of the log-mels that both branches of the encoder take, every 10 ms
    semantic_width: int = 256
    semantic_layers: int = 3
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
    def tiny(cls) -> "CodecConfig":
        """10M parameters: streams in a small part of real time on one CPU core."""
        return cls()

    @classmethod
    def base(cls) -> "CodecConfig":
        """67M parameters, 64 codebooks: the full recipe, for one H200. See train_codec.py."""
        return cls(
            front_dim=384, encoder_front_blocks=2, encoder_dim=512, encoder_layers=6,
            semantic_width=512, semantic_layers=3, decoder_front_dim=512, decoder_front_blocks=4,
            decoder_dim=512, decoder_layers=8, num_heads=8, context=100, semantic_dim=256,
            acoustic_dim=256, codebook_sizes=(1024,) * 64)  # fmt: skip

    @property
    def frame_rate(self) -> float:  # frames a second
        return self.sample_rate / self.hop

    @property
    def num_codebooks(self) -> int:
        return len(self.codebook_sizes)

    def transformer(self, dim: int, layers: int) -> TransformerConfig:
        return TransformerConfig(dim, layers, self.num_heads, self.context)


class ConvState:
    """The last inputs of a causal convolution, `[B, n, C]`, changed in place."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer

    def extend(self, x: Tensor, active: Tensor | None) -> Tensor:
        """The chunk `x` `[B, S, C]` behind what came before it, `[B, n + S, C]`."""
        extended = torch.cat((self.buffer, x), dim=1)
        tail = extended[:, extended.shape[1] - self.buffer.shape[1] :]
        if active is None:
            self.buffer.copy_(tail)
        else:
            torch.where(active[:, None, None], tail, self.buffer, out=self.buffer)
        return extended

    def reset(self, mask: Tensor | None = None) -> None:
        if mask is None:
            self.buffer.zero_()
        else:
            self.buffer.masked_fill_(mask[:, None, None], 0)


class CausalLayer(nn.Module):
    """A layer whose `compute` sees `history` rows of `width` numbers before those it is given."""

    history: int
    width: int

    def init_state(self, batch_size: int) -> ConvState:
        own = next(itertools.chain(self.parameters(), self.buffers()))
        return ConvState(own.new_zeros(batch_size, self.history, self.width))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(F.pad(self.fold(x), (0, 0, self.history, 0)))

    def step(self, x: Tensor, state: ConvState, active: Tensor | None = None) -> Tensor:
        return self.compute(state.extend(self.fold(x), active))

    def fold(self, x: Tensor) -> Tensor:
        """Input `[B, T, C]` → rows `[B, ., width]`."""
        return x


class FrameConv(CausalLayer):
    """A causal convolution over two neighbouring frames as one matrix product.

    With `in_frames` front frames folded into one it is a strided convolution of kernel 2 × stride;
    with `out_frames` unfolded from one it is a transposed convolution of kernel 2 × stride, trimmed
    so that nothing looks ahead. `[B, T * in_frames, C_in]` → `[B, T * out_frames, C_out]`."""

    def __init__(self, in_dim: int, out_dim: int, in_frames: int = 1, out_frames: int = 1) -> None:
        super().__init__()
        self.in_frames, self.out_frames = in_frames, out_frames
        self.history, self.width = 1, in_dim * in_frames
        self.linear = nn.Linear(2 * self.width, out_dim * out_frames)

    def fold(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.in_frames)).flatten(2)

    def compute(self, x: Tensor) -> Tensor:
        y = self.linear(torch.cat((x[:, :-1], x[:, 1:]), dim=-1))
        return y.unflatten(2, (self.out_frames, -1)).flatten(1, 2)


class ConvNeXtBlock(CausalLayer):
    """Causal depthwise convolution, norm, pointwise MLP, scaled residual; `[B, T, C]` → same."""

    def __init__(self, dim: int, kernel: int, expansion: int) -> None:
        super().__init__()
        self.history, self.width = kernel - 1, dim
        self.depthwise = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, expansion * dim)
        self.down = nn.Linear(expansion * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), 0.1))

    def compute(self, x: Tensor) -> Tensor:
        return self._block(x[:, self.history :], self.depthwise(x.transpose(1, 2)).transpose(1, 2))

    def step(self, x: Tensor, state: ConvState, active: Tensor | None = None) -> Tensor:
        # Products and a sum: for so few frames a convolution costs more to set up than to run.
        windows = state.extend(x, active).unfold(1, self.history + 1, 1)
        weight, bias = self.depthwise.weight[:, 0], self.depthwise.bias
        return self._block(x, (windows * weight).sum(-1) + bias)

    def _block(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.scale * self.down(F.gelu(self.up(self.norm(y))))


class StreamState(list):
    """The states of layers, in their order."""

    def reset(self, mask: Tensor | None = None) -> None:
        """Starts the slots where `mask` `[B]` bool is true anew (all of them if None)."""
        for layer in self:
            layer.reset(mask)


class CausalChain(nn.ModuleList):
    """Causal layers in a row, each with `forward`, `init_state` and `step`."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x

    def init_state(self, batch_size: int) -> StreamState:
        return StreamState(layer.init_state(batch_size) for layer in self)

    def step(self, x: Tensor, state: StreamState, active: Tensor | None = None) -> Tensor:
        for layer, layer_state in zip(self, state, strict=True):
            x = layer.step(x, layer_state, active)
        return x


class Fork(CausalChain):
    """Causal branches over the same input; `join` makes one of their outputs `[B, F, width]`."""

    def __init__(self, branches: list, join=lambda parts: torch.cat(parts, dim=-1)) -> None:
        super().__init__(branches)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join([branch(x) for branch in self])

    def step(self, x: Tensor, state: StreamState, active: Tensor | None = None) -> Tensor:
        return self.join([b.step(x, s, active) for b, s in zip(self, state, strict=True)])


class LogMel(CausalLayer):
    """Causal log-mel spectra of front frames `[B, T / 120, 120]` → `[B, T / 240, mels]`, 100 Hz,
    each of the last 20 ms. Words are easier to learn from them than from samples."""

    window, hop, floor = 480, 240, 1e-5
    history, width = 1, hop

    def __init__(self, sample_rate: int, mels: int) -> None:
        super().__init__()
        bins = self.window // 2 + 1
        filters = melscale_fbanks(bins, 40.0, 8000.0, mels, sample_rate, norm="slaney")
        self.register_buffer("filters", filters * 1000, persistent=False)
        self.register_buffer("taper", torch.hann_window(self.window), persistent=False)

    def fold(self, x: Tensor) -> Tensor:
        return x.flatten(1).unflatten(1, (-1, self.hop))

    def compute(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            frames = torch.cat((x[:, :-1], x[:, 1:]), dim=-1).float() * self.taper
            power = torch.fft.rfft(frames).abs().square()
            return ((power @ self.filters + self.floor).log() + 4.0) / 4.0  # about normal in speech


class SpectralHead(CausalLayer):
    """Front frames → samples by way of short spectra: `[B, T, C]` → `[B, T, stride]`.

    As in Vocos (Siuzdak 2023, section 3.3) each bin's magnitude is an exponential: from its low to
    its high bins speech falls by 40 dB and more, which a linear layer cannot follow. A frame is two
    strides long, under a Hann window; its second half guesses what follows: nothing waits."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.bins = stride + 1
        self.history, self.width = 1, 2 * stride
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
        window = (math.pi / (2 * stride) * (samples + 0.5)).sin().square()  # Hann between samples
        self.synthesis = nn.Parameter(waves * window / (2 * stride) ** 0.5)

    def fold(self, x: Tensor) -> Tensor:
        """Windowed frames `[B, T, 2 * stride]`."""
        # In fp32: half precision would round a magnitude by as much as 3 %.
        with torch.autocast(x.device.type, enabled=False):
            spectra = self.linear(x.float())
            magnitudes = spectra[..., : self.bins].clamp(max=4.0).exp()
            parts = spectra[..., self.bins :].unflatten(-1, (2, -1)) * magnitudes[..., None, :]
            return parts.flatten(-2) @ self.synthesis

    def compute(self, x: Tensor) -> Tensor:
        stride = self.width // 2
        return x[:, 1:, :stride] + x[:, :-1, stride:]


def build_encoder(config: CodecConfig) -> Fork:
    """Front frames of samples `[B, T / 120, 120]` → semantic and acoustic `[B, F, S + D]`.

    Two branches that share nothing: in one trunk the phone loss, whose gradient is ten times that
    of the balanced reconstruction, left the acoustic levels untaught."""
    c = config

    def mels(width: int) -> list[nn.Module]:
        conv = FrameConv(c.num_mels, width, in_frames=c.hop // LogMel.hop)
        return [LogMel(c.sample_rate, c.num_mels), conv]

    semantic = mels(c.semantic_width)
    semantic.append(StreamingTransformer(c.transformer(c.semantic_width, c.semantic_layers)))
    sizes = c.front_dim, c.kernel, c.expansion
    front = [ConvNeXtBlock(*sizes) for _ in range(c.encoder_front_blocks)]
    framed = FrameConv(c.front_stride, c.front_dim)
    down = FrameConv(c.front_dim, c.encoder_dim, in_frames=c.hop // c.front_stride)
    fronts = [CausalChain([framed, *front, down]), CausalChain(mels(c.encoder_dim))]
    both = Fork(fronts, lambda parts: parts[0] + parts[1])
    trunk = StreamingTransformer(c.transformer(c.encoder_dim, c.encoder_layers))
    return Fork([CausalChain(semantic), CausalChain([both, trunk])])


def build_decoder(config: CodecConfig) -> CausalChain:
    """Quantized frames `[B, F, D]` → front frames of samples `[B, F * 4, 120]`."""
    c = config
    sizes = c.decoder_front_dim, c.kernel, c.expansion
    front = [ConvNeXtBlock(*sizes) for _ in range(c.decoder_front_blocks)]
    trunk = StreamingTransformer(c.transformer(c.decoder_dim, c.decoder_layers))
    up = FrameConv(c.decoder_dim, c.decoder_front_dim, out_frames=c.hop // c.front_stride)
    head = SpectralHead(c.decoder_front_dim, c.front_stride)
    return CausalChain([trunk, up, *front, head])


class Codec(nn.Module):
    """Encoder, split quantizer and decoder. `fingerprint` names what its codes mean."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        widths = config.semantic_width, config.encoder_dim
        dims, out = (config.semantic_dim, config.acoustic_dim), config.decoder_dim
        self.quantizer = SplitQuantizer(widths, dims, config.codebook_sizes, config.codebook_decay)
        self.semantic_out, self.acoustic_out = (nn.Linear(dim, out) for dim in dims)
        self.decoder = build_decoder(config)
        self._stored_fingerprint: str | None = None
        self.decoder_kind = "general"

    @classmethod
    def from_checkpoint(cls, path: str | Path, device="cpu", decoder="general") -> "Codec":
        """A run's, a step's or a shipped folder in float32, for inference; UserError for others.
        `decoder`: the general one or the agent's; None: the agent's where the folder has it."""
        checkpoint = checkpoints.load_checkpoint(path, with_trainer=False)
        model = cls(checkpoints.config_of(CodecConfig, "codec", checkpoint.config, path))
        tensors, agents = checkpoint.tensors, checkpoint.path / AGENT_DECODER
        model._stored_fingerprint = codec_fingerprint(model.config, tensors)
        if decoder == "agent" or (decoder is None and agents.exists()):
            model.decoder_kind = "agent"
            tensors = {name: t for name, t in tensors.items() if name.startswith(CODES)}
            tensors |= _agent_decoder(agents, model.fingerprint)
        model.load_tensors(tensors, path)
        if torch.device(device).type == "cpu":
            stream_weights(model)
        return model.to(device).eval().requires_grad_(False)

    def load_tensors(self, tensors: dict[str, Tensor], path: str | Path) -> None:
        """Fills the model from stored tensors; EMA statistics may be absent (an export)."""
        checkpoints.fill(self, tensors, path, optional=STATISTICS)

    def export_tensors(self, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """The tensors that ship: in `dtype`, without what only training needs."""
        tensors = self.state_dict().items()
        return {n: t.detach().to("cpu", dtype) for n, t in tensors if not n.endswith(STATISTICS)}

    def export_decoder(self, folder: str | Path) -> Path:
        """Writes the decoder alone, as the agent's, beside the codec in `folder`, whose files stay
        as they are. UserError where that is another codec."""
        shipped, tensors = Codec.from_checkpoint(folder), self.export_tensors()
        own, file = codec_fingerprint(self.config, tensors), Path(folder) / AGENT_DECODER
        if (own, self.config) != (shipped.fingerprint, shipped.config):
            raise UserError(f"{folder}: holds another codec than the one whose codes this decoder "
                            f"was taught; train it with --init_from {folder}")  # fmt: skip
        part = {name: t for name, t in tensors.items() if not name.startswith(CODES)}
        with atomic_write(file) as temporary:
            temporary.write_bytes(save(part, {"format": "pt", "fingerprint": own}))
        return file

    @property
    def fingerprint(self) -> str:  # of the tensors as stored, or as they are
        return self._stored_fingerprint or codec_fingerprint(self.config, self.state_dict())

    def _frames(self, audio: Tensor) -> Tensor:
        """`[B, 1, T]` → front frames `[B, F * 4, 120]`, the last frame filled up with zeros."""
        if audio.dim() != 3 or audio.shape[1] != 1:
            raise ValueError(f"audio must be [B, 1, T], not {list(audio.shape)}")
        audio = F.pad(audio[:, 0], (0, -audio.shape[-1] % self.config.hop))
        return audio.unflatten(1, (-1, self.config.front_stride))

    def _mixed(self, semantic: Tensor, acoustic: Tensor) -> Tensor:  # for the decoder, [B, F, D]
        return self.semantic_out(semantic) + self.acoustic_out(acoustic)

    @torch.no_grad()
    def encode(self, audio: Tensor, num_codebooks: int = 8) -> Tensor:
        """Audio `[B, 1, T]` float32 in [-1, 1] at 24 kHz → codes `[B, K, ceil(T / 480)]` int64."""
        return self.quantizer.encode(self.encoder(self._frames(audio)), num_codebooks)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[B, K, F]`, any K from 1 → audio `[B, 1, F * 480]` float32."""
        return self.decoder(self._mixed(*self.quantizer.lookup(codes))).flatten(1)[:, None]

    def forward_semantic(self, audio: Tensor) -> Quantized:
        """The training pass of codebook 0 alone."""
        return self.quantizer.quantize_semantic(self.encoder[0](self._frames(audio)))

    def forward(self, audio: Tensor, num_codebooks: Tensor) -> tuple[Tensor, Quantized]:
        """The training pass: `[B, 1, T]` (T a multiple of 480) → reconstruction, `Quantized`."""
        info = self.quantizer(self.encoder(self._frames(audio)), num_codebooks)
        return self.decoder(self._mixed(info.semantic, info.acoustic)).flatten(1)[:, None], info

    def init_encoder_state(self, batch_size: int) -> StreamState:
        return self.encoder.init_state(batch_size)

    def init_decoder_state(self, batch_size: int) -> StreamState:
        return self.decoder.init_state(batch_size)

    @torch.no_grad()
    def encode_step(self, audio: Tensor, state: StreamState, num_codebooks=8, active=None):
        """Continues each slot by whole frames of audio `[B, 1, S * 480]` → codes `[B, K, S]`."""
        if audio.shape[-1] % self.config.hop or audio.shape[-1] == 0:
            raise ValueError(f"audio must be whole frames of {self.config.hop} samples")
        hidden = self.encoder.step(self._frames(audio), state, active)
        return self.quantizer.encode(hidden, num_codebooks)

    @torch.no_grad()
    def decode_step(self, codes: Tensor, state: StreamState, active=None) -> Tensor:
        """Continues each slot by codes `[B, K, S]` → audio `[B, 1, S * 480]`."""
        hidden = self._mixed(*self.quantizer.lookup(codes))
        return self.decoder.step(hidden, state, active).flatten(1)[:, None]


class AveragedCodec:
    """An exponential average of a codec's weights over the steps, whose codebooks fit it: they
    average the statistics of the trained ones, not their codes."""

    def __init__(self, model: Codec, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, model: Codec, restarted: list, skip: Tensor | None = None) -> None:
        """After a step; `restarted` is what the quantizer gave. Nothing moves where `skip` is 1."""
        moves = 1 if skip is None else (skip == 0).to(self.steps.dtype)
        self.steps += moves
        # Until it is reached (1 + steps) / (10 + steps): without the random weights of step 0.
        weight = (9 / (10 + self.steps)).clamp(min=1 - self.decay) * moves
        # What is frozen stays bit for bit: a mean loses the sign of a zero, and so the fingerprint.
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        own, theirs = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
        steps = torch._foreach_sub(theirs, own)
        torch._foreach_mul_(steps, weight)
        torch._foreach_add_(own, steps)
        stacks = zip(self.model.quantizer.stacks, model.quantizer.stacks, restarted, strict=False)
        for mine, theirs, mask in stacks:
            if mask is not None:
                mine.follow(theirs, weight, mask)

    def state_dict(self) -> dict:  # the weights are the checkpoint's own
        return {"steps": int(self.steps), "decay": self.decay}

    def load_state_dict(self, state: dict) -> None:
        self.steps.fill_(state["steps"])
        self.decay = state["decay"]


def codec_fingerprint(config: CodecConfig, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over what the codes depend on: encoder and quantizer, not the decoder."""
    fields = dataclasses.asdict(config).items()
    fields = {name: value for name, value in fields if not name.startswith("decoder")}
    names = [name for name in tensors if name.startswith(CODES)]
    parts = {name: tensors[name] for name in names if not name.endswith(STATISTICS)}
    return checkpoints.fingerprint(fields, parts)


def _agent_decoder(file: Path, fingerprint: str) -> dict[str, Tensor]:
    """Its tensors; UserError where there is none, or one for another codec's codes."""
    try:
        with safe_open(file, framework="pt") as opened:  # checks header and length
            taught = str(opened.metadata().get("fingerprint"))
        wrong = f"another codec's, of fingerprint {taught[:16]}, not {fingerprint[:16]}"
    except (OSError, SafetensorError) as error:
        taught, wrong = "", first_line(error)
    if taught != fingerprint:
        raise UserError(f"{file}: no decoder of the agent's for this codec ({wrong}); train one "
            "with train_codec.py --decoder_only, or take --decoder general")  # fmt: skip
    return load_file(file)


@torch.inference_mode()
def silence_codes(codec: Codec, device: torch.device, num_codebooks: int = 8) -> Tensor:
    """The codes `[1, K, F]` of a second of digital silence; the last are what it settles on."""
    second = torch.zeros(1, 1, codec.config.sample_rate, device=device)
    return codec.encode(second, num_codebooks=num_codebooks)
