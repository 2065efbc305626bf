"""The words in which other pretraining pipelines describe a model and a run, and what they are called here.

What belongs here: tables of names. A key that has no counterpart is refused by name, never dropped: whoever
wrote it believes that it is in force.
"""

from typing import Any

# ours -> theirs, where the value passes as it is
RUN_NAMES = {
    "data_file": ("data", "data_dir", "data_path", "train_data", "dataset_dir"),
    "save_path": ("output_dir", "out_dir", "save_dir", "run_dir"),
    "tokenizer": ("tokenizer_dir", "tokenizer_path", "tokenizer_name", "tokenizer_name_or_path"),
    "epochs": ("num_epochs", "num_train_epochs", "max_epochs"),
    "steps": ("max_steps", "num_steps", "total_steps", "train_steps", "max_train_steps", "max_iters"),
    "tokens": ("max_tokens", "total_tokens", "num_tokens", "train_tokens"),
    "batch_size": ("global_batch_size",),
    "accumulation": ("gradient_accumulation_steps", "grad_accum_steps", "grad_accumulation_steps"),
    "micro_batch_size": (
        "per_device_batch_size",
        "per_device_train_batch_size",
        "device_batch_size",
        "train_micro_batch_size_per_gpu",
    ),
    "sequence_length": (
        *("seq_len", "seq_length", "max_seq_len", "max_seq_length", "max_length"),
        *("block_size", "context_length"),
    ),
    "tokens_per_parameter": ("target_param_data_ratio", "tokens_per_param"),
    "flops": ("target_flops", "max_flops"),
    "optimizer": ("optim", "optimizer_type"),
    "learning_rate": ("lr", "max_lr", "peak_lr"),
    "schedule": ("lr_scheduler", "lr_scheduler_type", "lr_schedule", "scheduler"),
    "decay": ("decay_ratio", "decay_fraction", "cooldown_fraction", "cooldown_frac", "warmdown_ratio"),
    "warmup": ("warmup_ratio",),
    "warmup_steps": ("warmup_iters", "num_warmup_steps"),
    "floor": ("min_lr_ratio", "final_lr_frac"),
    "momentum": ("muon_momentum",),
    "z_loss": ("z_loss_weight", "z_loss_coef", "z_loss_coefficient", "z_loss_multiplier"),
    "clip": ("grad_clip", "max_grad_norm", "gradient_clipping"),
    "eval_steps": ("eval_every", "eval_interval"),
    "checkpoint_steps": (
        "save_every",
        "save_steps",
        "save_interval",
        "checkpoint_every",
        "checkpoint_interval",
    ),
    "keep_last": ("save_total_limit", "keep_last_n", "max_checkpoints"),
    "trackers": ("report_to", "log_with"),
    "log_steps": ("log_every", "log_interval", "logging_steps"),
    "gradient_checkpointing": ("grad_checkpointing", "activation_checkpointing"),
    "precision": ("mixed_precision", "dtype", "bf16"),
    "compile": ("torch_compile",),
    "attention": ("attn_implementation",),
}

# ours -> their value -> ours; YAML reads a bare `no` as false.
RUN_VALUES = {
    "optimizer": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "AdamW"), "adamw"),
        **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "AdamW8bit"), "adamw-8bit"),
        "Muon": "muon",
    },
    "schedule": {
        **dict.fromkeys(("cosine_with_min_lr", "cosine_with_warmup"), "cosine"),
        **dict.fromkeys(("linear_with_warmup",), "linear"),
        **dict.fromkeys(("constant_with_warmup", "none"), "constant"),
        **dict.fromkeys(("warmup_stable_decay", "WSD", "trapezoidal"), "wsd"),
    },
    "precision": {
        **dict.fromkeys(("bf16", "bfloat16", True), "auto"),
        **dict.fromkeys(("no", "none", "float32", False), "fp32"),
        "float16": "fp16",
    },
    "attention": {
        "flash_attention_2": "flash2",
        "flash_attention_3": "flash3",
        "flash_attention_4": "flash4",
        "flex_attention": "flex",
    },
    "trackers": {"none": [], "no": [], False: []},
}

# What such files state and this trainer has one answer to: accepted where they agree.
FIXED = {
    **dict.fromkeys(("beta1", "adam_beta1"), (0.9,)),
    **dict.fromkeys(("beta2", "adam_beta2"), (0.95,)),
    **dict.fromkeys(("betas", "adam_betas"), ([0.9, 0.95],)),
    **dict.fromkeys(("eps", "adam_eps", "adam_epsilon"), (1e-8,)),
    **dict.fromkeys(("num_workers", "dataloader_num_workers"), (0,)),
}

# ours -> theirs, of a model
MODEL_NAMES = {
    "num_hidden_layers": ("num_layers", "n_layer"),
    "num_attention_heads": ("num_heads", "n_head"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_head"),
    "hidden_size": ("n_embd", "d_model"),
    "intermediate_size": ("d_ff", "ffn_hidden_size"),
    "max_position_embeddings": ("max_seq_len", "seq_len", "block_size", "context_length"),
    "rms_norm_eps": ("norm_eps", "layer_norm_eps"),
    "tie_word_embeddings": ("tie_embeddings",),
}


def run_in_our_words(values: dict[str, Any], processes: int, source: str) -> dict[str, Any]:
    """A run's keys under our names. Keys that are null are left out, those that nobody knows stay.

    A file in other words than ours is one for AdamW unless it says otherwise: its learning rate is.

    Args:
        values: of a file.
        processes: over which a batch for each device adds up.
        source: named in errors.

    Raises:
        ValueError: for two names of one thing, and for what has a name but cannot be done here.
    """
    values = {name: value for name, value in values.items() if value is not None}
    other_words = bool((FIXED.keys() | _SWITCHES) & values.keys())
    values = _without_switches(values, source)
    for name in sorted(FIXED.keys() & values.keys()):
        if (value := values.pop(name)) not in FIXED[name]:
            raise ValueError(
                f"{source}: {name} is {value!r}, which cannot be had here (only {FIXED[name][0]!r}); "
                "change it or take it out"
            )
    least = values.pop("min_lr", None)
    ours = _rename(values, RUN_NAMES, source)
    if least is None and not other_words and ours.keys() - {"data_file"} <= values.keys():
        return ours
    for name, table in RUN_VALUES.items():
        value = ours.get(name)
        if isinstance(value, str | bool) and value in table:
            ours[name] = table[value]
    if least is not None:
        rate = ours.get("learning_rate")
        if "floor" in ours or not (isinstance(rate, int | float) and isinstance(least, int | float) and rate):
            raise ValueError(
                f"{source}: min_lr needs the learning_rate that it is a share of, and no other floor"
            )
        ours["floor"] = least / rate
    ours.setdefault("optimizer", "adamw")
    if "checkpoint_steps" in ours:
        ours.setdefault("checkpoint_minutes", 0)
    return _settle_batch(ours, "batch_size" in values, processes, source)


# Keys that switch one value of ours on or off.
_SWITCHES = {"fp16", "decay_lr"}


def _without_switches(values: dict[str, Any], source: str) -> dict[str, Any]:
    """`fp16` beside `bf16`, of which one may be on, and `decay_lr`, under one name with all their values."""
    values = dict(values)
    for name in _SWITCHES & values.keys():
        if type(values[name]) is not bool:
            raise ValueError(f"{source}: {name} must be true or false, got {values[name]!r}")
    if values.pop("fp16", False):
        if values.pop("bf16", False):
            raise ValueError(f"{source}: fp16 and bf16 are both on; leave one of them")
        values["mixed_precision"] = "fp16"
    if not values.pop("decay_lr", True):
        values["lr_schedule"] = "constant"
    return values


def _settle_batch(ours: dict[str, Any], ambiguous: bool, processes: int, source: str) -> dict[str, Any]:
    """A batch for each device, times accumulation and processes, as the windows of a step."""
    micro, accumulation = ours.get("micro_batch_size"), ours.get("accumulation")
    if ambiguous and accumulation not in (None, 1):
        raise ValueError(
            f"{source}: batch_size beside accumulated gradients may be that of a step or of a device; "
            "say global_batch_size or per_device_batch_size"
        )
    if type(micro) is not int or type(accumulation) not in (int, type(None)):
        return ours
    if "batch_size" not in ours:
        ours["batch_size"] = micro * (accumulation or 1) * processes
        ours["accumulation"] = accumulation or 1
        del ours["micro_batch_size"]
    elif accumulation is not None:
        if ours["batch_size"] != micro * accumulation * processes:
            raise ValueError(
                f"{source}: a batch of {ours['batch_size']} is not {micro} on a device x {accumulation} "
                f"accumulated x {processes} processes"
            )
        del ours["micro_batch_size"]
    return ours


def model_in_our_words(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The fields of a model under our names; `preset` and `depth` stay as they are.

    Raises:
        ValueError: for two names of one field, and for another model type than llama.
    """
    values = {
        name: value for name, value in values.items() if name not in ("architectures", "transformers_version")
    }
    kind = values.pop("model_type", "tessera")
    if kind not in ("tessera", "llama"):
        raise ValueError(f"{source} is of model type '{kind}'; llama's fields and Tessera's are understood")
    ours = _rename(values, MODEL_NAMES | {"preset": ("base",)}, source)
    if "rope_theta" in ours and "rope_parameters" not in ours:
        scaling = ours.pop("rope_scaling", None) or {"rope_type": "default"}
        ours["rope_parameters"] = {**scaling, "rope_theta": float(ours.pop("rope_theta"))}
    return ours


def _rename(values: dict[str, Any], names: dict[str, tuple[str, ...]], source: str) -> dict[str, Any]:
    ours_of = {theirs: ours for ours, all_theirs in names.items() for theirs in all_theirs}
    renamed, said = {}, {}
    for name, value in values.items():
        ours = ours_of.get(name, name)
        if ours in renamed:
            raise ValueError(f"{source}: {said[ours]} and {name} say the same thing; leave one of them")
        renamed[ours], said[ours] = value, name
    return renamed
