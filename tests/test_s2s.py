"""The dialogue LM: cached steps against the offline pass, losses and sampling against slow ones."""

import dataclasses
import itertools
import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import checkpoints
import s2s
from command import UserError
from s2s import (
    IGNORE,
    PAD,
    S2S,
    Batch,
    S2SConfig,
    Sampling,
    SlotSampling,
    draw,
    draw_text,
    gumbel_noise,
    token_loss,
    untimed_words_loss,
)

SIZES = (12, 10, 11)
LEVELS = len(SIZES)


def small(**changes) -> S2SConfig:
    fields = {
        "codebook_sizes": SIZES, "codec_fingerprint": "abc", "vocab_size": 20, "dim": 32,
        "num_layers": 2, "num_heads": 2, "context": 5, "depth_dim": 16, "depth_layers": 2,
        "depth_heads": 2, "code_dim": 8, "phones": ("_", "a", "b"),
    }  # fmt: skip
    return S2SConfig(**{**fields, **changes})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build(seed=0, **changes) -> S2S:
    torch.manual_seed(seed)
    model = S2S(small(**changes))
    for head in (model.text_head, *model.heads.values(), *model.depth_heads.tables):
        head.weight.data.mul_(20)  # logits apart, as after training
    return model.eval().requires_grad_(False)


def codes(*shape, seed=0) -> torch.Tensor:
    """Random codes `[*shape, K]`."""
    g = generator(seed)
    return torch.stack([torch.randint(0, n, shape, generator=g) for n in SIZES], dim=-1)


def untimed(*windows, room=1, length=4) -> dict:
    """The fields `untimed_*` of a batch of windows with these turns: (first patch, end, tokens)."""
    first, counts = torch.zeros(2, len(windows), room, dtype=torch.long)
    patches = torch.ones_like(first)
    tokens, labels = torch.zeros(2, len(windows), room, length, dtype=torch.long)
    for b, turns in enumerate(windows):
        for i, (start, end, said) in enumerate(turns):
            first[b, i], patches[b, i], counts[b, i] = start, end - start, len(said)
            tokens[b, i, : len(said)] = torch.tensor(said)
            labels[b, i, : len(said)] = torch.tensor([said.index(token) + 1 for token in said])
    return {
        "untimed_first": first, "untimed_tokens": tokens, "untimed_labels": labels,
        "untimed_patches": patches,
        "untimed_lengths": (tuple(patches.flatten().tolist()), tuple(counts.flatten().tolist())),
    }  # fmt: skip


def make_batch(config, batch=2, patches=9, seed=0) -> Batch:
    g = generator(seed)
    p = config.frames_per_step

    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=g)

    text = integers(config.vocab_size, batch, patches)
    return Batch(
        user_codes=codes(batch, patches, p, seed=seed + 1),
        agent_codes=codes(batch, patches, p, seed=seed + 2),
        agent_past=codes(batch, patches, p, seed=seed + 2),
        text=torch.where(integers(2, batch, patches) > 0, text, PAD),
        agent_emotion=integers(9, batch, patches),
        language=integers(4, batch),
        user_speaking=integers(2, batch, patches),
        depth_patches=torch.arange(patches).expand(batch, -1),
        turn_end=integers(2, batch, patches),
        user_emotion=integers(8, batch, patches),
        language_label=integers(3, batch, patches),
        user_words=integers(config.vocab_size, batch, patches),
        user_phones=integers(3, batch, patches, p),
        **untimed(*[[]] * batch),
    )


def forced_step(model, batch, patch, state, rows=slice(None), active=None):
    """One step whose text and agent patch are those of the batch."""
    user = batch.user_codes[rows, patch].transpose(1, 2)
    return model.step(
        user,
        state,
        active,
        emotion=batch.agent_emotion[rows, patch],
        language=batch.language[rows],
        sampling=Sampling(temperature=0.0, text_temperature=0.0),
        forced=(
            torch.ones(len(user), dtype=torch.bool),
            batch.agent_codes[rows, patch].transpose(1, 2),
            batch.text[rows, patch],
        ),
    )


def recognised(out) -> torch.Tensor:
    """What the heads recognise in a step, `[B, n]`."""
    flags = torch.stack((out.user_speaking, out.turn_end, out.user_words.float()), dim=1)
    return torch.cat((flags, out.user_emotion, out.language, out.user_phones.flatten(1)), dim=1)


def recognised_offline(model, batch) -> torch.Tensor:
    """The same from the offline pass, `[B, P, n]`."""
    logits = model.head_logits(model.hidden(batch))
    flags = torch.cat((logits["user_speaking"], logits["turn_end"]), dim=-1).sigmoid()
    words = logits["user_words"].argmax(-1, keepdim=True).float()
    flags = torch.cat((flags, words), dim=-1)
    emotion, language = logits["user_emotion"].softmax(-1), logits["language"].softmax(-1)
    return torch.cat((flags, emotion, language, logits["user_phones"].flatten(2)), dim=-1)


ORDERS = [(order, p) for order in ("level", "frame") for p in (1, 2, 4)]


# -- steps against the offline pass --------------------------------------------------------------


@pytest.mark.parametrize("order, p", ORDERS)
def test_a_step_is_the_offline_pass(order, p):
    model = build(depth_order=order, frames_per_step=p)
    batch = make_batch(model.config, patches=13)  # more than twice the window
    state = model.init_state(2)
    expected = recognised_offline(model, batch)
    for patch in range(13):
        out = forced_step(model, batch, patch, state)
        torch.testing.assert_close(recognised(out), expected[:, patch], atol=1e-4, rtol=1e-4)
        assert torch.equal(out.text, batch.text[:, patch])
        assert torch.equal(out.agent_codes, batch.agent_codes[:, patch].transpose(1, 2))


@pytest.mark.parametrize("order, p", ORDERS)
def test_greedy_replies_are_the_likeliest_of_the_offline_pass(order, p):
    """A free run at temperature 0: teacher-forced on its own output, it takes every maximum."""
    model = build(depth_order=order, frames_per_step=p)
    batch = make_batch(model.config, patches=7)
    state, greedy = model.init_state(2), Sampling(temperature=0.0, text_temperature=0.0)
    for patch in range(7):
        user = batch.user_codes[:, patch].transpose(1, 2)
        out = model.step(user, state, None, batch.agent_emotion[:, patch], batch.language, greedy)
        batch.agent_codes[:, patch] = batch.agent_past[:, patch] = out.agent_codes.transpose(1, 2)
        batch.text[:, patch] = out.text
    hidden = model.hidden(batch)
    scores = model.text_head(hidden)
    speaks = scores[..., 1:].logsumexp(-1) > scores[..., PAD]  # decided first, and apart
    likeliest = torch.where(speaks, scores[..., 1:].argmax(-1) + 1, PAD)
    assert torch.equal(likeliest, batch.text)
    agent = batch.agent_codes.flatten(0, 1)
    logits = model.depth_logits(hidden.flatten(0, 1), batch.text.flatten(), agent)
    for places, scores in zip(model.schedule, logits, strict=True):
        for (f, k), row in zip(places, scores, strict=True):
            assert torch.equal(row.argmax(-1), agent[:, f, k]), (f, k)
    assert agent.unique(dim=0).shape[0] > 3  # one patch over and over would prove little


@pytest.mark.parametrize("order, p", ORDERS)
def test_depth_steps_see_only_what_was_written_before(order, p):
    model = build(depth_order=order, frames_per_step=p)
    steps = len(model.schedule)
    assert steps == (p + LEVELS - 1 if order == "level" else p * LEVELS)
    assert sorted(place for places in model.schedule for place in places) == [
        (f, k) for f in range(p) for k in range(LEVELS)
    ]
    hidden = torch.randn(3, 32, generator=generator())
    text, agent = torch.tensor([0, 4, 7]), codes(3, p)
    base = model.depth_logits(hidden, text, agent)
    for step, places in enumerate(model.schedule):
        changed = agent.clone()
        for f, k in places:
            changed[:, f, k] = (changed[:, f, k] + 1) % SIZES[k]
        other = model.depth_logits(hidden, text, changed)
        for later in range(steps):
            same = all(
                torch.allclose(a, b, atol=1e-6)
                for a, b in zip(base[later], other[later], strict=True)
            )
            assert same == (later <= step)


def test_the_offline_pass_sees_no_future():
    model = build()
    batch = make_batch(model.config)
    base = model.hidden(batch)
    changed = dataclasses.replace(
        batch, agent_codes=batch.agent_codes.clone(), user_codes=batch.user_codes.clone(),
        text=batch.text.clone(), agent_past=batch.agent_past.clone(),
    )  # fmt: skip
    changed.agent_past[:, 4:] = codes(2, 5, 2, seed=9)
    changed.text[:, 4:] = 3
    changed.user_codes[:, 5:] = codes(2, 4, 2, seed=10)
    other = model.hidden(changed)
    torch.testing.assert_close(other[:, :5], base[:, :5], atol=1e-5, rtol=0)
    assert not torch.allclose(other[:, 5], base[:, 5], atol=1e-3)


def test_text_conditions_the_depth_transformer():
    model = build()
    hidden = torch.randn(1, 32, generator=generator()).expand(2, -1)
    logits = model.depth_logits(hidden, torch.tensor([0, 5]), codes(1, 2).expand(2, -1, -1))
    for scores in logits:
        assert not torch.allclose(scores[0][0], scores[0][1], atol=1e-4)


@pytest.mark.parametrize("who", ["user_codes", "agent_past"])
def test_the_order_of_frames_in_a_patch_is_recognised(who):
    model = build()
    batch = make_batch(model.config)
    swapped = dataclasses.replace(batch, **{who: getattr(batch, who).flip(2)})
    difference = (model.hidden(swapped) - model.hidden(batch)).abs()[:, 1:].amax(-1)
    assert (difference > 1e-3).all()


# -- slots ---------------------------------------------------------------------------------------


def test_slots_are_calls_of_their_own():
    """One slot always on, one that waits now and then, one reset in mid-call."""
    model = build(acoustic_delay=0)
    batch = make_batch(model.config, batch=3, patches=12)
    state, reset_at = model.init_state(3), 5
    active_at = torch.ones(12, 3, dtype=torch.bool)
    active_at[:, 1] = torch.rand(12, generator=generator(2)) < 0.5
    seen = []
    for patch in range(12):
        if patch == reset_at:
            state.reset(torch.tensor([False, False, True]))
        seen.append(recognised(forced_step(model, batch, patch, state, active=active_at[patch])))

    def check(slot, patches):
        names = ("user_codes", "agent_past", "text", "agent_emotion")
        own = {name: getattr(batch, name)[slot : slot + 1, patches] for name in names}
        own = dataclasses.replace(batch, language=batch.language[slot : slot + 1], **own)
        got = torch.stack([seen[patch][slot] for patch in patches])
        torch.testing.assert_close(got, recognised_offline(model, own)[0], atol=1e-4, rtol=1e-4)

    check(0, list(range(12)))
    check(1, [p for p in range(12) if active_at[p, 1]])
    check(2, list(range(reset_at)))
    check(2, list(range(reset_at, 12)))


def snapshot(state):
    names = ("agent", "text", "delayed")
    tensors = [getattr(state, name) for name in names] + [state.temporal.position]
    return [t.clone() for t in tensors]


def test_a_slot_that_is_not_active_keeps_its_state():
    model = build(acoustic_delay=1)
    batch = make_batch(model.config)
    state = model.init_state(2)
    for patch in range(3):
        forced_step(model, batch, patch, state)
    before = snapshot(state)
    forced_step(model, batch, 3, state, active=torch.tensor([True, False]))
    after = snapshot(state)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(before, after, strict=True))
    assert not torch.equal(before[0][0], after[0][0])
    state.reset()
    fresh = snapshot(model.init_state(2))
    assert all(torch.equal(a, b) for a, b in zip(snapshot(state), fresh, strict=True))


def test_only_forced_slots_are_forced():
    model = build()
    batch = make_batch(model.config)
    user, greedy = batch.user_codes[:, 0].transpose(1, 2), Sampling(0.0, 25, 0.0)
    free = model.step(user, model.init_state(2), sampling=greedy)
    given = (free.agent_codes + 1) % min(SIZES)
    out = model.step(
        user,
        model.init_state(2),
        sampling=greedy,
        forced=(torch.tensor([False, True]), given, free.text),
    )
    assert torch.equal(out.agent_codes[0], free.agent_codes[0])
    assert torch.equal(out.agent_codes[1], given[1])


def test_the_timer_is_called_between_the_stages():
    model, calls = build(), []
    user = codes(1, 2).transpose(1, 2)
    out = model.step(user, model.init_state(1), timer=lambda: calls.append(1))
    assert calls == [1]
    assert out.agent_codes.shape == (1, LEVELS, 2) and out.text.shape == (1,)
    assert out.user_emotion.shape == (1, 8) and out.language.shape == (1, 3)
    assert out.user_phones.shape == (1, 2, 3)


# -- sampling ------------------------------------------------------------------------------------


def slot_sampling(*sampling: Sampling) -> SlotSampling:
    """One a slot, of a model with one code a patch; the first is the widest."""
    return SlotSampling(torch.tensor([each.row(0.0) for each in sampling]), sampling[0], 1)


def noises(sampling: Sampling, count: int, seed: int = 4) -> torch.Tensor:
    """The noise of `count` slots, each with a key of its own."""
    keys = torch.randint(2**62, (count,), generator=generator(seed))
    return slot_sampling(*[sampling] * count).noise(keys, torch.zeros_like(keys))


def noise_of(sampling: Sampling, count: int) -> torch.Tensor:
    return noises(sampling, count)[:, 2]


def text_of(logits: torch.Tensor, sampling: Sampling, weight: float = 1.0) -> torch.Tensor:
    return draw_text(logits, noises(sampling, len(logits)), sampling.row(0.0)[-1], weight)


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(50, 30, generator=generator())
    assert torch.equal(draw(logits, noise_of(Sampling(0.0, 20), 50)), logits.argmax(-1))
    assert torch.equal(draw(logits, noise_of(Sampling(1.0, 1), 50)), logits.argmax(-1))


@pytest.mark.parametrize("temperature, top_k", [(1.0, 8), (0.7, 3), (1.5, 50)])
def test_draws_follow_the_softmax(temperature, top_k):
    """Counts of 40,000 draws against softmax over the top k: chi-square within its 99.9 %."""
    logits = 1.5 * torch.randn(8, generator=generator(3))
    count = 40_000
    drawn = draw(logits.expand(count, -1), noise_of(Sampling(temperature, top_k), count))
    expected = logits / temperature
    expected[logits.argsort(descending=True)[top_k:]] = -math.inf
    expected = expected.softmax(-1) * count
    observed = drawn.bincount(minlength=8).float()
    possible = expected > 0
    assert (observed[~possible] == 0).all()
    chi_square = ((observed - expected)[possible].square() / expected[possible]).sum()
    assert chi_square < 24.3  # 99.9 % point at 7 degrees of freedom, the most there are here


def test_text_is_drawn_as_whether_to_speak_then_what_to_say():
    """At temperature 1 the softmax itself; colder, many unlikely replies still outweigh silence."""
    logits, count = 1.5 * torch.randn(6, generator=generator(3)), 40_000
    drawn = text_of(logits.expand(count, -1), Sampling(0, 1, 1.0, 20, 1.0))
    observed = drawn.bincount(minlength=6).float() / count
    assert (observed - logits.softmax(-1)).abs().max() < 0.015
    unsure = torch.cat((torch.tensor([0.3]), torch.full((20,), 0.7 / 20))).log()
    drawn = text_of(unsure.expand(count, -1), Sampling(0, 1, 0.5, 20, 0.5))
    speaks = 0.7**2 / (0.7**2 + 0.3**2)
    assert abs(float((drawn != PAD).float().mean()) - speaks) < 0.015
    assert len(drawn.unique()) == 21


def test_odds_of_speaking_are_the_true_ones():
    """A weight of 10 in the loss teaches odds ten times too high; eagerness adds decibels."""
    torch.manual_seed(0)
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    labels = torch.tensor([[PAD] * 17 + [1, 1, 2]])  # a true chance of .15
    optimizer = torch.optim.Adam([logits], 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        token_loss(logits.expand(1, 20, 3), labels, 10.0).backward()
        optimizer.step()
    learnt = logits.detach()[0]
    assert abs(float(1 - learnt.softmax(-1)[0, PAD]) - 0.64) < 0.01
    many = learnt.expand(40_000, -1)
    odds = 0.15 / 0.85
    cases = (10.0, 0.0, odds), (10.0, 10.0, 10 * odds), (1.0, 0.0, 10 * odds)
    for weight, eagerness, expected in cases:
        sampling = Sampling(text_temperature=1.0, speak_temperature=1.0, eagerness=eagerness)
        drawn = text_of(many, sampling, weight)
        spoken = float((drawn != PAD).float().mean())
        assert abs(spoken - expected / (1 + expected)) < 0.01
        assert abs(float((drawn == 1).sum() / (drawn != PAD).sum()) - 2 / 3) < 0.02


def test_the_coldest_text_still_decides_first_whether_to_speak():
    """Two replies of .3 each against a silence of .4: one of them is said."""
    logits = torch.tensor([[0.4, 0.3, 0.3], [0.6, 0.3, 0.1]]).log()
    drawn = text_of(logits, Sampling(text_temperature=0.0))
    assert drawn[0] != PAD and drawn[1] == PAD
    model = build(text_weight=4.0)
    model.text_head.weight.zero_()
    model.text_head.bias.copy_(torch.tensor([0.0] + [math.log(3.0 / 19)] * 19))  # odds 3 to 1
    user = codes(1, 2).transpose(1, 2)
    for eagerness, speaks in ((0.0, False), (2.0, True)):
        out = model.step(user, model.init_state(1), sampling=Sampling(eagerness=eagerness))
        assert bool(out.text != PAD) == speaks
    # Where none is named, the model's own counts.
    eager = S2S(dataclasses.replace(model.config, eagerness=2.0)).eval()
    eager.load_state_dict(model.state_dict())
    for each, speaks in ((model, False), (eager, True)):
        assert bool(each.step(user, each.init_state(1)).text != PAD) == speaks


def impatient(decibels: float) -> S2S:
    """An LM whose odds of speaking are `decibels`, of a voice that nothing in it hears."""
    model = build()
    for head in (model.text_head, model.heads["user_phones"]):
        head.weight.zero_()
        head.bias.zero_()
    model.text_head.bias[1:] = decibels * math.log(10) / 10 - math.log(19)
    return model


def replies(model: S2S, heard: str, active: str | None = None) -> str:
    """A letter a step, x: something was said. In `heard` x is a phone, in `active` a step taken."""
    state, said = model.init_state(1), ""
    for phone, goes in zip(heard, active or "x" * len(heard), strict=True):
        model.heads["user_phones"].bias.unflatten(0, (2, 3))[:, 1] = 5.0 if phone == "x" else -5.0
        text = model.step(codes(1, 2).transpose(1, 2), state, torch.tensor([goes == "x"])).text
        said += "x" if text[0] != PAD and goes == "x" else "."
    return said


def test_who_has_spoken_is_answered_the_rather_the_longer_they_wait(monkeypatch):
    """Of -18 dB, at 100 dB a second: 4 dB a patch of 40 ms, five patches after a voice of 7."""
    monkeypatch.setattr(s2s, "IMPATIENCE", 100.0)
    likely, never = impatient(-18.0), impatient(-101.0)
    assert replies(likely, 7 * "x" + 9 * ".") == 11 * "." + "x...."
    # A pause starts it anew; a cough and a silence get no reply.
    assert replies(likely, 7 * "x" + "...x" + 5 * ".") == 15 * "." + "x"
    for unheard in (6 * "x" + 60 * ".", 60 * "."):
        assert "x" not in replies(likely, unheard)
    # It ends after a second, and with a reply; the next turn is another one.
    assert replies(impatient(-99.0), 7 * "x" + 60 * ".").find("x") == 7 + 24
    assert "x" not in replies(never, 7 * "x" + 60 * ".")
    assert replies(likely, 2 * (7 * "x" + 7 * ".")) == 2 * (11 * "." + "x..")
    # A call's own time counts alone.
    heard, going = 3 * "x" + ".x" + 3 * "x" + 6 * ".", 3 * "x" + ".x" + 9 * "x"
    assert replies(likely, heard, going) == 12 * "." + "x."
    state = likely.init_state(3)
    state.voiced.fill_(7), state.waited.fill_(3)
    state.reset(torch.tensor([False, True, False]))
    assert state.voiced.tolist() == [7, 0, 7] and state.waited.tolist() == [3, 0, 3]


def test_noise_is_gumbel_and_of_its_key_tick_and_number_alone():
    keys, ticks = torch.arange(64) - 5, torch.arange(64) // 2
    numbers = 1000 * torch.arange(300).view(3, 100)
    noise = gumbel_noise(keys, ticks, numbers)
    assert torch.equal(noise[7:9, 1:], gumbel_noise(keys[7:9], ticks[7:9], numbers[1:]))
    start, line = torch.zeros(1).long(), torch.arange(200_000)[None]
    many = gumbel_noise(start, start, line), gumbel_noise(line[0, :2000], line[0, :2000], numbers)
    for values in (each.flatten().double() for each in many):
        assert values.isfinite().all()
        counts = (-(-values).exp()).exp().histc(50, 0, 1)
        expected = len(values) / 50
        assert float((counts - expected).square().sum() / expected) < 85.4  # 99.9 %, 49 degrees
    # Neighbours in any of the three are strangers: correlations within five deviations.
    first = torch.arange(400)
    ticks = torch.zeros_like(first), torch.ones_like(first)
    block, late = (gumbel_noise(first, tick, first[None])[:, 0] for tick in ticks)
    for one, two in ((block[1:], block[:-1]), (block[:, 1:], block[:, :-1]), (block, late)):
        together = torch.corrcoef(torch.stack((one.flatten(), two.flatten())))[0, 1]
        assert abs(float(together)) < 5 / one.numel() ** 0.5


def test_a_slot_draws_by_its_own_numbers():
    """Beside wider, warmer slots, the same as alone."""
    own, wide = Sampling(0.7, 3, 0.4, 2, 0.3), Sampling(2.0, 8, 2.0, 9, 2.0)
    alone = slot_sampling(own).noise(torch.tensor([77]), torch.tensor([5]))[0]
    keys, ticks = torch.tensor([1, 77, 77]), torch.tensor([0, 5, 5])
    beside = slot_sampling(wide, own, wide).noise(keys, ticks)
    assert torch.equal(alone, beside[1, :, :3])
    assert (alone > -math.inf).sum(1).tolist() == [2, 2, 3]
    assert (beside[1, :, 3:] == -math.inf).all()
    assert (beside[2] > -math.inf).sum(1).tolist() == [2, 9, 8]


def test_seeds_repeat_and_differ():
    model = build()
    user = codes(6, 1, 2, seed=8).transpose(2, 3)

    def run(seed):
        state = model.init_state(1, seed=seed)
        outs = [model.step(patch, state, sampling=Sampling(1.0, 50, 1.0, 50)) for patch in user]
        return torch.stack([out.agent_codes for out in outs])

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_sampling_refuses_what_cannot_be():
    negative = [{f"{name}temperature": -0.1} for name in ("", "text_", "speak_")]
    endless = {"eagerness": math.inf}
    for wrong in (*negative, {"top_k": 0}, {"text_top_k": 0}, endless):
        with pytest.raises(UserError):
            Sampling(**wrong)


# -- words without times ---------------------------------------------------------------------------


def said_by(path: tuple[int, ...]) -> list[int]:
    """What a CTC path says: repeats merged, blanks left out."""
    merged = [token for i, token in enumerate(path) if i == 0 or token != path[i - 1]]
    return [token for token in merged if token != PAD]


def test_words_without_times_are_learnt_by_ctc():
    """Against the sum over every path of three tokens through the turn's patches."""
    logits = torch.randn(2, 7, 3, generator=generator(2), requires_grad=True)
    turns = [(1, 5, [2, 1])], [(2, 6, [1, 1, 2])]  # a repeat needs a blank between
    batch = dataclasses.replace(make_batch(small(), patches=7), **untimed(*turns))
    expected = []
    inside = torch.zeros(2, 7, dtype=torch.bool)
    for b, ((first, last, tokens),) in enumerate(turns):
        inside[b, first:last] = True
        scores = logits[b, first:last].detach().softmax(-1)
        total = sum(
            math.prod(float(scores[t, token]) for t, token in enumerate(path))
            for path in itertools.product(range(3), repeat=last - first)
            if said_by(path) == tokens
        )
        expected.append(-math.log(total) / len(tokens))
    loss = untimed_words_loss(logits, batch)
    assert float(loss.detach()) == pytest.approx(sum(expected) / 2, rel=1e-5)
    loss.backward()
    assert (logits.grad.abs().sum(-1) > 0).equal(inside)


def slow_untimed_loss(logits, windows):
    """Turn by turn, over the whole vocabulary."""
    values = []
    for scores, turns in zip(logits, windows, strict=True):
        for first, last, said in turns:
            spoken = scores[first:last].log_softmax(-1)[:, None]
            lengths = (len(spoken),), (len(said),)
            values.append(torch.nn.functional.ctc_loss(spoken, torch.tensor([said]), *lengths))
    return torch.stack(values).mean()


def test_all_turns_at_once_are_the_slow_loop():
    """Windows of 200 patches with turns of 5 to 40, few tokens, so that many repeat."""
    g = generator(3)
    windows = [
        [(a, b, torch.randint(1, 5, ((b - a) // 2,), generator=g).tolist()) for a, b in spans]
        for spans in ([(3, 40), (60, 65), (70, 110)], [(100, 120)], [])
    ]
    logits = [torch.randn(3, 200, 9, generator=generator(7), requires_grad=True) for _ in range(2)]
    fields = untimed(*windows, room=4, length=20)
    batch = dataclasses.replace(make_batch(small(), 3, 200), **fields)
    losses = untimed_words_loss(logits[0], batch), slow_untimed_loss(logits[1], windows)
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(logits[0].grad, logits[1].grad, atol=1e-6, rtol=1e-4)
    batch = dataclasses.replace(batch, **untimed([], [], []))
    logits[0].grad = None
    loss = untimed_words_loss(logits[0], batch)
    loss.backward()
    assert loss.item() == 0.0 and not logits[0].grad.any()


# -- delay, codes that are not there --------------------------------------------------------------


@pytest.mark.parametrize("delay, p", [(1, 1), (1, 2), (2, 2), (3, 2), (2, 4), (5, 2)])
def test_a_step_undoes_the_delay_of_training(delay, p):
    model = build(acoustic_delay=delay, frames_per_step=p)
    frames = 8 * p
    original = codes(frames, seed=5)
    delayed = original.clone()
    delayed[delay:, 1:] = original[:-delay, 1:]
    delayed[:delay, 1:] = 0
    state, out = model.init_state(1), []
    for patch in delayed.view(8, p, LEVELS):
        step = model.step(
            patch.t()[None],
            state,
            forced=(torch.tensor([True]), patch.t()[None], torch.tensor([PAD])),
        )
        out.append(step.agent_codes[0].t())
    out = torch.cat(out)  # [F, K], `delay` frames late
    assert torch.equal(out[delay:], original[:-delay])
    assert (out >= 0).all()


@pytest.fixture
def tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "hello", "there", "you"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def test_an_agent_without_its_past_codes_goes_by_its_words_alone():
    model = build(hear_self=False)
    batch = make_batch(model.config)
    others = dataclasses.replace(batch, agent_past=(batch.agent_codes + 1) % min(SIZES))
    torch.testing.assert_close(model.hidden(batch), model.hidden(others), atol=0, rtol=0)
    batch.text[:, 0] = 3
    said = model.hidden(batch)
    batch.text[:, 0] = 4
    assert not torch.equal(model.hidden(batch)[:, 1:], said[:, 1:])
    state = model.init_state(2)
    model.step(batch.user_codes[:, 0].transpose(1, 2), state)


def test_an_lm_that_hears_codebook_0_alone_goes_by_nothing_else():
    model = build(user_levels=1)
    batch = make_batch(model.config)
    others = batch.user_codes.clone()
    others[..., 1:] = (others[..., 1:] + 1) % min(SIZES)
    same = model.hidden(dataclasses.replace(batch, user_codes=others))
    torch.testing.assert_close(model.hidden(batch), same, atol=0, rtol=0)
    others[..., 0] = (others[..., 0] + 1) % min(SIZES)
    changed = model.hidden(dataclasses.replace(batch, user_codes=others))
    assert not torch.equal(changed, same)
    model.step(batch.user_codes[:, 0].transpose(1, 2), model.init_state(2))


def test_models_take_codes_that_are_gone():
    model = build()
    batch = make_batch(model.config)
    everything_lost = dataclasses.replace(
        batch, user_codes=torch.full_like(batch.user_codes, IGNORE)
    )
    hidden = model.hidden(everything_lost)
    assert hidden.isfinite().all() and not torch.allclose(hidden, model.hidden(batch), atol=1e-3)


# -- losses --------------------------------------------------------------------------------------

LABELS = (
    "user_speaking", "turn_end", "user_emotion", "language_label", "user_words", "user_phones",
)  # fmt: skip


def nll(logits, label):
    return float(-logits.double().log_softmax(-1)[label])


def mean(values):
    return sum(values) / len(values) if values else 0.0


def test_losses_are_a_slow_loop():
    weight = 4.0
    model = build(text_weight=weight)
    batch = make_batch(model.config, patches=6)
    for name in LABELS:
        getattr(batch, name)[1, 3:] = IGNORE
    batch.agent_codes[0, 0, :, 1:] = IGNORE
    batch.depth_patches = torch.tensor([[0, 2, 3, 4], [0, 1, 4, 5]])
    chosen = torch.zeros(2, 6, dtype=torch.bool).scatter(1, batch.depth_patches, True)
    losses, metrics = model.losses(batch)

    hidden = model.hidden(batch)
    heads, text_logits = model.head_logits(hidden), model.text_head(hidden)
    places = [(b, t) for b in range(2) for t in range(6)]
    tokens = {
        "text": (text_logits, batch.text),
        "user_words": (heads["user_words"], batch.user_words),
    }
    for name, (scores, labels) in tokens.items():
        total = norm = 0.0
        for b, t in places:
            token = int(labels[b, t])
            if token != IGNORE:
                share = 1 / weight if token == PAD else 1.0
                total += share * nll(scores[b, t], token)
                norm += share
        assert float(losses[name]) == pytest.approx(total / norm, rel=1e-4)

    for name in ("user_speaking", "turn_end"):
        values = []
        for b, t in places:
            label = int(getattr(batch, name)[b, t])
            if label != IGNORE:
                p = float(heads[name][b, t, 0].double().sigmoid())
                values.append(-math.log(p if label else 1 - p))
        assert float(losses[name]) == pytest.approx(mean(values), rel=1e-3)

    for name, label in (("user_emotion", "user_emotion"), ("language", "language_label")):
        labels = getattr(batch, label)
        values = [nll(heads[name][b, t], labels[b, t]) for b, t in places if labels[b, t] >= 0]
        assert float(losses[name]) == pytest.approx(mean(values), rel=1e-4)
        right = [
            float(heads[name][b, t].argmax() == labels[b, t])
            for b, t in places
            if labels[b, t] >= 0
        ]
        assert float(metrics[f"{name}_accuracy"]) == pytest.approx(mean(right))
    phones = [
        nll(heads["user_phones"][b, t, f], batch.user_phones[b, t, f])
        for b, t in places
        for f in range(2)
        if batch.user_phones[b, t, f] >= 0
    ]
    assert float(losses["user_phones"]) == pytest.approx(mean(phones), rel=1e-4)

    per_place = {}
    for b, t in places:
        if not chosen[b, t]:
            continue
        patch = batch.agent_codes[b, t][None]
        logits = model.depth_logits(hidden[b, t][None], batch.text[b, t][None], patch)
        for step, scores in zip(model.schedule, logits, strict=True):
            for (f, k), row in zip(step, scores, strict=True):
                values = per_place.setdefault((f, k), [])
                if patch[0, f, k] != IGNORE:
                    values.append(nll(row[0], patch[0, f, k]))
    for name, levels in (("semantic", (0,)), ("acoustic", range(1, LEVELS))):
        expected = mean([mean(v) for (_, k), v in per_place.items() if k in levels])
        assert float(losses[name]) == pytest.approx(expected, rel=1e-4)


def test_unknown_labels_cost_nothing_and_stay_finite():
    torch.manual_seed(0)
    model = S2S(small())
    batch = make_batch(model.config)
    for name in LABELS:
        getattr(batch, name).fill_(IGNORE)
    batch.agent_codes.fill_(IGNORE)
    losses, _ = model.losses(batch)
    for name in (*LABELS[:3], "language", "user_words", "user_phones"):
        assert float(losses[name].detach()) == 0
    for name in ("semantic", "acoustic"):
        assert float(losses[name].detach()) == 0, f"{name} without a code known"
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert "semantic" not in model.losses(batch, speak=False)[0]


def test_a_batch_is_learnt():
    torch.manual_seed(0)
    model = S2S(small())
    batch = make_batch(model.config, patches=6)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    first = None
    for _ in range(60):
        losses, metrics = model.losses(batch)
        first = first or float(sum(losses.values()).detach())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert float(sum(losses.values()).detach()) < 0.2 * first
    assert float(metrics["text_accuracy"]) > 0.95


# -- configs and checkpoints ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"frames_per_step": 3},
        {"depth_order": "both"},
        {"codebook_sizes": (12,)},
        {"acoustic_delay": -1},
        {"text_weight": 0.0},
    ],
)
def test_configs_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError):
        small(**wrong)


def test_code_tables_start_from_the_codec():
    model = build()
    books = [torch.randn(n, 8, generator=generator(i)) for i, n in enumerate(SIZES)]
    model.code_tables.start_from(books)
    for k, book in enumerate(books):
        table = model.code_tables.tables[k].weight
        scaled = (book - book.mean(0)) / book.std()
        torch.testing.assert_close(table[:-1], scaled)
        assert (table[-1] == 0).all()


@pytest.mark.parametrize("width", [5, 12])
def test_code_tables_start_from_vectors_of_another_width(width):
    """Distances stay: narrower vectors all of them, wider ones where they hardly use the rest."""
    model = build()  # tables of width 8
    books = [torch.randn(n, width, generator=generator(i)) for i, n in enumerate(SIZES)]
    for book in books:
        book[:, 8:] *= 1e-3
    model.code_tables.start_from(books)
    for k, book in enumerate(books):
        table = model.code_tables.tables[k].weight
        expected = torch.cdist(book, book) / book.std()
        torch.testing.assert_close(torch.cdist(table[:-1], table[:-1]), expected, atol=0.05, rtol=0)
        assert (table[-1] == 0).all()


def save(model, folder, tokenizer, config=None, tensors=None):
    config = checkpoints.stored_config("s2s", model.config) if config is None else config
    tensors = model.state_dict() if tensors is None else tensors
    return checkpoints.save_export(folder, 3, config, tensors, tokenizer)


def test_a_checkpoint_comes_back(tmp_path, tokenizer):
    model = build(acoustic_delay=1)
    loaded = S2S.from_checkpoint(save(model, tmp_path / "s2s", tokenizer.to_str()))
    assert loaded.config == model.config and not loaded.training
    assert loaded.tokenizer.decode([2, 3]) == "hello there"
    batch = make_batch(model.config)
    assert torch.equal(loaded.hidden(batch), model.hidden(batch))


def test_wrong_checkpoints_are_refused_in_one_line(tmp_path, tokenizer):
    model, text = build(), tokenizer.to_str()
    stored = checkpoints.stored_config("s2s", model.config)
    fewer = model.state_dict()
    fewer.pop("text_head.weight")
    whole = save(model, tmp_path / "cut", text)
    weights = whole / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    cases = [
        (save(model, tmp_path / "codec", text, {**stored, "model": "codec"}), "not a s2s"),
        (save(model, tmp_path / "field", text, {**stored, "colour": 1}), "colour"),
        (save(model, tmp_path / "fewer", text, tensors=fewer), "text_head.weight"),
        (save(model, tmp_path / "wide", text, {**stored, "dim": 64}), "do not fit"),
        (save(model, tmp_path / "mute", None), "tokenizer.json"),
        (whole, "cut"),
        (tmp_path / "nothing", "no such"),
    ]
    for folder, reason in cases:
        with pytest.raises(UserError) as error:
            S2S.from_checkpoint(folder)
        assert reason in str(error.value) and "\n" not in str(error.value)
