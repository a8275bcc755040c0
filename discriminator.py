"""Discriminators that teach the codec to sound natural, and their losses. Training only.

Multi-period: Kong et al. 2020, "HiFi-GAN". Multi-scale complex STFT: Défossez et al. 2022, "High
Fidelity Neural Audio Compression" (EnCodec), section 3.4; the two together as in Kumar et al.
2023, "High-Fidelity Audio Compression with Improved RVQGAN" (DAC). Log-mel: spectrograms as images,
as in Jang et al. 2021, "UnivNet", section 2.2, for where the others are too slow to learn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchaudio.functional import melscale_fbanks


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Periods and sizes in samples; `period_channels` is a width a layer, `mel_bands` by size."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    stft_sizes: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    stft_channels: int = 32
    stft_dilations: tuple[int, ...] = (1, 2, 4)
    mel_sizes: tuple[int, ...] = ()
    mel_bands: tuple[int, ...] = ()
    mel_channels: int = 16
    sample_rate: int = 24_000  # of the bands

    def __post_init__(self) -> None:
        sizes = (*self.stft_sizes, *self.mel_sizes)
        if not (self.periods or sizes) or (self.periods and not self.period_channels):
            raise ValueError("periods or sizes are needed, and period_channels for periods")
        odd = any(n % 4 or n < 16 for n in sizes) or any(n < 1 for n in self.mel_bands)
        if odd or len(self.mel_sizes) != len(self.mel_bands):
            raise ValueError("sizes are multiples of 4 from 16 on, mel_bands as many as mel_sizes")

    @classmethod
    def tiny(cls) -> "DiscriminatorConfig":
        """For two CPU cores: 0.22M parameters, which tell the two apart after a hundred steps. The
        longest window's bands are narrower than a voice's pitch up to 5 kHz."""
        return cls(periods=(), stft_sizes=(), mel_sizes=(2048, 1024, 512), mel_bands=(320, 160, 64),
                   mel_channels=24)  # fmt: skip

    @classmethod
    def small(cls) -> "DiscriminatorConfig":
        """For minutes on a GPU: log-mels as `tiny`, wider, one size more."""
        tiny = cls.tiny()
        sizes, bands = (*tiny.mel_sizes, 256), (*tiny.mel_bands, 40)
        return replace(tiny, mel_sizes=sizes, mel_bands=bands, mel_channels=32)

    @classmethod
    def base(cls) -> "DiscriminatorConfig":
        """HiFi-GAN's and EnCodec's own widths: 42M parameters."""
        return cls()


class SubDiscriminator(nn.Module):
    """Judges one image of the waveform, by `layers` and then `last`."""

    def forward(self, audio: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`[B, 1, T]` → logits `[B, 1, n, m]`, the features of every layer."""
        x, features = self.image(audio), []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.1)
            features.append(x)
        return self.last(x), features


class PeriodDiscriminator(SubDiscriminator):
    """Sees the waveform folded at one period, `[B, 1, T / period, period]`."""

    def __init__(self, period: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        sizes = zip((1, *channels), channels, [3] * (len(channels) - 1) + [1], strict=False)
        layers = (nn.Conv2d(i, o, (5, 1), (s, 1), padding=(2, 0)) for i, o, s in sizes)
        self.layers = nn.ModuleList(map(weight_norm, layers))
        self.last = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def image(self, audio: Tensor) -> Tensor:
        audio = F.pad(audio, (0, -audio.shape[-1] % self.period))
        return audio.unflatten(-1, (-1, self.period))


class STFTDiscriminator(SubDiscriminator):
    """Sees real and imaginary parts of one STFT, hop a quarter of it."""

    def __init__(self, size: int, channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("window", _window(size), persistent=False)
        c, stride = channels, (1, 2)
        layers = [nn.Conv2d(2, c, (3, 9), padding=(1, 4))]
        layers += [nn.Conv2d(c, c, (3, 9), stride, (d, 4), dilation=(d, 1)) for d in dilations]
        layers += [nn.Conv2d(c, c, (3, 3), padding=(1, 1))]
        self.layers = nn.ModuleList(weight_norm(layer) for layer in layers)
        self.last = weight_norm(nn.Conv2d(c, 1, (3, 3), padding=(1, 1)))

    def image(self, audio: Tensor) -> Tensor:
        """`[B, 1, T]` → `[B, 2, frames, bins]` float32, white noise at the noise's own scale."""
        bins = torch.view_as_real(_complex_spectrum(audio, self.window))
        return bins.permute(0, 3, 2, 1).contiguous()


class LogMelDiscriminator(SubDiscriminator):
    """Sees one log-mel spectrogram, hop a quarter of the window: in it the quiet upper bands, which
    a codec smears first, weigh as much as the loud ones."""

    def __init__(self, size: int, bands: int, channels: int, sample_rate: int) -> None:
        super().__init__()
        self.register_buffer("window", _window(size), persistent=False)
        c, top = channels, 11 / 24 * sample_rate
        filters = melscale_fbanks(size // 2 + 1, 40.0, top, bands, sample_rate, norm="slaney")
        self.register_buffer("filters", filters * 1000, persistent=False)
        self.layers = nn.ModuleList([
            nn.Conv2d(1, c, (3, 5), padding=(1, 2)),
            nn.Conv2d(c, 2 * c, (3, 5), (1, 2), padding=(1, 2)),
            nn.Conv2d(2 * c, 2 * c, (3, 5), (2, 2), padding=(1, 2)),
            nn.Conv2d(2 * c, 2 * c, (3, 3), padding=1)])  # fmt: skip
        self.last = nn.Conv2d(2 * c, 1, (3, 3), padding=1)

    def image(self, audio: Tensor) -> Tensor:
        """`[B, 1, T]` → `[B, 1, frames, bands]` float32, about zero mean and unit deviation."""
        bins = _complex_spectrum(audio, self.window)
        with torch.autocast(audio.device.type, enabled=False):
            power = bins.real.square() + bins.imag.square()
            mel = power.transpose(1, 2) @ self.filters.float() + 1e-5
            return ((mel.log() + 4.0) / 4.0)[:, None]


def _window(size: int) -> Tensor:
    window = torch.hann_window(size)
    return window / window.square().sum().sqrt()


def _complex_spectrum(audio: Tensor, window: Tensor) -> Tensor:
    """`[B, 1, T]` → complex64 `[B, bins, frames]`, hop a quarter of the window."""
    # In half precision quiet bins would drown. Zero padding: slices may be shorter than the window.
    with torch.autocast(audio.device.type, enabled=False):
        how = {"window": window.float(), "pad_mode": "constant", "return_complex": True}
        return torch.stft(audio.squeeze(1).float(), len(window), len(window) // 4, **how)


class Discriminator(nn.Module):
    """One sub-discriminator a period, STFT size and log-mel size, in this order."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = c = config
        self.periods = nn.ModuleList(PeriodDiscriminator(p, c.period_channels) for p in c.periods)
        stft = c.stft_channels, c.stft_dilations
        self.stfts = nn.ModuleList(STFTDiscriminator(size, *stft) for size in c.stft_sizes)
        mels, mel = zip(c.mel_sizes, c.mel_bands, strict=True), (c.mel_channels, c.sample_rate)
        self.mels = nn.ModuleList(LogMelDiscriminator(*size, *mel) for size in mels)

    def forward(self, audio: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """`[B, 1, T]` in [-1, 1] → (logits, features), one entry a sub-discriminator."""
        judged = [judge(audio) for judge in (*self.periods, *self.stfts, *self.mels)]
        return tuple(map(list, zip(*judged, strict=True)))


def discriminator_loss(real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> Tensor:
    """Mean over sub-discriminators of max(0, 1 - D(x)) + max(0, 1 + D(y)) (EnCodec eq. 5)."""
    pairs = zip(real_logits, fake_logits, strict=True)
    terms = [F.relu(1 - x.float()).mean() + F.relu(1 + y.float()).mean() for x, y in pairs]
    return torch.stack(terms).mean()


@torch.no_grad()
def verdict(real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> dict[str, Tensor]:
    """Whether the discriminators still tell the two apart: mean logits `disc_real` and
    `disc_fake`, `disc_accuracy` the share of logits on the right side of 0: at 0.5 they have
    collapsed, at 1.0 for long they have won and teach nothing."""
    real = torch.stack([logit.float().mean() for logit in real_logits])
    fake = torch.stack([logit.float().mean() for logit in fake_logits])
    pairs = zip(real_logits, fake_logits, strict=True)
    right = [0.5 * ((r > 0).float().mean() + (f <= 0).float().mean()) for r, f in pairs]
    means = {"disc_real": real.mean(), "disc_fake": fake.mean()}
    right = torch.stack(right)
    return {**means, "disc_accuracy": right.mean(), "disc_accuracy_weakest": right.min()}


def generator_loss(fake_logits: Sequence[Tensor]) -> Tensor:
    """Mean over sub-discriminators of max(0, 1 - D(y)) (EnCodec eq. 3)."""
    return torch.stack([F.relu(1 - y.float()).mean() for y in fake_logits]).mean()


def feature_matching_loss(real_features: list, fake_features: list) -> Tensor:
    """Mean over layers of mean|D(x) - D(y)| / mean|D(x)| (EnCodec eq. 4); D(x) is a target."""
    terms = []
    for real, fake in zip(sum(real_features, []), sum(fake_features, []), strict=True):
        real = real.detach().float()
        scale = real.abs().mean().clamp_min(1e-3)  # digital silence must not divide by zero
        terms.append((real - fake.float()).abs().mean() / scale)
    return torch.stack(terms).mean()
