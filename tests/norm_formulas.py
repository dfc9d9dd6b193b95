"""Logits of a model by the formulas of the two papers, in plain torch and any precision.

Written from the papers alone: no norm record, cache or attention of the package is used, only :class:`KVPolicy`'s mask
(which has tests of its own). Weights have the names of the bundled Hugging Face model.
"""

from __future__ import annotations

import math
import re

import torch

from phd_megatron.phd.kv_policy import KVPolicy


def block(scheme, index, layers, x, mha, ffn, norm):
    """One block's output. ``mha(x, "qk")`` norms q and k per head; ``norm(place, x)`` is one of the four around."""
    before, between, attention_out, ffn_out = (
        lambda x, place=place: norm(place, x)
        for place in (
            "input_layernorm",
            "post_attention_layernorm",
            "attention_output_layernorm",
            "mlp_output_layernorm",
        )
    )
    if scheme == "mix_ln":
        scheme = "post" if index < layers // 4 else "pre"
    if scheme == "embed_norm":
        scheme = "hybrid"
    if scheme == "hybrid_star" and index > 0:
        scheme = "hybrid"
    if scheme == "first_qkv_pre":
        scheme = "qkv_pre" if index == 0 else "hybrid"
    scheme = {"hybrid": "qkv_post", "pre_qk": "pre_qk_pre", "hybrid_star": "pre_qkv_pre"}.get(scheme, scheme)
    if product := re.fullmatch("(pre_)?(qkvc|qkv|qkc|qk|kv|kc)_(pre|post)", scheme):
        y = mha(before(x) if product[1] else x, product[2]) + x
        return ffn(between(y)) + (between(y) if product[3] == "post" else y)
    if scheme == "pre":
        y = mha(before(x), "") + x
        return ffn(between(y)) + y
    if scheme == "post":
        y = attention_out(mha(x, "") + x)
        return ffn_out(ffn(y) + y)
    if scheme == "pre_post":
        y = mha(before(x), "") + x
        return ffn(between(y)) + between(y)
    if scheme == "post_pre":
        y = mha(before(x), "") + before(x)
        return ffn(between(y)) + y
    if scheme == "sandwich":
        y = attention_out(mha(before(x), "")) + x
        return ffn_out(ffn(between(y))) + y
    if scheme == "outputnorm":
        y = x + attention_out(mha(x, "qk"))
        return y + ffn_out(ffn(y))
    if scheme == "olmo2":
        y = x + attention_out(mha(x, "QK"))
        return y + ffn_out(ffn(y))
    if scheme == "olmoe":
        y = x + mha(before(x), "QK")
        return y + ffn(between(y))
    if scheme == "deepnorm":
        alpha = (2 * layers) ** (1 / 4)
        y = attention_out(mha(x, "") + alpha * x)
        return ffn_out(ffn(y) + alpha * y)
    if scheme == "hybrid_star_7b" and index == 0:
        y = attention_out(mha(before(x), "qkv")) + x
        return ffn(between(y)) + y
    if scheme == "hybrid_star_7b":
        y = attention_out(mha(x, "qkv")) + x
        return ffn(between(y)) + between(y)
    raise NotImplementedError(f"write the formula of {scheme} here")


def rms(x, weight, eps=1e-5):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x, weight, bias, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def rope(x, positions, theta=10000.0, share=1.0):
    """``x`` [rows, heads, d]: dimension i is rotated against i + half, over the first share of the dimensions."""
    half = int(x.size(-1) * share) // 2
    frequency = 1 / theta ** (torch.arange(half).float() / half)  # in float32, as in training
    angle = positions[:, None].float() * frequency
    cos, sin = angle.cos().double()[:, None], angle.sin().double()[:, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


def rope_position(kind, n, j, K):
    """Of copy ``j`` (from 1) of the token at ``n`` (from 0)."""
    return {"token": n, "repeated": K * n + j - 1, "fraction": n + (j - 1) / K}[kind]


def logits_by_formula(weights, config, tokens):
    """``[n, vocabulary]`` of one sequence of ``n`` tokens; ``config`` has the fields of the bundled model's."""
    if config.tie_word_embeddings:
        weights = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    K, n, d = config.phd_repeat, len(tokens), config.head_dim
    heads, groups, scheme = config.num_attention_heads, config.num_key_value_heads, config.norm_scheme
    mask = KVPolicy(K, config.phd_window, config.phd_chunk).mask(n)
    kind = config.phd_copy_positions
    positions = torch.tensor([rope_position(kind, m, j, K) for j in range(1, K + 1) for m in range(n)])
    x = weights["model.embed_tokens.weight"][tokens]

    def linear(name, x):
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(name, x):
        if config.normalization == "LayerNorm":
            return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
        return rms(x, weights[f"{name}.weight"])

    if scheme == "embed_norm":
        x = norm("model.embed_norm", x)
    x = x.repeat(K, 1)
    if config.phd_copy_embedding == "vector" and K > 1:
        x = x + torch.cat([torch.zeros(n, x.size(1)), weights["model.copy_embedding.weight"].repeat_interleave(n, 0)])
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}"

        def mha(x, normed, prefix=prefix):
            q, k, v = (linear(f"{prefix}.self_attn.{c}_proj", x) for c in "qkv")
            q = norm(f"{prefix}.self_attn.q_norm", q) if "Q" in normed else q
            k = norm(f"{prefix}.self_attn.k_norm", k) if "K" in normed else k
            q, k, v = (t.unflatten(-1, (-1, d)) for t in (q, k, v))
            q = norm(f"{prefix}.self_attn.q_norm", q) if "q" in normed else q
            k = norm(f"{prefix}.self_attn.k_norm", k) if "k" in normed else k
            v = norm(f"{prefix}.self_attn.v_norm", v) if "v" in normed else v
            share = config.rope_parameters.get("partial_rotary_factor", 1.0)
            q, k = (rope(t, positions, config.rope_parameters["rope_theta"], share) for t in (q, k))
            k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(d)
            context = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -math.inf).softmax(-1), v)
            context = norm(f"{prefix}.self_attn.c_norm", context) if "c" in normed else context
            return linear(f"{prefix}.self_attn.o_proj", context.flatten(1))

        def ffn(x, prefix=prefix):
            up = linear(f"{prefix}.mlp.up_proj", x)
            if config.mlp_gated:
                gate = linear(f"{prefix}.mlp.gate_proj", x)
                return linear(f"{prefix}.mlp.down_proj", gate * torch.sigmoid(gate) * up)
            return linear(f"{prefix}.mlp.down_proj", up * 0.5 * (1 + torch.erf(up / math.sqrt(2))))

        def around(place, x, prefix=prefix):
            return norm(f"{prefix}.{place}", x)

        x = block(scheme, i, config.num_hidden_layers, x, mha, ffn, around)
    return linear("lm_head", norm("model.norm", x[-n:]))
