"""The one list of transformers' tests that Tessera leaves out, each with its reason.

docs/contract.md shows the same list to readers; `test_left_out.py` compares the two.
"""

import unittest

from contract.upstream import version

EVERY = ("bytegpt", "llama", "nanochat", "verse", "gpt")
WITHOUT_EXPERTS = ("llama", "nanochat", "verse", "gpt")

# test, or the start of the names that it expands to; dialects or kinds of tokenizers it is left out for; why
LEFT_OUT: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "test_eager_matches_batched_and_grouped_inference",
        WITHOUT_EXPERTS,
        "asks that the grouped products of experts are called, and the dialect has no experts",
    ),
    (
        "test_output_router_logits_from_config",
        WITHOUT_EXPERTS,
        "asks for router logits, and the dialect has no routers",
    ),
    (
        "test_moe_models_record_router_logits",
        EVERY,
        "asks that hooks record the router logits; here layers return them, which can be compiled",
    ),
    ("test_model_rope_scaling_from_config", ("gpt",), "the dialect has learned positions"),
    (
        "test_generate_from_random_inputs_embeds",
        ("nanochat",),
        "value embeddings are looked up by token, and random embeddings are no tokens",
    ),
    (
        "test_static_cache_no_recompile_with_smaller_length",
        ("bytegpt", "llama", "gpt"),
        "looks for the compiled call of the library's decoding loop; these have a loop compiled as a whole",
    ),
    (
        "test_alignment_methods",
        ("bytes", "sentencepiece"),
        "asks which word a token is in, and these tokenizers do not cut text into words",
    ),
    (
        "test_rust_tokenizer_add_prefix_space",
        ("bytes",),
        "a space that the text does not have would make ids other than its bytes",
    ),
    (
        "test_training_new_tokenizer",
        ("bytes",),
        "256 bytes are a vocabulary that is not trained",
    ),
    (
        "test_training_new_tokenizer",
        ("sentencepiece",),
        "expects decoded text with the sign for spaces in it; ours is the text itself",
    ),
)

# The same, with transformers before 5.23 alone.
LEFT_OUT_BEFORE_5_23: tuple[tuple[str, tuple[str, ...], str], ...] = tuple(
    (
        f"test_eager_matches_batched_and_grouped_inference_{dtype}",
        ("bytegpt",),
        "before transformers 5.23: asks for less than one rounding step of half precision",
    )
    for dtype in ("0_fp16", "2_bf16")
)


def leave_out(case: type[unittest.TestCase], dialect: str) -> type[unittest.TestCase]:
    """Replaces the listed tests of a class by skips that say why; a test of another name stays."""
    old = tuple(map(int, version().split(".")[:2])) < (5, 23)
    for listed, dialects, reason in LEFT_OUT + (LEFT_OUT_BEFORE_5_23 if old else ()):
        for name in dir(case):
            if dialect in dialects and (name == listed or name.startswith(f"{listed}_")):
                setattr(case, name, unittest.skip(reason)(getattr(case, name)))
    return case
