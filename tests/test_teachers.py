"""Teachers: small random models against transformers' own passes, alignment, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import teachers
from audio import SAMPLE_RATE
from command import UserError
from teachers import Teacher, Units, load_teacher, ssl_loss

CPU = torch.device("cpu")
FRAMES = 30


def save_wavlm(folder: Path, **changes) -> Path:
    """A random WavLM of 3 layers of 32; by default of the kind of `large`."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_dim": (16,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "num_buckets": 32,
        "max_bucket_distance": 80,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
    }
    transformers.WavLMModel(transformers.WavLMConfig(**{**sizes, **changes})).save_pretrained(
        folder
    )
    return folder


def save_whisper(folder: Path, positions: int = 50) -> Path:
    """A random Whisper of 2 layers of 32 that hears `positions` frames at once."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=positions,
        vocab_size=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {"wavlm": save_wavlm(root / "wavlm"), "whisper": save_whisper(root / "whisper")}


@pytest.fixture(scope="module", params=["wavlm", "whisper"])
def teacher(request, folders) -> Teacher:
    return load_teacher(str(folders[request.param]), CPU)


def noise(frames: int = FRAMES, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """`[B, 1, frames * 480]`."""
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(batch, 1, frames * 480, generator=generator)


# --------------------------------------------------------------------------------- features


def test_the_resampler_moves_nothing(teacher):
    """A tone sampled at 24 kHz becomes the same tone sampled at 16 kHz."""
    for hertz in (200.0, 1000.0, 5000.0):
        tones = [torch.sin(2 * math.pi * hertz * torch.arange(r) / r + 0.3) for r in (24000, 16000)]
        heard = teacher.resample(tones[0][None])[0]
        assert heard.shape == tones[1].shape
        assert (heard - tones[1])[100:-100].abs().max() < 0.02


@pytest.mark.parametrize("frames", [1, 7, 30])
def test_features_fit_the_codec_s_frames(teacher, frames):
    for samples in (480 * frames, 480 * frames - 479):
        layers = teacher(torch.zeros(2, 1, samples))
        assert len(layers) == 1 + teacher.model.config.num_hidden_layers
        assert {tuple(layer.shape) for layer in layers} == {(2, frames, 32)}


def test_an_impulse_a_frame_later_moves_the_target_by_one_frame(teacher):
    """In the middle of frame `t` it changes feature `t` most, for every `t`."""
    before = teacher.target(teacher(noise()))
    for frame in range(FRAMES):
        audio = noise()
        audio[0, 0, 480 * frame + 240] += 1.0
        change = (teacher.target(teacher(audio)) - before)[0].norm(dim=-1)
        assert change.argmax() == frame


@pytest.mark.parametrize("kind", ["layer", "group"])
def test_wavlm_is_transformers_own(tmp_path, kind):
    """Normalised as its feature extractor does where it is the large kind; any layer."""
    large = kind == "layer"
    folder = save_wavlm(tmp_path / kind, feat_extract_norm=kind, do_stable_layer_norm=large)
    own = load_teacher(str(folder), CPU)
    audio = noise() + 0.02
    heard = own.resample(audio[:, 0])[0].numpy()
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=large)
    heard = extractor(heard, sampling_rate=16000, return_tensors="np")["input_values"][0]
    heard = torch.from_numpy(np.pad(heard, 40))[None]
    model = transformers.WavLMModel.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(heard, output_hidden_states=True)
    layers = [*out.hidden_states[:-1], out.last_hidden_state]
    for mine, theirs in zip(own(audio), layers, strict=True):
        centred = theirs - theirs.mean(-1, keepdim=True)
        expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(mine, expected, atol=2e-4, rtol=1e-3)
    mean = sum(own(audio)) / len(layers)
    torch.testing.assert_close(own.target(own(audio)), mean)


def test_wavlm_unpadded_has_a_frame_less(folders):
    """The trap that the padding is for: 49 features for 50 codec frames."""
    model = transformers.WavLMModel.from_pretrained(folders["wavlm"]).eval()
    assert model(torch.zeros(1, 16000)).last_hidden_state.shape[1] == 49
    own = load_teacher(str(folders["wavlm"]), CPU)
    assert own(torch.zeros(1, 1, 24000))[0].shape[1] == 50


def test_mel_frames_are_whisper_s_half_a_frame_later(folders):
    own = load_teacher(str(folders["whisper"]), CPU)
    audio = own.resample(noise(50)[:, 0])
    audio = audio * torch.linspace(1e-5, 1, 16000)  # quiet enough at first for the floor
    extractor = transformers.WhisperFeatureExtractor(chunk_length=1)
    later = extractor(audio[0, 160:].numpy(), sampling_rate=16000, return_tensors="pt")
    mine, theirs = own.log_mel(audio)[0], later["input_features"][0]
    assert mine.shape == theirs.shape == (80, 100)
    # Not the first and the last two: mirrored there, zeros here.
    torch.testing.assert_close(mine[:, 2:-3], theirs[:, 2:-3], atol=1e-4, rtol=1e-4)


def test_whisper_on_a_whole_window_is_transformers_own(folders):
    own = load_teacher(str(folders["whisper"]), CPU)
    audio = noise(50)
    model = transformers.WhisperModel.from_pretrained(folders["whisper"]).encoder.eval()
    with torch.no_grad():
        out = model(own.log_mel(own.resample(audio[:, 0]))).last_hidden_state
    expected = torch.nn.functional.layer_norm(out, out.shape[-1:])
    torch.testing.assert_close(own.target(own(audio)), expected, atol=1e-5, rtol=1e-5)


def test_whisper_cut_is_the_full_pass_with_the_rest_masked(folders):
    """On 20 of 50 positions, with transformers' own layers; unmasked, the rest is heard too."""
    own = load_teacher(str(folders["whisper"]), CPU)
    audio = noise(20)
    mel = torch.zeros(1, 80, 100)
    mel[:, :, :40] = own.log_mel(own.resample(audio[:, 0]))
    encoder = transformers.WhisperModel.from_pretrained(folders["whisper"]).encoder.eval()
    gelu = torch.nn.functional.gelu
    with torch.no_grad():
        x = gelu(encoder.conv2(gelu(encoder.conv1(mel)))).transpose(1, 2)
        # The convolutions reach beyond the cut: zeros there, as at the end of a full window.
        cut = gelu(encoder.conv2(gelu(encoder.conv1(mel[:, :, :40])))).transpose(1, 2)
        torch.testing.assert_close(x[:, :19], cut[:, :19])
        x[:, :20] = cut
        x = x + encoder.embed_positions.weight
        mask = torch.zeros(1, 1, 50, 50).masked_fill(torch.arange(50) >= 20, -1e9)
        for layer in encoder.layers:
            x = layer(x, mask)
            x = x[0] if isinstance(x, tuple) else x
        full = encoder.layer_norm(x)[:, :20]
        heard_all = encoder(mel).last_hidden_state[:, :20]
    expected = torch.nn.functional.layer_norm(full, full.shape[-1:])
    mine = own.target(own(audio))
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)
    assert (torch.nn.functional.layer_norm(heard_all, (32,)) - mine).abs().max() > 1e-3
    # And back to the longer window again.
    assert own(noise(50))[0].shape[1] == 50
    with pytest.raises(UserError, match="takes 1 s at once"):
        own(noise(51))


# --------------------------------------------------------------------------------- losses


def test_units_are_k_means_of_the_target_and_their_codes_its_components():
    """Against scikit-learn's, from the same start; three blobs, which no frame is between."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    generator = torch.Generator().manual_seed(0)
    blobs = torch.randn(3, 8, generator=generator) * 5
    which = torch.randint(3, (4, 50), generator=generator)
    target = blobs[which] + 0.3 * torch.randn(4, 50, 8, generator=generator)
    units = Units(count=3, width=8)
    units.find(part[None] for part in target)
    start = target.flatten(0, 1)[[0, 99, 199]].numpy()
    known = KMeans(3, init=start, n_init=1, max_iter=10).fit(target.flatten(0, 1).numpy())
    torch.testing.assert_close(units.centres, torch.from_numpy(known.cluster_centers_))
    assert units(target).flatten().tolist() == known.labels_.tolist()
    codes, components = units.codes(2), PCA(2).fit_transform(known.cluster_centers_)
    assert float(codes.norm(dim=1).mean()) == pytest.approx(Units.LENGTH, rel=1e-5)
    distances = torch.cdist(codes, codes) / torch.cdist(*(torch.from_numpy(components),) * 2)
    assert distances[0, 1:].tolist() == pytest.approx([float(distances[1, 2])] * 2, rel=1e-4)
    assert units.codes(5)[:, 3:].abs().max() == 0  # there are but three centres


def test_ssl_loss_sends_a_true_gradient_to_the_waveform(teacher):
    """Against central differences along a random direction; the teacher itself gets none."""
    reference = teacher(noise(8, seed=1))
    assert float(ssl_loss(reference, reference)) == 0
    audio = noise(8).double().float().requires_grad_()
    ssl_loss(teacher(audio), reference).backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    direction = torch.randn(audio.shape, generator=torch.Generator().manual_seed(2))
    double = teacher.double()
    try:
        along = (audio.grad * direction).sum()
        with torch.no_grad():
            plus, minus = (
                ssl_loss(double_pass(double, audio.double() + s * direction.double()), reference)
                for s in (1e-5, -1e-5)
            )
    finally:
        teacher.float()
    assert float(along) == pytest.approx(float(plus - minus) / 2e-5, rel=0.02, abs=1e-4)


def double_pass(teacher: Teacher, audio: torch.Tensor) -> list[torch.Tensor]:
    """The teacher's pass in double precision, where differences are exact enough."""
    heard = teacher.prepare(teacher.resample(audio[:, 0]))
    out = teacher.model(heard, output_hidden_states=True)
    layers = (*out.hidden_states[:-1], out.last_hidden_state)
    return [torch.nn.functional.layer_norm(x, x.shape[-1:]) for x in layers]


def test_a_waveform_learns_from_the_ssl_loss_alone(teacher):
    reference = teacher(noise(8, seed=1))
    audio = torch.nn.Parameter(noise(8))
    optimizer = torch.optim.Adam([audio], 3e-3)
    losses = []
    for _ in range(15):
        loss = ssl_loss(teacher(audio), reference)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


# --------------------------------------------------------------------------------- refusals


def test_names_stand_for_models(monkeypatch):
    asked = []
    monkeypatch.setattr(
        transformers.AutoConfig, "from_pretrained", lambda name: asked.append(name) or 1 / 0
    )
    assert load_teacher("none", torch.device("cuda")) is None
    for name in ("wavlm", "whisper"):
        with pytest.raises(ZeroDivisionError):
            load_teacher(name, CPU)
    assert asked == ["microsoft/wavlm-large", "openai/whisper-large-v3-turbo"]


def refused(name: str | Path) -> str:
    with pytest.raises(UserError) as stop:
        load_teacher(str(name), CPU)
    assert "\n" not in str(stop.value) and len(str(stop.value)) < 400
    return str(stop.value)


def test_a_teacher_that_cannot_be_had_ends_in_one_line(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "--teacher none" in refused("microsoft/wavlm-large-of-nobody")
    assert "no such folder" in refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "not a WavLM or Whisper model" in refused(tmp_path / "empty")
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    assert "a bert model; WavLM or Whisper" in refused(tmp_path / "bert")

    cut = save_wavlm(tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "not a WavLM or Whisper model" in refused(cut)
    weights.unlink()
    assert "not a WavLM or Whisper model" in refused(cut)
    (cut / "config.json").unlink()
    transformers.WavLMConfig(num_hidden_layers=1).save_pretrained(cut)
    torch.save({"masked_spec_embed": torch.zeros(768)}, cut / "pytorch_model.bin")
    assert "no weights for" in refused(cut)

    def gated(name):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    assert "accept its terms at https://huggingface.co/some/one" in refused("some/one")


def test_a_run_keeps_its_teacher(folders):
    own = load_teacher(str(folders["wavlm"]), CPU)
    assert own.name == "wavlm, 3 layers of 32"
    teachers.check_same_teachers("none", [], "run")
    teachers.check_same_teachers(own.name, [own], "run")
    for stored, now in ((own.name, []), ("none", [own]), ("wavlm, 24 layers of 1024", [own])):
        with pytest.raises(UserError, match="give the same --teacher"):
            teachers.check_same_teachers(stored, now, "run")


def test_sample_rates_are_the_codec_s():
    assert SAMPLE_RATE == 24_000 and 480 * teachers.TEACHER_RATE == 320 * SAMPLE_RATE
