"""A conversation with a running `tessera serve`, through the client of OpenAI, streamed.

    tessera serve --model runs/examples/chat &
    python examples/chat_client.py "Tell me a story about a fox and a kite." "Where was the kite?"

Needs `pip install openai`.
"""

import argparse

from openai import OpenAI


def main() -> None:
    """Asks the questions one after the other, in one conversation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.server}/v1", api_key=args.api_key)
    model = client.models.list().data[0].id
    messages = []
    for question in args.questions:
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


if __name__ == "__main__":
    main()
