"""Configuration of a PHD-Transformer with a norm scheme of the HybridNorm family."""

import math

import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    raise RuntimeError(
        f"this model's code needs transformers 5 or later, and transformers {transformers.__version__} is installed; "
        "update it: pip install -U 'transformers>=5'"
    )

from transformers import PreTrainedConfig

from .copy_positions import COPY_POSITIONS
from .kv_policy import KVPolicy
from .norm_schemes import norm_scheme


class PHDConfig(PreTrainedConfig):
    """Architecture of :class:`PHDForCausalLM`; Llama's names plus those below.

    Args:
        normalization: ``RMSNorm`` or ``LayerNorm``, with epsilon ``rms_norm_eps``.
        mlp_gated: gate and up projections (SwiGLU with ``hidden_act="silu"``) instead of one up projection.
        attention_bias: biases of the q, k and v projections.
        attention_output_bias: bias of the attention output projection.
        mlp_bias: biases of the FFN projections.
        rope_parameters: ``rope_theta`` and optionally ``partial_rotary_factor``; ``rope_type`` is ``default``, or
            ``llama3`` or ``yarn`` with their words in transformers.
        phd_repeat: ``K``, how often a token is repeated inside the decoder; 1 is the vanilla transformer.
        phd_window: ``W``, token positions of hidden keys a hidden query sees, its own included.
        phd_chunk: ``C``, the window stays inside chunks of ``C`` positions; ``None`` for no chunks.
        phd_copy_positions: by what RoPE turns the copies of a token, see ``copy_positions.py``.
        phd_copy_embedding: ``vector`` adds a learned one to each of copies 2 to ``K`` after the embedding, or ``none``.
        norm_scheme: row of ``norm_schemes.py``.
        num_experts: experts of each layer that is not in ``mlp_only_layers``; 0 for a dense model. Further words:
            ``num_experts_per_tok``, ``moe_intermediate_size`` (of one expert, by default ``intermediate_size``),
            ``shared_expert_intermediate_size`` (of those that compute every row, 0 for none) with
            ``use_shared_expert_gate``.
        scoring_func: ``softmax`` over the chosen experts (``norm_topk_prob``) or over all, or ``sigmoid``, which may
            have a bias for the choice alone (``use_expert_bias``). ``n_group`` and ``topk_group`` limit the choice to
            the best groups, ``routed_scaling_factor`` multiplies the weights, ``router_dtype`` (``fp32``, ``fp64``) is
            what the router computes in.

    Raises:
        ValueError: for sizes that do not fit, an unknown scheme, or a RoPE type this model does not have.
    """

    model_type = "phd_transformer"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers reads a plain list)

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]  # then num_attention_heads
    head_dim: int = None  # type: ignore[assignment]  # then hidden_size / num_attention_heads
    hidden_act: str = "silu"
    mlp_gated: bool = True
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    normalization: str = "RMSNorm"
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict = None  # type: ignore[assignment]  # then theta 10000
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    phd_repeat: int = 1
    phd_window: int = 1
    phd_chunk: int | None = None
    phd_copy_positions: str = "token"
    phd_copy_embedding: str = "none"
    norm_scheme: str = "pre"
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    mlp_only_layers: list[int] | None = None
    norm_topk_prob: bool = True
    scoring_func: str = "softmax"
    use_expert_bias: bool = False
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0
    shared_expert_intermediate_size: int = 0
    use_shared_expert_gate: bool = False
    router_dtype: str | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Refuse what cannot be; the model asks again, because ``from_pretrained`` sets fields afterwards."""
        norm_scheme(self.norm_scheme)
        self.kv_policy()
        if self.phd_copy_positions not in COPY_POSITIONS:
            raise ValueError(f"phd_copy_positions={self.phd_copy_positions!r}: choose {', '.join(COPY_POSITIONS)}")
        if self.phd_copy_embedding not in ("none", "vector"):
            raise ValueError(f"phd_copy_embedding={self.phd_copy_embedding!r}: choose none or vector")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; each KV head serves the same number of query heads"
            )
        if self.normalization not in ("RMSNorm", "LayerNorm"):
            raise ValueError(f"normalization={self.normalization!r}: choose RMSNorm or LayerNorm")
        rope_type = self.rope_parameters.get("rope_type", "default")
        if rope_type not in ("default", "llama3", "yarn"):
            raise ValueError(f"rope_type={rope_type!r}: this model has none but default, llama3 and yarn")
        if rope_type != "default" and not 1 <= self.rope_parameters["factor"] < math.inf:
            raise ValueError(f"factor={self.rope_parameters['factor']!r} of RoPE: it must be at least 1, and finite")
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func={self.scoring_func!r}: choose softmax or sigmoid")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} of num_experts={self.num_experts}")

    def has_experts(self, layer_index: int) -> bool:
        """Whether the layer with this 0-based index has experts."""
        return self.num_experts > 0 and layer_index not in (self.mlp_only_layers or ())

    def kv_policy(self) -> KVPolicy:
        """What each query sees, as the one definition that training used."""
        return KVPolicy(self.phd_repeat, self.phd_window, self.phd_chunk)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE turns, the first ones."""
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))


__all__ = ["PHDConfig"]
