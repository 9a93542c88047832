"""Model dimensions that determine the data movement and compute of a decode step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

from hillinfer.errors import UsageError


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only model.

    inner         MLP width that a token passes through: in a mixture of experts, of the chosen and shared ones
    mlp           number of hidden x inner matrices
    width         bytes per value
    stored_inner  MLP width with all experts, mean over the layers; 0: `inner`
    tables        parameters of embeddings per layer (Gemma 3n)
    """

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
    stored_inner: int = 0
    tables: int = 0

    @property
    def record_bytes(self) -> int:
        """One token's K and V in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.width

    def code_bytes(self, bits: int = 8) -> int:
        """One token's key codes in one layer."""
        return self.kv_heads * self.head_dim * bits // 8

    @property
    def layer_weights(self) -> int:
        """Parameters of one layer's projections and MLP that one token meets."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + self.mlp * self.hidden * self.inner

    @property
    def head_weights(self) -> int:
        """Parameters of the projection to the vocabulary."""
        return self.hidden * self.vocab

    @property
    def weight_bytes(self) -> int:
        """Of the layers with all experts, and of an untied embedding and head."""
        idle = self.mlp * self.hidden * max(0, self.stored_inner - self.inner)
        return self.width * (self.layers * (self.layer_weights + idle) + 2 * self.head_weights + self.tables)

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
    """The shape of any Hugging Face text config, with `width` bytes per value.

    Where layers differ it is that of a full-attention layer, whose KV is tiered; of a list the largest entry counts.
    What a config does not say is estimated: default parameter counts of 130 families are met within 10 %, but layers
    without attention or MLP (Mamba, convolutions) are counted as if they had both.
    """
    layer = config
    if getattr(config, "is_heterogeneous", False):
        kinds = config.layer_types or ()
        layer = config.per_layer_config[kinds.index("full_attention") if "full_attention" in kinds else 0]
    find = partial(_find, (layer, getattr(layer, "attn_config", None), getattr(layer, "ffn_config", None)))
    heads, hidden = find("num_attention_heads", "num_heads") or 1, find("hidden_size", "d_model") or 0
    kv_heads = find("num_key_value_heads", "num_kv_heads", "kv_n_heads") or heads
    if getattr(layer, "multi_query", False) and not getattr(layer, "new_decoder_architecture", False):
        kv_heads = 1  # Falcon-7B, StarCoder
    head_dim = find("head_dim") or hidden // heads
    layers, vocab = find("num_hidden_layers", "num_layers") or 1, find("vocab_size") or 0
    gated = hasattr(layer, "hidden_activation") or getattr(layer, "hidden_act", None) in ("silu", "swish")
    mlp = 3 if gated or config.model_type in ("gemma", "bitnet", "lfm3") else 2
    inner, stored = _inner(find, layer, layers, hidden)
    tables = layers * (find("vocab_size_per_layer_input") or 0) * (find("hidden_size_per_layer_input") or 0)
    name = config.model_type
    return ModelShape(name, layers, heads, kv_heads, head_dim, hidden, inner, vocab, mlp, width, stored, tables)


def window_of(config) -> int | None:
    """The longest sequence that a model is made for, in tokens; None if its config does not say.

    YaRN extends `original_max_position_embeddings` by its factor, whether or not `max_position_embeddings` says so.
    """
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    windows = [getattr(text, name, None) or 0 for name in ("max_position_embeddings", "max_sequence_length")]
    for part in (rope, *rope.values()):  # one table, or one for each kind of layer
        if isinstance(part, dict) and part.get("rope_type") == "yarn":
            windows.append(int(part["factor"] * part["original_max_position_embeddings"]))
    return max(windows) or None


def _find(places: tuple, *names: str) -> int | None:
    """The first of these settings that is a number other than 0, or the largest of a list of them."""
    for place, name in product(places, names):
        value = getattr(place, name, None)
        if value and isinstance(value, int | list | tuple):
            return value if isinstance(value, int) else max(value)
    return None


def _inner(find: Callable, layer, layers: int, hidden: int) -> tuple[int, int]:
    """`ModelShape.inner` and `stored_inner`."""
    dense = find("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_inner", "dff") or 4 * hidden
    count = find("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts") or 1
    if count == 1 or not getattr(layer, "is_moe", True):
        return dense, dense
    width = find("moe_intermediate_size", "expert_ffn_hidden_size") or dense
    shared = find("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")
    shared = shared or (find("n_shared_experts", "num_shared_experts", "moe_num_shared_experts") or 0) * width
    chosen = find("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts") or 1
    sparse = _sparse_layers(find, layer, layers)
    active, stored = (sparse * (n * width + shared) + (layers - sparse) * dense for n in (chosen, count))
    return round(active / layers), round(stored / layers)


def _sparse_layers(find: Callable, layer, layers: int) -> int:
    """How many layers have experts."""
    if kinds := getattr(layer, "mlp_layer_types", None):
        return layers - kinds.count("dense")
    if listed := getattr(layer, "moe_layers", None):
        return len(listed)
    first = find("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index") or 0
    step = find("decoder_sparse_step", "moe_layer_interval", "expert_layer_period") or 1
    return (layers - first) // step - len(getattr(layer, "mlp_only_layers", None) or ())
