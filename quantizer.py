"""The codec's split quantizer: a semantic codebook beside an acoustic residual VQ.

After Moshi (Défossez et al. 2024) and SoundStream (Zeghidour et al. 2021). Codebooks learn by
exponential moving averages (van den Oord et al. 2017), start by k-means on data, and restart codes
that nothing comes near, on several ranks as one process with the joint batch would.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

STATISTICS = ("cluster_size", "embedding_sum")  # of codebooks in training; an export has none
MAX_CANDIDATES = 8192  # vectors that k-means starts from


class Codebook(NamedTuple):
    """One codebook, to read: codes `[n, d]`, and ‖e‖² / 2 `[n]`, dearer than a step's search."""

    embedding: Tensor
    half_norms: Tensor

    def scores(self, x: Tensor) -> Tensor:
        """`[..., d]` → `[..., n]`, the higher the nearer: (‖x‖² - ‖x - e‖²) / 2."""
        with torch.autocast(x.device.type, enabled=False):
            return x.float() @ self.embedding.float().t() - self.half_norms

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest code of each vector: `[..., d]` → `[...]` int64."""
        return self.scores(x).argmax(-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """`[...]` int64 → `[..., d]`."""
        return F.embedding(codes, self.embedding)


def half_norms(codes: Tensor) -> Tensor:  # ‖e‖² / 2 of [..., d]
    return 0.5 * codes.float().pow(2).sum(-1)


@torch.no_grad()
def k_means(vectors: Tensor, codes: Tensor, rounds: int = 10) -> Tensor:
    """Lloyd's (1982): `vectors` `[N, d]` and where to start `[n, d]` → their centres `[n, d]`."""
    for _ in range(rounds):
        book = Codebook(codes, half_norms(codes))
        nearest = torch.cat([book.nearest(part) for part in vectors.split(MAX_CANDIDATES)])
        ones = torch.ones_like(nearest, dtype=torch.float32)
        counts = codes.new_zeros(len(codes)).index_add_(0, nearest, ones)
        sums = torch.zeros_like(codes).index_add_(0, nearest, vectors)
        means = sums / counts.clamp(min=1)[:, None]
        codes = torch.where(counts[:, None] > 0, means, codes)
    return codes


class CodebookStack(nn.Module):
    """Codebooks of one size, learnt by exponential moving averages (van den Oord et al. 2017, A.1).

    Their buffers are rows of one fp32 tensor each, `[K, n, d]` and `[K, n]`: on a GPU 64 codebooks
    that move one by one are thousands of launches. Nothing here waits for the device. `levels` is
    their place among all of the quantizer."""

    stored = ("embedding", *STATISTICS)

    def __init__(self, count: int, size: int, dim: int, decay: float, first: int = 0) -> None:
        super().__init__()
        self.levels, self.decay = slice(first, first + count), decay
        codes = torch.stack([torch.randn(size, dim) for _ in range(count)])
        self.register_buffer("embedding", codes, persistent=False)
        self.register_buffer("cluster_size", torch.zeros(count, size), persistent=False)
        self.register_buffer("embedding_sum", torch.zeros_like(codes), persistent=False)
        self.register_buffer("half_norms", half_norms(codes), persistent=False)
        self.started = [False] * count  # which stand for data; until then nothing is quantized

    def books(self) -> list[Codebook]:  # their tensors are views
        return list(map(Codebook, self.embedding.unbind(), self.half_norms.unbind()))

    @torch.no_grad()
    def initialise(self, left: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Starts codebooks that stand for nothing yet by k-means, from the codes that `draws`
        choose, on what those before them leave of the vectors `left` `[N, d]`. Returns what the
        last one leaves, and `[K, n]` bool, the codes that began anew."""
        fresh = torch.zeros_like(self.cluster_size, dtype=torch.bool)
        for row, book in enumerate(self.books()):
            if not self.started[row]:
                self._k_means(row, book, left, draws[row])
                fresh[row] = True
            left = left - book.lookup(book.nearest(left))
        return left, fresh

    def _k_means(self, row: int, book: Codebook, candidates: Tensor, draws: Tensor) -> None:
        codes, size = book.embedding, len(book.embedding)
        places = (draws[:size] * len(candidates)).long().clamp(max=len(candidates) - 1)
        codes.copy_(k_means(candidates, candidates[places]))
        book.half_norms.copy_(half_norms(codes))
        mean_size = len(candidates) / size
        self.cluster_size[row].fill_(mean_size)
        self.embedding_sum[row].copy_(codes * mean_size)
        self.started[row] = True

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor, used: Tensor, draws: Tensor, skip=None):
        """One EMA step by this rank's `vectors` `[K, B, F, d]`, whose nearest codes are `codes`;
        clips count where `used` `[K, B]`. Where the scalar `skip` is not 0 nothing changes.
        Dead codes restart with fresh statistics, from those of all ranks' vectors that `draws`
        `[K, n or more]` in [0, 1) choose. Returns `[K, n]` bool, the codes that restarted."""
        counts, sums = self._statistics(vectors, codes, used)
        fresh, some = drawn_vectors(vectors, used, draws[:, : counts.shape[1]])
        if dist.is_initialized():
            for part in (counts, sums, fresh):
                dist.all_reduce(part)
        moves = (1 - self.decay) * some  # a level that nobody used stays where it is
        sizes = self.cluster_size.lerp(counts, moves)
        sums = self.embedding_sum.lerp(sums, moves[..., None])
        mean_size = sizes.mean(-1, keepdim=True)
        dead = (sizes < 0.1 * mean_size) & (some > 0)
        sizes = torch.where(dead, mean_size, sizes)
        sums = torch.where(dead[..., None], fresh * mean_size[..., None], sums)
        heeded = torch.ones_like(dead[0, 0]) if skip is None else skip == 0
        self._set(sizes, sums, heeded)
        return dead & heeded

    @torch.no_grad()
    def follow(self, other: CodebookStack, weight: Tensor, restarted: Tensor) -> None:
        """Moves by the scalar `weight` towards `other`'s statistics; takes codes over that just
        `restarted` `[K, n]`: between the old and the new place of a code there would be nothing."""
        sizes = self.cluster_size.lerp(other.cluster_size, weight)
        sizes = torch.where(restarted, other.cluster_size, sizes)
        sums = self.embedding_sum.lerp(other.embedding_sum, weight)
        sums = torch.where(restarted[..., None], other.embedding_sum, sums)
        self._set(sizes, sums, weight > 0)
        self.started = list(other.started)

    def _set(self, sizes: Tensor, sums: Tensor, moves: Tensor) -> None:
        """Takes statistics, and the codes that follow from them, over where `moves` is true."""
        for name, value in zip(self.stored, (sums / sizes[..., None], sizes, sums), strict=True):
            own = getattr(self, name)
            own.copy_(torch.where(moves, value, own))
        self.half_norms.copy_(half_norms(self.embedding))

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


def in_joint_order(x: Tensor, dim: int) -> Tensor:
    """`x` of all ranks: their clips, along `dim`, in turn, as the sampler deals them out."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts, dim=dim + 1).flatten(dim, dim + 1)


def drawn_vectors(vectors: Tensor, used: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Those at `draws` `[K, n]` in [0, 1) among the vectors `[K, B, F, d]` of all ranks whose clip
    is `used` `[K, B]`; zeros where another rank has it, so that their sum is it. Returns
    `[K, n, d]`, and `[K, 1]`: 1.0 where any clip is used, else 0.0."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    used = in_joint_order(used.to(torch.uint8).contiguous(), 1)  # [K, B * ranks]
    frames = vectors.shape[2]
    order = used.argsort(dim=1, descending=True, stable=True)
    count = used.sum(1, keepdim=True) * frames
    place = torch.minimum((draws * count).long(), count - 1).clamp(min=0)  # among those used
    clip = order.gather(1, place.div(frames, rounding_mode="floor"))
    level = torch.arange(len(vectors), device=vectors.device)[:, None]
    local = clip.div(ranks, rounding_mode="floor")
    drawn = vectors[level, local, place.remainder(frames)]
    if ranks > 1:
        drawn = drawn * (clip.remainder(ranks) == rank)[..., None]
    return drawn, (count > 0).float()


@dataclass
class Quantized:
    """What the quantizer gives in training."""

    semantic: Tensor  # [B, F, d], straight-through
    acoustic: Tensor | None  # the same; None from the semantic branch alone
    codes: Tensor  # [B, K, F]
    commitments: tuple[Tensor, Tensor]  # scalars: of codebook 0 and of the others
    scores: Tensor  # [B, F, n] of the codes of codebook 0, as logits
    residuals: list[Tensor]  # per stack of codebooks the vectors [levels, B, F, d] it quantized
    used: Tensor  # [B, K] bool

    @property
    def commitment(self) -> Tensor:
        return sum(self.commitments)


class SplitQuantizer(nn.Module):
    """A semantic codebook in parallel with an acoustic residual VQ, each in a space of its own:
    stacks of codebooks of one size, which are stored one by one, as `codebooks.K.embedding` … ."""

    def __init__(self, widths: tuple, dims: tuple, sizes: Sequence[int], decay: float) -> None:
        super().__init__()
        self.widths = widths  # of the semantic and the acoustic branch
        self.semantic_in, self.acoustic_in = map(nn.Linear, widths, dims)
        self.stacks = nn.ModuleList([CodebookStack(1, sizes[0], dims[0], decay)])
        for size, same in itertools.groupby(sizes[1:]):
            first, count = self.stacks[-1].levels.stop, len(list(same))
            self.stacks.append(CodebookStack(count, size, dims[1], decay, first))

    @property
    def codebooks(self) -> list[Codebook]:  # the semantic one first
        return [book for stack in self.stacks for book in stack.books()]

    def _rows(self, prefix: str) -> Iterator[tuple[CodebookStack, int, dict[str, Tensor]]]:
        """Each codebook's stack, row in it, and buffers by their names in checkpoints."""
        for stack in self.stacks:
            for row in range(len(stack.started)):
                name = f"{prefix}codebooks.{stack.levels.start + row}"
                yield stack, row, {f"{name}.{n}": getattr(stack, n)[row] for n in stack.stored}

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for _, _, buffers in self._rows(prefix):
            destination.update(buffers)

    @torch.no_grad()
    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        """A codebook without statistics, as in an export, goes on from its codes as they are."""
        for stack, row, buffers in self._rows(prefix):
            given = {name: state.pop(name) for name in buffers if name in state}
            missing += [name for name in buffers if name not in given]
            for name, tensor in given.items():
                if tensor.shape == buffers[name].shape:
                    buffers[name].copy_(tensor)
                else:
                    errors.append(f"{name} is {[*tensor.shape]}, not {[*buffers[name].shape]}")
            embedding, sizes, sums = buffers.values()
            if len(given) == 1:
                sizes.fill_(1.0)
                sums.copy_(embedding)
            stack.half_norms[row].copy_(half_norms(embedding))
            stack.started[row] = bool(sizes.sum() > 0)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    @torch.no_grad()
    def set_semantic(self, codes: Tensor) -> None:
        """Makes `codes` `[n, d]` those of codebook 0."""
        stack = self.stacks[0]
        for tensor, value in ((stack.embedding, codes), (stack.embedding_sum, codes),
                              (stack.cluster_size, 1.0), (stack.half_norms, half_norms(codes))):
            tensor[0] = value
        stack.started = [True]

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
        """Quantizes with gradients; sample `b` uses its first `num_codebooks[b]` codebooks. The
        commitment is, per clip, the sum over the levels that it uses, as in DAC (Kumar et al.
        2023): a mean would pull the less the more levels there are."""
        total = self.stacks[-1].levels.stop
        used = torch.arange(total, device=hidden.device) < num_codebooks[:, None]
        semantic, acoustic = hidden.split(self.widths, dim=-1)
        first = self.quantize_semantic(semantic)
        with torch.autocast(hidden.device.type, enabled=False):
            vectors = self.acoustic_in(acoustic.float())
            counted = used[:, 1:].t().float()  # [K - 1, B]
            residuals, codes = self._residual_codes(vectors, counted)
            quantized, commitment = vectors, 0 * vectors.sum()
            if self.stacks[-1].started[-1]:
                quantized = vectors - residuals[-1]
                commitment = summed_squares(vectors, residuals[1:], counted)
        codes = torch.cat((first.codes, codes), dim=1)
        entered = residuals[:-1].split([len(stack.started) for stack in self.stacks[1:]])
        residuals, commitments = [*first.residuals, *entered], (first.commitment, commitment)
        made = first.semantic, quantized, codes, commitments, first.scores, residuals, used
        return Quantized(*made)

    def quantize_semantic(self, semantic: Tensor) -> Quantized:
        """The semantic codebook alone, with gradients: `[B, F, S]` → codes `[B, 1, F]`."""
        (book,) = self.stacks[0].books()
        with torch.autocast(semantic.device.type, enabled=False):
            vectors = self.semantic_in(semantic.float())
            scores = book.scores(vectors)
            codes = scores.argmax(-1)
            used = torch.ones(len(codes), 1, dtype=torch.bool, device=codes.device)
            quantized, commitment = vectors, 0 * vectors.sum()
            if self.stacks[0].started[0]:  # vectors pass as they are until there are codes
                chosen = book.lookup(codes)
                commitment = F.mse_loss(vectors, chosen)
                quantized = vectors + (chosen - vectors).detach()
        residuals = [vectors.detach()[None]]
        made = quantized, None, codes[:, None], (commitment, 0 * commitment), scores
        return Quantized(*made, residuals, used)

    @torch.no_grad()
    def _residual_codes(self, vectors: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """What enters each level of the residual VQ and what the last leaves, `[K, B, F, d]`, and
        codes `[B, K - 1, F]`, of `[B, F, d]`; `counted` `[K - 1, B]` is 1 where a clip uses it."""
        residuals, codes = [vectors], []
        for book, weight in zip(self.codebooks[1:], counted[..., None, None], strict=True):
            codes.append(book.nearest(residuals[-1]))
            residuals.append(residuals[-1].addcmul(book.lookup(codes[-1]), weight, value=-1))
        return torch.stack(residuals), torch.stack(codes, dim=1)

    @property
    def is_initialised(self) -> bool:
        return all(all(stack.started) for stack in self.stacks)

    @torch.no_grad()
    def update(self, info: Quantized, draws: Tensor, freeze_semantic=False, skip=None) -> list:
        """Moves the codebooks of `info` by one EMA step, or starts them by k-means at first.

        `draws` `[K, size of the largest]` in [0, 1), the same on every rank, choose the vectors
        that codes start from. With `freeze_semantic` codebook 0 stays as it is; where the scalar
        `skip` is not 0, all of them. Returns, per stack of `info`, `[levels, size]` bool: the codes
        that began anew; None where it stood still."""
        restarted, stacks = [], self.stacks[: len(info.residuals)]
        # Here alone the device is waited for: once, or as often as the first steps are skipped.
        if skip is not None and not all(all(s.started) for s in stacks) and bool(skip):
            return restarted
        left = None  # what a stack that has just started leaves for the next one
        for stack, vectors in zip(stacks, info.residuals, strict=True):
            levels = stack.levels
            if levels.start == 0 and freeze_semantic:
                restarted.append(None)
            elif all(stack.started):
                codes, used = info.codes[:, levels].transpose(0, 1), info.used[:, levels].t()
                restarted.append(stack.update(vectors, codes, used, draws[levels], skip))
            else:
                if left is None or levels.start < 2:
                    joint = in_joint_order(vectors[0].contiguous().float(), 0)
                    left = joint.flatten(0, 1)[:MAX_CANDIDATES]
                left, fresh = stack.initialise(left, draws[levels])
                restarted.append(fresh)
        return restarted


def summed_squares(vectors: Tensor, errors: Tensor, counted: Tensor) -> Tensor:
    """Mean over clips of the sum over levels of mean(`errors`²), with its gradient in `vectors`
    `[B, F, d]`; `errors` `[K, B, F, d]` are these less constants, `counted` is `[K, B]`. Written
    out, because autograd would keep and pass `errors` several times."""
    scale = 1.0 / vectors.numel()
    value = scale * (torch.linalg.vector_norm(errors, dim=(2, 3)).square() * counted).sum()
    pull = torch.bmm(counted.t()[:, None], errors.flatten(2).transpose(0, 1))  # [B, 1, F * d]
    product = (vectors * (2 * scale * pull).view_as(vectors)).sum()
    return value + (product - product.detach())
