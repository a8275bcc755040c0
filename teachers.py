"""What codebook 0 and the output can learn from: a frozen WavLM or Whisper encoder.

Both give 50 features a second of audio at 16 kHz; it is padded so that feature `t` is centred on
frame `t` of the codec, samples [480 t, 480 t + 480) at 24 kHz. Codebook 0 learns their `Units`;
`ssl_loss` compares reconstruction and recording, and its gradient flows through the teacher into
the waveform.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchaudio
from safetensors import SafetensorError
from torch import Tensor, nn

from audio import FRAME_SECONDS, HOP, SAMPLE_RATE
from command import UserError
from quantizer import Codebook, half_norms, k_means

TEACHER_RATE = 16_000
OVERHANG = 40  # to each side of a codec frame of 320 samples: features see 400 (25 ms)
KNOWN = {"wavlm": "microsoft/wavlm-large", "whisper": "openai/whisper-large-v3-turbo"}


class Teacher(nn.Module):
    """A frozen encoder of features `width` wide, differentiable from them back to the audio.

    Each kind has `prepare`, from 16 kHz audio `[B, F * 320]` to the encoder's input for `F`
    features, and `target`, what codebook 0 is taught, `[B, F, width]`, from those of all layers."""

    kind = ""

    def __init__(self, model: nn.Module, source: str) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.source = source
        self.width = model.config.hidden_size
        self.resample = torchaudio.transforms.Resample(SAMPLE_RATE, TEACHER_RATE)

    @property
    def name(self) -> str:
        """Kind and sizes, as `wavlm, 24 layers of 1024`: what a resumed run must find again."""
        return f"{self.kind}, {self.model.config.num_hidden_layers} layers of {self.width}"

    def forward(self, audio: Tensor) -> list[Tensor]:
        """Audio `[B, 1, T]` at 24 kHz → one `[B, ceil(T / 480), width]` fp32 a layer, the first
        what enters it. Each is normalised over its width, because the scale grows from layer to
        layer. bf16 on CUDA and under autocast, but resampling and spectra in fp32."""
        half = audio.is_cuda or torch.is_autocast_enabled(audio.device.type)
        with torch.autocast(audio.device.type, enabled=False):
            padded = F.pad(audio[:, 0].float(), (0, -audio.shape[-1] % HOP))
            inputs = self.prepare(self._at_16_khz(padded))
        with torch.autocast(audio.device.type, torch.bfloat16, enabled=half):
            out = self.model(inputs, output_hidden_states=True)
        layers = (*out.hidden_states[:-1], out.last_hidden_state)
        return [F.layer_norm(layer.float(), layer.shape[-1:]) for layer in layers]

    def _at_16_khz(self, audio: Tensor) -> Tensor:
        """`[B, F * 480]` → `[B, F * 320]`: as `resample`, which reads a length off the device."""
        kernel, width = self.resample.kernel, self.resample.width  # [2, 1, n]: two phases for three
        parts = F.conv1d(F.pad(audio, (width, width + 3))[:, None], kernel, stride=3)
        return parts.transpose(1, 2).flatten(1)[:, : audio.shape[-1] * 2 // 3]


class WavLMTeacher(Teacher):
    """WavLM (Chen et al. 2022); the target is the mean of all layers, as in SpeechTokenizer."""

    kind = "wavlm"

    def prepare(self, audio: Tensor) -> Tensor:
        if self.model.config.feat_extract_norm == "layer":  # large: trained on normalised audio
            deviation = (audio.var(-1, correction=0, keepdim=True) + 1e-7).sqrt()
            audio = (audio - audio.mean(-1, keepdim=True)) / deviation
        return F.pad(audio, (OVERHANG, OVERHANG))

    def target(self, layers: list[Tensor]) -> Tensor:
        return torch.stack(layers).mean(0)


class WhisperTeacher(Teacher):
    """The encoder of Whisper (Radford et al. 2023); the target is its last layer. It was trained on
    windows filled up to 30 s with silence, which all frames attend to. Here its positions are cut
    to the window: features are those of the full pass, the silence masked out."""

    kind = "whisper"

    def __init__(self, model: nn.Module, source: str) -> None:
        super().__init__(model, source)
        bins = 0.0, 8000.0, model.config.num_mel_bins, TEACHER_RATE, "slaney", "slaney"
        filters = torchaudio.functional.melscale_fbanks(201, *bins)
        self.register_buffer("filters", filters)  # [bins, mels]
        self.register_buffer("taper", torch.hann_window(400))
        self.register_buffer("positions", model.embed_positions.weight.detach().clone())

    def prepare(self, audio: Tensor) -> Tensor:
        config, frames = self.model.config, audio.shape[-1] // 320
        if frames > len(self.positions):
            limit, seconds = (n * FRAME_SECONDS for n in (len(self.positions), frames))
            raise UserError(f"{self.source} takes {limit:g} s at once, not {seconds:g}: "
                            "lower --window_seconds")  # fmt: skip
        if config.max_source_positions != frames:
            config.max_source_positions = frames
            self.model.embed_positions = nn.Embedding.from_pretrained(self.positions[:frames])
        return self.log_mel(audio)

    def log_mel(self, audio: Tensor) -> Tensor:
        """`[B, F * 320]` → `[B, mels, 2 F]`, Whisper's own, but mel frame `m` is centred on sample
        160 (m + 1), not 160 m, and so feature `t` on the middle of the codec's frame."""
        padded, taper = F.pad(audio, (OVERHANG, 200)), self.taper
        spectrum = torch.stft(padded, 400, 160, window=taper, center=False, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()  # [B, bins, 2 F]
        log = (self.filters.t() @ power).clamp(min=1e-10).log10()
        return (torch.maximum(log, log.amax((1, 2), keepdim=True) - 8.0) + 4.0) / 4.0

    def target(self, layers: list[Tensor]) -> Tensor:
        return layers[-1]


def load_teacher(name: str, device: torch.device) -> Teacher | None:
    """`none`, `wavlm`, `whisper`, or the folder or Hugging Face id of one; UserError for others."""
    import transformers as hub

    if name == "none":
        return None
    source = KNOWN.get(name, name)
    kinds = {"wavlm": (hub.WavLMModel, WavLMTeacher), "whisper": (hub.WhisperModel, WhisperTeacher)}
    try:
        kind = hub.AutoConfig.from_pretrained(source).model_type
        if kind not in kinds:
            raise UserError(f"--teacher {source}: a {kind} model; WavLM or Whisper is needed")
        model, found = kinds[kind][0].from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        kinds = "WavLM or Whisper"
        raise UserError(why_not("--teacher", source, kinds, error)) from error
    # A mask that only WavLM's own training uses. Anything else missing would be random numbers.
    absent = sorted(set(found["missing_keys"]) - {"masked_spec_embed"})
    if absent:
        raise UserError(f"--teacher {source}: no weights for {absent[0]}; fetch the model again")
    encoder = model.encoder if kind == "whisper" else model
    return kinds[kind][1](encoder.float(), source).to(device)


def why_not(flag: str, source: str, kinds: str, error: Exception) -> str:
    """One line on a model of Hugging Face that a flag names and that cannot be loaded."""
    reason = " ".join(str(error).split())[:150]
    if Path(source).exists():
        return f"{flag} {source}: not a {kinds} model ({reason})"
    advice = "see the network or give a downloaded folder"
    if source.startswith((".", "/", "~")):
        advice = "no such folder"
    elif "gated" in reason:
        advice = f"accept its terms at https://huggingface.co/{source}, then run: hf auth login"
    return f"{flag} {source} cannot be had: {advice}; or {flag} none ({reason})"


def joint_target(found: Sequence[Teacher], heard: Sequence[list[Tensor]]) -> Tensor:
    """All teachers' targets side by side, `[B, F, sum of widths]`."""
    pairs = zip(found, heard, strict=True)
    return torch.cat([teacher.target(layers) for teacher, layers in pairs], dim=-1)


def described(found: Sequence[Teacher]) -> str:
    return " + ".join(teacher.name for teacher in found) or "none"


def check_same_teachers(stored: str, found: Sequence[Teacher], where: str | Path) -> None:
    """Raises UserError where a run would go on with other kinds or sizes than it began with."""
    now = described(found)
    if stored != now:
        remedy = "give the same --teacher, or start in a new --checkpoint_dir with --init_from"
        raise UserError(f"{where}: this run's teacher is {stored}, not {now}: {remedy}")


class Units(nn.Module):
    """What codebook 0 is to tell: which of the clusters of the teachers' targets, side by side, a
    frame falls into, as HuBERT is taught (Hsu et al. 2021, section II-A). Of training alone."""

    LENGTH = 8.0  # mean norm of a unit's code: how sure the logits begin

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(count, width))

    @torch.no_grad()
    def find(self, targets: Iterable[Tensor]) -> None:
        """k-means of some targets `[B, F, width]`."""
        frames = torch.cat([target.flatten(0, 1) for target in targets])
        start = torch.linspace(0, len(frames) - 1, len(self.centres), device=frames.device).long()
        self.centres.copy_(k_means(frames, frames[start]))

    def forward(self, target: Tensor) -> Tensor:
        """`[B, F, width]` → units `[B, F]` int64."""
        return Codebook(self.centres, half_norms(self.centres)).nearest(target)

    def codes(self, dim: int) -> Tensor:
        """A code for each, `[count, dim]`: the centres' principal components."""
        centred = self.centres - self.centres.mean(0)
        axes = torch.linalg.svd(centred, full_matrices=False).Vh[:dim]
        codes = centred @ axes.t()
        codes = codes * (self.LENGTH / codes.norm(dim=1).mean())
        return F.pad(codes, (0, dim - len(axes)))


def ssl_loss(estimate: list[Tensor], reference: list[Tensor]) -> Tensor:
    """Mean L1 distance of two recordings' features, all layers alike (JHCodec, Lee et al. 2026)."""
    return torch.stack([F.l1_loss(x, y) for x, y in zip(estimate, reference, strict=True)]).mean()
