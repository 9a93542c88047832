"""Constructed initial weights, with which training learns retrieval in minutes instead of hours.

No weights are frozen; the initialisation only provides circuits that a random start would have to discover. Of the
hidden size of 320, 64 dimensions encode the token itself, 8 x 24 encode hashes of the last eight tokens, and 64 serve
as a scratch register (the note).
- Layer 0: head h attends h+1 tokens back (query and key biases whose RoPE phases cancel at that distance) and writes a
  hash of that token to its slot, so each position encodes its last eight tokens.
- Layer 1: heads also attend 1 to 8 tokens back, with small random values; one head instead finds the latest token after
  "Paragraph " and writes it to the note.
- Layers 2 and 3: one query head of each GQA group matches the slots against those of earlier positions, shifted by one
  (an induction head over eight-token n-grams). Two groups copy the token found there, two copy the note found there.
  The first token of the text is their attention sink: of the former when the question asks for a paragraph, of the
  latter otherwise. The other query heads are random.
- Deeper layers and all MLPs start small and random.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SLOT = 24
TOKEN, NOTE = slice(0, 64), slice(256, 320)
SLOTS = [slice(64 + SLOT * i, 64 + SLOT * (i + 1)) for i in range(8)]
FIRST_FLAT = 12  # rotary frequencies from here on rotate by less than half a radian over the window: used for content
FLAT = torch.cat([torch.arange(FIRST_FLAT, 32), torch.arange(32 + FIRST_FLAT, 64)])
SHARP = 10.0  # nats per rotary frequency


def config_of(settings: dict, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab, hidden_size=320, head_dim=64, num_attention_heads=8, num_key_value_heads=4,
        num_hidden_layers=settings["layers"], intermediate_size=settings["ffn"], attention_bias=True,
        tie_word_embeddings=True, max_position_embeddings=settings["window"], rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
        bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.02,
    )  # fmt: skip


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(columns, columns))[0][:rows]


def heads(attention) -> dict[str, torch.Tensor]:
    """Views by head: query (8, 64, d) and key, value (4, 64, d), their biases, output (d, 8, 64)."""
    views = {"o": attention.o_proj.weight.view(-1, 8, 64)}
    for name, n in (("q", 8), ("k", 4), ("v", 4)):
        projection = getattr(attention, f"{name}_proj")
        views[name] = projection.weight.view(n, 64, -1)
        views[name + "_bias"] = projection.bias.view(n, 64)
    return views


def look_back(w: dict, theta: float) -> None:
    """Bias query head h to attend h+1 tokens back, where the RoPE phases of query and key cancel."""
    frequency = theta ** (-torch.arange(32) / 32.0)[:FIRST_FLAT]
    amplitude = (SHARP * 8) ** 0.5  # 8 = sqrt(head_dim)
    w["k_bias"][:, :FIRST_FLAT] = amplitude
    for head in range(8):
        w["q_bias"][head, :FIRST_FLAT] = amplitude * torch.cos(-frequency * (head + 1))
        w["q_bias"][head, 32 : 32 + FIRST_FLAT] = amplitude * torch.sin(-frequency * (head + 1))


def look_at_header(w: dict, header: torch.Tensor) -> None:
    """Query head 6 attends to the latest position preceded by the header token, and copies its token to the note.

    Three slow frequencies (periods of 350 to 2,600 tokens) favour nearby positions.
    """
    w["q_bias"][6] = 0
    w["q_bias"][6, 4:7] = (SHARP * 8) ** 0.5
    w["q_bias"][6, FLAT[0]] = 16.0
    w["k"][3, FLAT[0], SLOTS[0]] = 4 * header / header.norm()
    w["v"][3, :, TOKEN] = torch.eye(64)
    w["o"][NOTE, 6] = torch.eye(64)


def match(w: dict, hash_: torch.Tensor) -> None:
    """Even query heads match eight slots, five flat dimensions each. Groups 0-1 copy the token, 2-3 the note."""
    for group in range(4):
        for offset in range(8):  # 0 is one token back
            rows = FLAT[offset * 5 : offset * 5 + 5]
            read = 2.5 * orthonormal(5, SLOT) * (0.4 if offset == 0 else 1.0)
            w["k"][group, rows, SLOTS[offset]] = read
            if offset == 0:
                w["q"][2 * group, rows, TOKEN] = read @ hash_
            else:
                w["q"][2 * group, rows, SLOTS[offset - 1]] = read
        w["v"][group, :, TOKEN if group < 2 else NOTE] = torch.eye(64)
        w["o"][TOKEN, 2 * group] = 1.5 * torch.eye(64)


def rest(w: dict, first_keys: torch.Tensor, asked: torch.Tensor) -> None:
    """Bias matching heads towards the first token (the sink) by a number of nats that the token `asked` changes."""
    for group in range(4):
        flat = first_keys[group, FLAT]
        unit = torch.zeros(64)
        unit[FLAT] = 8 * flat / flat.square().sum()  # one nat on the first token
        always, then = (6.0, 60.0) if group < 2 else (60.0, -90.0)
        w["q_bias"][2 * group] += always * unit
        w["q"][2 * group, :, TOKEN] += then * torch.outer(unit, asked / asked.square().sum())


@torch.no_grad()
def build(settings: dict, tokenizer, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config_of(settings, len(tokenizer))).float().eval()
    layers = model.model.layers
    for layer in layers:
        for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            matrix.mul_((2 * len(layers)) ** -0.5)
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, 0.02)
    embedding[:, TOKEN].normal_(0, 1)
    embedding[tokenizer.bos_token_id, TOKEN] = 0  # a head whose sink is the first token copies nothing
    embedding[tokenizer.bos_token_id, 64:256].normal_(0, 1)
    model.model.norm.weight.fill_(0.12)

    def seen(text: str) -> torch.Tensor:
        """The token's 64 dimensions after the first norm."""
        (token,) = tokenizer(text, add_special_tokens=False).input_ids
        return embedding[token, TOKEN] * (320 / embedding[token].square().sum()).sqrt()

    hash_ = orthonormal(SLOT, 64)
    w = heads(layers[0].self_attn)
    look_back(w, settings["rope_theta"])
    w["v"][:, :SLOT, TOKEN] = hash_
    for head in range(8):
        w["o"][SLOTS[head], head, :SLOT] = 0.45 * torch.eye(SLOT)
    w = heads(layers[1].self_attn)
    look_back(w, settings["rope_theta"])
    look_at_header(w, hash_ @ seen("Paragraph "))
    for i in (2, 3):
        w = heads(layers[i].self_attn)
        match(w, hash_)
        kept: list[torch.Tensor] = []
        hook = layers[i].self_attn.k_proj.register_forward_hook(lambda *a, kept=kept: kept.append(a[2][0, 0]))
        model(torch.tensor([[tokenizer.bos_token_id]]))
        hook.remove()
        rest(w, kept[0].view(4, 64), seen("? It is paragraph "))
    return model
