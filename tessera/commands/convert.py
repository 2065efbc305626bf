"""`tessera convert`: in from other formats, and out to them."""

from typing import Annotated

import typer

from ._common import silence_transformers


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Model directory or file of any known kind, or a run directory."
        ),
    ],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Directory to write; must not be there yet.")
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
            help="tessera, native, llama, mistral, qwen3, gpt2, deepseek_v3, nanochat, or nanochat's own "
            "nanochat-original (July 2026) and nanochat-2025; default: tessera, "
            "or native if ranks are given."
        ),
    ] = None,
    mp: Annotated[int | None, typer.Option(help="Model-parallel ranks of the native layout.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Round to float32, bfloat16 or float16; default: as it is.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the result is verified: cpu, cuda.")] = "cpu",
) -> None:
    """Convert from and to other families and native shards.

    What SOURCE is, its files say: a Tessera, Llama, Mistral, Qwen3, GPT-2, DeepSeek-V3 or NanoChat model,
    the native layout, nanochat's own model_*.pt, Meta's consolidated.*.pth, or llama2.c's .bin. The result
    is kept only if its logits are those of the source.
    """
    if n_experts is not None and ranks is None:
        raise ValueError("give both numbers or neither: N_EXPERTS and MP, the ranks of the native layout")
    if ranks is not None and mp not in (None, ranks):
        raise ValueError(f"MP is given twice, as {ranks} and as {mp}")
    silence_transformers()
    from tessera.conversion.convert import convert as run

    done = run(
        source,
        target,
        to=to,
        n_experts=n_experts,
        mp=mp if ranks is None else ranks,
        dtype=dtype,
        device=device,
    )
    for note in done.notes:
        typer.echo(note)
    typer.echo(
        f"{done.source} -> {done.target}: {done.parameters:,} parameters; logits differ by at most "
        f"{done.difference.largest:.3g} (allowed: {done.difference.allowed:.3g})\nwritten: {target}"
    )
