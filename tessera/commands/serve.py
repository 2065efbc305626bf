"""`tessera generate`, `tessera chat`, `tessera serve`: text from a model."""

from typing import Annotated

import typer

from ._common import require_extra, silence_transformers


def generate(
    ckpt_path: Annotated[
        str, typer.Option("--model", "--ckpt-path", help="Model directory, or a run directory.")
    ],
    config: Annotated[str | None, typer.Option(help="Configuration, if not the checkpoint's own.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given again.")] = None,
    input_file: Annotated[
        str | None, typer.Option(help="File of prompts, one a line, run as one batch.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Type prompts; /clear and /exit.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a completion.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.2,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens of this mass.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="For the same text again.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the fastest.")] = None,
) -> None:
    """Continue prompts from flags, a file or the keyboard."""
    if not (prompt or input_file or interactive):
        raise ValueError("give --prompt, --input-file or --interactive")
    from pathlib import Path

    from tessera.serving import generate as serving

    silence_transformers()
    prompts = list(prompt or [])
    if input_file is not None:
        if not Path(input_file).is_file():
            raise ValueError(f"there is no file {input_file}")
        prompts += [
            line for line in Path(input_file).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        if not prompts:
            raise ValueError(f"{input_file} holds no prompts")
    sampling = serving.Sampling(max_new_tokens, temperature, top_k, top_p)
    model, tokenizer = serving.load(ckpt_path, config, device)
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    completions = serving.complete(model, tokenizer, prompts, sampling) if prompts else []
    for text, completion in zip(prompts, completions, strict=True):
        typer.echo(f"Prompt: {text}\nCompletion: {completion}\n")
    if interactive:
        serving.converse(model, tokenizer, sampling)


def chat(
    model: Annotated[
        str, typer.Option("--model", "--ckpt-path", help="Model directory, or a run directory.")
    ],
    system: Annotated[str, typer.Option(help="Instructions that come before the conversation.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens of this mass.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="For the same answers again.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the fastest.")] = None,
) -> None:
    """Chat with a model in the terminal."""
    from tessera.serving.conversations import ChatFormat
    from tessera.serving.engine import Engine, Request
    from tessera.serving.generate import Sampling, load
    from tessera.serving.terminal_chat import TerminalChat

    silence_transformers()
    # It knows the ranges.
    Sampling(max_new_tokens, temperature, top_k, top_p)
    loaded, tokenizer = load(model, device=device)
    conversations = ChatFormat(tokenizer)
    engine = Engine(loaded, tokenizer, end_ids=conversations.end_ids, max_batch_size=1)
    settings = Request((), max_new_tokens, temperature, top_k, top_p, seed)
    try:
        TerminalChat(engine, conversations, settings, system).run()
    finally:
        engine.close(wait=10)


def serve(
    model: Annotated[
        str, typer.Option("--model", "--ckpt-path", help="Model directory, or a run directory.")
    ],
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes one that is free.", min=0, max=65535)] = 8000,
    max_batch_size: Annotated[int, typer.Option(help="Requests that run together.")] = 8,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; others get status 429.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer if a request gives none.")] = 512,
    max_body_kb: Annotated[int, typer.Option(help="Largest body of a request.")] = 1024,
    api_key: Annotated[
        str | None, typer.Option(envvar="TESSERA_API_KEY", help="What clients must send; default: nothing.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the fastest.")] = None,
) -> None:
    """Serve a model over HTTP: OpenAI's protocol and a chat page."""
    require_extra("serve", "fastapi", "uvicorn")
    from pathlib import Path

    from tessera.serving.conversations import ChatFormat
    from tessera.serving.engine import Engine
    from tessera.serving.generate import load
    from tessera.serving.server import Server, ServerSettings, build_app, listen

    silence_transformers()
    path = Path(model).resolve()
    name = path.parent.name if path.name == "final" else path.name
    settings = ServerSettings(name, max_new_tokens, api_key or None, max_body_kb)
    with listen(host, port) as address:
        loaded, tokenizer = load(model, device=device)
        conversations = ChatFormat(tokenizer)
        engine = Engine(
            loaded,
            tokenizer,
            end_ids=conversations.end_ids,
            max_batch_size=max_batch_size,
            max_queue=max_queue,
        )

        def say(url: str) -> None:
            typer.echo(f"serving {name} on {loaded.device} at {url} (the chat page; the API is {url}/v1)")
            if not conversations.available:
                typer.echo("it has no chat template: the page continues texts")
            typer.echo("Ctrl-C stops it")

        try:
            Server(build_app(engine, settings), engine, say).run(sockets=[address])
        except KeyboardInterrupt:
            typer.echo("stopped")
        finally:
            engine.close(wait=10)
