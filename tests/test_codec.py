"""The codec: streaming against offline, causality, layers and losses against independent ones."""

import copy
import dataclasses
import errno
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchaudio
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoints
import training
from codec import (
    AveragedCodec,
    Codec,
    CodecConfig,
    FrameConv,
    LogMel,
    SpectralHead,
    codec_fingerprint,
)
from command import UserError
from losses import MelLoss, SpectralLoss, si_sdr, waveform_loss
from quantizer import CodebookStack

CONTEXT = 6
SMALL = CodecConfig(
    front_dim=16,
    encoder_dim=16,
    encoder_layers=1,
    semantic_width=24,
    decoder_front_dim=24,
    decoder_front_blocks=1,
    decoder_dim=16,
    decoder_layers=2,
    num_heads=2,
    context=CONTEXT,
    semantic_dim=8,
    acoustic_dim=8,
    codebook_sizes=(16,) * 4,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(seed=0, codebooks=4, size=64):
    """From which vectors codes start."""
    return torch.rand(codebooks, size, generator=generator(seed))


def noise(*shape, seed=0, scale=0.3):
    return scale * torch.randn(*shape, generator=generator(seed))


def build(config=SMALL, seed=0):
    """A small codec whose codebooks were started on noise, so that all codes are in use."""
    torch.manual_seed(seed)
    model = Codec(config)
    counts = torch.full((4,), config.num_codebooks)
    _, info = model(noise(4, 1, 48 * 480, seed=seed), counts)
    model.quantizer.update(info, draws(seed, config.num_codebooks))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return build()


# -- streaming ---------------------------------------------------------------------------------


def stream(model, audio, chunk, encoder=None, decoder=None):
    """Codes and audio of whole frames given `chunk` frames at a time."""
    encoder = encoder or model.init_encoder_state(audio.shape[0])
    decoder = decoder or model.init_decoder_state(audio.shape[0])
    codes, out = [], []
    for part in audio.split(chunk * 480, dim=-1):
        codes.append(model.encode_step(part, encoder, 4))
        out.append(model.decode_step(codes[-1], decoder))
    return torch.cat(codes, dim=2), torch.cat(out, dim=2)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 3 * CONTEXT + 1, 40])
def test_streaming_is_the_offline_pass_for_any_chunking(model, chunk):
    audio = noise(2, 1, 40 * 480, seed=1)
    codes = model.encode(audio, 4)
    assert codes.unique().numel() > 8  # codes that never change would prove nothing
    streamed_codes, streamed = stream(model, audio, chunk)
    assert torch.equal(streamed_codes, codes)
    torch.testing.assert_close(streamed, model.decode(codes), atol=1e-4, rtol=0)


def test_streaming_after_a_reset_is_a_fresh_call(model):
    audio = noise(2, 1, 10 * 480, seed=2)
    encoder, decoder = model.init_encoder_state(2), model.init_decoder_state(2)
    stream(model, noise(2, 1, 17 * 480, seed=3), 3, encoder, decoder)
    encoder.reset()
    decoder.reset()
    codes, out = stream(model, audio, 3, encoder, decoder)
    assert torch.equal(codes, model.encode(audio, 4))
    torch.testing.assert_close(out, model.decode(codes), atol=1e-4, rtol=0)


def test_slots_advance_and_restart_on_their_own(model):
    """Three slots: one always active, one now and then, one reset in mid-call."""
    frames = 24
    audio = noise(3, 1, frames * 480, seed=4)
    encoder, decoder = model.init_encoder_state(3), model.init_decoder_state(3)
    reset_at = 9
    active_at = torch.ones(frames, 3, dtype=torch.bool)
    active_at[:, 1] = torch.rand(frames, generator=generator(5)) < 0.5
    codes, out = [], []
    for frame in range(frames):
        if frame == reset_at:
            mask = torch.tensor([False, False, True])
            encoder.reset(mask)
            decoder.reset(mask)
        step = audio[..., frame * 480 : (frame + 1) * 480]
        codes.append(model.encode_step(step, encoder, 4, active_at[frame]))
        out.append(model.decode_step(codes[-1], decoder, active_at[frame]))

    def heard(slot, frames_of_slot):
        sound = torch.cat([audio[slot, :, f * 480 : (f + 1) * 480] for f in frames_of_slot], -1)
        expected = model.encode(sound[None], 4)[0]
        got = torch.stack([codes[f][slot, :, 0] for f in frames_of_slot], dim=1)
        assert torch.equal(got, expected)
        got = torch.cat([out[f][slot] for f in frames_of_slot], dim=-1)
        torch.testing.assert_close(got, model.decode(expected[None])[0], atol=1e-4, rtol=0)

    heard(0, list(range(frames)))
    heard(1, [f for f in range(frames) if active_at[f, 1]])
    heard(2, list(range(reset_at)))
    heard(2, list(range(reset_at, frames)))


def test_steps_take_whole_frames_only(model):
    state = model.init_encoder_state(1)
    for samples in (0, 100, 481):
        with pytest.raises(ValueError, match="whole frames"):
            model.encode_step(torch.zeros(1, 1, samples), state)
    with pytest.raises(ValueError, match=r"\[B, 1, T\]"):
        model.encode(torch.zeros(1, 480))


@pytest.mark.parametrize("samples", [1, 479, 480, 481, 960, 24_000 - 7])
def test_shapes_for_any_length(model, samples):
    frames = math.ceil(samples / 480)
    audio = noise(2, 1, samples)
    for levels in (1, 3, 4):
        codes = model.encode(audio, levels)
        assert codes.shape == (2, levels, frames) and codes.dtype == torch.int64
        assert model.decode(codes).shape == (2, 1, frames * 480)
    assert torch.equal(model.encode(audio, 4)[:, :2], model.encode(audio, 2))


# -- causality ---------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [0, 1, 5, 13])
def test_samples_after_a_frame_change_nothing_up_to_it(model, frame):
    audio = noise(1, 1, 20 * 480, seed=6)
    changed = audio.clone()
    changed[..., (frame + 1) * 480 :] = noise(1, 1, (19 - frame) * 480, seed=7, scale=1.0)
    codes, other = model.encode(audio, 4), model.encode(changed, 4)
    assert torch.equal(codes[..., : frame + 1], other[..., : frame + 1])
    assert not torch.equal(codes, other)
    before = slice(0, (frame + 1) * 480)
    torch.testing.assert_close(
        model.decode(codes)[..., before], model.decode(other)[..., before], atol=1e-6, rtol=0
    )


def test_latency_is_exactly_one_frame(model):
    """A frame's code hears that frame to its last sample, and sounds from its first one on."""
    frame, hop = 7, 480
    audio = noise(1, 1, 12 * hop, seed=8).requires_grad_()
    hidden = model.encoder(model._frames(audio))
    (gradient,) = torch.autograd.grad(hidden[0, frame].square().sum(), audio)
    heard = gradient[0, 0].nonzero().flatten()
    assert int(heard.max()) == (frame + 1) * hop - 1

    inputs = noise(1, 12, SMALL.decoder_dim, seed=9).requires_grad_()
    out = model.decoder(inputs).flatten()
    for sample, reach in ((frame * hop - 1, frame - 1), (frame * hop, frame)):
        (gradient,) = torch.autograd.grad(out[sample], inputs, retain_graph=True)
        used = gradient[0].abs().sum(-1).nonzero().flatten()
        assert int(used.max()) == reach


# -- layers against torch's own ----------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 4])
def test_frame_conv_is_a_strided_convolution(stride):
    torch.manual_seed(0)
    layer = FrameConv(5, 7, in_frames=stride)
    conv = nn.Conv1d(5, 7, 2 * stride, stride)
    conv.weight.data = layer.linear.weight.data.view(7, 2 * stride, 5).transpose(1, 2)
    conv.bias.data = layer.linear.bias.data
    x = torch.randn(2, 6 * stride, 5)
    expected = conv(nn.functional.pad(x.transpose(1, 2), (stride, 0))).transpose(1, 2)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 4])
def test_frame_conv_is_a_trimmed_transposed_convolution(stride):
    torch.manual_seed(0)
    layer = FrameConv(5, 7, out_frames=stride)
    conv = nn.ConvTranspose1d(5, 7, 2 * stride, stride, bias=False)
    previous, current = layer.linear.weight.data.view(stride, 7, 2, 5).unbind(2)
    # [stride, 7, 5] -> [5, 7, stride]: what a frame adds to its own place, then to the next.
    parts = [w.permute(2, 1, 0) for w in (current, previous)]
    conv.weight.data = torch.cat(parts, dim=2).contiguous()
    x = torch.randn(2, 6, 5)
    expected = conv(x.transpose(1, 2))[..., : 6 * stride].transpose(1, 2)
    expected = expected + layer.linear.bias.view(stride, 7).repeat(6, 1)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_log_mel_is_the_short_time_spectrum_of_the_last_20_ms():
    audio = noise(2, 4800)
    layer = LogMel(24_000, 80)
    spectrum = torch.stft(
        nn.functional.pad(audio, (240, 0)), 480, 240, window=torch.hann_window(480), center=False,
        return_complex=True,
    )  # fmt: skip
    scale = torchaudio.transforms.MelScale(80, 24_000, 40.0, 8000.0, 241, norm="slaney")
    mels = scale(spectrum.abs().square()).transpose(1, 2)
    expected = ((1000 * mels + 1e-5).log() + 4) / 4
    torch.testing.assert_close(layer(audio.unflatten(1, (-1, 120))), expected, atol=1e-4, rtol=1e-4)


def test_the_spectral_head_is_an_inverse_stft_whose_frames_start_where_they_are_known():
    torch.manual_seed(0)
    layer = SpectralHead(6, 120)
    x = torch.randn(2, 9, 6)
    spectra = layer.linear(x)
    assert (spectra[..., :121] < 4).all()  # the limit plays no part here
    magnitude, real, imaginary = spectra.split(121, dim=-1)
    spectrum = torch.complex(real, imaginary) * magnitude.exp()
    spectrum.imag[..., [0, -1]] = 0  # a real signal has none there
    window = torch.hann_window(480)[1::2]  # between the samples
    frames = torch.fft.irfft(spectrum, 240) * window * 240**0.5
    expected = torch.zeros(2, 10 * 120)
    for i in range(9):
        expected[:, i * 120 : (i + 2) * 120] += frames[:, i]
    torch.testing.assert_close(layer(x).flatten(1), expected[:, : 9 * 120], atol=1e-5, rtol=1e-4)


def test_the_spectral_head_begins_quiet_and_tilted_like_speech():
    torch.manual_seed(0)
    audio = SpectralHead(256, 120)(torch.randn(4, 400, 256)).flatten(1)
    assert 0.001 < audio.square().mean().sqrt() < 0.01
    low, high = (s.abs().square().mean() for s in torch.fft.rfft(audio).chunk(2, dim=-1))
    assert high < low / 10


def test_the_semantic_branch_alone_is_that_part_of_the_full_pass(model):
    audio = noise(2, 1, 12 * 480)
    _, whole = model(audio, torch.full((2,), 4))
    alone = model.forward_semantic(audio)
    assert torch.equal(alone.codes, whole.codes[:, :1])
    torch.testing.assert_close(alone.semantic, whole.semantic)
    torch.testing.assert_close(alone.residuals[0], whole.residuals[0])


def test_codebooks_that_came_without_statistics_go_on_and_others_start_by_kmeans():
    torch.manual_seed(0)
    quantizer = Codec(SMALL).quantizer
    codes = noise(16, 8)

    def load(*names):
        quantizer.load_state_dict({f"codebooks.{name}": codes for name in names}, strict=False)

    load("0.embedding", "2.embedding")
    assert [stack.started for stack in quantizer.stacks] == [[True], [False, True, False]]
    assert torch.equal(quantizer.stacks[1].embedding_sum[1], codes)
    left, fresh = quantizer.stacks[1].initialise(noise(200, 8), draws(codebooks=3))
    assert fresh.any(1).tolist() == [True, False, True] and quantizer.is_initialised
    state = Codec(SMALL).quantizer.state_dict()  # with statistics of nothing
    quantizer.load_state_dict(state)
    assert not any(any(stack.started) for stack in quantizer.stacks)


# -- quantizer ---------------------------------------------------------------------------------


def move(stack, x, codes, seed=0, used=None, skip=None):
    """One step of a stack of one codebook by the vectors `[N, d]`, each a clip of its own."""
    used = torch.ones(1, len(x), dtype=torch.bool) if used is None else used[None]
    return stack.update(x[None, :, None], codes[None, :, None], used, draws(seed)[:1], skip)[0]


def one_codebook(size, dim, decay=0.9, x=None, seed=0):
    """A stack of a single codebook, started on `x` `[N, dim]`."""
    stack = CodebookStack(1, size, dim, decay)
    if x is not None:
        stack.initialise(x, draws(seed)[:1])
    return stack, stack.books()[0]


def test_nearest_code_is_nearest():
    torch.manual_seed(0)
    _, codebook = one_codebook(16, 4)
    x = torch.randn(3, 50, 4)
    expected = torch.cdist(x, codebook.embedding[None].expand(3, -1, -1)).argmin(-1)
    assert torch.equal(codebook.nearest(x), expected)


def test_kept_norms_follow_the_codes():
    """The nearest code stays the nearest after k-means, an update and a load."""
    x = noise(300, 8, scale=1.0)

    def check(codebook):
        nearest = torch.cdist(x, codebook.embedding.float()).argmin(-1)
        assert torch.equal(codebook.nearest(x), nearest)

    torch.manual_seed(0)
    stack, codebook = one_codebook(16, 8, 0.5, x)
    check(codebook)
    move(stack, x, codebook.nearest(x))
    check(codebook)
    quantizer = Codec(SMALL).quantizer
    quantizer.load_state_dict({"codebooks.2.embedding": 3 * codebook.embedding}, strict=False)
    assert torch.equal(quantizer.codebooks[2].embedding, 3 * codebook.embedding)
    check(quantizer.codebooks[2])


def test_update_is_the_ema_formula():
    """Ten steps against van den Oord et al. 2017, equations 6 to 8, one code at a time."""
    torch.manual_seed(0)
    size, dim, decay = 8, 3, 0.9
    stack, codebook = one_codebook(size, dim, decay, torch.randn(200, dim))
    counts = stack.cluster_size[0].tolist()
    sums = stack.embedding_sum[0].clone()
    for step in range(10):
        x = torch.randn(64, dim)
        codes = torch.arange(64) % size  # every code in use: none restarts
        move(stack, x, codes, step)
        for code in range(size):
            mine = [x[i] for i in range(64) if codes[i] == code]
            counts[code] = decay * counts[code] + (1 - decay) * len(mine)
            sums[code] = decay * sums[code] + (1 - decay) * sum(mine)
            torch.testing.assert_close(
                codebook.embedding[code], sums[code] / counts[code], atol=1e-5, rtol=1e-5
            )
        torch.testing.assert_close(stack.cluster_size[0], torch.tensor(counts), rtol=1e-5, atol=0)


def test_dead_codes_restart_with_fresh_statistics():
    """From clips that use the level alone; where there are none, no code restarts."""
    torch.manual_seed(0)
    stack, codebook = one_codebook(8, 3, 0.5, torch.randn(200, 3))
    sizes, sums = stack.cluster_size[0], stack.embedding_sum[0]
    x = torch.randn(96, 3)
    x[64:] += 50
    used, codes = torch.arange(96) < 64, torch.arange(96) % 7
    for step in range(20):
        if sizes[7] * 0.5 < 0.1 * sizes.mean():
            break
        assert not move(stack, x, codes, step, used).any()
    before = codebook.embedding.clone()
    assert not move(stack, x, codes, 99, used & False).any()
    assert torch.equal(codebook.embedding, before)
    restarted = move(stack, x, codes, 99, used)  # code 7 dies here
    assert restarted.nonzero().flatten().tolist() == [7]
    assert (x[:64] - codebook.embedding[7]).norm(dim=1).min() < 1e-5
    assert sizes[7] > 0.5 * sizes[:7].mean()
    torch.testing.assert_close(sums[7], codebook.embedding[7] * sizes[7])
    assert codebook.embedding[:7].abs().max() < 10  # nor do they pull on those that live


def test_a_stack_moves_as_its_codebooks_would_one_by_one():
    """Against a plain loop over levels and codes, dead ones included; then bit for bit against
    stacks of one."""
    torch.manual_seed(0)
    levels, size, dim, decay = 3, 8, 4, 0.8
    stack = CodebookStack(levels, size, dim, decay)
    singles = [CodebookStack(1, size, dim, decay) for _ in range(levels)]
    left, places = noise(300, dim), draws(0, levels)
    stack.initialise(left, places)
    for k, single in enumerate(singles):
        left, _ = single.initialise(left, places[k : k + 1])
    sizes, sums = list(stack.cluster_size.clone()), list(stack.embedding_sum.clone())
    deaths = 0
    for step in range(25):
        vectors, places = noise(levels, 4, 6, dim, seed=step), draws(step, levels)
        codes = torch.randint(0, size - 1, (levels, 4, 6), generator=generator(step))
        used = torch.arange(levels)[:, None] < torch.tensor([3, 1, 2, 3])
        skip = torch.tensor(float(step == 7))
        restarted = stack.update(vectors, codes, used, places, skip)
        for k in range(levels):
            one = slice(k, k + 1)
            singles[k].update(vectors[one], codes[one], used[one], places[one], skip)
            for name, rows in stack.named_buffers():
                assert torch.equal(getattr(singles[k], name)[0], rows[k]), name
            if skip:
                continue
            mine = vectors[k][used[k]].flatten(0, 1)
            chosen = codes[k][used[k]].flatten()
            for code in range(size):
                own = mine[chosen == code]
                sizes[k][code] = decay * sizes[k][code] + (1 - decay) * len(own)
                sums[k][code] = decay * sums[k][code] + (1 - decay) * own.sum(0)
            mean = sizes[k].mean()
            for code in range(size):
                dead = sizes[k][code] < 0.1 * mean
                deaths += dead
                assert restarted[k, code] == dead
                if dead:
                    sizes[k][code] = mean
                    sums[k][code] = mean * mine[int(places[k, code] * len(mine))]
            codebook = sums[k] / sizes[k][:, None]
            torch.testing.assert_close(stack.embedding[k], codebook, atol=1e-6, rtol=1e-5)
    assert deaths > 1


def test_codebooks_are_stored_one_by_one_whatever_stacks_they_are_in():
    sizes = (16, 16, 16, 8, 8, 4)
    model = build(dataclasses.replace(SMALL, codebook_sizes=sizes))
    assert [s.levels for s in model.quantizer.stacks] == [
        slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 6)
    ]  # fmt: skip
    state = model.state_dict()
    stored = {name: tensor for name, tensor in state.items() if "codebooks" in name}
    assert len(stored) == 6 * 3 and not any("stacks" in name for name in state)
    for k, (size, book) in enumerate(zip(sizes, model.quantizer.codebooks, strict=True)):
        assert torch.equal(stored[f"quantizer.codebooks.{k}.embedding"], book.embedding)
        assert stored[f"quantizer.codebooks.{k}.cluster_size"].shape == (size,)
    twin = Codec(model.config)
    assert not twin.quantizer.is_initialised
    twin.load_state_dict(state)
    assert twin.quantizer.is_initialised
    for mine, theirs in zip(twin.quantizer.buffers(), model.quantizer.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    for names, said in (((), "Missing"), (("quantizer.codebooks.6.embedding",), "Unexpected")):
        broken = {name: t for name, t in state.items() if name != "quantizer.codebooks.4.embedding"}
        broken |= {name: torch.zeros(4, 8) for name in names}
        with pytest.raises(RuntimeError, match=said):
            twin.load_state_dict(broken)
    wrong = {"quantizer.codebooks.5.embedding": torch.zeros(1, 8)}  # would be broadcast
    with pytest.raises(RuntimeError, match=r"codebooks.5.embedding is \[1, 8\], not \[4, 8\]"):
        twin.load_state_dict(wrong, strict=False)


@pytest.mark.parametrize("levels", [9, 65])
def test_commitment_is_summed_over_the_levels_in_use(levels):
    """Each level pulls on the encoder as it would alone, however many others there are."""
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, codebook_sizes=(16,) * levels)
    quantizer = Codec(config).quantizer
    books = enumerate(quantizer.codebooks)
    codes = {f"codebooks.{k}.embedding": 0.3 * book.embedding for k, book in books}
    quantizer.load_state_dict(codes, strict=False)
    hidden = noise(3, 5, SMALL.semantic_width + SMALL.encoder_dim).requires_grad_()
    counts = torch.tensor([levels, 9, 4])
    info = quantizer(hidden, counts)
    (got,) = torch.autograd.grad(info.commitment, hidden, retain_graph=True)
    # Level by level, as the definition has it.
    parts = hidden.split(quantizer.widths, dim=-1)
    semantic, residual = quantizer.semantic_in(parts[0]), quantizer.acoustic_in(parts[1])
    terms = [(semantic - quantizer.codebooks[0].lookup(info.codes[:, 0]).detach()).square().mean()]
    for k in range(1, levels):
        residual = residual - quantizer.codebooks[k].lookup(info.codes[:, k])
        errors = residual.square().mean((1, 2)) * (counts > k)
        terms.append(errors.mean())
    (expected,) = torch.autograd.grad(sum(terms), hidden, retain_graph=True)
    torch.testing.assert_close(info.commitment, sum(terms), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-4)
    # The clip that uses 8 acoustic levels is pulled the same whether there are 8 or 64.
    (eight,) = torch.autograd.grad(sum(terms[:9]), hidden)
    torch.testing.assert_close(got[1:], eight[1:], atol=1e-7, rtol=1e-4)
    assert got[0].norm() > 0.999 * eight[0].norm() * (1 if levels == 9 else 2)


def test_a_skipped_step_leaves_codebooks_and_average_bit_for_bit():
    model = build().requires_grad_(True)
    average = AveragedCodec(model, 0.9)
    with torch.no_grad():
        model.semantic_out.weight.add_(1.0)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, average.model)]
    _, info = model(noise(2, 1, 20 * 480, seed=4), torch.full((2,), 4))
    for skip in (torch.tensor(1.0), torch.tensor(0.0)):
        restarted = model.quantizer.update(info, draws(3), skip=skip)
        average.update(model, restarted, skip)
        after = [m.state_dict() for m in (model, average.model)]
        same = [
            all(torch.equal(value, old[name]) for name, value in new.items())
            for new, old in zip(after, before, strict=True)
        ]
        assert same == [bool(skip)] * 2
        assert not (skip and any(codes.any() for codes in restarted))
    assert average.state_dict()["steps"] == 1


def test_codebooks_start_by_kmeans_on_data():
    """Four far clusters are found, and until then training passes vectors as they are."""
    torch.manual_seed(0)
    centres = 20 * torch.eye(4)
    x = centres.repeat(50, 1) + 0.1 * torch.randn(200, 4)
    _, codebook = one_codebook(8, 4, x=x, seed=1)
    assert torch.cdist(x, codebook.embedding).min(dim=1).values.max() < 1.0

    model = Codec(SMALL)
    counts = torch.full((2,), 4)
    _, info = model(noise(2, 1, 20 * 480), counts)
    assert not model.quantizer.is_initialised and float(info.commitment.detach()) == 0
    before = [c.embedding.clone() for c in model.quantizer.codebooks]
    model.quantizer.update(info, draws())
    assert model.quantizer.is_initialised
    for old, codebook in zip(before, model.quantizer.codebooks, strict=True):
        assert not torch.equal(old, codebook.embedding)
    _, info = model(noise(2, 1, 20 * 480), counts)
    assert float(info.commitment.detach()) > 0


def test_codes_given_to_codebook_0_stand_and_teach_its_branch():
    """They are what it encodes to, an update leaves them, and their scores' gradient reaches it."""
    torch.manual_seed(0)
    model, given = Codec(SMALL), torch.randn(SMALL.codebook_sizes[0], SMALL.semantic_dim)
    model.quantizer.set_semantic(given)
    audio, counts = noise(2, 1, 20 * 480), torch.full((2,), 4)
    for info in (model.forward_semantic(audio), model(audio, counts)[1]):
        vectors = info.residuals[0][0]  # what enters codebook 0
        nearest = torch.cdist(vectors, given).argmin(-1)
        assert torch.equal(info.codes[:, 0], nearest)
        assert torch.equal(info.scores.argmax(-1), nearest)
        spread = info.scores - info.scores.logsumexp(-1, keepdim=True)
        (-spread[..., 3].mean()).backward()
        assert model.quantizer.semantic_in.weight.grad.abs().sum() > 0
        model.quantizer.update(info, draws(), freeze_semantic=True)
        assert torch.equal(model.quantizer.codebooks[0].embedding, given)
    again = Codec(SMALL)
    again.load_tensors(model.export_tensors(torch.float32), "memory")
    assert torch.equal(again.encode(audio, 4), model.eval().encode(audio, 4))


def test_each_level_lowers_the_quantization_error(model):
    hidden = model.encoder(model._frames(noise(4, 1, 48 * 480)))
    target = model.quantizer.acoustic_in(hidden[..., -SMALL.encoder_dim :])
    codes = model.quantizer.encode(hidden, 4)
    errors = [
        float((target - model.quantizer.lookup(codes[:, :levels])[1]).square().mean())
        for levels in (1, 2, 3, 4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]


def test_a_sample_is_decoded_from_the_codebooks_it_uses(model):
    audio = noise(4, 1, 10 * 480, seed=3)
    estimate, info = model(audio, torch.tensor([1, 2, 3, 4]))
    codes = model.encode(audio, 4)
    for sample, levels in enumerate((1, 2, 3, 4)):
        assert torch.equal(info.codes[sample, :levels], codes[sample, :levels])
        expected = model.decode(model.encode(audio[sample : sample + 1], levels))
        torch.testing.assert_close(estimate[sample : sample + 1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("jumps", [False, True])
@torch.no_grad()
def test_averaged_codebooks_fit_the_averaged_encoder(jumps):
    """An encoder that drifts and trembles: its average is quantized no worse than it is itself.

    With the trained codebooks in the place of its own, which are where the encoder is by now, it
    would be. `jumps`: a code of every acoustic level dies, and restarts elsewhere, every ten steps.
    """
    torch.manual_seed(0)
    model = build(dataclasses.replace(SMALL, codebook_decay=0.8)).requires_grad_(True)
    # Log-mels of noise have a mean, which a drift moves far from codes that follow it: not here.
    model.encoder[1][0][1][1].linear.weight.zero_()
    average = AveragedCodec(model, 0.97)
    start = {k: v.clone() for k, v in model.quantizer.acoustic_in.state_dict().items()}
    drift = torch.randn_like(start["weight"])
    for step in range(150):
        trembling = 0.02 * torch.randn_like(drift)
        model.quantizer.acoustic_in.weight.copy_(start["weight"] + step / 30 * drift + trembling)
        _, info = model(noise(6, 1, 24 * 480, seed=step), torch.full((6,), 4))
        if jumps and step % 10 == 0:
            model.quantizer.stacks[1].cluster_size[:, 0] = 0  # nothing came near it for long
        average.update(model, model.quantizer.update(info, draws(step)))

    def error(encoder, books):
        hidden = encoder.encoder(encoder._frames(noise(8, 1, 24 * 480, seed=999)))
        target = encoder.quantizer.acoustic_in(hidden[..., -SMALL.encoder_dim :])
        left = target
        for book in books.quantizer.codebooks[1:]:
            left = left - book.lookup(book.nearest(left))
        return float(left.square().mean() / target.var(dim=(0, 1)).mean())

    own, raw = error(average.model, average.model), error(model, model)
    assert own < 1.05 * raw < 0.9, (own, raw)
    assert error(average.model, model) > 1.03 * own


def test_an_average_leaves_frozen_weights_bit_for_bit():
    model = build().requires_grad_(True)
    model.encoder.requires_grad_(False)
    weight = next(model.encoder.parameters())
    weight.view(-1)[0] = -0.0
    average = AveragedCodec(model, 0.9)
    average.update(model, [])
    kept = next(average.model.encoder.parameters())
    assert torch.equal(kept.view(torch.int32), weight.view(torch.int32))


@torch.no_grad()
def test_an_average_is_its_formula_and_takes_restarted_codes_over():
    torch.manual_seed(0)
    model = build().requires_grad_(True)
    average = AveragedCodec(model, 0.9)
    weight, stack = model.semantic_out.weight, model.quantizer.stacks[1]
    expected, sums = weight.clone(), stack.embedding_sum[0].clone()
    sizes = stack.cluster_size[0].clone()
    for step in range(1, 40):
        weight.add_(0.1 * torch.randn_like(weight))
        stack.embedding_sum.add_(torch.randn_like(stack.embedding_sum))
        stack.cluster_size.add_(torch.rand_like(stack.cluster_size))
        stack.embedding.copy_(stack.embedding_sum / stack.cluster_size[..., None])
        masks = torch.stack([torch.arange(16) == (step if k == 1 else -1) for k in range(4)])
        average.update(model, [masks[:1], masks[1:]])
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
        sums = decay * sums + (1 - decay) * stack.embedding_sum[0]
        sizes = decay * sizes + (1 - decay) * stack.cluster_size[0]
        if step < 16:
            sums[step] = stack.embedding_sum[0, step]
            sizes[step] = stack.cluster_size[0, step]
    torch.testing.assert_close(average.model.semantic_out.weight, expected)
    averaged = average.model.quantizer.codebooks[1]
    torch.testing.assert_close(averaged.embedding, sums / sizes[:, None], atol=1e-5, rtol=1e-4)
    x = noise(50, 8)
    assert torch.equal(averaged.nearest(x), torch.cdist(x, averaged.embedding).argmin(-1))


def test_quantizer_statistics_and_losses_stay_in_float32_under_autocast():
    """bf16 is for the layers: codes are the nearest in fp32, losses those of the fp32 signals."""
    model = build()
    audio = noise(2, 1, 12 * 480, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        estimate, info = model(audio, torch.full((2,), 4))
        assert model.semantic_out(info.semantic).dtype == torch.bfloat16  # it is on
        losses = MelLoss()(estimate, audio), waveform_loss(estimate, audio)
        model.quantizer.update(info, draws())
    assert all(r.dtype == torch.float32 for r in info.residuals)
    assert info.semantic.dtype == info.acoustic.dtype == info.commitment.dtype == torch.float32
    fresh = build()
    residuals = torch.cat(info.residuals)
    for k, book in enumerate(fresh.quantizer.codebooks):
        nearest = torch.cdist(residuals[k], book.embedding[None]).argmin(-1)
        assert torch.equal(info.codes[:, k], nearest)
    fresh.quantizer.update(info, draws())
    for mine, theirs in zip(fresh.quantizer.buffers(), model.quantizer.buffers(), strict=True):
        assert theirs.dtype == torch.float32 and torch.equal(mine, theirs)
    exact = MelLoss()(estimate.float(), audio), waveform_loss(estimate.float(), audio)
    assert [float(x) for x in losses] == [float(x) for x in exact]


def test_compiled_layers_are_the_eager_ones():
    """As --compile does, through the compiler's tracing and its own backward pass."""
    audio, counts = noise(2, 1, 12 * 480), torch.tensor([2, 4])
    results = []
    config = dataclasses.replace(SMALL, semantic_layers=1, decoder_layers=1)
    for compiled in (False, True):
        model = build(config).requires_grad_(True)
        names = list(model.state_dict())
        if compiled:
            for part in (*model.encoder, model.decoder):
                part.compile(backend="aot_eager")
        estimate, info = model(audio, counts)
        (waveform_loss(estimate, audio) + info.commitment).backward()
        assert list(model.state_dict()) == names
        results.append([estimate, info.codes, *(p.grad for p in model.parameters())])
        streamed, _ = stream(model, audio, 3)
        assert torch.equal(streamed, model.encode(audio, 4))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


# -- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "floor", "scales"),
    [
        (SpectralLoss, 1e-4, {2048: None, 1024: None, 512: None}),
        (MelLoss, 1e-3, {2048: 128, 1024: 96, 512: 64, 256: 32, 128: 16}),
    ],
)
def test_losses_of_spectra_against_torchaudio(kind, floor, scales):
    estimate, target = noise(2, 1, 9600, seed=1), noise(2, 1, 9600, seed=2)
    expected = []
    for window, bands in scales.items():
        sizes = {"n_fft": window, "hop_length": window // 4, "power": 1.0}
        spectrogram = torchaudio.transforms.Spectrogram(**sizes)
        if bands:
            spectrogram = torchaudio.transforms.MelSpectrogram(24_000, n_mels=bands, **sizes)
        scale = torch.hann_window(window).sum()
        a, b = (torch.log10(spectrogram(x[:, 0]) / scale + floor) for x in (estimate, target))
        expected.append((a - b).abs().mean())
    loss = kind()
    torch.testing.assert_close(
        loss(estimate, target), torch.stack(expected).mean(), rtol=1e-3, atol=0
    )
    assert float(loss(target, target)) == 0
    silence = torch.zeros(1, 1, 4800, requires_grad=True)
    loss(silence, target[:1, :, :4800]).backward()
    assert silence.grad.isfinite().all()


def test_single_bins_tell_harmonics_from_noise_in_the_same_bands():
    """A voice at 200 Hz, of which only 3 to 8 kHz are left, beside noise there."""
    hertz = torch.arange(12_001)
    inside = (hertz > 2900) & (hertz < 7900)

    def hiss(seed: int) -> torch.Tensor:
        sound = torch.fft.irfft(torch.fft.rfft(noise(1, 1, 24_000, seed=seed)) * inside)
        return 0.1 * sound / sound.std()

    time = torch.arange(24_000) / 24_000
    voice = sum(torch.sin(2 * math.pi * 200 * k * time + k * k) for k in range(15, 40))
    voice = 0.1 * voice[None, None] / voice.std()
    spectral, mel = (
        float(loss(hiss(3), voice) / loss(hiss(3), hiss(4))) for loss in (SpectralLoss(), MelLoss())
    )
    assert spectral > 2 and spectral > mel


def test_si_sdr_is_its_formula():
    target = noise(3, 1, 4000, seed=1)
    estimate = 0.5 * target + noise(3, 1, 4000, seed=2, scale=0.02) + 0.1
    got = si_sdr(estimate, target)
    for b in range(3):
        s, e = target[b, 0].double(), estimate[b, 0].double()
        s, e = s - s.mean(), e - e.mean()
        projection = (e @ s) / (s @ s) * s
        ratio = projection @ projection / ((e - projection) @ (e - projection))
        assert float(got[b]) == pytest.approx(10 * math.log10(ratio), abs=1e-3)
    torch.testing.assert_close(si_sdr(3 * estimate, target), got, atol=1e-3, rtol=0)
    assert si_sdr(torch.zeros(1, 1, 100), torch.zeros(1, 1, 100)).isfinite().all()


def test_waveform_loss_is_the_relative_error():
    target, estimate = noise(2, 1, 4000, seed=1), noise(2, 1, 4000, seed=2)
    ratios = [
        float((estimate[b] - target[b]).square().sum() / target[b].square().sum()) for b in (0, 1)
    ]
    assert float(waveform_loss(estimate, target)) == pytest.approx(sum(ratios) / 2, rel=1e-4)
    weighted = waveform_loss(estimate, target, torch.tensor([1.0, 3.0]))
    assert float(weighted) == pytest.approx((ratios[0] + 3 * ratios[1]) / 2, rel=1e-4)
    silence = torch.zeros(1, 1, 4000)
    quiet = torch.full((1, 1, 4000), 1e-3)
    assert float(waveform_loss(quiet, silence)) == pytest.approx(1e-6 / 1e-4, rel=1e-3)


# -- checkpoints -------------------------------------------------------------------------------


def test_an_export_comes_back(model, tmp_path):
    folder = checkpoints.save_export(
        tmp_path / "codec", 7, checkpoints.stored_config("codec", SMALL), model.export_tensors()
    )
    loaded = Codec.from_checkpoint(folder)
    assert loaded.config == SMALL and not loaded.training
    for name, tensor in model.state_dict().items():
        if not name.endswith(("cluster_size", "embedding_sum")):
            torch.testing.assert_close(loaded.state_dict()[name], tensor.half().float())
    assert loaded.fingerprint == Codec.from_checkpoint(folder).fingerprint
    assert loaded.fingerprint == codec_fingerprint(SMALL, model.export_tensors())
    audio = noise(1, 1, 4800)
    rounded = build()
    rounded.load_state_dict(model.export_tensors(), strict=False)
    codes = loaded.encode(audio, 4)
    assert torch.equal(codes, rounded.encode(audio, 4))
    # Its weights lie in another order in memory, and are summed in it.
    torch.testing.assert_close(loaded.decode(codes), rounded.decode(codes), atol=1e-6, rtol=1e-5)


def test_fingerprint_names_what_codes_mean(model):
    base = codec_fingerprint(SMALL, model.export_tensors())

    def changed(name):
        tensors = model.export_tensors()
        tensors[name] = tensors[name] + 0.5
        return codec_fingerprint(SMALL, tensors)

    decoder = [n for n in model.export_tensors() if n.startswith(("decoder.", "semantic_out"))]
    assert changed(decoder[0]) == changed(decoder[-1]) == base
    assert changed("quantizer.codebooks.0.embedding") != base
    assert changed("encoder.1.0.0.0.linear.weight") != base
    other = dataclasses.replace(SMALL, decoder_layers=3, decoder_front_dim=32)
    assert codec_fingerprint(other, model.export_tensors()) == base
    other = dataclasses.replace(SMALL, num_mels=40)
    assert codec_fingerprint(other, model.export_tensors()) != base
    other = dataclasses.replace(SMALL, context=9)
    assert codec_fingerprint(other, model.export_tensors()) != base


# -- the agent's decoder -----------------------------------------------------------------------


def export(model, folder):
    made = checkpoints.stored_config("codec", model.config), model.export_tensors()
    return checkpoints.save_export(folder, 7, *made)


@pytest.fixture(scope="module")
def tuned(model):
    """The same codes, another decoder."""
    tuned = copy.deepcopy(model)
    other = build(seed=1)
    for part in ("decoder", "semantic_out", "acoustic_out"):
        getattr(tuned, part).load_state_dict(getattr(other, part).state_dict())
    return tuned


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_agents_decoder_stands_beside_the_general_one(model, tuned, tmp_path):
    """The codec's own files, codes and fingerprint stay; its streaming is its offline pass."""
    folder, audio = export(model, tmp_path / "codec"), noise(2, 1, 40 * 480)
    before, general = bytes_of(folder), Codec.from_checkpoint(folder)
    unchosen = Codec.from_checkpoint(folder, decoder=None)
    assert unchosen.decoder_kind == general.decoder_kind == "general"
    codes = general.encode(audio, 4)
    assert torch.equal(unchosen.decode(codes), general.decode(codes))
    with pytest.raises(UserError) as error:
        Codec.from_checkpoint(folder, decoder="agent")
    assert "agent.safetensors" in one_line(error) and "--decoder_only" in one_line(error)

    file = tuned.export_decoder(folder)
    after = bytes_of(folder)
    assert len(after.pop(file.name)) < 2.2 * sum(p.numel() for p in tuned.parameters())
    assert after == before
    agents = Codec.from_checkpoint(folder, decoder="agent")
    unchosen = Codec.from_checkpoint(folder, decoder=None)
    assert agents.decoder_kind == unchosen.decoder_kind == "agent"
    again = Codec.from_checkpoint(folder)
    assert again.fingerprint == agents.fingerprint == general.fingerprint
    assert torch.equal(again.decode(codes), general.decode(codes))

    whole = Codec.from_checkpoint(export(tuned, tmp_path / "whole"))  # of which it is a part
    assert torch.equal(agents.encode(audio, 4), codes)
    assert torch.equal(agents.decode(codes), whole.decode(codes))
    assert not torch.allclose(agents.decode(codes), general.decode(codes), atol=1e-3)
    assert torch.equal(unchosen.decode(codes), agents.decode(codes))
    for chunk in (1, 2, 7):
        streamed = stream(agents, audio, chunk)
        assert torch.equal(streamed[0], codes)
        torch.testing.assert_close(streamed[1], agents.decode(codes), atol=1e-5, rtol=1e-4)


def test_a_decoder_of_another_codec_is_refused(model, tuned, tmp_path):
    """Where it is written, though sizes agree, and where it has become another's since."""
    folder, other = export(model, tmp_path / "codec"), export(build(seed=2), tmp_path / "other")
    before = bytes_of(other)
    with pytest.raises(UserError, match=f"--init_from {other}") as error:
        tuned.export_decoder(other)
    assert one_line(error) and bytes_of(other) == before
    wider = build(dataclasses.replace(SMALL, decoder_layers=1))
    wider.load_state_dict(model.state_dict() | wider.state_dict(), strict=False)
    for part in ("encoder", "quantizer"):
        getattr(wider, part).load_state_dict(getattr(model, part).state_dict())
    with pytest.raises(UserError, match="another codec"):
        wider.export_decoder(folder)
    with pytest.raises(UserError, match="no such checkpoint folder"):
        tuned.export_decoder(tmp_path / "nowhere")

    file = tuned.export_decoder(folder)
    (other / file.name).write_bytes(file.read_bytes())
    for decoder in ("agent", None):
        with pytest.raises(UserError) as error:
            Codec.from_checkpoint(other, decoder=decoder)
        assert str(other / file.name) in one_line(error)
        assert f"{Codec.from_checkpoint(folder).fingerprint[:16]}, not" in str(error.value)
    assert Codec.from_checkpoint(other).decoder_kind == "general"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError) as error:
        Codec.from_checkpoint(folder, decoder="agent")
    assert str(file) in one_line(error)
    fewer = load_file(other / file.name)
    del fewer["acoustic_out.bias"]
    save_file(fewer, file, {"fingerprint": Codec.from_checkpoint(folder).fingerprint})
    with pytest.raises(UserError, match=r"acoustic_out\.bias"):
        Codec.from_checkpoint(folder, decoder="agent")


KILLED = """
import os, sys
import command, codec
model = codec.Codec.from_checkpoint(sys.argv[2])
command.sync_to_disk = lambda *_: os.kill(os.getpid(), 9)
model.export_decoder(sys.argv[1])
"""


def test_a_kill_or_a_full_disk_leaves_the_old_decoder(model, tuned, tmp_path, monkeypatch):
    folder = export(model, tmp_path / "codec")
    file = model.export_decoder(folder)  # its own decoder, as an earlier one
    before, whole = file.read_bytes(), export(tuned, tmp_path / "whole")
    root = Path(__file__).resolve().parent.parent
    run = [sys.executable, "-c", KILLED, str(folder), str(whole)]
    assert subprocess.run(run, cwd=root, timeout=300).returncode == -signal.SIGKILL
    assert file.read_bytes() == before
    assert Codec.from_checkpoint(folder, decoder="agent").decoder_kind == "agent"

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            tuned.export_decoder(folder)
    assert file.read_bytes() == before
    tuned.export_decoder(folder)
    assert file.read_bytes() != before


# -- what is refused ---------------------------------------------------------------------------


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) > 20
    return str(error.value)


def test_wrong_checkpoints_are_refused_in_one_line(model, tmp_path):
    def save(name, config, tensors=None):
        tensors = model.export_tensors() if tensors is None else tensors
        return checkpoints.save_export(tmp_path / name, 1, config, tensors)

    stored = checkpoints.stored_config("codec", SMALL)
    with pytest.raises(UserError) as error:
        Codec.from_checkpoint(save("s2s", {**stored, "model": "s2s"}))
    assert "not a codec" in one_line(error)

    with pytest.raises(UserError) as error:
        Codec.from_checkpoint(save("unknown", {**stored, "colour": 3}))
    assert "colour" in one_line(error)

    cut = save("cut", stored) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(UserError) as error:
        Codec.from_checkpoint(cut.parent)
    assert "cut" in one_line(error)

    fewer = model.export_tensors()
    del fewer["encoder.1.0.0.0.linear.weight"]
    with pytest.raises(UserError) as error:
        Codec.from_checkpoint(save("fewer", stored, fewer))
    assert "encoder.1.0.0.0.linear.weight" in one_line(error)

    wide = {**stored, "encoder_dim": 32}
    with pytest.raises(UserError) as error:
        Codec.from_checkpoint(save("wide", wide))
    one_line(error)

    broken = save("broken", stored)
    (broken / "config.json").write_text(json.dumps({**stored, "hop": 481}))
    with pytest.raises((UserError, ValueError)):
        Codec.from_checkpoint(broken)

    with pytest.raises(UserError) as error:
        Codec.from_checkpoint(tmp_path / "nothing")
    one_line(error)


def test_a_config_that_cannot_work_is_refused():
    with pytest.raises(ValueError):
        CodecConfig(hop=481)
    with pytest.raises(ValueError):
        CodecConfig(codebook_sizes=(1024,))
    assert CodecConfig.tiny().frame_rate == 50.0


def test_base_is_built_and_takes_two_steps():
    """The full size: its parts, and every parameter learns, on 0.1 s of audio."""
    config = CodecConfig.base()
    assert (config.encoder_layers, config.decoder_layers, config.context) == (6, 8, 100)
    assert config.encoder_dim == config.decoder_dim == config.semantic_width == 512
    assert config.num_codebooks == 64 and config.sample_rate / config.front_stride == 200
    torch.manual_seed(0)
    base = Codec(config)
    assert 60e6 < sum(p.numel() for p in base.parameters()) < 70e6
    audio = noise(1, 1, 5 * 480)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    estimate = train(base, audio, 2, rate=1e-4)
    assert estimate.shape == audio.shape and estimate.isfinite().all()
    still = [name for name, p in base.named_parameters() if torch.equal(p, before[name])]
    assert not still and base.quantizer.is_initialised


# -- training ----------------------------------------------------------------------------------


def train(model, audio, steps, rate=3e-3):
    """Plain training steps, as train_codec.py takes them, without balancer or GAN."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.8, 0.99))
    mel = MelLoss()
    counts = torch.full((len(audio),), model.config.num_codebooks)
    for step in range(steps):
        estimate, info = model(audio, counts)
        loss = mel(estimate, audio) + waveform_loss(estimate, audio) + 0.25 * info.commitment
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = training.all_reduce_mean(parameter.grad)
        optimizer.step()
        places = draws(step, model.config.num_codebooks, max(model.config.codebook_sizes))
        model.quantizer.update(info, places)
    return estimate.detach()


def test_one_batch_is_learnt():
    """The path end to end, codes included, reaches a high SNR on what it has seen."""
    torch.manual_seed(0)
    time = torch.arange(20 * 480) / 24_000
    pitch = torch.tensor([[150.0], [210.0]])
    audio = sum(torch.sin(2 * math.pi * k * pitch * time) / k for k in (1, 2, 3))[:, None] * 0.2
    sizes = {"encoder_dim": 32, "decoder_dim": 32, "front_dim": 32}
    model = Codec(dataclasses.replace(SMALL, codebook_sizes=(64,) * 4, **sizes))
    train(model, audio, 400)
    train(model, audio, 150, rate=5e-4)
    decoded = model.eval().decode(model.encode(audio, 4))
    snr = 10 * torch.log10(audio.square().sum() / (decoded - audio).square().sum())
    assert float(snr) > 20, float(snr)


def _worker(rank, world_size, folder):
    """One rank of two: its half of the joint batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world_size)
    try:
        joint = noise(4, 1, 12 * 480, seed=11)
        torch.manual_seed(0)
        model = Codec(SMALL)
        train(model, joint[rank::world_size].clone(), 4)  # as epochs_of_batches deals
        torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_are_one_process_with_the_joint_batch(tmp_path):
    torch.multiprocessing.spawn(_worker, (2, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    model = Codec(SMALL)
    train(model, noise(4, 1, 12 * 480, seed=11), 4)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    for name, tensor in model.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name]), f"ranks differ in {name}"
        torch.testing.assert_close(ranks[0][name], tensor, atol=2e-4, rtol=1e-3, msg=name)
