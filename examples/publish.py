"""A release for the Hub: weights, code, tokenizer and model card. After finetune_chat.py.

    python examples/publish.py                     # writes it to a folder
    python examples/publish.py your-name/a-model   # sends it

The same on the command line: `tessera push DIR your-name/a-model`.
"""

import sys

from finetune_chat import CHAT, FOLDER

from tessera.conversion.push import push


def main() -> None:
    """Builds the release, tries it in a process without Tessera, and writes or sends it."""
    if len(sys.argv) > 1:
        print(push(CHAT, sys.argv[1]))
        return
    release = FOLDER / "release"
    push(CHAT, "your-name/a-model", output=release)
    print(*sorted(path.name for path in release.iterdir()), sep="\n")


if __name__ == "__main__":
    main()
