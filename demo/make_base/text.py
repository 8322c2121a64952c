"""Stage 2: trains both text encoders contrastively with thumbnails, as in CLIP (Radford et al. 2021, figure 3).

A UNet learns to follow captions much sooner with pretrained encoders. Stage 3 trains the encoders further, together with the UNet.

python -m demo.make_base.text FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from demo.drawing import SQUARE
from demo.make_base.pictures import VALIDATION, make_pictures, sentence
from demo.make_base.stage import Stage, generator, pixels, write_result
from demo.make_base.tokenizer import END, START, make_tokenizer

STEPS, BATCH, WIDTH = 600, 96, 64


def build(words: CLIPTokenizer, *, projected: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text encoder like SDXL's first one, which SD1.5 uses too, or like SDXL's second one (`projected`)."""
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=WIDTH,
        # The activations differ as in the real encoders.
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=words.convert_tokens_to_ids(START),
        eos_token_id=words.convert_tokens_to_ids(END),
        pad_token_id=words.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def token_ids(words: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids `(n, 77)`."""
    return words(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


class _Eye(torch.nn.Module):
    """Image encoder, `(n, 3, 32, 32)` to `(n, WIDTH)`, with a projection for the first text encoder, which has none."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 96)):
            layers += [torch.nn.Conv2d(before, after, 3, 2, 1), torch.nn.GroupNorm(8, after), torch.nn.SiLU()]
        self.body = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(96 * 16, WIDTH))
        self.first = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.warmth = torch.nn.Parameter(torch.tensor(2.5))

    def contrast(self, picture: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """InfoNCE in both directions: each image is matched to its caption within the batch, and each caption to its image."""
        picture, words = functional.normalize(picture, dim=-1), functional.normalize(words, dim=-1)
        scores = picture @ words.T * self.warmth.exp().clamp(max=50)
        right = torch.arange(len(scores))
        return (functional.cross_entropy(scores, right) + functional.cross_entropy(scores.T, right)) / 2


def main(folder: Path, seed: int = 0) -> None:
    torch.set_num_threads(2)
    shown, rows = make_pictures(folder / "pictures")[SQUARE]
    places = [place for place in range(len(rows) - VALIDATION) if rows[place].plain]
    words = {pad: make_tokenizer(folder / f"tokenizer{number}", pad) for number, pad in ((1, END), (2, "!"))}
    torch.manual_seed(seed)
    modules = {"first": build(words[END], projected=False), "second": build(words["!"], projected=True), "eye": _Eye()}
    stage = Stage(folder, "text", modules, steps=STEPS, lr=2e-3, decay=0.98, every=100)
    stage.restore()
    first, second, eye = modules.values()

    def loss_of(step: int) -> torch.Tensor:
        draw = generator(seed, 11, step)
        # No caption occurs twice in a batch, because it would match two images.
        chosen = {rows[place].scene: place for place in draw.choice(places, 2 * BATCH, replace=False)}
        chosen = dict(list(chosen.items())[:BATCH])
        captions = [sentence(scene, draw) for scene in chosen]
        picture = eye.body(functional.avg_pool2d(pixels(shown[sorted(chosen.values())]), 4))
        # The images were read in file order; sort the captions accordingly.
        order = sorted(range(len(chosen)), key=list(chosen.values()).__getitem__)
        captions = [captions[place] for place in order]
        pooled = eye.first(first(token_ids(words[END], captions)).pooler_output)
        return eye.contrast(picture, pooled) + eye.contrast(
            picture, second(token_ids(words["!"], captions)).text_embeds
        )

    stage.run(loss_of)
    stage.averaged()
    scenes = list(dict.fromkeys(row.scene for row in rows[-VALIDATION:] if row.plain))
    result = {"steps": stage.step, "seconds": round(stage.seconds), "log": stage.log, "vocabulary": len(words[END])}
    result["right_of"] = len(scenes)
    with torch.no_grad():
        places = [
            next(i for i in range(len(rows) - VALIDATION, len(rows)) if rows[i].scene == scene) for scene in scenes
        ]
        picture = functional.normalize(eye.body(functional.avg_pool2d(pixels(shown[places]), 4)), dim=-1)
        spoken = second(token_ids(words["!"], [scene.caption for scene in scenes])).text_embeds
        found = (picture @ functional.normalize(spoken, dim=-1).T).argmax(1)
        result["right"] = int((found == torch.arange(len(scenes))).sum())
    for name, encoder, pad in (("first", first, END), ("second", second, "!")):
        _level_unheard(encoder, words[pad])
        encoder.save_pretrained(folder / f"text_{name}")
    write_result(folder, "text", result)


@torch.no_grad()
def _level_unheard(encoder: torch.nn.Module, words: CLIPTokenizer) -> None:
    """Scales embeddings of tokens that occur in no caption to the median norm of the others, so that new words have effect."""
    from demo.drawing import all_scenes
    from demo.make_base.pictures import OPENINGS

    captions = [opening + scene.caption for scene in all_scenes() for opening in set(OPENINGS)]
    heard = torch.zeros(len(words), dtype=torch.bool)
    heard[token_ids(words, captions).unique()] = True
    table = encoder.get_input_embeddings().weight
    lengths = table.norm(dim=1, keepdim=True)
    table[~heard] *= lengths[heard].median() / lengths[~heard]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
