"""A conversation with a running `tessera serve`, through the client of OpenAI, streamed.

    tessera serve --model runs/examples/chat &
    python examples/chat_client.py "Tell me a story about a fox and a kite." "Where was the kite?"

Needs `pip install openai`.
"""

import argparse
import os

from openai import OpenAI, OpenAIError


def converse(server: str, api_key: str, questions: list[str]) -> None:
    """Asks the questions one after the other, in one conversation."""
    client = OpenAI(base_url=f"{server}/v1", api_key=api_key)
    model = client.models.list().data[0].id
    messages = []
    for question in questions:
        print(f"user: {question}\nassistant: ", end="")
        messages.append({"role": "user", "content": question})
        answer = ""
        for chunk in client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=100, stream=True
        ):
            piece = chunk.choices[0].delta.content or ""
            print(piece, end="", flush=True)
            answer += piece
        messages.append({"role": "assistant", "content": answer})
        print()


def main() -> None:
    """Reads the flags and talks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default=os.environ.get("TESSERA_API_KEY") or "none")
    args = parser.parse_args()
    try:
        converse(args.server, args.api_key, args.questions)
    except OpenAIError as error:
        raise SystemExit(f"no answer from {args.server}: {error}") from error


if __name__ == "__main__":
    main()
