"""Parameters and FLOPs of a configuration, counted without building a tensor.

Shape letters: D model width, F intermediate width, E experts, K experts a token uses, V vocabulary.
"""

from dataclasses import dataclass

from moe.config import ModelConfig
from moe.loss_head import tile_size


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by component: all of them, and those a token meets."""

    total: dict[str, int]
    active: dict[str, int]

    @property
    def num_total(self) -> int:
        return sum(self.total.values())

    @property
    def num_active(self) -> int:
        return sum(self.active.values())


def count_parameters(config: ModelConfig, vocab_size: int) -> ParameterCount:
    """Parameters of `MoEDecoder(config)`; equal to the sum over its tensors."""
    width, layers, sparse = config.hidden_size, config.num_layers, config.num_moe_layers
    attention, attention_norms = _latent_attention(config) if config.attention == "mla" else _grouped_attention(config)
    norms = 2 * width + attention_norms
    expert = 3 * width * config.expert_intermediate_size
    layers += config.has_mtp  # its block is one more, with a projection and three norms of its own
    num_routed = sum(config.block_experts)
    total = {
        "embedding": vocab_size * width,
        "attention": layers * attention,
        "dense mlp": (layers - sparse) * 3 * width * config.dense_intermediate_size,
        "routed experts": num_routed * expert,
        "shared experts": sparse * config.num_shared_experts * expert,
        "router": num_routed * width,
        "norms": layers * norms + width + (3 * width if config.has_mtp else 0),
        "next token": 2 * width * width if config.has_mtp else 0,
        "head": 0 if config.tie_embeddings else vocab_size * width,
    }
    return ParameterCount(total, total | {"routed experts": sparse * config.top_k * expert})


def _grouped_attention(config: ModelConfig) -> tuple[int, int]:
    """Parameters of one attention's projections, and of its norms."""
    head, heads, kv_heads = config.head_size, config.num_heads, config.num_kv_heads
    projections = config.hidden_size * head * (2 * heads + 2 * kv_heads)
    projections += head * (heads + 2 * kv_heads) if config.attention_bias else 0
    return projections, 2 * head if config.qk_norm else 0


def _latent_attention(config: ModelConfig) -> tuple[int, int]:
    width, heads, shape = config.hidden_size, config.num_heads, config.mla
    query = heads * shape.query_size
    projections = shape.q_lora_rank * (width + query) if shape.q_lora_rank else width * query
    projections += width * (shape.kv_lora_rank + shape.qk_rope_head_dim)
    projections += shape.kv_lora_rank * heads * (shape.qk_nope_head_dim + shape.v_head_dim)
    return projections + heads * shape.v_head_dim * width, shape.q_lora_rank + shape.kv_lora_rank


def _head_sizes(config: ModelConfig) -> tuple[int, int]:
    """Width of a query or key head, and of a value head."""
    if config.attention == "mla":
        return config.mla.query_size, config.mla.v_head_dim
    return config.head_size, config.head_size


def flops_per_token(config: ModelConfig, vocab_size: int, sequence_length: int) -> float:
    """Model FLOPs of forward and backward for one token, by active parameters.

    6 a parameter of every matrix product a token goes through (the head counts, the embedding look-up does not), and
    3 * layers * T * heads * (key + value width) for causal attention scores and values, half of the full square
    (Kaplan et al. 2020, arXiv 2001.08361, section 2.1; Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    active = count_parameters(config, vocab_size).active
    matrices = (
        sum(active.values()) - active["embedding"] - active["norms"] - active["head"] + vocab_size * config.hidden_size
    )
    attention = (config.num_layers + config.has_mtp) * sequence_length * config.num_heads * sum(_head_sizes(config))
    return 6.0 * matrices + 3.0 * attention


def activation_bytes(
    config: ModelConfig, vocab_size: int, *, tokens: int, element_bytes: int, kept_graphs: int = 1
) -> float:
    """Estimate of what the backward keeps on one rank, in bytes, for micro-batches of `tokens`.

    What autograd saves of every block under the policy `activation_recompute`, of tokens that all choose alike; masks
    of dropout, allocator overhead and temporaries are not in it. With block recomputation only each block's input is
    kept, and one block is alive at a time. `kept_graphs`: micro-batches whose graphs exist at once (`deferred` keeps
    all).
    """
    blocks = [_kept_elements(config, experts, element_bytes) for experts in config.block_experts]
    if config.activation_recompute == "block":
        kept, alive = float(len(blocks) * config.hidden_size), max(blocks)
    else:
        kept, alive = sum(blocks), 0.0
    kept += config.hidden_size * (_norm_elements(config, element_bytes) + 1)  # the last norm and the head's input
    head = head_bytes(config, vocab_size, tokens=tokens, element_bytes=element_bytes, kept_graphs=kept_graphs)
    return element_bytes * tokens * (kept * kept_graphs + alive) + head


def _kept_elements(config: ModelConfig, experts: int, element_bytes: int) -> float:
    """Elements that a block with so many experts, 0 for a dense one, keeps of each token."""
    width, remakes = config.hidden_size, config.activation_recompute == "selective"
    norm, wide = _norm_elements(config, element_bytes), 4 / element_bytes
    activation = 2 if remakes else 4  # gate and up; silu(gate) and its product with up
    kept = 2 * width * (norm + 1) + _attention_elements(config) + norm * _inner_norms(config)
    if not experts:
        return kept + activation * config.dense_intermediate_size
    kept += wide * 3 * experts + activation * config.num_shared_experts * config.expert_intermediate_size
    if element_bytes == 4:  # the loop on a CPU keeps the input of its activations alone
        return kept + config.top_k * 2 * config.expert_intermediate_size
    router = 0 if remakes else wide * width  # its input in float32
    copies = 1 if remakes else 2  # the experts' outputs, for the gradient of gates; and their inputs
    return kept + router + config.top_k * (copies * width + activation * config.expert_intermediate_size)


def _norm_elements(config: ModelConfig, element_bytes: int) -> float:
    """Elements that a norm keeps for each of its input, which is one of them in float32: there nothing is widened."""
    return 1.0 if config.activation_recompute == "selective" else 1 + 4 / element_bytes


def head_bytes(
    config: ModelConfig, vocab_size: int, *, tokens: int, element_bytes: int = 4, kept_graphs: int = 1
) -> float:
    """Bytes of logits and what is made of them at their worst moment, for micro-batches of `tokens`.

    A whole head keeps exponentials in float32 with each graph; in tiles there is one float32 tile at work. Beside what
    is at work lies the same in the parameters' type, if that is a narrower one; a tile has a copy in any case.
    """
    tile = tile_size(config.loss_tile, tokens, vocab_size)
    if tile < vocab_size:
        return 2 * 4.0 * tokens * tile
    return tokens * vocab_size * (4.0 * kept_graphs + (element_bytes if element_bytes < 4 else 0))


def _attention_elements(config: ModelConfig) -> int:
    """Elements an attention keeps for each token between its norm and its output projection, norms apart."""
    key, value = _head_sizes(config)
    if config.attention == "mla":  # values are a part of what the latent expands to; normed latents beside it
        shape = config.mla
        expanded = config.num_heads * (shape.qk_nope_head_dim + value)
        return config.num_heads * (2 * key + 2 * value) + expanded + shape.q_lora_rank + shape.kv_lora_rank
    # What is mixed is kept twice, by head and by token.
    return config.num_heads * (key + 2 * value) + config.num_kv_heads * (key + value)


def _inner_norms(config: ModelConfig) -> int:
    """Elements of each token that an attention's own norms normalise."""
    if config.attention == "mla":
        return config.mla.q_lora_rank + config.mla.kv_lora_rank
    return config.head_size * (config.num_heads + config.num_kv_heads) if config.qk_norm else 0
