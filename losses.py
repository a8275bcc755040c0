"""What reconstructions are compared by: spectra, waveform, SI-SDR. Audio `[B, 1, T]`, in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks


class SpectralLoss(nn.Module):
    """Multi-scale L1 distance of log magnitudes in fp32, bin by bin (Yamamoto et al. 2020, eq. 5):
    from about 2 kHz on bands of mels are wider than the distance of two harmonics, and cannot tell
    a voice from noise; single bins of long windows can."""

    WINDOWS, FLOOR = (2048, 1024, 512), 1e-4

    def __init__(self) -> None:
        super().__init__()
        for window in self.WINDOWS:
            self.register_buffer(f"window_{window}", torch.hann_window(window), persistent=False)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """Audio `[B, 1, T]` twice → a scalar, the mean over scales."""
        with torch.autocast(estimate.device.type, enabled=False):
            both = torch.cat((estimate.float(), target.float()))[:, 0]
            return torch.stack([self._scale(both, window) for window in self.WINDOWS]).mean()

    def _scale(self, both: Tensor, window: int) -> Tensor:
        taper = getattr(self, f"window_{window}")
        spectrum = torch.stft(both, window, window // 4, window=taper, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        magnitude = (power + 1e-9).sqrt().transpose(1, 2) / taper.sum()  # [2 B, frames, bins]
        estimate, target = torch.log10(self._bands(magnitude, window) + self.FLOOR).chunk(2)
        return F.l1_loss(estimate, target)

    def _bands(self, magnitude: Tensor, window: int) -> Tensor:
        return magnitude


class MelLoss(SpectralLoss):
    """The same over bands of mels, after DAC (Kumar et al. 2023, section 3.4)."""

    WINDOWS, FLOOR = (2048, 1024, 512, 256, 128), 1e-3

    def __init__(self, sample_rate: int = 24_000) -> None:
        super().__init__()
        for window, bands in zip(self.WINDOWS, (128, 96, 64, 32, 16), strict=True):
            filters = melscale_fbanks(window // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate)
            self.register_buffer(f"filters_{window}", filters, persistent=False)

    def _bands(self, magnitude: Tensor, window: int) -> Tensor:
        return (magnitude @ getattr(self, f"filters_{window}")).clamp(min=0)


def waveform_loss(estimate: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """‖x − y‖² / ‖x‖² per sample of `[B, 1, T]`, averaged with `weights` `[B]` (1 by default): it
    makes phase learnable. A floor of −40 dB RMS keeps near-silence from dominating the batch."""
    estimate, target = estimate.float(), target.float()
    energy = target.square().mean((1, 2)).clamp(min=1e-4)
    errors = (estimate - target).square().mean((1, 2)) / energy
    return (errors if weights is None else weights * errors).mean()


def si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019), per clip `[B]`."""
    flat = estimate.flatten(1), target.flatten(1)
    estimate, target = (x - x.mean(1, keepdim=True) for x in flat)
    energy = target.square().sum(1, keepdim=True).clamp(min=1e-8)
    projection = (estimate * target).sum(1, keepdim=True) / energy * target
    noise = (estimate - projection).square().sum(1).clamp(min=1e-8)
    return 10 * torch.log10(projection.square().sum(1).clamp(min=1e-8) / noise)


class PhoneHead(nn.Module):
    """Phones of quantized semantic features `[B, F, d]`, in training: logits `[B, F, num_phones]`.
    Convolutions see 7 frames to each side, for a causal code cannot know a phone that begins."""

    def __init__(self, semantic_dim: int, num_phones: int, width: int = 192) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(semantic_dim, width, 7, padding=3), nn.GELU(),
            nn.Conv1d(width, width, 5, padding=2), nn.GELU(),
            nn.Conv1d(width, num_phones, 5, padding=2))  # fmt: skip

    def forward(self, semantic: Tensor) -> Tensor:
        return self.layers(semantic.transpose(1, 2)).transpose(1, 2)
