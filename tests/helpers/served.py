"""Tiny chat models, and servers of them in this process."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from tessera import TesseraForCausalLM, build_byte_tokenizer
from tessera.serving.conversations import ChatFormat
from tessera.serving.engine import Engine
from tessera.tokenization.chat import SPECIAL_TOKENS, add_chat

from .models import tiny_model


def chat_tokenizer():
    """Bytes and the tokens of the chat format."""
    return add_chat(build_byte_tokenizer())


def space_dropping(tokenizer) -> PreTrainedTokenizerFast:
    """Decodes as the tokenizers of Llama and Mistral do: without the space that a text begins with."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.decoder = decoders.Sequence([backend.decoder, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    dropping = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=tokenizer.eos_token,
        extra_special_tokens=[
            token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token
        ],
        chat_template=tokenizer.chat_template,
    )
    assert dropping.decode(list(b"  ")) == " "
    return dropping


def chat_model(name: str = "llama-tiny", seed: int = 4, **overrides) -> TesseraForCausalLM:
    """A tiny model with random weights for `chat_tokenizer`."""
    return tiny_model(name, seed, vocab_size=256 + len(SPECIAL_TOKENS), **overrides)


def scripted(ids: Sequence[int], seconds: float = 0.0) -> TesseraForCausalLM:
    """A model that says these tokens, then ends its turn, whatever the prompt; each step takes so long."""
    model = chat_model()
    script = [*ids, 256 + SPECIAL_TOKENS.index("<|im_end|>")]
    step = 0

    def speak(module, args, kwargs, output):
        nonlocal step
        step = 0 if kwargs["input_ids"].shape[1] > 1 else step + 1
        time.sleep(seconds)
        output.logits[:, -1] = torch.nn.functional.one_hot(
            torch.tensor(script[min(step, len(script) - 1)]), output.logits.shape[-1]
        ).float()
        # Far above the others, so that sampling follows it as well.
        output.logits[:, -1] *= 1e4
        return output

    model.register_forward_hook(speak, with_kwargs=True)
    return model


def greedy_reference(model, tokenizer, prompt: Sequence[int], count: int) -> str:
    """What plain transformers continues a prompt with, up to an end token."""
    ids = torch.tensor([list(prompt)])
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|im_end|>"])]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=ends,
    )
    return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


@contextmanager
def engine_of(model, tokenizer=None, **limits) -> Iterator[Engine]:
    """An engine that is closed in the end."""
    tokenizer = tokenizer or chat_tokenizer()
    engine = Engine(model, tokenizer, end_ids=ChatFormat(tokenizer).end_ids, **limits)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def served(engine: Engine, **settings) -> Iterator[str]:
    """The address of a server of an engine."""
    # Here, so that tests of engines alone do not need the libraries of the server.
    from tessera.serving.server import Server, ServerSettings, build_app, listen

    ready = threading.Event()
    urls = []

    def say(url: str) -> None:
        urls.append(url)
        ready.set()

    app = build_app(engine, ServerSettings(**{"name": "tiny", "max_new_tokens": 16, **settings}))
    server = Server(app, engine, say)
    with listen("127.0.0.1", 0) as address:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [address]}, daemon=True)
        thread.start()
        assert ready.wait(20), "the server did not start"
        yield urls[0]
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
