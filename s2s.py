"""The dialogue LM: two streams of codec codes (agent, user) and one of text, in full duplex.

After the RQ-Transformer of Moshi (Défossez et al. 2024, section 3.4): a temporal transformer takes
one step a *patch* of `frames_per_step` codec frames; of its state first the text token (the agent's
inner monologue) is sampled, then a small depth transformer writes the agent's codes of the patch.
Heads on the temporal state recognise the user's speech.

Shapes: `B` batch, `P` patches, `p` frames in a patch, `K` codebooks, `F` frames, `D` width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

import checkpoints
import training
from command import EMOTIONS, UserError
from streamed import stream_weights
from transformer import StreamingTransformer, TransformerConfig

PAD = 0  # text id of "no token in this patch"
IGNORE = -100  # a label that is not known, a code that is not there
MAX_TURN_PATCHES = 500  # longer turns without word times are not learnt from
MAX_AGE = 31  # patches since the last token; more are counted as this many
IMPATIENCE = 60.0  # dB a second on the odds of speaking while the user waits for a reply
VOICED_SECONDS, WAIT_SECONDS = 0.25, 1.0  # who has spoken that long, and so long at most
DRAW_STRIDE = 1 << 20  # between the numbers of draws: more than any has candidates
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as int64


@dataclass(frozen=True)
class S2SConfig:
    """Sizes of an `S2S`, and the codec whose codes it speaks; stored in every checkpoint."""

    codebook_sizes: tuple[int, ...] = (1024,) * 8
    codec_fingerprint: str = ""
    frame_rate: float = 50.0
    frames_per_step: int = 2
    depth_order: str = "level"
    acoustic_delay: int = 0  # frames by which the acoustic levels follow the semantic one
    vocab_size: int = 2048
    dim: int = 256
    num_layers: int = 6
    num_heads: int = 4
    context: int = 200  # attention window in patches
    dropout: float = 0.1  # of the temporal transformer, in training
    depth_dim: int = 128
    depth_layers: int = 2
    depth_heads: int = 4
    code_dim: int = 64  # width of the factorised code tables
    text_weight: float = 1.0  # of a token against PAD in the loss, and so in the odds learnt
    eagerness: float = 0.0  # dB on the odds of speaking, where `Sampling` gives none
    hear_self: bool = True  # whether the agent's own last codes are an input, beside its text
    user_levels: int | None = None  # of the user's codes that are an input; None: all
    phones: tuple[str, ...] = ()  # classes of the phone head; phones[0] is silence
    listen_delay: int = 3  # patches by which the heads for phones and words follow the user
    languages: tuple[str, ...] = ("english", "hindi", "telugu")
    emotion_dim: int = 0  # width of the emotion branch; 0: none, emotions by a linear head
    codebook_dim: int = 64  # of the codec's own vectors, which the emotion branch reads
    emotions: tuple[str, ...] = EMOTIONS
    temporal: TransformerConfig | None = None  # of a backbone; None: by the sizes above

    def __post_init__(self) -> None:
        if isinstance(self.temporal, dict):
            object.__setattr__(self, "temporal", TransformerConfig(**self.temporal))
        if self.temporal and self.temporal.dim != self.dim:
            raise ValueError(f"dim {self.dim} is not the backbone's {self.temporal.dim}")
        for name in ("codebook_sizes", "phones", "languages", "emotions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.frames_per_step not in (1, 2, 4) or self.depth_order not in ("level", "frame"):
            raise ValueError("frames_per_step must be 1, 2 or 4, depth_order level or frame")
        if len(self.codebook_sizes) < 2 or self.acoustic_delay < 0:
            raise ValueError("at least two codebooks and a delay of zero or more are needed")
        if not 0 < self.text_weight < math.inf:
            raise ValueError(f"text_weight must be more than 0, not {self.text_weight}")

    @classmethod
    def tiny(cls, **changes) -> S2SConfig:
        """About 8M parameters: one CPU core keeps up with a call."""
        return cls(**changes)

    @classmethod
    def base(cls, **changes) -> S2SConfig:
        """About 350M parameters, for one H200: a context of 30 s, trained on windows of 45 s."""
        sizes = {"vocab_size": 32_000, "dim": 1024, "num_layers": 20, "num_heads": 16,
                 "context": 750, "depth_dim": 512, "depth_layers": 6, "depth_heads": 8,
                 "code_dim": 128, "dropout": 0.0}  # fmt: skip
        return cls(**{**sizes, **changes})

    @property
    def patch_rate(self) -> float:
        """Patches, and so temporal steps, a second."""
        return self.frame_rate / self.frames_per_step

    def depth_schedule(self) -> list[list[tuple[int, int]]]:
        """Per depth step the (frame, level) places it writes. `level`: semantic codes frame by
        frame, then each acoustic level for all frames, p + K − 1 steps. `frame`: p · K steps."""
        frames, levels = range(self.frames_per_step), range(len(self.codebook_sizes))
        if self.depth_order == "frame":
            return [[(f, k)] for f in frames for k in levels]
        return [[(f, 0)] for f in frames] + [[(f, k) for f in frames] for k in levels[1:]]


@dataclass(frozen=True)
class Sampling:
    """How text and codes are drawn; a temperature of 0 takes the likeliest. `speak_temperature` is
    that of the choice between a token and PAD, which comes first. `eagerness` is added to the odds
    of a token against PAD, in decibels (10: ten times those of the data); None: the config's.
    Of n patches to begin a reply in none is likelier than 1 in n: at 0 dB it waits for the last."""

    temperature: float = 0.3
    top_k: int = 25
    text_temperature: float = 0.5
    text_top_k: int = 10
    speak_temperature: float = 0.0
    eagerness: float | None = None

    def __post_init__(self) -> None:
        coldest = min(self.temperature, self.text_temperature, self.speak_temperature)
        if coldest < 0 or min(self.top_k, self.text_top_k) < 1:
            raise UserError("temperatures must be 0 or more and top_k 1 or more")
        if not math.isfinite(self.eagerness or 0.0):
            raise UserError("eagerness must be a finite number of decibels")

    def row(self, eagerness: float) -> tuple[float, ...]:
        """Temperatures and candidates (speak or not, text, codes); its eagerness or the given."""
        text, codes = (self.text_temperature, self.text_top_k), (self.temperature, self.top_k)
        own = eagerness if self.eagerness is None else self.eagerness
        return self.speak_temperature, 2, *text, *codes, own


class SlotSampling:
    """A `Sampling` a slot: `rows` `[B, 7]` float32 are `Sampling.row` and may change between steps,
    to no wider a `top_k` than one of `widest`. `places` is the number of codes a patch."""

    def __init__(self, rows: Tensor, widest: Sampling, places: int) -> None:
        self.rows = rows
        self._kinds = torch.tensor([0, 1] + [2] * places, device=rows.device)
        self._ranks = torch.arange(max(2, widest.top_k, widest.text_top_k), device=rows.device)
        draws = torch.arange(len(self._kinds), device=rows.device)[:, None]
        self._numbers = DRAW_STRIDE * draws + self._ranks

    def noise(self, key: Tensor, tick: Tensor) -> Tensor:
        """`[B, 2 + places, candidates]`, for whether to speak, what to say and codes: what `draw`
        adds to logits, noise times temperature, and -inf for candidates not to be drawn."""
        heat, most = self.rows[:, :6].unflatten(1, (3, 2))[:, self._kinds, :, None].unbind(2)
        noise = heat * gumbel_noise(key, tick, self._numbers)
        return noise.masked_fill_(self._ranks >= most, -math.inf)


def gumbel_noise(key: Tensor, tick: Tensor, numbers: Tensor) -> Tensor:
    """Standard Gumbel noise `[B, n, k]` that depends on key `[B]`, tick `[B]` and number `[n, k]`
    (int64) alone, on every device: the mixing function of SplitMix64 (Steele et al. 2014), whose
    shifts keep the sign here, so that of the result's 64 bits the first is 0."""
    bits = _mixed(_mixed(key + _GOLDEN * tick)[:, None, None] + _GOLDEN * numbers)
    return -((((bits >> 40) + 0.5) * 2.0**-23).log().neg().log())


def _mixed(bits: Tensor) -> Tensor:
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ (bits >> shift)) * factor
    return bits ^ (bits >> 31)


@dataclass
class Batch:
    """What the LM is trained on; labels that are unknown and codes that are missing: `IGNORE`.

    Inputs: `user_codes`, `agent_codes` `[B, P, p, K]` int64, `agent_past` (the agent's, corrupted),
    `text` `[B, P]` (`PAD` or a token), `agent_emotion` `[B, P]`, `language` `[B]` (0: not given),
    `depth_patches` `[B, n]` (whose codes are learnt), `emotion_codes` (the user's, not corrupted).
    Labels: `user_speaking`, `turn_end`, `user_emotion`, `language_label` `[B, P]`, `user_words`
    `[B, P]` (`PAD` or a token of a word that has ended), `user_phones` `[B, P, p]`.

    The user's turns without word times, at most `M` a window: `untimed_first` and `untimed_patches`
    `[B, M]` their first patches and lengths, `untimed_tokens` `[B, M, S]` their text,
    `untimed_labels` `[B, M, S]` from 1 on which of these each is (a repeated one: its first place),
    0 behind them; `untimed_lengths`, on the host, `B * M` lengths and `B * M` numbers of tokens.
    """

    user_codes: Tensor
    agent_codes: Tensor
    agent_past: Tensor
    text: Tensor
    agent_emotion: Tensor
    language: Tensor
    depth_patches: Tensor
    user_speaking: Tensor
    turn_end: Tensor
    user_emotion: Tensor
    language_label: Tensor
    user_words: Tensor
    user_phones: Tensor
    untimed_first: Tensor
    untimed_tokens: Tensor
    untimed_labels: Tensor
    untimed_patches: Tensor
    untimed_lengths: tuple[tuple[int, ...], tuple[int, ...]]
    emotion_codes: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {name: v for name, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **{name: change(v) for name, v in tensors.items()})


@dataclass
class StepOutput:
    """A tick's patch of each slot; the user's words and phones are `listen_delay` patches late."""

    agent_codes: Tensor  # [B, K, p]
    text: Tensor  # [B]
    user_speaking: Tensor  # [B], a probability, as the next three
    turn_end: Tensor  # [B]
    user_emotion: Tensor  # [B, 8]
    language: Tensor  # [B, 3]
    user_words: Tensor  # [B], the likeliest token of a word that has ended, or PAD
    user_phones: Tensor  # [B, p, n] logits


class S2SState:
    """The state of `B` calls, a row each, changed in place: caches and what was written last.

    `agent` `[B, p, K]` the agent's last patch, `text` `[B]` its last token that is not `PAD`, `age`
    `[B]` the patches since then, `voiced` and `waited` `[B]` the patches in which the user has
    spoken unanswered and been silent since, `delayed` `[B, acoustic_delay]` semantic codes before
    their acoustic ones, `key` `[B]` of the seed: draws depend on it and the temporal position."""

    def __init__(self, model: S2S, batch_size: int, seed: int) -> None:
        c, device = model.config, model.text_embedding.weight.device
        self.temporal = model.temporal.init_state(batch_size, max_chunk=1)
        self.depth = model.depth.init_state(batch_size, max_chunk=1)
        self.depth_plans = model.depth.plans(self.depth, len(model.schedule))
        patch = (batch_size, c.frames_per_step, len(c.codebook_sizes))
        self.agent = torch.empty(patch, dtype=torch.long, device=device)
        self.text = torch.empty(batch_size, dtype=torch.long, device=device)
        self.age, self.voiced, self.waited = (torch.empty_like(self.text) for _ in range(3))
        self.delayed = self.text.new_empty(batch_size, c.acoustic_delay)
        self.emotion = model.emotion.init_state(batch_size) if model.emotion else ()
        self.key = torch.empty_like(self.text)
        self.reset(seed=seed)

    def reset(self, mask: Tensor | None = None, seed: int | None = None) -> None:
        """Starts slots in `mask` `[B]` bool (None: all) anew, drawing by `seed` (None: the old)."""
        self.temporal.reset(mask)
        self.depth.reset(mask)
        if mask is None:
            mask = torch.ones_like(self.text, dtype=torch.bool)
        zero = self.voiced, self.waited, *self.emotion
        starts = [(self.agent, IGNORE), (self.text, PAD), (self.age, MAX_AGE),
                  (self.delayed, IGNORE), *((tensor, 0) for tensor in zero)]  # fmt: skip
        for tensor, value in starts:
            tensor.masked_fill_(_of_slots(mask, tensor), value)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            self.key.masked_fill_(mask, int(torch.empty(1).long().random_(generator=generator)))


def _store(old: Sequence[Tensor], new: Sequence[Tensor], active: Tensor | None) -> None:
    """Changes tensors of a state in place, for the slots `active` `[B]` bool (all if None)."""
    for tensor, value in zip(old, new, strict=True):
        if active is None:
            tensor.copy_(value)
        else:
            torch.where(_of_slots(active, tensor), value, tensor, out=tensor)


def _of_slots(mask: Tensor, tensor: Tensor) -> Tensor:
    """`mask` `[B]` as it selects rows of `tensor` `[B, ...]`."""
    return mask.view(-1, *[1] * (tensor.dim() - 1))


class CodeTables(nn.Module):
    """A narrow table a codebook, for both speakers and the depth transformer: codes of the first n
    levels `[..., n]` → `[..., n, d]`. The last row of each table stands for "no code"."""

    def __init__(self, config: S2SConfig) -> None:
        super().__init__()
        self.sizes = config.codebook_sizes
        self.tables = nn.ModuleList(nn.Embedding(n + 1, config.code_dim) for n in self.sizes)
        self.register_buffer("missing", torch.tensor(self.sizes), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        levels = torch.where(codes < 0, self.missing[: codes.shape[-1]], codes).unbind(-1)
        pairs = zip(self.tables, levels, strict=False)
        return torch.stack([table(level) for table, level in pairs], dim=-2)

    @torch.no_grad()
    def start_from(self, codebooks: Sequence[Tensor]) -> None:
        """Starts from the codec's own vectors `[n, width]` of each level, normalised: narrower ones
        leave the last columns at zero, wider ones are projected on the principal directions."""
        for table, vectors in zip(self.tables, codebooks, strict=False):
            vectors = vectors.float()
            vectors = (vectors - vectors.mean(0)) / vectors.std().clamp(min=1e-5)
            width = min(vectors.shape[1], table.embedding_dim)
            if vectors.shape[1] > width:
                vectors = vectors @ torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -width:]
            table.weight.zero_()
            table.weight[:-1, :width] = vectors


class DepthHeads(nn.Module):
    """Logits of a depth step's codes: a projection a place, then a narrow output table a level."""

    def __init__(self, config: S2SConfig) -> None:
        super().__init__()
        self.schedule, width = config.depth_schedule(), config.code_dim
        sizes = [len(places) * width for places in self.schedule]
        self.project = nn.ModuleList(nn.Linear(config.depth_dim, size) for size in sizes)
        self.tables = nn.ModuleList(nn.Linear(width, size) for size in config.codebook_sizes)

    def forward(self, hidden: Tensor, step: int) -> Tensor:
        """`[N, depth_dim]` → logits `[N, places, size]` of the step, whose places share a level."""
        places = self.schedule[step]
        parts = self.project[step](hidden).unflatten(-1, (len(places), -1))
        return self.tables[places[0][1]](parts)


class EmotionBranch(nn.Module):
    """The user's emotion by how they speak: codes → logits of the emotions, patch by patch.

    It reads the vectors that the codec decodes, semantic and the sum of the acoustic ones, in which
    loudness and pitch are plain; and, lest a high voice be taken for a happy one, their difference
    from the mean of this caller's speech so far. A GRU (Cho et al. 2014) carries both on.
    State: the GRU's `[B, d]`; of the speech so far sum `[B, d]` and patches `[B]`."""

    def __init__(self, config: S2SConfig) -> None:
        super().__init__()
        c, d = config, config.emotion_dim  # the last row of each codebook: "no code"
        shape = len(c.codebook_sizes), max(c.codebook_sizes) + 1, c.codebook_dim
        self.register_buffer("codebooks", torch.zeros(shape))
        self.project = nn.Linear(2 * c.frames_per_step * c.codebook_dim, d)
        self.voice = nn.Linear(d, 1)
        self.memory = nn.GRU(2 * d, d, batch_first=True)
        self.head = nn.Linear(d, len(c.emotions))
        self.dropout = nn.Dropout(0.3)

    @torch.no_grad()
    def start_from(self, codebooks: Sequence[Tensor]) -> None:
        """Takes the codec's vectors `[n, width]` of each level, at most `codebook_dim` wide."""
        for table, vectors in zip(self.codebooks, codebooks, strict=True):
            table[: len(vectors), : vectors.shape[1]] = vectors / codebooks[0].std()

    def init_state(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        d = self.head.in_features
        return tuple(self.codebooks.new_zeros(batch_size, *size) for size in ((d,), (d,), ()))

    def forward(self, codes: Tensor, state: tuple | None = None, active=None) -> tuple:
        """(emotion `[B, P, n]`, voice `[B, P]`) logits of codes `[B, P, p, K]`. With a `state`,
        which is changed in place for the slots `active` `[B]` bool, P is 1."""
        with torch.autocast(codes.device.type, enabled=False):
            rows = codes.masked_fill(codes < 0, self.codebooks.shape[1] - 1)
            vectors = self.codebooks[torch.arange(codes.shape[-1], device=codes.device), rows]
            both = torch.cat((vectors[..., 0, :], vectors[..., 1:, :].sum(-2)), dim=-1)
            spoken = F.gelu(self.project(self.dropout(both.flatten(-2))))
            voice = self.voice(spoken)[..., 0]
            weight = voice.sigmoid()
            memory, total, patches = state or self.init_state(len(codes))
            total = total[:, None] + (weight[..., None] * spoken).cumsum(1)
            patches = patches[:, None] + weight.cumsum(1)
            mean = total / patches.clamp(min=1.0)[..., None]
            both = torch.cat((spoken, spoken - mean), dim=-1)
            if state is None:
                out, _ = self.memory(both, memory[None])
            else:  # the same; cuDNN's own is not for a graph
                memory = torch.gru_cell(both[:, 0], memory, *self.memory.all_weights[0])
                _store(state, (memory, total[:, -1], patches[:, -1]), active)
                out = memory[:, None]
            return self.head(self.dropout(out)), voice


class S2S(nn.Module):
    """The dialogue LM. `tokenizer` is its own; id 0 is PAD."""

    def __init__(self, config: S2SConfig) -> None:
        super().__init__()
        self.config = c = config
        self.tokenizer: Tokenizer | None = None
        self.text_embedding = nn.Embedding(c.vocab_size, c.dim)
        self.age_embedding = nn.Embedding(MAX_AGE + 1, c.dim)
        # Codes of a patch are concatenated: every frame and level has weights of its own.
        self.code_tables = CodeTables(c)
        patch_width = c.frames_per_step * len(c.codebook_sizes) * c.code_dim
        self.agent_projection = nn.Linear(patch_width, c.dim, bias=False) if c.hear_self else None
        heard = c.frames_per_step * (c.user_levels or len(c.codebook_sizes)) * c.code_dim
        self.user_projection = nn.Linear(heard, c.dim, bias=False)
        self.emotion_embedding = nn.Embedding(len(c.emotions) + 1, c.dim)  # 0: not given
        self.language_embedding = nn.Embedding(len(c.languages) + 1, c.dim)  # 0: not given
        layers = c.temporal or TransformerConfig(c.dim, c.num_layers, c.num_heads, c.context)
        layers = dataclasses.replace(layers, context=c.context, dropout=c.dropout)
        self.temporal = StreamingTransformer(layers)
        self.text_head = nn.Linear(c.dim, c.vocab_size)
        heads = {"user_speaking": 1, "turn_end": 1, "user_emotion": len(c.emotions)}
        heads |= {"language": len(c.languages)}
        heads |= {"user_phones": c.frames_per_step * max(1, len(c.phones))}
        self.heads = nn.ModuleDict({name: nn.Linear(c.dim, size) for name, size in heads.items()})
        self.words_projection = nn.Linear(c.dim, c.dim)  # the user's words, by the text head
        self.emotion, self.emotion_projection = None, None
        if c.emotion_dim:
            self.emotion = EmotionBranch(c)
            self.emotion_projection = nn.Linear(len(c.emotions), c.dim, bias=False)
            self.depth_emotion = nn.Embedding(len(c.emotions) + 1, c.depth_dim)
        self.schedule = c.depth_schedule()
        self.depth_text = nn.Embedding(c.vocab_size, c.depth_dim)
        self.depth_context = nn.ModuleList(nn.Linear(c.dim, c.depth_dim) for _ in self.schedule)
        widths = [len(places) * c.code_dim for places in self.schedule[:-1]]
        self.depth_input = nn.ModuleList(nn.Linear(n, c.depth_dim, bias=False) for n in widths)
        sizes = c.depth_dim, c.depth_layers, c.depth_heads, len(self.schedule)
        self.depth = StreamingTransformer(TransformerConfig(*sizes))
        self.depth_heads = DepthHeads(c)
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5 if "tables" in name else 0.1)
        for head in (self.text_head, *self.heads.values(), *self.depth_heads.tables):
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        if c.emotion_dim:  # an LM taught without goes on as it was
            nn.init.zeros_(self.emotion_projection.weight)
            nn.init.zeros_(self.depth_emotion.weight)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str | torch.device = "cpu") -> S2S:
        """Of a run, step or shipped folder, in float32, for inference; UserError for others."""
        checkpoint = checkpoints.load_checkpoint(path, with_trainer=False)
        model = cls(checkpoints.config_of(S2SConfig, "s2s", checkpoint.config, path))
        checkpoints.fill(model, checkpoint.tensors, path)
        if checkpoint.tokenizer is None:
            raise UserError(f"{path}: tokenizer.json is missing; copy the whole folder again")
        model.tokenizer = Tokenizer.from_str(checkpoint.tokenizer)
        if torch.device(device).type == "cpu":
            stream_weights(model)
        return model.to(device).eval().requires_grad_(False)

    def _temporal_input(self, text, age, agent, user, emotion, language, recognised) -> Tensor:
        """Sum of embeddings: last token that is not `PAD` and its age `[B, P]`, last agent patch
        and this user patch `[B, P, p, K]`, emotion `[B, P]`, language `[B]`, logits of the user's
        emotion `[B, P, n]` or None → `[B, P, D]`."""
        x = self.user_projection(self.code_tables(user[..., : self.config.user_levels]).flatten(-3))
        if self.agent_projection is not None:
            x = x + self.agent_projection(self.code_tables(agent).flatten(-3))
        x = x + self.text_embedding(text) + self.age_embedding(age)
        if recognised is not None:
            x = x + self.emotion_projection(recognised.detach().softmax(-1).to(x.dtype))
        return x + self.emotion_embedding(emotion) + self.language_embedding(language)[:, None]

    def hidden(self, batch: Batch, recognised: Tensor | None = None) -> Tensor:
        """Temporal states `[B, P, D]`: at patch t after text and agent to t − 1 and user to t."""
        agent = F.pad(batch.agent_past[:, :-1], (0, 0, 0, 0, 1, 0), value=IGNORE)
        text, age = last_tokens(F.pad(batch.text[:, :-1], (1, 0), value=PAD))
        inputs = text, age, agent, batch.user_codes, batch.agent_emotion, batch.language
        return self.temporal(self._temporal_input(*inputs, recognised))

    def emotion_losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The emotion branch alone: its logits `[B, P, n]`, its losses and accuracy."""
        logits, voice = self.emotion(batch.emotion_codes)
        losses = {"user_emotion": cross_entropy(logits, batch.user_emotion),
                  "user_voice": binary_loss(voice[..., None], batch.user_speaking)}  # fmt: skip
        return logits, losses, {"user_emotion_accuracy": accuracy(logits, batch.user_emotion)}

    def head_logits(self, hidden: Tensor) -> dict[str, Tensor]:
        """Logits of the heads on the user, `[B, P, n]`; `user_phones` `[B, P, p, n]`."""
        logits = {name: head(hidden) for name, head in self.heads.items()}
        phones = logits["user_phones"].unflatten(-1, (self.config.frames_per_step, -1))
        words = self.text_head(self.words_projection(hidden))
        return {**logits, "user_phones": phones, "user_words": words}

    def depth_logits(self, hidden: Tensor, text: Tensor, codes: Tensor, emotion=None) -> list:
        """Teacher-forced: states `[N, D]`, tokens `[N]`, codes `[N, p, K]` and, with an emotion
        branch, emotions `[N]` → per step and place of `depth_schedule`, logits `[N, size]`."""
        codes, said = codes.clamp(min=0), self._depth_said(text, emotion)
        steps = range(len(self.schedule))
        inputs = [self._depth_input(hidden, said, codes, step) for step in steps]
        out = self.depth(torch.stack(inputs, dim=1))  # [N, steps, depth_dim]
        return [list(self.depth_heads(out[:, step], step).unbind(1)) for step in steps]

    def _depth_said(self, text: Tensor, emotion: Tensor | None) -> Tensor:
        """Tokens and emotions `[N]` → `[N, depth_dim]`. The emotion comes in here, too: in the
        temporal state it is a small part of a long sum, and was hardly heard."""
        said = self.depth_text(text)
        return said if self.emotion is None else said + self.depth_emotion(emotion)

    def _depth_input(self, hidden: Tensor, said: Tensor, codes: Tensor, step: int) -> Tensor:
        """`[N, depth_dim]` of the temporal state `[N, D]`, the embedded text `[N, depth_dim]` and
        what the step before wrote of the codes `[N, p, K]`."""
        x = self.depth_context[step](hidden) + said
        if step == 0:
            return x
        frames, level = place_of(self.schedule[step - 1])
        written = self.code_tables.tables[level](codes[:, frames, level])
        return x + self.depth_input[step - 1](written.flatten(1))

    def losses(self, batch: Batch, speak: bool = True, split: int | None = None) -> tuple:
        """Losses, means over known labels, and metrics, accuracies; in fixed shapes, and nothing
        that waits for the device. `speak`: the codes of `batch.depth_patches` are learnt too.
        `split`, a patch: also metrics of text and phones before (`_within`) and after (`_past`)."""
        recognised, branch, metrics = None, {}, {}
        if self.emotion is not None:
            recognised, branch, _ = self.emotion_losses(batch)
        hidden = self.hidden(batch, recognised)
        logits = {**self.head_logits(hidden), "text": self.text_head(hidden)}
        if recognised is not None:
            logits["user_emotion"] = recognised
        losses = {}
        for name in ("user_speaking", "turn_end"):
            losses[name] = binary_loss(logits[name], getattr(batch, name))
        classes = {"user_emotion": batch.user_emotion, "language": batch.language_label}
        for name, labels in {**classes, "user_phones": batch.user_phones}.items():
            losses[name] = cross_entropy(logits[name], labels)
            metrics[f"{name}_accuracy"] = accuracy(logits[name], labels)
        for name in ("text", "user_words"):
            labels = getattr(batch, name)
            losses[name] = token_loss(logits[name], labels, self.config.text_weight)
            tokens = torch.where(labels > PAD, labels, IGNORE)
            metrics[f"{name}_accuracy"] = accuracy(logits[name], tokens)
        losses["user_text"] = untimed_words_loss(logits["user_words"], batch)
        losses |= branch
        if split is not None:
            for name, part in (("within", slice(split)), ("past", slice(split, None))):
                text = logits["text"][:, part], batch.text[:, part]
                metrics[f"text_{name}"] = token_loss(*text, self.config.text_weight)
                phones = logits["user_phones"][:, part], batch.user_phones[:, part]
                metrics[f"user_phones_{name}"] = cross_entropy(*phones)
        if speak:
            first = hidden.shape[1] * torch.arange(len(hidden), device=hidden.device)
            chosen = (batch.depth_patches + first[:, None]).flatten()  # [B * n] of B * P patches
            parts = (hidden, batch.text, batch.agent_codes, batch.agent_emotion)
            states, text, targets, emotion = (part.flatten(0, 1)[chosen] for part in parts)
            depth = self.depth_logits(states, text, targets, emotion)
            losses |= depth_losses(depth, self.schedule, targets)
        return losses, metrics

    def init_state(self, batch_size: int, seed: int = 0) -> S2SState:
        return S2SState(self, batch_size, seed)

    @torch.no_grad()
    def step(self, user_codes: Tensor, state: S2SState, active: Tensor | None = None,
             emotion: Tensor | None = None, language: Tensor | None = None,
             sampling: Sampling | SlotSampling | None = None, strength: Tensor | None = None,
             forced: tuple[Tensor, Tensor, Tensor] | None = None,
             timer=lambda: None) -> StepOutput:  # fmt: skip
        """Reads a patch of the user and writes the agent's patch of the same tick.

        user_codes: `[B, K, p]` int64. active: `[B]` bool, slots that take part. emotion, language:
        `[B]`, 0 not given, else 1 + index into the config's names. forced: `[B]` bool, slots whose
        agent patch `[B, K, p]` and text `[B]` are these. strength: `[B]`, of the emotion, by
        classifier-free guidance (Ho and Salimans 2022): the state has 2 B rows, of which the latter
        B run without emotion, and logits are without + strength · (with − without). None: the state
        has B rows, as for 1. timer: called when the temporal stage is done.
        """
        slots, recognised = len(user_codes), None
        if not isinstance(sampling, SlotSampling):
            sampling = self.slot_sampling(slots, sampling or Sampling())
        # Before the position moves on.
        noise = sampling.noise(state.key[:slots], state.temporal.position[:slots])
        none = torch.zeros_like(state.text[:slots])
        emotion, language = (none if given is None else given for given in (emotion, language))
        if strength is not None:
            user_codes, language = user_codes.repeat(2, 1, 1), language.repeat(2)
            emotion = F.pad(emotion, (0, len(emotion)))
            active = active if active is None else active.repeat(2)
        last = (state.text[:, None], state.age[:, None], state.agent[:, None])
        user = user_codes.transpose(1, 2)[:, None]
        if self.emotion is not None:
            recognised, _ = self.emotion(user, state.emotion, active)
        x = self._temporal_input(*last, user, emotion[:, None], language, recognised)
        hidden = self.temporal.step(x, state.temporal, active)[:, 0]
        heads = {name: logits[:, 0] for name, logits in self.head_logits(hidden[:, None]).items()}
        if recognised is not None:
            heads["user_emotion"] = recognised[:, 0]
        logits = guided(self.text_head(hidden), strength)
        owed, turn = self._owed(state, (heads["user_phones"].argmax(-1) > 0).any(1))
        eagerness = sampling.rows[:, -1] + owed[:slots]
        text = draw_text(logits, noise[:, :2], eagerness, self.config.text_weight)
        if forced is not None:
            muted, forced_codes, forced_text = forced
            text = torch.where(muted, forced_text, text)
        timer()
        said = self._depth_said(text if strength is None else text.repeat(2), emotion)
        codes = self._draw_codes(hidden, said, state, noise[:, 2:], strength)
        if forced is not None:
            codes = torch.where(muted[:, None, None], forced_codes.transpose(1, 2), codes)
        said = text
        if strength is not None:
            codes, said = torch.cat((codes, codes)), torch.cat((text, text))
            heads = {name: logits.chunk(2)[0] for name, logits in heads.items()}
        return StepOutput(
            self._advance(state, codes, said, turn, active)[:slots].transpose(1, 2), text,
            user_speaking=heads["user_speaking"][:, 0].sigmoid(),
            turn_end=heads["turn_end"][:, 0].sigmoid(),
            user_words=heads["user_words"].argmax(-1), user_phones=heads["user_phones"],
            user_emotion=heads["user_emotion"].softmax(-1),
            language=heads["language"].softmax(-1))  # fmt: skip

    def slot_sampling(self, slots: int, sampling: Sampling) -> SlotSampling:
        """The same `sampling` for every slot."""
        row = torch.tensor(sampling.row(self.config.eagerness), device=self.text_head.weight.device)
        return SlotSampling(row.repeat(slots, 1), sampling, sum(map(len, self.schedule)))

    def _draw_codes(self, hidden, said, state: S2SState, noise: Tensor, strength) -> Tensor:
        """Depth steps: codes `[B, p, K]`, each drawn given those before; `said`: `_depth_said`."""
        rows, codes = len(hidden) // len(noise), torch.zeros_like(state.agent)
        noises = noise.split([len(places) for places in self.schedule], dim=1)
        for step, places in enumerate(self.schedule):
            x = self._depth_input(hidden, said, codes, step)[:, None]
            out = self.depth.step_by(x, state.depth, state.depth_plans[step])[:, 0]
            drawn = draw(guided(self.depth_heads(out, step), strength), noises[step])
            frames, level = place_of(places)
            codes[:, frames, level] = drawn.repeat(rows, 1) if rows > 1 else drawn
        return codes[: len(noise)]

    def _owed(self, state: S2SState, heard: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`[B]` dB of IMPATIENCE after a patch in which a phone is `heard` `[B]`, and the state's
        `voiced` and `waited`. A question ill understood seems, by `user_speaking`, to go on."""
        rate = self.config.patch_rate
        waited = (state.waited + 1).masked_fill(heard, 0)
        voiced = (state.voiced + heard).masked_fill(waited > WAIT_SECONDS * rate, 0)
        rise = IMPATIENCE / rate * waited * (voiced >= VOICED_SECONDS * rate)
        return rise, {"voiced": voiced, "waited": waited}

    def _advance(self, state: S2SState, codes: Tensor, text: Tensor, turn, active) -> Tensor:
        """Stores the patch for the next step; returns it with semantic and acoustic aligned."""
        semantic = torch.cat((state.delayed, codes[:, :, 0]), dim=1)
        aligned = codes.clone()
        aligned[:, :, 0] = semantic[:, : codes.shape[1]].clamp(min=0)
        new = {"agent": codes, "delayed": semantic[:, codes.shape[1] :]}
        new["age"] = (state.age + 1).clamp(max=MAX_AGE).masked_fill(text != PAD, 0)
        replied = (text != PAD) & (turn["waited"] > 0)
        new |= turn | {"voiced": turn["voiced"].masked_fill(replied, 0)}
        new["text"] = torch.where(text != PAD, text, state.text)
        _store([getattr(state, name) for name in new], list(new.values()), active)
        return aligned


def guided(logits: Tensor, strength: Tensor | None) -> Tensor:
    """`[2 B, ...]`, with emotion and without, as `[B, ...]`; where `strength` is None, as it is."""
    if strength is None:
        return logits
    given, free = logits.chunk(2)
    return torch.lerp(free, given, _of_slots(strength, free).to(free.dtype))  # 1: as given


def draw_text(logits: Tensor, noise: Tensor, eagerness, text_weight: float) -> Tensor:
    """PAD or a token for each row of `[B, V]`: first whether to speak, then what to say. In one
    draw a low temperature would favour PAD, likelier than each of several replies, not than all.
    `text_weight`, that of the loss, is taken off the odds again; `eagerness` `[B]`, in dB, is added
    to them. noise: the first two draws of `SlotSampling.noise`."""
    logits = logits.float()
    tokens = logits[:, PAD + 1 :]  # PAD comes first
    odds = tokens.logsumexp(1) - math.log(text_weight) + eagerness * math.log(10) / 10
    silent = odds + noise[:, 0, 1] <= logits[:, PAD] + noise[:, 0, 0]
    return (draw(tokens, noise[:, 1]) + (PAD + 1)).masked_fill(silent, PAD)


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """One index of each `[..., n]`, from as many of the likeliest as `noise` `[..., k]` is for, the
    likeliest where that is 0; by the Gumbel-max trick, which waits for no device."""
    values, indices = logits.topk(min(noise.shape[-1], logits.shape[-1]), dim=-1)
    chosen = (values + noise[..., : values.shape[-1]]).argmax(-1, keepdim=True)
    return indices.gather(-1, chosen)[..., 0]


def place_of(places: Sequence[tuple[int, int]]) -> tuple[slice, int]:
    """The frames and the level of a depth step's places."""
    (first, level), (last, _) = places[0], places[-1]
    return slice(first, last + 1), level


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of known labels hit; logits `[..., n]`, labels `[...]`; nan where none is known."""
    return (logits.argmax(-1) == labels).sum() / (labels != IGNORE).sum()


def over_ranks(count: Tensor) -> Tensor:
    """The divisor of a sum over a rank's labels with which the mean of all ranks' losses is that of
    the whole batch. Without gradients (validation, by the main rank alone): `count`. Never zero."""
    count = count.float()
    return (training.all_reduce_mean(count) if torch.is_grad_enabled() else count).clamp(min=1e-6)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over known labels, zero (with a gradient of zero) where none is known."""
    logits, labels = logits.flatten(0, -2).float(), labels.flatten()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / over_ranks((labels != IGNORE).sum())


def token_loss(logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Weighted mean cross-entropy of tokens `[B, P]`, one counting `weight` times a `PAD`."""
    counted = torch.where(labels == PAD, 1.0 / weight, 1.0).masked_fill(labels == IGNORE, 0.0)
    flat, options = logits.flatten(0, 1).float(), {"ignore_index": IGNORE, "reduction": "none"}
    raw = F.cross_entropy(flat, labels.flatten(), **options)
    return (raw * counted.flatten()).sum() / over_ranks(counted.sum())


def untimed_words_loss(logits: Tensor, batch: Batch) -> Tensor:
    """CTC (Graves et al. 2006) of the text of each turn without word times, per token; PAD is the
    blank. Of `logits` `[B, P, V]` only the blank's and each turn's own tokens' are looked at."""
    counts = (batch.untimed_labels.flatten(0, 1) > 0).sum(-1)
    turns = over_ranks((counts > 0).sum())
    if not any(batch.untimed_lengths[1]):
        return logits[:1, :1, :1].sum() * 0.0
    size, length, vocabulary = logits.shape
    span = torch.arange(min(length, MAX_TURN_PATCHES), device=logits.device)
    at = (batch.untimed_first[..., None] + span).clamp(max=length - 1)  # [B, M, T]
    at = at + length * torch.arange(size, device=logits.device)[:, None, None]
    classes = F.pad(batch.untimed_tokens, (1, 0), value=PAD)  # [B, M, 1 + S]
    scores = logits.float()
    chosen = scores.flatten()[at[..., None] * vocabulary + classes[:, :, None]]
    chosen = chosen - scores.logsumexp(-1).flatten()[at][..., None]
    steps_first = chosen.flatten(0, 1).transpose(0, 1)  # [T, B * M, 1 + S]
    what = steps_first, batch.untimed_labels.flatten(0, 1), *batch.untimed_lengths
    raw = F.ctc_loss(*what, blank=0, reduction="none", zero_infinity=True)
    # torch's gradient takes the classes for all there are, and adds their probabilities to it.
    inside = (span < batch.untimed_patches[..., None]) & (raw > 0).view(size, -1, 1)
    surplus = torch.where(inside[..., None], chosen.exp(), 0.0).sum((-1, -2)).flatten()
    raw = raw - surplus + surplus.detach()
    return torch.where(counts > 0, raw / counts.clamp(min=1), 0.0).sum() / turns


def binary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """As `cross_entropy`, of labels 0 and 1; logits `[..., 1]`."""
    known, scores = labels != IGNORE, logits[..., 0].float()
    raw = F.binary_cross_entropy_with_logits(scores, labels.float(), reduction="none")
    return (raw * known).sum() / over_ranks(known.sum())


def depth_losses(depth: list[list[Tensor]], schedule, targets: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the semantic and of the acoustic codes; targets `[N, p, K]`."""
    parts: dict[str, list[Tensor]] = {"semantic": [], "acoustic": []}
    for places, logits in zip(schedule, depth, strict=True):
        for (f, k), scores in zip(places, logits, strict=True):
            parts["acoustic" if k else "semantic"].append(cross_entropy(scores, targets[:, f, k]))
    return {name: torch.stack(values).mean() for name, values in parts.items()}


def last_tokens(text: Tensor) -> tuple[Tensor, Tensor]:
    """The last token up to each patch of `[B, P]` (`PAD`: none), its age (at most `MAX_AGE`)."""
    places = torch.arange(text.shape[1], device=text.device)
    last = torch.where(text != PAD, places, -1).cummax(dim=1).values
    token = torch.where(last < 0, PAD, text.gather(1, last.clamp(min=0)))
    return token, torch.where(last < 0, MAX_AGE, (places - last).clamp(max=MAX_AGE))
