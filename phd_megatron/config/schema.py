"""What a run is: one dataclass per section of the YAML file.

Field names are Megatron's own and unique over all sections, so each is also a command-line flag. The comment ``#:``
above a field is the flag's help text. ``None`` means "derived"; the resolved configuration that is printed and saved
says from what. An annotation holds all that is known of a field (see :mod:`.facts`): its type, its range,
its role, from which follows what a resume does with it, and what it needs.
Fields of Megatron-Core's ``TransformerConfig`` that are not listed here are accepted too and land in
``ModelConfig.transformer``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from phd_megatron.config.facts import (
    COMPUTING,
    FORM,
    GRADIENT_BUFFERS,
    INITIAL,
    LAYOUT,
    OPTIMIZER_STATES,
    PIPELINE_CUT,
    PLACE,
    RECIPE,
    REPORT,
    SCHEDULE,
    SHAPE,
    START,
    Batch,
    BelowOne,
    Copies,
    Depth,
    Deviation,
    Dropout,
    Epsilon,
    Growth,
    Length,
    Minutes,
    Needs,
    NewtonSchulzSteps,
    NotNegative,
    Positive,
    Rank,
    Samples,
    SamplesOrNone,
    Seed,
    Share,
    Size,
    Steps,
    StepsOrNone,
    Stretch,
    TokensOrNone,
    Turns,
)

Backend = Literal["auto", "reference", "sdpa", "flex", "triton", "sdpa_triton"]
ExpertsBackend = Literal["auto", "grouped_mm", "te", "sequential"]
CopyPositions = Literal["token", "repeated", "fraction"]

_TO_SAVE = Needs("save", reason="a place to save")
_TO_SAVE_OFTEN = Needs("save_interval", reason="saves during the run; the one at its end is waited for in any case")
_TO_LOAD = Needs("load", reason="a checkpoint to load")
_TO_WRITE = Needs("metrics_file", "tensorboard_dir", "wandb_project", reason="a place to write them")
_TO_FP16 = Needs("fp16", reason="a loss to scale; only fp16 has it")
_TO_DECOUPLE = Needs("decoupled_lr", reason="a rate to fall from")
_OF_MUON = Needs("optimizer", value="muon", reason="the optimizer that has it")
_OF_ROPE_SCALING = Needs("use_rope_scaling", reason="the scaling that reads it")
_OF_YARN = Needs("position_embedding_type", value="yarn", reason="the scaling that reads it")
_ON_WANDB = Needs("wandb_project", reason="a project there")
_OF_DEEPSPEED = Needs("deepspeed", reason="the engine that reads it")


@dataclass
class ModelConfig:
    """Architecture. Compared field by field on resume; a difference is refused."""

    #: decoder layers
    num_layers: Annotated[Depth | None, SHAPE] = None
    #: model width
    hidden_size: Annotated[Size | None, SHAPE] = None
    #: width of one FFN branch; default 4 * hidden_size
    ffn_hidden_size: Annotated[Size | None, SHAPE] = None
    #: query heads
    num_attention_heads: Annotated[Size | None, SHAPE] = None
    #: KV heads; default num_attention_heads
    num_query_groups: Annotated[Size | None, SHAPE] = None
    #: head dimension; default hidden_size / num_attention_heads
    kv_channels: Annotated[Size | None, SHAPE] = None
    #: original tokens per sample
    seq_length: Annotated[Length, FORM] = 1024
    #: positions the model is declared for; default seq_length
    max_position_embeddings: Annotated[Length | None, FORM] = None
    #: kind of norm
    normalization: Annotated[Literal["RMSNorm", "LayerNorm"], SHAPE] = "RMSNorm"
    #: epsilon of every norm
    layernorm_epsilon: Annotated[Epsilon, SHAPE] = 1e-5
    #: SwiGLU FFN (silu gate); false is a plain GELU FFN
    gated_linear_unit: Annotated[bool, SHAPE] = True
    #: biases in linear layers
    add_bias_linear: Annotated[bool, SHAPE] = False
    #: bias in the QKV projection only
    add_qkv_bias: Annotated[bool, SHAPE] = False
    #: dropout after each sublayer
    hidden_dropout: Annotated[Dropout, RECIPE] = 0.0
    #: dropout on attention weights
    attention_dropout: Annotated[Dropout, RECIPE] = 0.0
    #: RoPE theta
    rotary_base: Annotated[float, FORM, Ge(1), Le(1e18)] = 10000.0
    #: yarn stretches RoPE for a longer context (YaRN), by the yarn_* fields
    position_embedding_type: Annotated[Literal["rope", "yarn"], FORM] = "rope"
    #: Llama 3.1's scaling of RoPE, from a context of 8192
    use_rope_scaling: Annotated[bool, FORM] = False
    #: how much it stretches long waves
    rope_scaling_factor: Annotated[Stretch, FORM, _OF_ROPE_SCALING] = 8.0
    #: how much yarn stretches
    yarn_rotary_scaling_factor: Annotated[Stretch | None, FORM, _OF_YARN] = None
    #: positions before it
    yarn_original_max_position_embeddings: Annotated[Length | None, FORM, _OF_YARN] = None
    #: what turns more often in those is left as it was
    yarn_beta_fast: Annotated[Turns, FORM, _OF_YARN] = 32.0
    #: what turns less often is stretched whole
    yarn_beta_slow: Annotated[Turns, FORM, _OF_YARN] = 1.0
    #: queries and keys grow by 0.1 * this * ln(factor) + 1
    yarn_mscale: Annotated[Growth, FORM, _OF_YARN] = 1.0
    #: over the same of this
    yarn_mscale_all_dim: Annotated[Growth, FORM, _OF_YARN] = 0.0
    #: what is stretched in part begins and ends at whole dimensions
    yarn_correction_range_round_to_int: Annotated[bool, FORM, _OF_YARN] = True
    #: share of the head dimension that RoPE turns
    rotary_percent: Annotated[float, SHAPE, Gt(0), Le(1)] = 1.0
    #: separate LM head
    untie_embeddings_and_output_weights: Annotated[bool, SHAPE] = False
    #: true vocabulary; default the tokenizer's
    vocab_size: Annotated[Length | None, SHAPE] = None
    #: padding of the vocabulary; a property of the model, never times TP
    make_vocab_size_divisible_by: Annotated[Size, SHAPE] = 128
    #: K, how often a token is repeated (PHD); 1 is the vanilla model
    phd_repeat: Annotated[Copies, FORM] = 1
    #: W, token positions of hidden keys a query sees, its own included; 1 is plain PHD
    phd_window: Annotated[Length | None, FORM] = None
    #: C, the window stays inside chunks of C positions; null is PHD-SWA
    phd_chunk: Annotated[Length | None, FORM] = None
    #: RoPE turns copy j of token n by n, K n + j - 1 or n + (j - 1)/K
    phd_copy_positions: Annotated[CopyPositions, FORM] = "token"
    #: vector adds a learned one to each of copies 2 to K
    phd_copy_embedding: Annotated[Literal["none", "vector"], SHAPE] = "none"
    #: compute only the last copy's query, projection and FFN in the last layer
    phd_last_layer_pruning: Annotated[bool, COMPUTING] = True
    #: row of the norm-scheme table
    norm_scheme: Annotated[str, SHAPE] = "pre"
    #: auto is the norm scheme's own
    init: Annotated[Literal["auto", "normal", "depth_scaled", "megatron", "deepnorm"], INITIAL] = "auto"
    #: std of the truncated normal; default 1/sqrt(2.5 * hidden_size)
    init_method_std: Annotated[Deviation | None, INITIAL] = None
    #: that of an untied LM head; default init_method_std
    head_init_method_std: Annotated[Deviation | None, INITIAL] = None
    #: PHD attention; triton ones fuse norm and RoPE too
    phd_attention_backend: Annotated[Backend, COMPUTING] = "auto"
    #: products of experts; te takes Transformer Engine's, sequential one expert at a time
    moe_experts_backend: Annotated[ExpertsBackend, COMPUTING] = "auto"
    #: linear and norm modules
    transformer_impl: Annotated[Literal["auto", "local", "transformer_engine"], COMPUTING] = "auto"
    #: further TransformerConfig fields by name
    transformer: Annotated[dict[str, Any], SHAPE] = field(default_factory=dict)


@dataclass
class ParallelConfig:
    """How the run is laid out over ranks. May change between a save and a load."""

    #: TP
    tensor_model_parallel_size: Annotated[Size, LAYOUT] = 1
    #: PP
    pipeline_model_parallel_size: Annotated[Size, LAYOUT] = 1
    #: VPP, model chunks per pipeline rank
    virtual_pipeline_model_parallel_size: Annotated[Size | None, LAYOUT, PIPELINE_CUT] = None
    #: says VPP by the layers of a chunk; resolved to it
    num_layers_per_virtual_pipeline_stage: Annotated[Depth | None, LAYOUT, PIPELINE_CUT] = None
    #: layers of the first stage, where it has fewer or more
    num_layers_in_first_pipeline_stage: Annotated[Depth | None, LAYOUT, PIPELINE_CUT] = None
    #: layers of the last stage
    num_layers_in_last_pipeline_stage: Annotated[Depth | None, LAYOUT, PIPELINE_CUT] = None
    #: stages in letters, such as Ettt|tttt|tttt|tttL
    pipeline_model_parallel_layout: Annotated[str | None, LAYOUT, PIPELINE_CUT] = None
    #: the embedding counts as a layer when layers are divided
    account_for_embedding_in_pipeline_split: Annotated[bool, LAYOUT, PIPELINE_CUT] = False
    #: the loss counts as a layer when layers are divided
    account_for_loss_in_pipeline_split: Annotated[bool, LAYOUT, PIPELINE_CUT] = False
    #: micro-batches a chunk runs in a row; default PP
    microbatch_group_size_per_vp_stage: Annotated[Size | None, LAYOUT, PIPELINE_CUT] = None
    #: pipeline transfers beside compute; default on with virtual stages
    overlap_p2p_comm: Annotated[bool | None, LAYOUT, PIPELINE_CUT] = None
    #: also while the pipeline fills and drains; virtual stages only
    overlap_p2p_comm_warmup_flush: Annotated[bool, LAYOUT, PIPELINE_CUT] = False
    #: CP
    context_parallel_size: Annotated[Size, LAYOUT] = 1
    #: how keys and values reach the other CP ranks
    cp_comm_type: Annotated[Literal["all_gather", "p2p"], LAYOUT] = "all_gather"
    #: EP
    expert_model_parallel_size: Annotated[Size, LAYOUT] = 1
    #: TP of the experts; default TP
    expert_tensor_parallel_size: Annotated[Size | None, LAYOUT] = None
    #: split norms and residuals over the TP group
    sequence_parallel: Annotated[bool, LAYOUT] = False
    #: shard optimizer states over DP; default on, with adam
    use_distributed_optimizer: Annotated[bool | None, LAYOUT, OPTIMIZER_STATES] = None
    #: overlap gradient reduction with backward
    overlap_grad_reduce: Annotated[bool, LAYOUT, GRADIENT_BUFFERS] = False
    #: overlap parameter gather with forward
    overlap_param_gather: Annotated[bool, LAYOUT, GRADIENT_BUFFERS] = False
    #: parameters per gradient bucket
    ddp_bucket_size: Annotated[Samples | None, LAYOUT, GRADIENT_BUFFERS] = None
    #: DeepSpeed's ZeRO holds and updates the model, instead of Megatron-Core's optimizer
    deepspeed: Annotated[bool, LAYOUT, OPTIMIZER_STATES] = False
    #: DeepSpeed's configuration file (JSON), with the ZeRO stage
    deepspeed_config: Annotated[str | None, LAYOUT, OPTIMIZER_STATES, _OF_DEEPSPEED] = None
    #: auto is cuda where there is one
    device: Annotated[Literal["auto", "cpu", "cuda"], START] = "auto"
    #: timeout of collectives
    distributed_timeout_minutes: Annotated[Minutes, LAYOUT] = 10.0


@dataclass
class DataConfig:
    """What is read, in which order."""

    #: PREFIX, or WEIGHT PREFIX pairs of a blend
    data_path: Annotated[list[str], RECIPE] = field(default_factory=list)
    #: shares of training, validation and test
    split: Annotated[str, RECIPE] = "969,30,1"
    #: blend of the training set, instead of data_path and split
    train_data_path: Annotated[list[str] | None, RECIPE] = None
    #: blend of the validation set
    valid_data_path: Annotated[list[str] | None, RECIPE] = None
    #: blend of the test set
    test_data_path: Annotated[list[str] | None, RECIPE] = None
    #: byte, or a tokenizer directory; default the data's own
    tokenizer: Annotated[str | None, RECIPE] = None
    #: index cache; default beside the data
    data_cache_path: Annotated[str | None, PLACE] = None
    #: samples the training order is drawn for; default the run's own length
    data_horizon_samples: Annotated[Samples | None, RECIPE] = None
    #: data loader processes
    num_workers: Annotated[int, LAYOUT, Ge(0), Le(1024)] = 0
    #: positions restart after each end of document
    reset_position_ids: Annotated[bool, RECIPE] = False
    #: no attention across documents
    reset_attention_mask: Annotated[bool, RECIPE] = False
    #: which documents share a training sample: neighbours in Megatron's order, or those that fit whole
    packing: Annotated[Literal["none", "best_fit"], RECIPE] = "none"
    #: no loss on the end-of-document token
    eod_mask_loss: Annotated[bool, RECIPE] = False
    #: resume though the data is not what the checkpoint was trained on
    allow_changed_data: Annotated[bool, START] = False


@dataclass
class TrainingConfig:
    """Length, batch, precision and evaluation."""

    #: samples per rank and forward pass
    micro_batch_size: Annotated[Size, LAYOUT] = 1
    #: samples per step; default micro_batch_size * data-parallel size
    global_batch_size: Annotated[Batch | None, RECIPE] = None
    #: START INCREMENT SAMPLES
    rampup_batch_size: Annotated[list[Samples] | None, RECIPE] = None
    #: steps; or use train_samples
    train_iters: Annotated[Steps | None, RECIPE] = None
    #: samples; or use train_iters
    train_samples: Annotated[Samples | None, RECIPE] = None
    #: steps between validations; default 1000, or use evals_per_run
    eval_interval: Annotated[Steps | None, REPORT] = None
    #: validations of a run, spread evenly over its samples, the last at its end
    evals_per_run: Annotated[Steps | None, REPORT] = None
    #: global batches per validation, at most one pass over the split; 0 is none
    eval_iters: Annotated[StepsOrNone, REPORT] = 100
    #: stop (and save) after this many steps of this start
    exit_interval: Annotated[Steps | None, START] = None
    #: stop (and save) after this long
    exit_duration_in_mins: Annotated[Minutes | None, START] = None
    #: seed of initialisation, data order and dropout
    seed: Annotated[Seed, RECIPE] = 1234
    #: bfloat16 parameters with fp32 main parameters
    bf16: Annotated[bool, RECIPE] = False
    #: float16 with loss scaling
    fp16: Annotated[bool, RECIPE] = False
    #: constant loss scale of fp16; default dynamic
    loss_scale: Annotated[Positive | None, RECIPE, _TO_FP16] = None
    #: dynamic loss scale at the start, per token of a micro-batch; default 65536 / (micro_batch_size * seq_length)
    initial_loss_scale: Annotated[Positive | None, RECIPE, _TO_FP16] = None
    #: dynamic loss scale never falls below this; default the smaller of 1 and initial_loss_scale
    min_loss_scale: Annotated[Positive | None, RECIPE, _TO_FP16] = None
    #: steps without overflow after which the dynamic loss scale doubles
    loss_scale_window: Annotated[Steps, RECIPE, _TO_FP16] = 1000
    #: overflows after which the dynamic loss scale halves
    hysteresis: Annotated[Steps, RECIPE, _TO_FP16] = 2
    #: gradient buffers in fp32 with bf16/fp16
    accumulate_allreduce_grads_in_fp32: Annotated[bool, RECIPE] = True


@dataclass
class OptimizerConfig:
    """The optimizer and the learning-rate schedule."""

    #: adam is AdamW; muon orthogonalises the updates of the layers' matrices and leaves all else to AdamW
    optimizer: Annotated[Literal["adam", "muon"], RECIPE] = "adam"
    #: peak learning rate
    lr: Annotated[Positive, RECIPE, SCHEDULE] = 3e-4
    #: final learning rate
    min_lr: Annotated[NotNegative, RECIPE, SCHEDULE] = 0.0
    #: schedule
    lr_decay_style: Annotated[
        Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"], RECIPE, SCHEDULE
    ] = "cosine"
    #: default train_iters
    lr_decay_iters: Annotated[Steps | None, RECIPE, SCHEDULE] = None
    #: default train_samples
    lr_decay_samples: Annotated[Samples | None, RECIPE, SCHEDULE] = None
    #: warm-up in steps
    lr_warmup_iters: Annotated[StepsOrNone, RECIPE, SCHEDULE] = 0
    #: warm-up in samples
    lr_warmup_samples: Annotated[SamplesOrNone, RECIPE, SCHEDULE] = 0
    #: warm-up in original tokens
    lr_warmup_tokens: Annotated[TokensOrNone, RECIPE, SCHEDULE] = 0
    #: warm-up as a share of the decay length
    lr_warmup_fraction: Annotated[Share | None, RECIPE, SCHEDULE] = None
    #: WSD annealing
    lr_wsd_decay_style: Annotated[Literal["exponential", "linear", "cosine", "minus_sqrt"], RECIPE, SCHEDULE] = (
        "exponential"
    )
    #: length of the WSD annealing in steps
    lr_wsd_decay_iters: Annotated[Steps | None, RECIPE, SCHEDULE] = None
    #: length of the WSD annealing in samples
    lr_wsd_decay_samples: Annotated[Samples | None, RECIPE, SCHEDULE] = None
    #: learning rate that the warm-up starts from
    lr_warmup_init: Annotated[NotNegative, RECIPE, SCHEDULE] = 0.0
    #: peak learning rate of the input embedding and the LM head; default lr
    decoupled_lr: Annotated[Positive | None, RECIPE, SCHEDULE] = None
    #: final learning rate there; default min_lr
    decoupled_min_lr: Annotated[NotNegative | None, RECIPE, SCHEDULE, _TO_DECOUPLE] = None
    #: decoupled weight decay
    weight_decay: Annotated[NotNegative, RECIPE, SCHEDULE] = 0.1
    #: weight decay at the start of the run, where it changes; default weight_decay
    start_weight_decay: Annotated[NotNegative | None, RECIPE, SCHEDULE] = None
    #: weight decay at its end
    end_weight_decay: Annotated[NotNegative | None, RECIPE, SCHEDULE] = None
    #: how it changes in between; constant is not at all
    weight_decay_incr_style: Annotated[Literal["constant", "linear", "cosine"], RECIPE, SCHEDULE] = "constant"
    #: also decay norm weights and biases, as the HybridNorm authors do
    decay_norms: Annotated[bool, RECIPE] = False
    #: decay the input embedding, its tied copy as a head included
    decay_embeddings: Annotated[bool, RECIPE] = True
    #: AdamW beta 1
    adam_beta1: Annotated[BelowOne, RECIPE] = 0.9
    #: AdamW beta 2
    adam_beta2: Annotated[BelowOne, RECIPE] = 0.95
    #: AdamW epsilon
    adam_eps: Annotated[Epsilon, RECIPE] = 1e-8
    #: gradient clipping by global norm; 0 is none
    clip_grad: Annotated[NotNegative, RECIPE] = 1.0
    #: a step whose gradient norm before clipping is above this changes nothing; default none is
    grad_norm_skip_threshold: Annotated[Positive | None, RECIPE] = None
    #: momentum of muon
    muon_momentum: Annotated[BelowOne, RECIPE, _OF_MUON] = 0.95
    #: Nesterov's form of it
    muon_nesterov: Annotated[bool, RECIPE, _OF_MUON] = False
    #: orthogonalise query, key and value apart
    muon_split_qkv: Annotated[bool, RECIPE, _OF_MUON] = True
    #: size of an update by the matrix's shape
    muon_scale_mode: Annotated[Literal["spectral", "unit_rms_norm", "shape_scaling"], RECIPE, _OF_MUON] = "spectral"
    #: times this; about 0.2 with spectral gives updates of AdamW's size, so that its lr can be kept
    muon_extra_scale_factor: Annotated[Positive, RECIPE, _OF_MUON] = 1.0
    #: Newton-Schulz steps
    muon_num_ns_steps: Annotated[NewtonSchulzSteps, RECIPE, _OF_MUON] = 5
    #: their coefficients
    muon_coefficient_type: Annotated[
        Literal["simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"], RECIPE, _OF_MUON
    ] = "quintic"
    #: precision of their products: medium is bfloat16
    muon_fp32_matmul_prec: Annotated[Literal["medium", "high", "highest"], RECIPE, _OF_MUON] = "medium"
    #: under tensor parallelism: whole matrices on every rank, or divided, or each rank's part alone (another algorithm)
    muon_tp_mode: Annotated[Literal["duplicated", "distributed", "blockwise"], RECIPE, _OF_MUON] = "duplicated"


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    #: directory to save into
    save: Annotated[str | None, PLACE] = None
    #: directory to resume from
    load: Annotated[str | None, START] = None
    #: steps between saves; a final save is always made
    save_interval: Annotated[Steps | None, REPORT, _TO_SAVE] = None
    #: keep only the newest so many checkpoints; default all
    keep_last: Annotated[Steps | None, PLACE] = None
    #: go on training while a checkpoint is written; one copy of the state in host memory
    async_save: Annotated[bool, LAYOUT, _TO_SAVE_OFTEN] = False
    #: compare every file with its checksum before loading
    verify_checkpoint: Annotated[bool, START] = True
    #: refuse to start fresh when load holds no checkpoint
    exit_on_missing_checkpoint: Annotated[bool, START, _TO_LOAD] = False
    #: go on from an older checkpoint of save than the newest; those after it are replaced
    rewind: Annotated[bool, START, _TO_LOAD] = False
    #: load parameters only and start at step 0
    finetune: Annotated[bool, START, _TO_LOAD] = False
    #: do not load optimizer and schedule
    no_load_optim: Annotated[bool, START, _TO_LOAD] = False
    #: do not load random-number state
    no_load_rng: Annotated[bool, START, _TO_LOAD] = False
    #: the checkpoint's learning-rate and weight-decay schedule, whatever is given here
    use_checkpoint_opt_param_scheduler: Annotated[bool, START, _TO_LOAD] = False


@dataclass
class LoggingConfig:
    """What a run reports."""

    #: steps between log lines
    log_interval: Annotated[Steps, REPORT] = 10
    #: append one JSON object per logged step
    metrics_file: Annotated[str | None, PLACE] = None
    #: default SAVE/tensorboard when tensorboard is installed
    tensorboard_dir: Annotated[str | None, PLACE] = None
    #: log to Weights & Biases
    wandb_project: Annotated[str | None, PLACE] = None
    #: run name there
    wandb_exp_name: Annotated[str | None, PLACE, _ON_WANDB] = None
    #: peak of one device for MFU; default by device name, null on CPU
    peak_tflops: Annotated[Positive | None, REPORT] = None
    #: live display; auto is on a terminal only
    progress: Annotated[Literal["auto", "on", "off"], START] = "auto"
    #: statistics by layer in the first step and every so many; 0 is none
    log_layer_statistics: Annotated[StepsOrNone, REPORT, _TO_WRITE] = 0
    #: write every parameter's full gradient (safetensors) for comparison
    dump_gradients_dir: Annotated[str | None, PLACE] = None
    #: at these steps
    dump_gradients_iterations: Annotated[list[Steps], START] = field(default_factory=lambda: [1])
    #: trace some steps with torch's profiler
    profile: Annotated[bool, START] = False
    #: trace the steps after this one
    profile_step_start: Annotated[StepsOrNone, START] = 10
    #: up to this one, itself included
    profile_step_end: Annotated[Steps, START] = 12
    #: ranks that write a trace
    profile_ranks: Annotated[list[Rank], START] = field(default_factory=lambda: [0])
    #: where traces go; default SAVE/profile
    profile_dir: Annotated[str | None, PLACE] = None


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
