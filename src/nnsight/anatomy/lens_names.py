"""The names that TransformerLens, and others, have for what is under uniform names, and ours."""

from __future__ import annotations

OF_MODELS = {"hook_embed": "embed.output", "ln_final": "norm.output", "unembed": "logits"}
OF_LAYERS = {
    "hook_resid_pre": "input",
    "hook_resid_post": "output",
    "hook_attn_out": "attn.output",
    "hook_mlp_out": "mlp.output",
    "hook_cross_attn_out": "cross_attn.output",
    "attn.hook_result": "attn.result",
    "attn.hook_attn_scores": "attn.scores",
    "attn.hook_rot_q": "attn.q",
    "attn.hook_rot_k": "attn.k",
    "mlp.hook_pre": "mlp.pre",
    "mlp.hook_post": "mlp.act",
    "mlp.hook_expert_indices": "mlp.chosen",
    **{f"attn.hook_{name}": f"attn.{name}" for name in ("q", "k", "v", "z", "pattern")},
    "cross_attn.hook_attn_scores": "cross_attn.scores",
    "cross_attn.hook_result": "cross_attn.result",
    **{f"cross_attn.hook_{name}": f"cross_attn.{name}" for name in ("q", "k", "v", "z", "pattern")},
}
OF_OTHERS = {
    "attn.heads": "attn.z[:, :, head]",
    **{
        f"attn.{name}": "attn.pattern"
        for name in ("attention", "attention_probs", "attention_weights", "attn_weights", "probs", "weights")
    },
    **{f"mlp.{name}": "mlp.act" for name in ("activations", "hidden", "neurons")},
}
MID = "hook_resid_mid"


def ours(layer: str, name: str) -> str | None:
    """What to write for a name of theirs of a layer, with or without its `hook_`; None where they have no such name.

    Args:
        layer: How the layer is written: `layers[3]`.
        name: As in "hook_resid_pre", "resid_pre", "attn.hook_z".
    """
    part, _, last = name.rpartition(".")
    theirs = name if last.startswith("hook_") else f"{part}.hook_{last}".lstrip(".")
    if theirs == MID:  # no place of its own: not every architecture has a middle of a layer
        return f"{layer}.input + {layer}.attn.output"
    known = OF_LAYERS.get(theirs) or OF_OTHERS.get(name)
    return f"{layer}.{known}" if known else None
