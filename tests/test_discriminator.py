"""discriminator.py: shapes, gradients, precision, and the losses against formulas by hand."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from discriminator import (
    Discriminator,
    DiscriminatorConfig,
    LogMelDiscriminator,
    STFTDiscriminator,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
    verdict,
)

# Every kind, small.
TINY = DiscriminatorConfig(
    period_channels=(8, 16, 32, 64),
    stft_sizes=(1024, 512, 256),
    stft_channels=8,
    mel_sizes=(512, 256),
    mel_bands=(40, 20),
)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Discriminator(TINY)


def test_sizes(judge):
    assert parameters(judge) < 1_000_000
    tiny = Discriminator(DiscriminatorConfig.tiny())
    assert parameters(tiny) < 240_000 and len(tiny(torch.randn(1, 1, 999))[0]) == 3
    with torch.device("meta"):
        base = Discriminator(DiscriminatorConfig.base())
    assert 35e6 < parameters(base) < 50e6


def test_config_is_stored_and_refuses_nonsense():
    config = DiscriminatorConfig.tiny()
    assert DiscriminatorConfig(**dataclasses.asdict(config)) == config
    bad_fields = [
        {"stft_sizes": (10,)}, {"periods": (), "stft_sizes": ()},
        {"period_channels": ()}, {"mel_sizes": (512,)}, {"mel_sizes": (10,), "mel_bands": (4,)},
    ]  # fmt: skip
    for bad in bad_fields:
        with pytest.raises(ValueError):
            DiscriminatorConfig(**bad)


def contrasts(judge, audio, pitch):
    """By how many dB a sub-discriminator's image shows harmonics above the valleys between them,
    `[5]`: on the average of each kHz."""
    image = judge.image(audio)[0, :, 8:-8].double()
    if isinstance(judge, LogMelDiscriminator):
        decibels = 40 / np.log(10) * image[0].mean(0)
        hertz = torch.linspace(0, 12_000, len(judge.filters))
        places = (judge.filters * hertz[:, None]).sum(0) / judge.filters.sum(0)
    else:
        decibels = 10 * (image.square().sum(0) + 1e-5).log10().mean(0)
        places = torch.linspace(0, 12_000, image.shape[-1])

    def seen(hertz):
        return float(decibels[(places - hertz).abs().argmin()])

    found = {khz: [] for khz in range(5)}
    for k in range(2, int(5000 / pitch)):
        peak, valley = seen(k * pitch), seen((k + 0.5) * pitch)
        found[int(k * pitch / 1000)].append(peak - valley)
    return [np.mean(values) for values in found.values()]


def resolved(config, pitch):
    """(the least of `contrasts` of a voice's harmonics in the image that shows them best, the same
    of noise with the same energy in every band)."""
    rng, t = np.random.default_rng(0), np.arange(48_000) / 24_000
    phases = rng.uniform(0, 2 * np.pi, int(11_000 / pitch))
    voice = sum(np.cos(2 * np.pi * k * pitch * t + p) for k, p in enumerate(phases, start=1))
    noise = rng.standard_normal(len(t))
    noise *= np.sqrt(0.5 * 12_000 / pitch) / noise.std()  # half a square in every `pitch` Hz
    judges = Discriminator(config)
    rows = []
    for judge in (*judges.stfts, *judges.mels):
        sounds = (torch.from_numpy(0.05 * x).float()[None, None] for x in (voice, noise))
        rows.append([contrasts(judge, sound, pitch) for sound in sounds])
    return max((min(of_voice), max(map(abs, of_noise))) for of_voice, of_noise in rows)


@pytest.mark.parametrize("pitch", [100, 130, 170, 210, 250])
@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_some_judge_sees_a_voices_harmonics_up_to_5_khz(preset, pitch):
    """Neighbouring ones apart from the valley between them, where noise has none."""
    config = getattr(DiscriminatorConfig, preset)()
    config = dataclasses.replace(config, periods=(), stft_channels=2, mel_channels=2)
    voice, noise = resolved(config, pitch)
    assert voice - noise > 6 and noise < 3, (voice, noise)


def test_bands_wider_than_the_pitch_do_not_see_them():
    """What the codec that shipped first was taught against: it lost them from 1.5 kHz on."""
    wide = DiscriminatorConfig(
        periods=(), stft_sizes=(), mel_sizes=(2048, 1024, 512, 256), mel_bands=(128, 80, 64, 40)
    )
    assert all(resolved(wide, pitch)[0] < 3 for pitch in (100, 130, 170))


@pytest.mark.parametrize("samples", [24, 480, 4801])
def test_shapes(judge, samples):
    logits, features = judge(torch.randn(2, 1, samples))
    first = len(TINY.periods)
    periods = TINY.periods, logits[:first], features[:first]
    stfts = TINY.stft_sizes, logits[first:-2], features[first:-2]
    for period, logit, layers in zip(*periods, strict=True):
        rows = -(-samples // period)
        for channels, layer in zip(TINY.period_channels[:-1], layers, strict=False):
            rows = (rows - 1) // 3 + 1
            assert layer.shape == (2, channels, rows, period)
        assert layers[-1].shape == (2, TINY.period_channels[-1], rows, period)
        assert logit.shape == (2, 1, rows, period)
    for size, logit, layers in zip(*stfts, strict=True):
        frames = samples // (size // 4) + 1
        bins = size // 2 + 1
        assert layers[0].shape == (2, TINY.stft_channels, frames, bins)
        for _ in TINY.stft_dilations:
            bins = (bins + 1) // 2
        assert len(layers) == len(TINY.stft_dilations) + 2
        assert logit.shape == (2, 1, frames, bins)


def test_all_together_one_entry_each(judge):
    logits, features = judge(torch.randn(1, 1, 1000))
    entries = len(TINY.periods) + len(TINY.stft_sizes) + len(TINY.mel_sizes)
    assert len(logits) == len(features) == entries
    assert all(torch.isfinite(logit).all() for logit in logits)


def test_spectrum_against_numpy():
    judge = STFTDiscriminator(64, 4, (1,))
    audio = torch.randn(1, 1, 200)
    spectrum = judge.image(audio)
    padded = np.pad(audio.numpy().reshape(-1).astype(np.float64), 32)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(64) / 64)
    window /= np.sqrt((window**2).sum())
    for frame in range(spectrum.shape[2]):
        bins = np.fft.rfft(padded[frame * 16 : frame * 16 + 64] * window)
        assert np.allclose(spectrum[0, 0, frame].numpy(), bins.real, atol=1e-5)
        assert np.allclose(spectrum[0, 1, frame].numpy(), bins.imag, atol=1e-5)


def test_log_mels_by_hand():
    """numpy's Fourier transform, and triangles of equal area over HTK's mel scale."""
    judge = LogMelDiscriminator(256, 20, 4, 24_000)
    audio = 0.1 * torch.randn(1, 1, 2000, generator=torch.Generator().manual_seed(0))
    padded = np.pad(audio.numpy().reshape(-1).astype(np.float64), 128)
    window = np.hanning(257)[:-1]
    window /= np.sqrt((window**2).sum())

    def hz(mel):
        return 700 * (10 ** (mel / 2595) - 1)

    low, high = (2595 * np.log10(1 + f / 700) for f in (40, 11_000))
    edges, bins = hz(np.linspace(low, high, 22)), np.linspace(0, 12_000, 129)
    spectrum = judge.image(audio)[0, 0].numpy()
    assert spectrum.shape == (2000 // 64 + 1, 20)
    for frame in range(0, len(spectrum), 5):
        power = np.abs(np.fft.rfft(padded[frame * 64 : frame * 64 + 256] * window)) ** 2
        for band in range(20):
            left, middle, right = edges[band : band + 3]
            rising, falling = (bins - left) / (middle - left), (right - bins) / (right - middle)
            area = 1000 * np.minimum(rising, falling).clip(0) * 2 / (right - left)
            expected = (np.log(power @ area + 1e-5) + 4) / 4
            assert spectrum[frame, band] == pytest.approx(expected, abs=1e-4)


def test_every_sample_and_every_weight_gets_a_gradient(judge):
    audio = torch.randn(2, 1, 2400, requires_grad=True)
    logits, features = judge(audio)
    real_logits, real_features = judge(torch.randn(2, 1, 2400))
    loss = generator_loss(logits) + feature_matching_loss(real_features, features)
    loss.backward()
    assert torch.isfinite(audio.grad).all() and bool((audio.grad != 0).all())
    judge.zero_grad()
    discriminator_loss(real_logits, [logit.detach() * 0.5 for logit in logits]).backward()
    discriminator_loss(*(judge(torch.randn(1, 1, 2400))[0] for _ in range(2))).backward()
    for name, parameter in judge.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
    judge.zero_grad()


def test_stft_and_losses_stay_in_float32_under_autocast(judge):
    audio = torch.randn(1, 1, 1200)
    stft = judge.stfts[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spectrum = stft.image(audio.bfloat16())
        logits, features = judge(audio)
        losses = [
            discriminator_loss(logits, logits),
            generator_loss(logits),
            feature_matching_loss(features, features),
        ]
    assert spectrum.dtype == torch.float32
    assert torch.equal(spectrum, stft.image(audio.bfloat16().float()))
    assert logits[0].dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in losses)


def test_losses_by_hand():
    real = [torch.tensor([[2.0, 0.5]]), torch.tensor([-1.0])]
    fake = [torch.tensor([[-2.0, 0.5]]), torch.tensor([0.0])]
    # hinge: first judge (0 + .5)/2 + (0 + 1.5)/2 = 1, second 2 + 1 = 3
    assert float(discriminator_loss(real, fake)) == pytest.approx(2.0)
    # first judge (3 + .5)/2 = 1.75, second 1
    assert float(generator_loss(fake)) == pytest.approx(1.375)


def test_feature_matching_by_hand_and_its_scale():
    real = [[torch.tensor([1.0, -3.0]), torch.tensor([4.0])], [torch.tensor([10.0])]]
    fake = [[torch.tensor([0.0, -1.0]), torch.tensor([4.0])], [torch.tensor([15.0])]]
    # 1.5 / 2, 0 / 4, 5 / 10
    assert float(feature_matching_loss(real, fake)) == pytest.approx((0.75 + 0 + 0.5) / 3)
    louder = [[[1000 * x for x in layers] for layers in side] for side in (real, fake)]
    assert float(feature_matching_loss(*louder)) == pytest.approx((0.75 + 0 + 0.5) / 3)
    silent = [[torch.zeros(3)]]
    assert float(feature_matching_loss(silent, silent)) == 0.0


def test_real_features_are_targets_only():
    real, fake = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    feature_matching_loss([[real]], [[fake]]).backward()
    assert real.grad is None and fake.grad is not None


def test_the_verdict_shows_a_collapse(judge):
    real, fake = [torch.tensor([2.0, -1.0]), torch.tensor([[4.0]])], [torch.tensor([-3.0, -1.0])]
    fake.append(torch.tensor([[2.0]]))
    seen = {name: float(value) for name, value in verdict(real, fake).items()}
    assert seen == {
        "disc_real": 2.25, "disc_fake": 0.0, "disc_accuracy": 0.625, "disc_accuracy_weakest": 0.5
    }  # fmt: skip
    collapsed = copy.deepcopy(judge)
    for part in collapsed.mels:
        part.last.weight.data.zero_()
    for part in (*collapsed.periods, *collapsed.stfts):
        part.last.parametrizations.weight.original0.data.zero_()  # says its bias, whatever comes
    seen = verdict(collapsed(torch.randn(2, 1, 1200))[0], collapsed(torch.zeros(2, 1, 1200))[0])
    assert seen["disc_accuracy"] == seen["disc_accuracy_weakest"] == 0.5
    assert seen["disc_real"] == pytest.approx(float(seen["disc_fake"]), abs=1e-6)


def test_one_pass_serves_generator_and_discriminator():
    """Gradients of the judges and of the audio, as from a pass each with detached audio."""
    torch.manual_seed(0)
    real = 0.1 * torch.randn(2, 1, 1200)
    fake = 0.1 * torch.randn(2, 1, 1200)
    gradients = []
    for shared in (True, False):
        torch.manual_seed(1)
        judge = Discriminator(TINY)
        weights = list(judge.parameters())
        sound = fake.clone().requires_grad_()
        logits, features = judge(sound)
        real_logits, real_features = judge(real)
        loss = generator_loss(logits) + feature_matching_loss(real_features, features)
        (of_audio,) = torch.autograd.grad(loss, sound, retain_graph=True)
        if not shared:
            logits, real_logits = judge(fake)[0], judge(real)[0]
        discriminator_loss(real_logits, logits).backward(inputs=weights)
        assert sound.grad is None
        gradients.append([of_audio, *(w.grad for w in weights)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_learns_to_tell_noise_from_a_tone():
    torch.manual_seed(0)
    fewer = {"periods": (2, 5), "period_channels": (8, 16), "stft_sizes": (256,)}
    fewer |= {"mel_sizes": (256,), "mel_bands": (20,)}
    judge = Discriminator(dataclasses.replace(TINY, **fewer))
    optimizer = torch.optim.Adam(judge.parameters(), lr=5e-3, betas=(0.8, 0.99))
    time = torch.arange(1200) / 24000
    for _ in range(40):
        pitch = 100 + 300 * torch.rand(4, 1, 1)
        tone = 0.3 * torch.sin(2 * torch.pi * pitch * time)
        loss = discriminator_loss(judge(tone)[0], judge(0.2 * torch.randn(4, 1, 1200))[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5  # 2.0 is chance
