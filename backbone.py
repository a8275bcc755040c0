"""A pretrained language model as the dialogue LM's temporal transformer, with its vocabulary.

Gemma 3, Qwen 3 and Llama by their Hugging Face id or folder, or a GGUF file. What our transformer
has no place for is folded into the weights: Gemma's norms of weight 1 + w, its embeddings' scale,
and another scale of the queries than that of their width.
"""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn

from command import UserError
from s2s import PAD, S2S
from teachers import why_not
from transformer import LayerKind, TransformerConfig

RECOMMENDED = "google/gemma-3-1b-pt"  # 1.3 tokens a Hindi word and 2.7 a Telugu one
FAMILIES = {"gemma3_text": "Gemma 3", "qwen3": "Qwen 3", "llama": "Llama"}
PROBED = 256  # tokens, whose states tell how likely PAD begins
NEW_INPUT = 0.25  # root mean square of each input that is not text, against a token's
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Single characters that stay, whatever the texts hold: Latin (and a byte's), Devanagari, Telugu.
LETTERS = ((0x00, 0x17F), (0x900, 0x97F), (0xC00, 0xC7F))
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass
class Backbone:
    """What the dialogue LM takes from a pretrained one.

    layers: of its transformer, whose weights `tensors` are named as a `StreamingTransformer`'s.
    embedding, head: of each token, `[V, D]` fp32, the scale of what the layers read in them.
    tokenizer: JSON of the `tokenizers` library; start: the token that texts begin with, or None."""

    source: str
    layers: TransformerConfig
    tensors: dict[str, Tensor]
    embedding: Tensor
    head: Tensor
    tokenizer: str
    start: int | None


def load_backbone(source: str) -> Backbone:
    """UserError where it cannot be had, or has what the transformer here lacks."""
    import transformers as hub

    file = Path(source)
    options = {"gguf_file": file.name} if file.suffix == ".gguf" else {}
    where = str(file.parent) if options else source
    try:
        config = hub.AutoConfig.from_pretrained(where, **options)
        if config.model_type not in FAMILIES:
            families = ", ".join(FAMILIES.values())
            raise UserError(f"--backbone {source}: a {config.model_type} model; one of {families}")
        tokenizer = hub.AutoTokenizer.from_pretrained(where, **options)
        model, found = hub.AutoModelForCausalLM.from_pretrained(
            where, dtype=torch.float32, output_loading_info=True, **options)  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        families = " or ".join(FAMILIES.values())
        raise UserError(why_not("--backbone", source, families, error)) from error
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if absent := sorted(set(found["missing_keys"]) - tied):
        raise UserError(f"--backbone {source}: no weights for {absent[0]}; fetch the model again")
    gemma = config.model_type == "gemma3_text"
    layers, names = layers_of(model, source), dict(model.model.named_parameters())
    scale = layers.dim**0.5 if gemma else 1.0
    return Backbone(
        source, layers, renamed(names, layers, config), names["embed_tokens.weight"].data * scale,
        model.lm_head.weight.data, tokenizer.backend_tokenizer.to_str(),
        tokenizer.bos_token_id)  # fmt: skip


def layers_of(model: nn.Module, source: str) -> TransformerConfig:
    """The transformer's sizes; of the context, all that it was trained on."""
    c = model.config
    for name in ("attention_bias", "mlp_bias", "attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(c, name, None):
            raise UserError(f"--backbone {source}: has {name}, which the transformer here lacks")
    pattern = getattr(c, "layer_types", None) or ["full_attention"] * c.num_hidden_layers
    names, rotary = sorted(set(pattern)), model.model.rotary_emb
    gemma, kinds = c.model_type == "gemma3_text", []
    for name in names:
        prefix = f"{name}_" if gemma else ""
        if getattr(rotary, f"{prefix}attention_scaling", 1.0) != 1.0:
            raise UserError(f"--backbone {source}: scales its attention with its rotary positions")
        frequencies = getattr(rotary, f"{prefix}inv_freq")
        window = c.sliding_window if name == "sliding_attention" else None
        kinds.append(LayerKind(tuple(frequencies.double().tolist()), window))
    return TransformerConfig(
        c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.max_position_embeddings,
        num_kv_heads=c.num_key_value_heads, ffn_dim=c.intermediate_size, norm_eps=c.rms_norm_eps,
        head_width=2 * len(kinds[0].frequencies), query_key_norm=c.model_type != "llama",
        activation=ACTIVATIONS[c.hidden_activation if gemma else c.hidden_act],
        norms_after=gemma, kinds=tuple(kinds), recompute=True,
        pattern=tuple(names.index(name) for name in pattern))  # fmt: skip


def renamed(theirs: dict[str, Tensor], layers: TransformerConfig, config) -> dict[str, Tensor]:
    """A `StreamingTransformer`'s weights, by its names."""
    gemma = config.model_type == "gemma3_text"
    norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    if gemma:
        norms |= {"ffn_norm": "pre_feedforward_layernorm",
                  "attention_norm_after": "post_attention_layernorm",
                  "ffn_norm_after": "post_feedforward_layernorm"}  # fmt: skip
    if layers.query_key_norm:
        norms |= {f"attention.{x}_norm": f"self_attn.{x[0]}_norm" for x in ("query", "key")}
    fused = {"attention.qkv": [f"self_attn.{x}_proj" for x in "qkv"],
             "attention.out": ["self_attn.o_proj"], "ffn.down": ["mlp.down_proj"],
             "ffn.gate_up": ["mlp.gate_proj", "mlp.up_proj"]}  # fmt: skip
    offset = 1.0 if gemma else 0.0
    tensors = {"norm.weight": theirs["norm.weight"].data + offset}
    for i in range(layers.num_layers):
        ours, from_ = f"blocks.{i}", f"layers.{i}"
        for name, parts in fused.items():
            weights = [theirs[f"{from_}.{part}.weight"].data for part in parts]
            tensors[f"{ours}.{name}.weight"] = torch.cat(weights)
        for name, part in norms.items():
            tensors[f"{ours}.{name}.weight"] = theirs[f"{from_}.{part}.weight"].data + offset
        if gemma:
            scale = (layers.head_dim / config.query_pre_attn_scalar) ** 0.5
            tensors[f"{ours}.attention.query_norm.weight"] *= scale
    return tensors


def trimmed(backbone: Backbone, spelled: Iterable[str], most: int) -> Backbone:
    """The backbone with `PAD` as token 0 and then, in their order, those of its own tokens that
    spell `spelled`, the most frequent `most` of them (0: all of the vocabulary), with whatever
    merges into them, so that these are spelled as before, and letters and bytes, so that anything
    can be. Marks, as of a turn's begin, go; the one that texts begin with is where `PAD` starts."""
    state = json.loads(backbone.tokenizer)
    if state["model"]["type"] != "BPE":
        raise UserError(f"--backbone {backbone.source}: not a BPE tokenizer")
    vocabulary, marks = state["model"]["vocab"], {t["content"] for t in state["added_tokens"]}
    marks = {mark for mark in marks if len(mark) > 1} - BYTES - {state["model"]["unk_token"]}
    state |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    kept = vocabulary.keys()
    if most:
        kept = closed(vocabulary, used(Tokenizer.from_str(json.dumps(state)), spelled), most)
        kept |= {state["model"]["unk_token"]} & vocabulary.keys()
    kept = sorted(kept - marks, key=vocabulary.get)
    rows = torch.tensor([vocabulary[token] for token in kept])
    state["model"]["vocab"] = {"<pad>": PAD} | {token: i for i, token in enumerate(kept, 1)}
    state["model"]["merges"] = merges_within(state["model"]["merges"], set(kept))
    embedding, head = backbone.embedding[rows], backbone.head[rows]
    none = embedding.mean(0) if backbone.start is None else backbone.embedding[backbone.start]
    return dataclasses.replace(
        backbone, embedding=torch.cat((none[None], embedding)),
        head=torch.cat((torch.zeros_like(head[:1]), head)),
        tokenizer=json.dumps(state, ensure_ascii=False), start=PAD)  # fmt: skip


def used(tokenizer: Tokenizer, spelled: Iterable[str]) -> list[str]:
    """Its tokens in `spelled`, the most frequent first."""
    pieces, counts = Counter(spelled), Counter()
    encodings = tokenizer.encode_batch(list(pieces))
    for encoding, times in zip(encodings, pieces.values(), strict=True):
        counts.update(dict.fromkeys(encoding.tokens, times))
    return [token for token, _ in counts.most_common()]


def closed(vocabulary: dict[str, int], tokens: Sequence[str], most: int) -> set[str]:
    """The first of `tokens`, each with all of the vocabulary that is a part of it, until they are
    `most`; and letters and bytes. Nothing is ever split, so what merges into a token is within it:
    the merges among these spell such tokens as all merges do."""
    kept = {t for t in vocabulary if t in BYTES or (len(t) == 1 and is_letter(t))}
    for token in tokens:
        if len(kept) >= most:
            break
        ends = itertools.combinations(range(len(token) + 1), 2)
        kept |= {token[a:b] for a, b in ends} & vocabulary.keys()
    return kept


def is_letter(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in LETTERS)


def merges_within(merges: list, kept: set[str]) -> list:
    """Those of which both parts and the whole are kept; `"a b"` or `["a", "b"]` each."""
    pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in merges)
    return [merge for merge, (a, b) in pairs if a in kept and b in kept and a + b in kept]


@torch.no_grad()
def start_from(model: S2S, backbone: Backbone) -> None:
    """Gives the LM the backbone's layers and tokens. What else comes into the sum that the layers
    read starts at NEW_INPUT of a token's size, lest they read noise; `PAD`, which no language model
    has said, as likely as all tokens together, by the layers' states over some; the user's words,
    which the same head tells, as likely as each other."""
    model.temporal.load_state_dict(backbone.tensors)
    size = NEW_INPUT * backbone.embedding.square().mean().sqrt()
    for table in (model.age_embedding, model.emotion_embedding, model.language_embedding):
        table.weight.mul_(size / table.weight.std())
    for layer in filter(None, (model.user_projection, model.agent_projection)):
        layer.weight.mul_(size / layer.weight.std() * layer.in_features**-0.5)
    for tensor in model.words_projection.parameters():
        tensor.zero_()
    model.text_embedding.weight.copy_(backbone.embedding)
    model.text_head.weight.copy_(backbone.head)
    states = model.temporal(model.text_embedding.weight[None, PAD + 1 :][:, :PROBED])[0]
    tokens = (states @ model.text_head.weight[PAD + 1 :].T).logsumexp(-1).mean()
    usual = states.mean(0)
    model.text_head.weight[PAD] = usual * tokens / usual.square().sum()
