"""`tessera tokenizer`: from text to a tokenizer, or one that exists already; proving and looking at them."""

from typing import Annotated

import typer

from ._common import require_extra, silence_transformers

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Train a tokenizer, import, verify or look at one."
)

Output = Annotated[str, typer.Option(help="Directory to write; it must not exist, or be empty.")]


@app.callback()
def _group() -> None:
    pass


@app.command()
def train(
    output: Output,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text file or folder, JSON lines, parquet, or Hub dataset; may be given again."),
    ] = None,
    kind: Annotated[str, typer.Option("--type", help="bpe, sentencepiece or bytes.")] = "bpe",
    vocab_size: Annotated[
        int | None, typer.Option(help="Tokens in all, special ones included; default 32000.")
    ] = None,
    column: Annotated[str, typer.Option(help="Column of the text in tables.")] = "text",
    split: Annotated[str, typer.Option(help="Split of Hub datasets.")] = "train",
    name: Annotated[str | None, typer.Option(help="Configuration of Hub datasets.")] = None,
    limit_mb: Annotated[float, typer.Option(help="Megabytes of text to read at most; 0 for all.")] = 0.0,
) -> None:
    """Train a tokenizer on text."""
    if not data and kind != "bytes":
        raise ValueError("give --data: text to train the tokenizer on")
    if limit_mb < 0:
        raise ValueError(f"--limit-mb must be 0 (all) or more, got {limit_mb:g}")
    if kind == "sentencepiece":
        require_extra("tokenizer", "sentencepiece")
    from tessera.data.sources import read_texts
    from tessera.tokenization import train_tokenizer

    silence_transformers()
    texts = (
        read_texts(
            data, column=column, split=split, name=name, limit_bytes=int(limit_mb * 1e6) if limit_mb else None
        )
        if data and kind != "bytes"
        else ()
    )
    train_tokenizer(texts, kind=kind, vocab_size=vocab_size, output=output, source=data, report=typer.echo)
    typer.echo(f"tokenizer: {output}")


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="o200k_base, cl100k_base or gpt2; a .tiktoken or SentencePiece .model file; a folder with "
            "encoder.json and vocab.bpe, or with tokenizer.json; or a tokenizer on the Hub."
        ),
    ],
    output: Output,
    encoding: Annotated[
        str | None, typer.Option("--as", help="Encoding of a rank file, where its name does not tell.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Add the tokens and the template of the chat format.")
    ] = True,
) -> None:
    """Make a tokenizer directory of a tokenizer that exists."""
    from tessera.tokenization import import_tokenizer

    silence_transformers()
    tokenizer = import_tokenizer(source, encoding=encoding, chat=chat, output=output)
    typer.echo(f"{len(tokenizer)} tokens\ntokenizer: {output}")


A_TOKENIZER = (
    "A tokenizer directory, a name on the Hub, a .tiktoken or SentencePiece .model file, a folder with "
    "encoder.json and vocab.bpe, or o200k_base, cl100k_base or gpt2."
)


@app.command()
def verify(
    a: Annotated[str, typer.Argument(help=A_TOKENIZER)],
    b: Annotated[str, typer.Argument(help="Another, to compare it with.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text to compare on, as for train; may be given again. Default: hard strings."),
    ] = None,
    column: Annotated[str, typer.Option(help="Column of the text in tables.")] = "text",
    split: Annotated[str, typer.Option(help="Split of Hub datasets.")] = "train",
    name: Annotated[str | None, typer.Option(help="Configuration of Hub datasets.")] = None,
    limit_mb: Annotated[float, typer.Option(help="Megabytes of text to read at most; 0 for all.")] = 0.0,
    unicode: Annotated[
        bool, typer.Option("--unicode", help="Without --data: compare on every character of Unicode too.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Special tokens that only one has are a difference too.")
    ] = False,
    a_as: Annotated[
        str | None, typer.Option(help="Encoding of A, where it is a rank file of any name.")
    ] = None,
    b_as: Annotated[str | None, typer.Option(help="Encoding of B.")] = None,
) -> None:
    """Compare two tokenizers; exit code 1 with the first difference if there is one.

    Original files are run by their own libraries (tiktoken, sentencepiece), directories by tokenizers.
    """
    from tessera.data.sources import read_texts
    from tessera.tokenization.verify import verify_tokenizers

    if limit_mb < 0:
        raise ValueError(f"--limit-mb must be 0 (all) or more, got {limit_mb:g}")
    silence_transformers()
    limit = int(limit_mb * 1e6) if limit_mb else None
    texts = read_texts(data, column=column, split=split, name=name, limit_bytes=limit) if data else None
    found = verify_tokenizers(a, b, texts, encodings=(a_as, b_as), whole_unicode=unicode)
    equal = found.equal and not (strict and found.only_special)
    typer.echo(found.report())
    typer.echo("equal" if equal else "different")
    raise typer.Exit(0 if equal else 1)


Published = Annotated[
    bool,
    typer.Option(
        "--published/--no-published",
        help="Figures of GPT-2's, cl100k, o200k and Mistral's beside it, as far as they are to be had.",
    ),
]


def _say_without(sentence: str) -> None:
    typer.echo(sentence, err=True)


@app.command()
def info(
    tokenizer: Annotated[str, typer.Argument(help=A_TOKENIZER)],
    encoding: Annotated[
        str | None, typer.Option("--as", help="Encoding of a rank file, where its name does not tell.")
    ] = None,
    published: Published = True,
) -> None:
    """Tell what a tokenizer is like: size, tokens, bytes per token by kind of text."""
    from tessera.tokenization.published import open_published
    from tessera.tokenization.reference_codecs import open_codec
    from tessera.tokenization.token_statistics import describe

    silence_transformers()
    codec = open_codec(tokenizer, encoding=encoding)
    typer.echo(describe(codec, open_published(tokenizer, _say_without) if published else ()).report())


@app.command()
def compare(
    tokenizers: Annotated[list[str], typer.Argument(help=A_TOKENIZER + " Several, or one.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Text of your own, for a row more; as for train.")
    ] = None,
    column: Annotated[str, typer.Option(help="Column of the text in tables.")] = "text",
    split: Annotated[str, typer.Option(help="Split of Hub datasets.")] = "train",
    name: Annotated[str | None, typer.Option(help="Configuration of Hub datasets.")] = None,
    limit_mb: Annotated[float, typer.Option(help="Megabytes of --data to read at most; 0 for all.")] = 10.0,
    encodings: Annotated[
        list[str] | None,
        typer.Option("--as", help="FILE=ENCODING of a rank file of any name; may be given again."),
    ] = None,
    published: Published = True,
) -> None:
    """Table of bytes per token by kind of text.

    One tokenizer is compared with GPT-2's, cl100k, o200k and Mistral's, as far as they are to be had.
    """
    from tessera.data.sources import read_texts
    from tessera.tokenization.published import open_published
    from tessera.tokenization.reference_codecs import open_codec
    from tessera.tokenization.token_statistics import compare_table

    if limit_mb < 0:
        raise ValueError(f"--limit-mb must be 0 (all) or more, got {limit_mb:g}")
    silence_transformers()
    named = {file: encoding for file, _, encoding in (item.rpartition("=") for item in encodings or [])}
    if unknown := [file for file in named if file not in tokenizers]:
        raise ValueError(f"--as is FILE=ENCODING of a tokenizer that is given; {unknown[0]!r} is none")
    codecs = [open_codec(given, encoding=named.get(given)) for given in tokenizers]
    if len(codecs) == 1 and published:
        codecs += open_published(tokenizers[0], _say_without)
    limit = int(limit_mb * 1e6) if limit_mb else None
    texts = list(read_texts(data, column=column, split=split, name=name, limit_bytes=limit)) if data else None
    typer.echo(compare_table(codecs, texts))


@app.command()
def show(
    tokenizer: Annotated[str, typer.Argument(help=A_TOKENIZER)],
    text: Annotated[str | None, typer.Argument(help="Text to show.")] = None,
    file: Annotated[str | None, typer.Option(help="Text file, in place of TEXT.")] = None,
    output: Annotated[
        str | None, typer.Option(help="Page to write (HTML); without, to the terminal.")
    ] = None,
) -> None:
    """Show a text coloured by token: in the terminal, or as a page with ids on hover."""
    import os
    import sys
    from pathlib import Path

    from tessera.tokenization.page import page, terminal_text
    from tessera.tokenization.reference_codecs import open_codec

    if (text is None) == (file is None):
        raise ValueError("give the text itself, or a file with --file")
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f"there is no file {file}")
        text = Path(file).read_bytes().decode("utf-8", errors="replace")
    silence_transformers()
    codec = open_codec(tokenizer)
    if output is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        typer.echo(terminal_text(codec, text, color))
        return
    title = Path(file).name if file is not None else "A text"
    html = page(codec, text, title)
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(html, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the page cannot be written to {output}: {error.strerror}") from error
    typer.echo(f"page: {output}")
