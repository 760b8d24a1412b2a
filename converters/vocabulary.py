"""What generation needs to know of a model's tokens, whatever file it was read from."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

# Tokens that end a turn in known chat formats, whatever the metadata call end of sequence.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>")


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer and the ids that generation needs to know.

    size     one more than the largest id
    eos_id   what the model's own files call end of sequence
    eos_ids  all tokens that end an answer
    add_bos  put `bos_id` in front of a text that does not begin with it
    """

    tokenizer: Tokenizer
    size: int
    bos_id: int | None
    eos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
