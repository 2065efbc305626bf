"""Every block of docs/chat_data.md: Python is run and prints what the page shows, commands are parsed."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from helpers.chats import chat_model, chat_tokenizer, conversations, write_rows

from tessera.cli import app
from tessera.data.chat import PRESETS, ROW_SHAPES
from tessera.data.chat_rows import TOO_LONG
from tessera.tokenization.chat import NANOCHAT_TOKENS

PAGE = (Path(__file__).parents[2] / "docs" / "chat_data.md").read_text(encoding="utf-8")
BLOCKS = [
    (section, *block)
    for section, text in re.findall(r"^#+ (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    for block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
]


def test_there_is_no_block_that_nothing_reads():
    kinds = [(section, kind) for section, kind, _ in BLOCKS]
    assert kinds == [
        ("Conversations as data", "bash"),
        ("Formats", "python"),
        ("Formats", ""),
        ("A conversation, written out", "python"),
        ("A conversation, written out", ""),
        ("Rows", "python"),
        ("Rows", "python"),
    ]


@pytest.mark.parametrize("section", ["Formats", "A conversation, written out", "Rows"])
def test_a_section_runs_as_it_is_written_and_prints_what_it_shows(section, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chat_tokenizer().save_pretrained("tokenizer")
    if section == "Formats":
        import copy

        bare = copy.deepcopy(chat_tokenizer())
        bare.add_special_tokens({"extra_special_tokens": list(NANOCHAT_TOKENS)})
        bare.chat_template = "{{ messages }}"
        bare.save_pretrained("nanochat")
    if section == "Rows":
        chat_model(tmp_path / "runs" / "chat")
        write_rows(tmp_path / "chats.jsonl", conversations(30))
    namespace = {}
    code = "\n".join(text for place, kind, text in BLOCKS if place == section and kind == "python")
    exec(compile(code, f"chat_data.md, {section}", "exec"), namespace)
    shown = [text for place, kind, text in BLOCKS if place == section and not kind]
    if shown:
        assert capsys.readouterr().out.strip() == shown[0].strip()
    if section == "Rows":
        assert {len(row["position_ids"]) for row in namespace["rows"]} == {256}


def test_the_commands_have_these_options():
    root = typer.main.get_command(app)
    for line in BLOCKS[0][2].splitlines():
        command, words = root, shlex.split(line)[1:]
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_presets_shapes_and_ways_of_cutting_are_those_of_the_code():
    table = [[re.findall(r"`(.*?)`", cell) for cell in line.split("|")[1:6]] for line in PAGE.splitlines()]
    rows = {
        cells[0][0]: (cells[1][0], cells[2] + cells[3])
        for cells in table
        if len(cells) == 5 and cells[1] and "/" in cells[1][0]
    }
    assert rows == {
        name: (known.path, [*([known.name] if known.name else []), *known.splits])
        for name, known in PRESETS.items()
    }
    shapes = PAGE[PAGE.index("| `messages` |") : PAGE.index("- A column")]
    assert {column for columns, _ in ROW_SHAPES for column in columns} <= set(re.findall(r"`(\w+)`", shapes))
    assert all(f"`{way}`" in PAGE for way in TOO_LONG)
