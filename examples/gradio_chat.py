"""A Gradio chat in front of a running `tessera serve`.

    tessera serve --model runs/first-model &
    python examples/gradio_chat.py
    python examples/gradio_chat.py --server http://127.0.0.1:8000 --api-key KEY --port 7860

It talks to the server with the client of OpenAI, as any program would. Needs `pip install gradio openai`.
"""

import argparse
import os
from collections.abc import Callable, Iterator

from openai import OpenAI, OpenAIError


def make_reply(server: str, api_key: str = "none") -> Callable[..., Iterator[str]]:
    """The function behind the chat.

    Args:
        server: address of `tessera serve`.
        api_key: what the server was started with, if anything.

    Returns:
        From a message, the turns before it, instructions and a temperature to the answer so far, again and
        again until it is complete.

    Raises:
        OpenAIError: if there is no such server.
    """
    client = OpenAI(base_url=f"{server.rstrip('/')}/v1", api_key=api_key)
    model = client.models.list().data[0].id

    def reply(message: str, history: list[dict], system: str = "", temperature: float = 0.7) -> Iterator[str]:
        messages = [{"role": "system", "content": system}] if system.strip() else []
        # Gradio's turns hold more than the protocol has.
        messages += [{"role": turn["role"], "content": turn["content"]} for turn in history]
        messages.append({"role": "user", "content": message})
        stream = client.chat.completions.create(
            model=model, messages=messages, temperature=temperature, stream=True
        )
        text = ""
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            yield text

    return reply


def build_chat(server: str, api_key: str = "none"):
    """The Gradio interface, ready to `launch()`."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    return gradio.ChatInterface(
        make_reply(server, api_key),
        title="Tessera",
        additional_inputs=[
            gradio.Textbox("", label="System prompt"),
            gradio.Slider(0, 2, 0.7, step=0.05, label="Temperature"),
        ],
    )


def main() -> None:
    """Reads the flags and opens the chat."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="address of tessera serve")
    parser.add_argument("--api-key", default=os.environ.get("TESSERA_API_KEY") or "none")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    try:
        chat = build_chat(args.server, args.api_key)
    except OpenAIError as error:
        raise SystemExit(f"no answer from {args.server}: {error}; start it with 'tessera serve'") from error
    chat.launch(server_port=args.port)


if __name__ == "__main__":
    main()
