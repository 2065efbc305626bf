"""llama.cpp beside Tessera on the same GGUF file: tokens of hard texts, logits, and what both generate.

What belongs here: running a file with llama-cpp-python, where that is installed, and the comparison. Tessera
runs the weights that are in the file, so that what is compared is the two implementations and not the
rounding; how far the file is from the source is measured in `gguf_files.py`.
"""

import functools
import importlib.util
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.tokenization.probes import Probe, adversarial_texts

from .report import Check

_SAMPLE = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
_STEPS = 32
_LONGEST_PROMPT = 48
# Largest difference of two logits, as a share of the largest: llama.cpp rounds what it multiplies with a
# weight to the weight's type.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "q8_0": 1e-1}
# It looks GELU up in a table of fp16.
_GELU = 1e-3


def require_llama_cpp() -> None:
    """Refuses where llama.cpp cannot be run.

    Raises:
        ValueError: with what to install.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise ValueError("--verify llama.cpp runs it, and it is not installed: pip install llama-cpp-python")


def compare_with_llama_cpp(
    file: Path,
    model: nn.Module,
    config: TesseraConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
) -> list[Check]:
    """Runs a file with llama.cpp on the CPU and compares.

    Args:
        file: a GGUF file.
        model: with the weights of the file, in fp32 and eval mode, on the CPU.
        config: its configuration.
        tokenizer: what the file's was made of; None for a file without.
        dtype: of the file, which sets how far logits may differ.

    Raises:
        ValueError: if llama.cpp does not load the file, encodes a text to other ids, computes other logits,
            or generates another token where the two likeliest are not as good as equal. Where experts are
            chosen and numbers rounded, a token may be sent to another expert: then half of the positions
            must have equal logits.
    """
    longest = min(config.max_position_embeddings, _LONGEST_PROMPT + _STEPS)
    runner = _load(file, longest)
    try:
        texts, tokens = _compare_tokens(runner, tokenizer)
        prompt = _prompt(tokenizer, config, longest - min(_STEPS, longest // 2))
        steps = min(_STEPS, longest - len(prompt))
        expected, logits = _generate(model, prompt, steps)
        generated = []
        for token in runner.generate(prompt, temp=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0):
            generated.append(token)
            if len(generated) == steps:
                break
        runner.reset()
        runner.eval([*prompt, *expected])
        theirs = torch.from_numpy(runner.scores[: len(prompt) + steps]).float()
    finally:
        runner.close()
    scale = float(logits.abs().max())
    allowed = (TOLERANCES[dtype] + _GELU * config.hidden_act.startswith("gelu")) * max(1.0, scale)
    differences = (theirs - logits).abs().amax(-1)
    largest, typical = float(differences.max()), float(differences.median())
    may_choose = dtype != "float32" and "sparse" in config.mlp_layer_types
    if not (typical if may_choose else largest) <= allowed:
        raise ValueError(
            f"llama.cpp computes other logits from {file.name}: they differ by up to {largest:.3g}, allowed "
            f"are {allowed:.3g}; nothing is kept"
        )
    equal = next((i for i in range(steps) if generated[i] != expected[i]), steps)
    if equal < steps and not may_choose:
        row = logits[len(prompt) - 1 + equal]
        if float(row[expected[equal]] - row[generated[equal]]) > 2 * allowed:
            raise ValueError(
                f"llama.cpp generates token {generated[equal]} at step {equal + 1} from {file.name}, not "
                f"{expected[equal]}; nothing is kept"
            )
    checks = [Check("llama.cpp, tokens", True, f"{tokens:,} of {texts:,} texts, equal")] if texts else []
    apart = f"{largest:.3g}, at half of the positions {typical:.3g}; the largest is {scale:.3g}"
    return [
        *checks,
        Check("llama.cpp, logits", True, apart, f"{allowed:.3g}"),
        Check("llama.cpp, generated", True, f"{equal} of {steps} tokens equal"),
    ]


@functools.cache
def _silence():
    """What llama.cpp calls with each line that it would print; held, as it calls it to the end."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def _load(file: Path, length: int):
    import llama_cpp

    llama_cpp.llama_log_set(_silence(), None)
    fp32 = 0  # GGML_TYPE_F32: keys and values are kept as they are computed
    try:
        return llama_cpp.Llama(
            str(file),
            n_ctx=length,
            n_batch=length,
            n_gpu_layers=0,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            logits_all=True,
            type_k=fp32,
            type_v=fp32,
            verbose=False,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"llama.cpp does not load {file.name}: {error}") from error


def _compare_tokens(runner, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, int]:
    if tokenizer is None:
        return 0, 0
    texts = [("the sample", _SAMPLE)]
    texts += [(probe.name, probe.text) for probe in _probes(tokenizer)]
    count = 0
    for name, text in texts:
        for complete in (False, True):
            expected = tokenizer(text, add_special_tokens=complete).input_ids
            found = runner.tokenize(text.encode("utf-8"), add_bos=complete, special=True)
            if found != expected:
                raise ValueError(
                    f"llama.cpp encodes {name} to other ids ({found[:8]}, not {expected[:8]}); with "
                    "--no-tokenizer the file is written without a tokenizer, for ids alone"
                )
        count += len(expected)
    return len(texts), count


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[Probe]:
    """Hard texts, but for those that are known to be something else to llama.cpp; a conversion says which."""
    first = tokenizer("a", add_special_tokens=False).tokens()[0]
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    composes = "NFC" in str(tokenizer.backend_tokenizer.normalizer)
    for probe in adversarial_texts(special):
        if first.startswith("\u2581") and any(token in probe.text for token in special):
            continue
        if not composes or unicodedata.is_normalized("NFC", probe.text):
            yield probe


def _prompt(tokenizer: PreTrainedTokenizerBase | None, config: TesseraConfig, longest: int) -> list[int]:
    if tokenizer is not None:
        return tokenizer(_SAMPLE).input_ids[:longest]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (min(longest, 16),), generator=generator).tolist()


@torch.no_grad()
def _generate(model: nn.Module, prompt: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
    """The likeliest tokens one after the other, and the logits at all positions [T, V]."""
    ids = torch.tensor([prompt])
    for _ in range(steps):
        logits = model(ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    logits = model(ids, use_cache=False).logits
    return ids[0, len(prompt) :].tolist(), logits[0].float()
