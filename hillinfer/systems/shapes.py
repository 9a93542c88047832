"""Model dimensions that determine the data movement and compute of a decode step."""

from dataclasses import dataclass

from hillinfer.errors import UsageError


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only model; `width` in bytes per value, `mlp` the number of hidden x inner matrices."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    vocab: int
    mlp: int = 3
    width: int = 2

    @property
    def record_bytes(self) -> int:
        """One token's K and V in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.width

    def code_bytes(self, bits: int = 8) -> int:
        """One token's key codes in one layer."""
        return self.kv_heads * self.head_dim * bits // 8

    @property
    def layer_weights(self) -> int:
        """Parameters of one layer's projections and MLP."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + self.mlp * self.hidden * self.inner

    @property
    def head_weights(self) -> int:
        """Parameters of the projection to the vocabulary."""
        return self.hidden * self.vocab

    @property
    def weight_bytes(self) -> int:
        return self.width * (self.layers * self.layer_weights + 2 * self.head_weights)

    def kv_bytes(self, context: int, batch: int = 1) -> int:
        return self.layers * self.record_bytes * context * batch


_PUBLISHED = (  # configurations of the models
    ModelShape("embedded", 6, 8, 4, 64, 320, 384, 2869, width=4),  # data/model, as the demo runs it
    ModelShape("opt-6.7b", 32, 32, 32, 128, 4096, 16384, 50272, mlp=2),
    ModelShape("longchat-7b", 32, 32, 32, 128, 4096, 11008, 32000),
    ModelShape("qwen-7b", 32, 32, 32, 128, 4096, 11008, 151936),
    ModelShape("llama-2-13b", 40, 40, 40, 128, 5120, 13824, 32000),
    ModelShape("llama-3.1-8b", 32, 32, 8, 128, 4096, 14336, 128256),
    ModelShape("qwen2.5-7b", 28, 28, 4, 128, 3584, 18944, 152064),
    ModelShape("qwen3-8b", 36, 32, 8, 128, 4096, 12288, 151936),
)
SHAPES = {shape.name: shape for shape in _PUBLISHED}


def find_shape(name: str) -> ModelShape:
    if name not in SHAPES:
        raise UsageError(f"no model shape '{name}'; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def shape_of(config, width: int = 2) -> ModelShape:
    """The shape of a Hugging Face text config (Llama, Qwen, Mistral, OPT), with `width` bytes per value."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    gated = getattr(config, "intermediate_size", None)  # OPT has no gate, and another name
    inner, mlp = (gated, 3) if gated else (config.ffn_dim, 2)
    layers, vocab = config.num_hidden_layers, config.vocab_size
    return ModelShape(config.model_type, layers, heads, kv_heads, head_dim, hidden, inner, vocab, mlp, width)
