"""`tessera data`: from text to tokens on disk."""

import shlex
from typing import Annotated

import typer

from ._common import silence_transformers

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="From text to tokens on disk, or from the Hub."
)


@app.callback()
def _group() -> None:
    pass


@app.command()
def prepare(
    output: Annotated[str, typer.Option(help="Folder to write; must not exist, or be empty.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text, JSON lines, parquet: file, folder or Hub dataset (org/name). May be given again; "
            "X:0.7 gives a source a weight in tokens."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A known mixture instead of --data: c4-wikipedia.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer directory or Hub name; default: bytes.")
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Stop at so many tokens, such as 1e9; default: all, of a preset 2e9.")
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the documents that is held out.")] = 0.005,
    val_data: Annotated[
        list[str] | None, typer.Option(help="Text to hold out instead, as it is. May be given again.")
    ] = None,
    filters: Annotated[
        str | None,
        typer.Option(
            help="none, basic, c4, gopher, fineweb, or names of rules, with commas between; default: none, "
            "of a preset basic."
        ),
    ] = None,
    min_chars: Annotated[
        int | None, typer.Option(help="Shortest document; default: 200 with basic filters, else any.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that encode; default: one a core.")] = None,
    language: Annotated[
        str | None, typer.Option(help="Keep only this language, such as en, by a trained model.")
    ] = None,
    explain: Annotated[
        int,
        typer.Option(help="Show so many dropped documents of each reason; also in dropped_examples.jsonl."),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the order in which Hub datasets are read.")] = 0,
    column: Annotated[str | None, typer.Option(help="Column that holds the text; default: text.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of Hub datasets; default: train.")] = None,
    name: Annotated[str | None, typer.Option(help="Configuration of Hub datasets, such as en.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew instead of going on after an earlier call.")
    ] = False,
) -> None:
    """Read, filter and encode text to train.bin and val.bin.

    Killed, it goes on where it was when it is called again with the same arguments.
    """
    silence_transformers()
    import os

    from tessera.data.filters import choose_filters
    from tessera.data.mixing import MIXTURES, parse_source
    from tessera.data.prepare import prepare as run

    if (preset is None) == (not data):
        raise ValueError("give either --data or --preset")
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options = {"column": column, "split": split, "name": name}
    where = {option: value for option, value in options.items() if value is not None}
    if preset is None:
        sources = [parse_source(source, **where) for source in data]
    else:
        if where:
            raise ValueError(f"--{next(iter(where))} is for --data; a --preset says itself where its text is")
        if preset not in MIXTURES:
            raise ValueError(f"there is no mixture {preset!r}; there are {', '.join(MIXTURES)}")
        sources = list(MIXTURES[preset].sources)
        tokens = MIXTURES[preset].tokens if tokens is None else tokens
    if tokens is not None and not 1 <= tokens < 2**63:
        raise ValueError(f"--tokens must be at least 1, got {tokens:g}")
    meta = run(
        sources,
        output,
        tokenizer=tokenizer,
        tokens=None if tokens is None else int(tokens),
        val_fraction=val_fraction,
        val_data=val_data,
        filters=choose_filters(filters or ("basic" if preset else "none"), min_chars, language),
        workers=workers,
        seed=seed,
        explain=explain,
        restart=restart,
    )
    _show(meta)
    if explain:
        _show_dropped(output)
    _say_next(output)


def _say_next(output: str) -> None:
    typer.echo(f"\ntokens: {output}\nnext: tessera pretrain --config PRESET --data {shlex.quote(output)}")


@app.command()
def download(
    dataset: Annotated[str, typer.Argument(help="Dataset or model repository on the Hub: org/name.")],
    output: Annotated[str, typer.Option(help="Folder to write; must not exist, or be empty.")],
) -> None:
    """Fetch text that is tokenized already from the Hub."""
    silence_transformers()
    from tessera.data.download import download as run

    _show(run(dataset, output).meta)
    _say_next(output)


@app.command()
def upload(
    folder: Annotated[str, typer.Argument(help="What prepare or download wrote.")],
    repo: Annotated[str, typer.Argument(help="Dataset repository on the Hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; default: the main one.")] = None,
    dry_run: Annotated[
        str | None, typer.Option(help="Directory to put what would be sent in, instead of sending it.")
    ] = None,
) -> None:
    """Send tokens to the Hub, with a card; every file is checked before."""
    silence_transformers()
    from tessera.data.upload import upload as run

    typer.echo(run(folder, repo, private=private, revision=revision, dry_run=dry_run))
    if dry_run is None:
        typer.echo(f"next: tessera data download {repo} --output tokens")


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="What prepare or download wrote.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read and hash every file.")] = False,
    characters: Annotated[int, typer.Option(help="How much of the text to show.")] = 300,
) -> None:
    """Check a folder of tokens, and show what is in it."""
    silence_transformers()
    from tessera.data.token_files import decode_start, open_prepared

    data = open_prepared(folder, verify=verify)
    _show(data.meta)
    if verify and data.meta.get("sha256"):
        typer.echo("\nevery file is the one that was written (sha256)")
    for split in ("train", "val"):
        typer.echo(f"\n{split} begins:\n{decode_start(data, split, characters)}")


@app.command()
def preview(
    tokenizer: Annotated[str, typer.Option(help="Tokenizer or model directory, or Hub name.")],
    source: Annotated[
        str | None, typer.Argument(help="Conversations: file, folder, or Hub dataset (org/name).")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A known dataset instead of SOURCE, such as smoltalk.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Conversations to show.")] = 3,
    output: Annotated[str | None, typer.Option(help="Page to write as well (.html).")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids.")] = False,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Cut conversations there, as training would.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a Hub dataset.")] = None,
    name: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
) -> None:
    """Show conversations as they are trained on."""
    silence_transformers()
    import os
    import sys
    from pathlib import Path

    from tessera.data.chat import load_conversations, preset_path
    from tessera.data.chat_rows import Unusable
    from tessera.data.preview import show_conversation, to_page, to_terminal, totals
    from tessera.tokenization import load_chat_tokenizer

    if (preset is None) == (source is None):
        raise ValueError("give either SOURCE or --preset")
    if rows < 1:
        raise ValueError(f"--rows must be at least 1, got {rows}")
    if max_seq_len is not None and max_seq_len < 1:
        raise ValueError(f"--max-seq-len must be at least 1, got {max_seq_len}")
    if output is not None:
        if Path(output).is_dir():
            raise ValueError(f"--output {output} is a folder; give the file of the page to write")
        try:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output {output} cannot be written: {error.strerror}") from error
    source = source or preset_path(preset)
    chat = load_chat_tokenizer(tokenizer)
    conversations = load_conversations(source, split=split, name=name, limit=rows)
    shown, refused = [], []
    for conversation in conversations:
        try:
            shown.append(show_conversation(chat, conversation, max_seq_len))
        except Unusable as error:
            refused.append(str(error))
    if not shown:
        raise ValueError(f"no conversation can be used: {refused[0]}")
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    typer.echo(f"what is trained on stands {'in green' if color else 'between ⟦ and ⟧'}\n")
    typer.echo(to_terminal(shown, color, ids))
    typer.echo(f"\n{totals(shown)}")
    for sentence in refused:
        typer.echo(f"left out: {sentence}")
    if output is not None:
        Path(output).write_text(to_page(shown, source, tokenizer, ids), encoding="utf-8")
        typer.echo(f"page: {output}")


def _show(meta: dict) -> None:
    """Counts by split, by source and by reason to drop."""
    rows = [("split", "documents", "tokens", "MB", "bytes/token")]
    for split in ("train", "val"):
        counts = meta[split]
        rows.append((split, *_counts(counts)))
    _table(rows)
    if sources := meta.get("sources"):
        rows = [("source", "documents", "tokens", "MB", "bytes/token", "share", "weight")]
        total = sum(source["tokens"] for source in sources) or 1
        for source in sources:
            share, weight = f"{100 * source['tokens'] / total:.1f} %", source.get("weight", "")
            rows.append((source["source"], *_counts(source), share, str(weight)))
        _table(rows)
    if dropped := (meta.get("filters") or {}).get("dropped"):
        total = sum(source["read"] for source in meta["sources"])
        rows = [("dropped", "documents", "share")]
        _table(rows + [(name, f"{n:,}", f"{100 * n / total:.2f} %") for name, n in dropped.items()])
    if lines := (meta.get("filters") or {}).get("lines_dropped"):
        _table([("lines dropped", "lines"), *((name, f"{n:,}") for name, n in lines.items())])
    if drawn_by := meta.get("val_drawn_by"):
        typer.echo(f"\nheld out by: {drawn_by}")


def _show_dropped(folder: str) -> None:
    """The examples of what was dropped."""
    import json
    from pathlib import Path

    from tessera.data.dropped import EXAMPLES, describe

    for line in (Path(folder) / EXAMPLES).read_text(encoding="utf-8").splitlines():
        typer.echo("\n" + describe(json.loads(line)))


def _counts(counts: dict) -> tuple[str, ...]:
    tokens, size = counts["tokens"], counts["bytes"]
    documents = counts.get("documents")
    shown = "?" if documents is None else f"{documents:,}"
    return shown, f"{tokens:,}", f"{size / 1e6:,.1f}", f"{size / max(tokens, 1):.2f}"


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    typer.echo()
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        typer.echo("  ".join([first.ljust(widths[0]), *cells]))
