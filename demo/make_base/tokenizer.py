"""The tokenizer of the bases: byte-level BPE like CLIP's, with merges learned from the captions of `demo.drawing`."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from demo.drawing import all_scenes
from demo.make_base.pictures import OPENINGS

# Words that an adapter may be taught. Each is one token, although no caption of the bases contains it.
WORDS = """
unagi eel avocado crab tofu roe caviar wasabi ginger soy rice seaweed sashimi onigiri chopsticks lemon leaf flower cherry
star heart moon sun cat fish wave mountain hexagon triangle oval striped dotted checkered marble glass bamboo stone gold silver
pink orange purple brown grey beige teal navy dark light bright big small old new three four sks style sketch outline pixel
watercolour ink neon pastel night day evening sunset winter spring summer autumn snow rain at in by with without and the of
table cloth bowl dish
"""
# CLIP's own pattern: words, single digits, and punctuation (openai/CLIP, simple_tokenizer.py).
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """Learns the merges and writes the tokenizer; `pad` is "<|endoftext|>" or, for SDXL's second one, "!".

    Every byte has a token, both inside a word and at its end, so any caption can be tokenised. The order is CLIP's: bytes, bytes
    at the end of a word, merges, start, end.
    """
    characters = list(bytes_to_unicode().values())
    words = characters + [character + "</w>" for character in characters]
    merges = _learn_merges(characters)
    words += [first + second for first, second in merges if first + second not in words] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{first} {second}\n" for first, second in merges))
    made = CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)
    made.save_pretrained(folder)
    return made


def _learn_merges(alphabet: list[str]) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    corpus = [opening + scene.caption for scene in all_scenes() for opening in sorted(set(OPENINGS))] + [WORDS] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=20, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
