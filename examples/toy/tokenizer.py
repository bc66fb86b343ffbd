"""The toy policy's tokenizer: byte-level BPE trained on toy answers, with Qwen2.5-VL's special tokens and chat format.

Numbers of up to three digits are one token each, so that a coordinate is one decision, and a word is the same token whatever
punctuation follows; everything else can still be spelled byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = r"</?\w+>|\p{N}{1,3}| ?\p{L}+(?=[\s.,;?])| ?[^\s\p{N}<]+|<|\s+"


def train_tokenizer(corpus: Iterable[str], numbers: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary holds every byte, every number below `numbers`, and the corpus's frequent pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, min_frequency=50, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    every_number = [" ".join(map(str, range(numbers)))] * 50
    tokenizer.train_from_iterator([*corpus, *every_number], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT, model_max_length=4096
    )
