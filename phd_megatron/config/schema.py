"""What a run is: one dataclass per section of the YAML file.

Field names are Megatron's own and unique over all sections, so each is also a command-line flag. A comment after ``#:``
is the flag's help text. ``None`` means "derived"; the resolved configuration that is printed and saved says from what.
Fields of Megatron-Core's ``TransformerConfig`` that are not listed here are accepted too and land in
``ModelConfig.transformer``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Backend = Literal["auto", "reference", "sdpa", "flex", "triton", "sdpa_triton"]
CopyPositions = Literal["token", "repeated", "fraction"]


@dataclass
class ModelConfig:
    """Architecture. Compared field by field on resume; a difference is refused."""

    num_layers: int | None = None  #: decoder layers
    hidden_size: int | None = None  #: model width
    ffn_hidden_size: int | None = None  #: width of one FFN branch; default 4 * hidden_size
    num_attention_heads: int | None = None  #: query heads
    num_query_groups: int | None = None  #: KV heads; default num_attention_heads
    kv_channels: int | None = None  #: head dimension; default hidden_size / num_attention_heads
    seq_length: int = 1024  #: original tokens per sample
    max_position_embeddings: int | None = None  #: positions the model is declared for; default seq_length
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"  #: kind of norm
    layernorm_epsilon: float = 1e-5  #: epsilon of every norm
    gated_linear_unit: bool = True  #: SwiGLU FFN (silu gate); false is a plain GELU FFN
    add_bias_linear: bool = False  #: biases in linear layers
    add_qkv_bias: bool = False  #: bias in the QKV projection only
    hidden_dropout: float = 0.0  #: dropout after each sublayer
    attention_dropout: float = 0.0  #: dropout on attention weights
    rotary_base: float = 10000.0  #: RoPE theta
    rotary_percent: float = 1.0  #: share of the head dimension that RoPE turns
    untie_embeddings_and_output_weights: bool = False  #: separate LM head
    vocab_size: int | None = None  #: true vocabulary; default the tokenizer's
    make_vocab_size_divisible_by: int = 128  #: padding of the vocabulary; a property of the model, never times TP
    phd_repeat: int = 1  #: K, how often a token is repeated (PHD); 1 is the vanilla model
    phd_window: int | None = None  #: W, token positions of hidden keys a query sees, its own included; 1 is plain PHD
    phd_chunk: int | None = None  #: C, the window stays inside chunks of C positions; null is PHD-SWA
    phd_copy_positions: CopyPositions = "token"  #: RoPE turns copy j of token n by n, K n + j - 1 or n + (j - 1)/K
    phd_copy_embedding: Literal["none", "vector"] = "none"  #: vector adds a learned one to each of copies 2 to K
    phd_last_layer_pruning: bool = True  #: compute only the last copy's query, projection and FFN in the last layer
    norm_scheme: str = "pre"  #: row of the norm-scheme table
    init: Literal["auto", "normal", "depth_scaled", "megatron", "deepnorm"] = "auto"  #: auto is the norm scheme's own
    init_method_std: float | None = None  #: std of the truncated normal; default 1/sqrt(2.5 * hidden_size)
    head_init_method_std: float | None = None  #: that of an untied LM head; default init_method_std
    phd_attention_backend: Backend = "auto"  #: PHD attention; triton ones fuse norm and RoPE too
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"  #: linear and norm modules
    transformer: dict[str, Any] = field(default_factory=dict)  #: further TransformerConfig fields by name


@dataclass
class ParallelConfig:
    """How the run is laid out over ranks. May change between a save and a load."""

    tensor_model_parallel_size: int = 1  #: TP
    pipeline_model_parallel_size: int = 1  #: PP
    virtual_pipeline_model_parallel_size: int | None = None  #: VPP, model chunks per pipeline rank
    num_layers_per_virtual_pipeline_stage: int | None = None  #: says VPP by the layers of a chunk; resolved to it
    num_layers_in_first_pipeline_stage: int | None = None  #: layers of the first stage, where it has fewer or more
    num_layers_in_last_pipeline_stage: int | None = None  #: layers of the last stage
    pipeline_model_parallel_layout: str | None = None  #: stages in letters, such as Ettt|tttt|tttt|tttL
    account_for_embedding_in_pipeline_split: bool = False  #: the embedding counts as a layer when layers are divided
    account_for_loss_in_pipeline_split: bool = False  #: the loss counts as a layer when layers are divided
    microbatch_group_size_per_vp_stage: int | None = None  #: micro-batches a chunk runs in a row; default PP
    overlap_p2p_comm: bool | None = None  #: pipeline transfers beside compute; default on with virtual stages
    overlap_p2p_comm_warmup_flush: bool = False  #: also while the pipeline fills and drains; virtual stages only
    context_parallel_size: int = 1  #: CP
    cp_comm_type: Literal["all_gather", "p2p"] = "all_gather"  #: how keys and values reach the other CP ranks
    expert_model_parallel_size: int = 1  #: EP
    expert_tensor_parallel_size: int | None = None  #: TP of the experts; default TP
    sequence_parallel: bool = False  #: split norms and residuals over the TP group
    use_distributed_optimizer: bool = True  #: shard optimizer states over DP
    overlap_grad_reduce: bool = False  #: overlap gradient reduction with backward
    overlap_param_gather: bool = False  #: overlap parameter gather with forward
    ddp_bucket_size: int | None = None  #: parameters per gradient bucket
    device: Literal["auto", "cpu", "cuda"] = "auto"  #: auto is cuda where there is one
    distributed_timeout_minutes: float = 10.0  #: timeout of collectives


@dataclass
class DataConfig:
    """What is read, in which order."""

    data_path: list[str] = field(default_factory=list)  #: PREFIX, or WEIGHT PREFIX pairs of a blend
    split: str = "969,30,1"  #: shares of training, validation and test
    train_data_path: list[str] | None = None  #: blend of the training set, instead of data_path and split
    valid_data_path: list[str] | None = None  #: blend of the validation set
    test_data_path: list[str] | None = None  #: blend of the test set
    tokenizer: str | None = None  #: byte, or a tokenizer directory; default the data's own
    data_cache_path: str | None = None  #: index cache; default beside the data
    data_horizon_samples: int | None = None  #: samples the training order is drawn for; default the run's own length
    num_workers: int = 0  #: data loader processes
    reset_position_ids: bool = False  #: positions restart after each end of document
    reset_attention_mask: bool = False  #: no attention across documents
    eod_mask_loss: bool = False  #: no loss on the end-of-document token
    allow_changed_data: bool = False  #: resume though the data is not what the checkpoint was trained on


@dataclass
class TrainingConfig:
    """Length, batch, precision and evaluation."""

    micro_batch_size: int = 1  #: samples per rank and forward pass
    global_batch_size: int | None = None  #: samples per step; default micro_batch_size * data-parallel size
    rampup_batch_size: list[int] | None = None  #: START INCREMENT SAMPLES
    train_iters: int | None = None  #: steps; or use train_samples
    train_samples: int | None = None  #: samples; or use train_iters
    eval_interval: int | None = None  #: steps between validations; default 1000, or use evals_per_run
    evals_per_run: int | None = None  #: validations of a run, spread evenly over its samples, the last at its end
    eval_iters: int = 100  #: global batches per validation, at most one pass over the split; 0 is none
    exit_interval: int | None = None  #: stop (and save) after this many steps of this start
    exit_duration_in_mins: float | None = None  #: stop (and save) after this long
    seed: int = 1234  #: seed of initialisation, data order and dropout
    bf16: bool = False  #: bfloat16 parameters with fp32 main parameters
    fp16: bool = False  #: float16 with loss scaling
    accumulate_allreduce_grads_in_fp32: bool = True  #: gradient buffers in fp32 with bf16/fp16


@dataclass
class OptimizerConfig:
    """AdamW and the learning-rate schedule."""

    lr: float = 3e-4  #: peak learning rate
    min_lr: float = 0.0  #: final learning rate
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"  #: schedule
    lr_decay_iters: int | None = None  #: default train_iters
    lr_decay_samples: int | None = None  #: default train_samples
    lr_warmup_iters: int = 0  #: warm-up in steps
    lr_warmup_samples: int = 0  #: warm-up in samples
    lr_warmup_tokens: int = 0  #: warm-up in original tokens
    lr_warmup_fraction: float | None = None  #: warm-up as a share of the decay length
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"  #: WSD annealing
    lr_wsd_decay_iters: int | None = None  #: length of the WSD annealing in steps
    lr_wsd_decay_samples: int | None = None  #: length of the WSD annealing in samples
    weight_decay: float = 0.1  #: decoupled weight decay
    decay_norms: bool = False  #: also decay norm weights and biases, as the HybridNorm authors do
    decay_embeddings: bool = True  #: decay the input embedding, its tied copy as a head included
    adam_beta1: float = 0.9  #: AdamW beta 1
    adam_beta2: float = 0.95  #: AdamW beta 2
    adam_eps: float = 1e-8  #: AdamW epsilon
    clip_grad: float = 1.0  #: gradient clipping by global norm; 0 is none


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    save: str | None = None  #: directory to save into
    load: str | None = None  #: directory to resume from
    save_interval: int | None = None  #: steps between saves; a final save is always made
    keep_last: int | None = None  #: keep only the newest so many checkpoints; default all
    async_save: bool = False  #: go on training while a checkpoint is written; one copy of the state in host memory
    verify_checkpoint: bool = True  #: compare every file with its checksum before loading
    exit_on_missing_checkpoint: bool = False  #: refuse to start fresh when load holds no checkpoint
    finetune: bool = False  #: load parameters only and start at step 0
    no_load_optim: bool = False  #: do not load optimizer and schedule
    no_load_rng: bool = False  #: do not load random-number state


@dataclass
class LoggingConfig:
    """What a run reports."""

    log_interval: int = 10  #: steps between log lines
    metrics_file: str | None = None  #: append one JSON object per logged step
    tensorboard_dir: str | None = None  #: default SAVE/tensorboard when tensorboard is installed
    wandb_project: str | None = None  #: log to Weights & Biases
    wandb_exp_name: str | None = None  #: run name there
    peak_tflops: float | None = None  #: peak of one device for MFU; default by device name, null on CPU
    progress: Literal["auto", "on", "off"] = "auto"  #: live display; auto is on a terminal only
    log_layer_statistics: int = 0  #: statistics by layer in the first step and every so many; 0 is none
    dump_gradients_dir: str | None = None  #: write every parameter's full gradient (safetensors) for comparison
    dump_gradients_iterations: list[int] = field(default_factory=lambda: [1])  #: at these steps
    profile: bool = False  #: trace some steps with torch's profiler
    profile_step_start: int = 10  #: trace the steps after this one
    profile_step_end: int = 12  #: up to this one, itself included
    profile_ranks: list[int] = field(default_factory=lambda: [0])  #: ranks that write a trace
    profile_dir: str | None = None  #: where traces go; default SAVE/profile


@dataclass
class RunConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
