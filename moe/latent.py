"""The shape of multi-head latent attention, and what makes it impossible."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Widths of `model.attention: mla` (DeepSeek-V2, arXiv 2405.04434, section 2.1); num_heads is the model's."""

    kv_lora_rank: int = 0
    """Width of the latent that keys and values of all heads come from."""
    q_lora_rank: int = 0
    """Width of the latent that queries come from; 0 projects them directly."""
    qk_nope_head_dim: int = 0
    """Part of a query or key head that positions leave alone."""
    qk_rope_head_dim: int = 0
    """Part of a query head that positions turn, and width of the key part that all heads share; even."""
    v_head_dim: int = 0
    """Width of a value head."""

    @property
    def query_size(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def is_set(self) -> bool:
        """Whether any width is given."""
        return any(asdict(self).values())

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = [f"{name}: {value} is negative" for name, value in asdict(self).items() if value < 0]
        found += [
            f"{name}: must be at least 1 with attention mla"
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            if getattr(self, name) == 0
        ]
        if self.qk_rope_head_dim % 2:
            found.append(f"qk_rope_head_dim: {self.qk_rope_head_dim} is odd; rotary positions need an even width")
        return found
