"""Attention masks: none where plain causal order needs none, and which kernel takes the others.

Plain causal training is the common case and the fast one: the kernels know causal order by themselves, and a
mask, even one that hides nothing more, keeps the best of them away. So a mask is made only for what is more
than that: windows shorter than the row, packed documents, padding on the left, a cache of fixed length. On a
GPU such a mask is a `BlockMask` for flex attention, whose size is that of its blocks and not of T x T;
attention modules choose the kernel by the mask that they are given. What belongs here: the step from what a
caller passes (`attention_mask`, `position_ids`, a cache) to one mask for each kind of layer.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
)

from .configuration_tessera import TesseraConfig

_MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}

# Where flex attention has kernels for both directions.
BLOCK_MASK_DEVICES = {"cuda"}

# Flex attention is compiled for seconds when it is first called. A forward pass alone, as before decoding,
# takes the written-out mask instead while that has at most so many entries (one byte each).
WRITTEN_OUT_ENTRIES = 2**28

Mask = torch.Tensor | BlockMask | None


def make_masks(
    config: TesseraConfig,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict[str, Mask] | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None,
    dropout: bool = False,
) -> dict[str, Mask]:
    """The mask of each kind of layer; None where causal order says all.

    The library isolates packed documents only without a cache and without a padding mask. So the masks are
    made as if an empty cache were not there, and beside a padding mask the documents are counted here.
    Padding on the right needs no mask: in causal order no token sees what follows it. What comes out at
    padded positions is not defined.

    Args:
        config: for the kinds of layers, the window, and the attention implementation.
        embeds: [B, T, C], of which shape, dtype and device count.
        attention_mask: [B, S] with zeros on padding; or [B, 1, T, S]; or ready masks by kind of layer.
        cache: keys and values that come before, or None.
        position_ids: [B, T] as the caller gave them; a new document starts where they restart.
        dropout: whether attention probabilities are dropped, which flex attention cannot do.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    kinds = sorted(set(config.layer_types))
    if cache is not None and attention_mask is None and _is_empty(cache):
        cache = None
    if cache is None:
        attention_mask, position_ids = _without_the_plain(attention_mask, position_ids)

    implementation = config._attn_implementation
    # Under sdpa a soft-cap takes the eager path, which needs its mask.
    softcap_by_hand = implementation == "sdpa" and config.attn_logit_softcapping is not None
    nothing_given = cache is None and attention_mask is None and position_ids is None
    masks: dict[str, Mask] = {}
    if nothing_given and implementation == "sdpa" and not softcap_by_hand:
        length = embeds.shape[1]
        plain = [kind for kind in kinds if kind == "full_attention" or length <= config.sliding_window]
        masks = dict.fromkeys(plain)
    if len(masks) == len(kinds):
        return masks

    missing = [kind for kind in kinds if kind not in masks]
    padded = attention_mask is not None and attention_mask.ndim == 2
    documents = None
    if cache is None and position_ids is not None and padded:
        starts = (position_ids.expand_as(attention_mask) == 0) & (attention_mask != 0)
        documents = starts.cumsum(-1)
    if not dropout and cache is None and _takes_block_masks(config, embeds, attention_mask):
        if documents is None and position_ids is not None:
            documents = F.pad(position_ids.diff(dim=-1) != 1, (1, 0)).cumsum(-1)
        windows = {kind: config.sliding_window if kind == "sliding_attention" else None for kind in missing}
        made = {kind: _block_mask(embeds, windows[kind], attention_mask, documents) for kind in missing}
        return masks | made

    arguments = {
        "config": config,
        "inputs_embeds": embeds,
        "attention_mask": attention_mask,
        "past_key_values": cache,
        "position_ids": position_ids,
    }
    # Flash attention takes the padding mask as it is, and no other beside it.
    flash = "flash" in (implementation or "")
    packed = cache is None and attention_mask is None and position_ids is not None
    if flash and packed and embeds.shape[0] > 1 and not torch.compiler.is_compiling():
        # The library looks for documents in a batch of one row and would let these see one another.
        raise ValueError(
            f"flash attention keeps packed documents apart in one row only, got {embeds.shape[0]}: join the "
            "rows to one (their positions restart), or take sdpa"
        )
    if documents is not None and not flash:
        arguments["and_mask_function"] = packed_sequence_mask_function(documents)
    elif softcap_by_hand:
        arguments["and_mask_function"] = everything
    return masks | {kind: _MASKS[kind](**arguments) for kind in missing}


def _block_mask(
    embeds: torch.Tensor,
    window: int | None,
    attention_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
) -> BlockMask:
    """Causal order within a window, a padding mask [B, T] and documents numbered in [B, T] or [1, T]."""
    batch, length = embeds.shape[:2]
    kept = None if attention_mask is None else attention_mask != 0
    documents = None if documents is None else documents.expand(batch, -1)

    def sees(b, h, query, key):
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        if documents is not None:
            seen = seen & (documents[b, query] == documents[b, key])
        return seen if kept is None else seen & kept[b, key]

    rows = None if kept is None and documents is None else batch
    # Uncompiled it would write all T x T entries out to look at them.
    tracing = torch.compiler.is_compiling()
    create = create_block_mask if tracing else torch.compile(create_block_mask)
    return create(sees, rows, None, length, length, device=embeds.device)


def _without_the_plain(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """None in place of a padding mask or positions that ask for nothing beyond causal order.

    This looks at values, which a compiler that traces cannot.
    """
    if torch.compiler.is_compiling():
        return attention_mask, position_ids
    if attention_mask is not None and attention_mask.ndim == 2:
        seen = attention_mask != 0
        if seen[:, 0].all() and not (seen[:, 1:] & ~seen[:, :-1]).any():
            attention_mask = None
    if position_ids is not None and (position_ids.diff(dim=-1) == 1).all():
        position_ids = None
    return attention_mask, position_ids


def _takes_block_masks(
    config: TesseraConfig, embeds: torch.Tensor, attention_mask: torch.Tensor | None
) -> bool:
    """Whether what sdpa cannot do without a mask goes to flex attention."""
    if config._attn_implementation != "sdpa" or embeds.device.type not in BLOCK_MASK_DEVICES:
        return False
    if attention_mask is not None and attention_mask.ndim != 2:
        return False
    batch, length = embeds.shape[:2]
    small = batch * length * length <= WRITTEN_OUT_ENTRIES
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or not small


def _is_empty(cache: Cache) -> bool:
    """Whether a cache that grows has nothing in it yet; the masks of a static one are of its own length."""
    return not cache.is_compileable and cache.get_seq_length() == 0


def everything(*_) -> torch.Tensor:
    """A mask function that hides nothing; given one, the library always makes the mask."""
    return torch.ones((), dtype=torch.bool)
