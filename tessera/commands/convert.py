"""`tessera convert`: in from other formats, and out to them."""

import re
from typing import Annotated

import typer

from ._common import silence_transformers

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Model directory or file of any known kind, or a run directory."
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="Directory to write, or a file ending in .gguf; must not be there yet."
        ),
    ],
    n_experts: Annotated[
        int | None,
        typer.Argument(
            metavar="N_EXPERTS", help="With MP, for native shards: routed experts of the model; 0 if dense."
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Argument(metavar="MP", help="Model-parallel ranks: one file each.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="tessera, native, a family of transformers (llama, mistral, qwen2, qwen3, qwen3_moe, "
            "mixtral, gpt2, deepseek_v2, deepseek_v3, nanochat), nanochat's own nanochat-original "
            "(July 2026) or nanochat-2025, or gguf; default: tessera, native if ranks are given, gguf if "
            "TARGET ends in .gguf."
        ),
    ] = None,
    mp: Annotated[int | None, typer.Option(help="Model-parallel ranks of the native layout.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Round to float32, bfloat16, float16, fp8 (in blocks) or, for gguf, q8_0; default: as it is."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the result is verified: cpu, cuda.")] = "cpu",
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights, like 2GB or 500MB.")] = "5GB",
    verify: Annotated[
        str | None,
        typer.Option(
            help="Beside every weight, compare the logits of whole models (full), of some layers (sample) "
            "or of none (weights), or for gguf run the file with llama.cpp too (llama.cpp); default: full "
            "where memory allows it, else sample."
        ),
    ] = None,
    verify_memory: Annotated[
        str | None, typer.Option(help="Memory that this may take, like 8GB; default: what is free.")
    ] = None,
    tokenizer: Annotated[
        bool, typer.Option("--tokenizer/--no-tokenizer", help="For gguf: put the tokenizer into the file.")
    ] = True,
) -> None:
    """Convert from and to other families and native shards.

    What SOURCE is, its files say: a Tessera, Llama, Mistral, Qwen3, GPT-2, DeepSeek-V3 or NanoChat model,
    the native layout, nanochat's own model_*.pt, Meta's consolidated.*.pth, or llama2.c's .bin. The result
    is kept only if it is the same model: every weight bit for bit, logits, tokenizer. What was compared is in
    its conversion_report.md. A call that was killed goes on where it was.
    """
    if n_experts is not None and ranks is None:
        raise ValueError("give both numbers or neither: N_EXPERTS and MP, the ranks of the native layout")
    if ranks is not None and mp not in (None, ranks):
        raise ValueError(f"MP is given twice, as {ranks} and as {mp}")
    largest = read_size("--max-shard-size", max_shard_size)
    memory = None if verify_memory is None else read_size("--verify-memory", verify_memory)
    silence_transformers()
    from tqdm import tqdm

    from tessera.conversion.convert import convert as run

    # Only for a terminal, and not for what is written at once.
    with tqdm(unit="B", unit_scale=True, desc="writing", disable=None, leave=False, delay=1) as bar:

        def show(written: int, total: int) -> None:
            bar.total = total
            bar.update(written - bar.n)

        done = run(
            source,
            target,
            to=to,
            n_experts=n_experts,
            mp=mp if ranks is None else ranks,
            dtype=dtype,
            device=device,
            max_shard_size=largest,
            verify=verify,
            verify_memory=memory,
            progress=show,
            tokenizer=tokenizer,
        )
    for sentence in (*done.course, *done.notes):
        typer.echo(sentence)
    width = max(len(check.name) for check in done.report.checks)
    for check in done.report.checks:
        allowed = f" (allowed: {check.allowed})" if check.allowed else ""
        typer.echo(f"  {check.name.ljust(width)}  {check.found}{allowed}")
    logits = ""
    if done.difference is not None:
        difference = done.difference
        logits = f"; logits differ by at most {difference.largest:.3g} (allowed: {difference.allowed:.3g})"
    typer.echo(f"{done.source} -> {done.target}: {done.parameters:,} parameters{logits}\nwritten: {target}")


def read_size(option: str, text: str) -> int:
    """Bytes of a size like 2GB, 500 MB, 4GiB or 1000.

    Raises:
        ValueError: naming the option, if it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", text.upper())
    size = int(float(match[1]) * (_UNITS | _BINARY_UNITS)[match[2]]) if match else 0
    if size < 1:
        raise ValueError(f"{option} {text}: give a size like 2GB or 500MB")
    return size
