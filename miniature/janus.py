"""The miniature Janus, in two stages of `miniature.build`: a VQ of 36 tokens a picture, then the language model.

What it can do, as the real one: write a plan for a wish (right as often as its lessons were), draw from a plan (well)
and from a bare wish (badly, because alt text is careless), and answer questions about a picture.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.modeling_janus import JanusVQVAE

from data.grammar import TASKS
from data.questions import load_questions
from interfaces import Prompt
from miniature import fit, world
from miniature.fit import CACHE, ROOT, WEIGHTS, pictures, pixels
from models.janus import INSTRUCTION, SYSTEM, Janus, Settings, load_janus, part_of

SIDE, CODES, WIDTH = 6, 256, 128  # tokens of a picture's side, size of the codebook, width of the language model
USER, ASSISTANT = "<|User|>:", "<|Assistant|>:"
MARKS = ["<pad>", "<bos>", "<eos>", "<unk>", "<image_placeholder>", "<begin_of_image>", "<end_of_image>"]
TEMPLATE = (  # as Janus-Pro's, for one turn
    "{% for message in messages %}<|User|>: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image_placeholder>\n{% else %}{{ part.text }}{% endif %}{% endfor %}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)


def words() -> list[str]:
    """All words of prompts, layouts and questions."""
    rng = random.Random("words")
    texts = [world.request(task, rng).text for task in TASKS for _ in range(2000)]
    texts += [world.describe(world.random_scene(rng)) for _ in range(2000)] + [ASKED.format("red circle"), "yes no ."]
    return sorted({word for text in texts for word in text.replace(",", " , ").replace("?", " ?").split()})


ASKED = "is there a {} ?"


def processor() -> JanusProcessor:
    """One token a word; whole sentences of `models.janus` are one token, too, because they never change."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import JanusImageProcessor, PreTrainedTokenizerFast

    fixed = [*MARKS, USER, ASSISTANT, SYSTEM, INSTRUCTION]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*fixed, *words()])}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in fixed])
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", model_max_length=512,
        extra_special_tokens={"image_token": MARKS[4], "boi_token": MARKS[5], "eoi_token": MARKS[6]},
    )  # fmt: skip
    looks = JanusImageProcessor(
        size={"height": world.SIZE, "width": world.SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return JanusProcessor(looks, fast, chat_template=TEMPLATE, num_image_tokens=SIDE**2)


# VQ ------------------------------------------------------------------------------------------------------------------


class Codebook(nn.Module):
    """Codes on the unit sphere that follow what is assigned to them; one that nothing is assigned to starts anew."""

    def __init__(self, codes: Tensor):
        super().__init__()
        for name, value in {
            "codes": codes, "sums": codes.clone(), "sizes": torch.ones(len(codes)), "idle": torch.zeros(len(codes)),
        }.items():  # fmt: skip
            self.register_buffer(name, value)

    def nearest(self, z: Tensor) -> Tensor:
        """(N,) numbers of the codes nearest to (N, D) unit vectors."""
        return (z @ self.codes.T).argmax(1)

    def follow(self, z: Tensor, chosen: Tensor, noise: torch.Generator) -> None:
        """Move towards (N, D) `z`."""
        one_hot = F.one_hot(chosen, len(self.codes)).float()
        count = one_hot.sum(0)
        self.sizes.lerp_(count, 0.03)
        self.sums.lerp_(one_hot.T @ z, 0.03)
        self.codes.copy_(F.normalize(self.sums / self.sizes.clamp_min(1e-5)[:, None], dim=-1))
        self.idle.copy_(torch.where(count > 0, 0, self.idle + 1))
        if len(dead := (self.idle > 60).nonzero().flatten()):
            far = 1 - (z @ self.codes.T).max(1).values
            new = z[torch.multinomial(far.clamp_min(1e-6), len(dead), replacement=True, generator=noise)]
            self.codes[dead], self.sums[dead], self.sizes[dead], self.idle[dead] = new, new, 1.0, 0.0


def k_means(points: Tensor, count: int, rounds: int = 10) -> Tensor:
    """(count, D) centres on the unit sphere; far points are likely to be the first ones."""
    noise = torch.Generator().manual_seed(0)
    centres, near = points[:1], 1 - points @ points[0]
    for _ in range(count - 1):
        new = points[torch.multinomial(near.clamp_min(1e-8), 1, generator=noise)]
        centres, near = torch.cat([centres, new]), torch.minimum(near, 1 - points @ new[0])
    for _ in range(rounds):
        one_hot = F.one_hot((points @ centres.T).argmax(1), count).float()
        used = one_hot.sum(0) > 0
        centres[used] = F.normalize((one_hot.T @ points)[used], dim=-1)
    return centres


def build_vq(continuous: int = 500, quantised: int = 4000, decoder: int = 3000, batch: int = 16) -> JanusVQVAE:
    """JanusVQVAE 48 x 48 x 3 -> 6 x 6 of 256 codes; half of its pictures are crowded.

    First without codes but with noise, then with the codebook, then the decoder alone, because codes move no more.
    """
    from transformers import JanusVQVAEConfig

    torch.manual_seed(4)
    vq = JanusVQVAE(
        JanusVQVAEConfig(
            embed_dim=8, num_embeddings=CODES, latent_channels=32, base_channels=32, channel_multiplier=[1, 1, 1, 2],
            num_res_blocks=0, num_patches=SIDE, projection_dim=WIDTH, image_token_embed_dim=WIDTH,
        )
    )  # fmt: skip
    for module in vq.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm):
            module.reset_parameters()  # transformers starts convolutions too small to learn from
    vq.quantize.embedding.requires_grad_(False)

    def look(rng: random.Random) -> Tensor:
        crowd = [rng.randint(5, 9) if rng.random() < 0.5 else None for _ in range(batch)]
        return pixels([world.draw(world.random_scene(rng, things), rng) for things in crowd])

    def encoded(x: Tensor) -> Tensor:
        return F.normalize(vq.quant_conv(vq.encoder(x)), dim=1)

    def rebuilt(z: Tensor, x: Tensor, things: float) -> Tensor:
        error, ground = vq.decoder(vq.post_quant_conv(z)) - x, x[:, :, :1, :1]
        off_ground = ((x - ground).abs().amax(1, keepdim=True) > 0.25).float()
        weight = 1 + things * F.max_pool2d(off_ground, 3, 1, 1)
        return ((error.abs() + error**2) * weight).mean()

    def without_codes(rng: random.Random, noise: torch.Generator) -> Tensor:
        x = look(rng)
        z = encoded(x)
        return rebuilt(z + 0.05 * torch.randn(z.shape, generator=noise), x, 3)

    def quantise(z: Tensor, noise: torch.Generator | None) -> Tensor:
        flat = z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        chosen = book.nearest(flat)
        codes = book.codes[chosen].view(len(z), SIDE, SIDE, -1).permute(0, 3, 1, 2)
        if noise is not None:
            book.follow(flat, chosen, noise)
        return codes

    def with_codes(rng: random.Random, noise: torch.Generator) -> Tensor:
        x = look(rng)
        z = encoded(x)
        codes = quantise(z, noise)
        return rebuilt(z + (codes - z).detach(), x, 3) + 0.25 * ((z - codes) ** 2).sum(1).mean()

    def decoder_alone(rng: random.Random, noise: torch.Generator) -> Tensor:
        x = look(rng)
        with torch.no_grad():
            codes = quantise(encoded(x), None)
        return rebuilt(codes, x, 3)

    fit.fit("janus_vq_1", nn.ModuleDict({"vq": vq}), without_codes, steps=continuous, lr=3e-3, weight_decay=0.0)
    with torch.no_grad():
        rng = random.Random("janus_vq/k-means")
        seen = torch.cat([encoded(look(rng)).permute(0, 2, 3, 1).reshape(-1, 8) for _ in range(20)])
    book = Codebook(k_means(seen, CODES))
    both = nn.ModuleDict({"vq": vq, "book": book})
    fit.fit("janus_vq_2", both, with_codes, steps=quantised, lr=3e-3, weight_decay=0.0)
    fit.fit("janus_vq_3", both, decoder_alone, steps=decoder, lr=3e-3, weight_decay=0.0)
    vq.quantize.embedding.weight.data.copy_(book.codes)
    vq.eval().requires_grad_(False)
    vq.save_pretrained(CACHE / "janus_vq")
    print(f"the oracle reads {reconstruction(vq):.1%} of 500 reconstructed scenes exactly")
    return vq


@torch.inference_mode()
def reconstruction(vq: JanusVQVAE, scenes: int = 500) -> float:
    """Share of scenes that the oracle reads exactly after encode -> decode: the ceiling of every drawing."""
    rng = random.Random("reconstruction")
    truth = [world.random_scene(rng) for _ in range(scenes)]
    codes = vq.encode(pixels([world.draw(scene, rng) for scene in truth])).image_tokens.view(scenes, -1)
    drawn = pictures(vq.decode(codes))
    return sum(world.reads_exactly(s, world.see(p)) for s, p in zip(truth, drawn, strict=True)) / scenes


# Language model ------------------------------------------------------------------------------------------------------


def new_janus(vq: JanusVQVAE) -> Janus:
    """With that VQ and an untrained language model."""
    from transformers import JanusConfig, JanusVisionConfig, LlamaConfig

    read = processor()
    ids = read.tokenizer
    spread = 1 / math.sqrt(WIDTH)
    text = LlamaConfig(
        vocab_size=len(ids), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, initializer_range=spread,
        tie_word_embeddings=False, pad_token_id=ids.pad_token_id, bos_token_id=ids.bos_token_id,
        eos_token_id=ids.eos_token_id,
    )  # fmt: skip
    vision = JanusVisionConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=world.SIZE,
        patch_size=world.SIZE // SIDE, projection_dim=WIDTH, num_image_tokens=SIDE**2,
    )  # fmt: skip
    model = JanusForConditionalGeneration(
        JanusConfig(
            text_config=text, vision_config=vision, vq_config=vq.config, tie_word_embeddings=False,
            image_token_id=ids.convert_tokens_to_ids(MARKS[4]), initializer_range=spread,
        )
    )  # fmt: skip
    model.model.vqmodel = vq
    for module in (model.model.generation_aligner, model.model.generation_head, model.model.aligner):
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    nn.init.normal_(model.lm_head.weight, std=spread)
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=spread)
    model.model.generation_embeddings.weight.data.copy_(vq.quantize.embedding.weight)
    return Janus(model, read)


class Lessons:
    """What the language model learns from, step by step."""

    def __init__(self, janus: Janus, pool: int):
        self.janus, self.tokenizer = janus, janus.processor.tokenizer
        rng, forbidden = random.Random("janus/pool"), {prompt.text for prompt in world.splits()[1]}
        self.forbidden = forbidden
        self.scenes = [world.random_scene(rng) for _ in range(pool)]
        drawn = [world.draw(scene, rng) for scene in self.scenes]
        encode = janus.model.model.vqmodel.encode
        with torch.inference_mode():
            parts = [encode(pixels(drawn[i : i + 100])).image_tokens.view(-1, SIDE**2) for i in range(0, pool, 100)]
        self.tokens, self.drawn = torch.cat(parts).clone(), drawn
        marks = {self.tokenizer.convert_tokens_to_ids(mark) for mark in (",", "<begin_of_image>", ASSISTANT)}
        self.ends = torch.tensor(sorted(marks))

    def drawing(self, rng: random.Random, batch: int) -> tuple[list[list[int]], Tensor, list[list[tuple]]]:
        """Text prefixes, image tokens, and the looks of the things that the prefix describes."""
        rows, picked, looks = [], [], []
        for _ in range(batch):
            picked.append(rng.randrange(len(self.scenes)))
            scene = self.scenes[picked[-1]]
            things, kind, wish = rng.sample(scene, len(scene)), rng.random(), world.hearsay(scene, rng)
            prompt, plan = (
                (world.describe(things), None) if kind < 0.35
                else (wish, world.describe(things)) if kind < 0.85
                else (wish, None)
            )  # fmt: skip
            row = self.janus.image_prefix(prompt, plan)
            if rng.random() < 0.1:
                row = self.janus.without_text(row)
                kind = 1
            rows.append(row)
            looks.append([(list(world.COLORS).index(t.color), world.SHAPES.index(t.shape), t.place) for t in things]
                         if kind < 0.85 else [])  # fmt: skip
        return rows, self.tokens[picked], looks

    def wish(self, rng: random.Random) -> Prompt:
        while True:
            prompt = world.request(rng.choice(TASKS), rng)
            if prompt.text not in self.forbidden:
                return prompt

    def planning(self, rng: random.Random, batch: int, skill: float) -> tuple[list[list[int]], list[list[int]]]:
        """Prefixes and plans, right as often as `skill` says."""
        prompts = [self.wish(rng) for _ in range(batch)]
        plans = [self.tokenizer(world.lesson(p, rng, skill)[1], add_special_tokens=False).input_ids for p in prompts]
        return [self.janus.plan_prefix(p.text) for p in prompts], [
            [*ids, self.tokenizer.eos_token_id] for ids in plans
        ]

    def seeing(self, rng: random.Random, batch: int) -> tuple[list[str], list[int], Tensor]:
        """Questions, tokens of their answers, pictures."""
        questions, answers, picked = [], [], []
        for _ in range(batch):
            picked.append(rng.randrange(len(self.scenes)))
            asked, answer = question(self.scenes[picked[-1]], rng)
            questions.append(asked)
            answers.append(self.tokenizer.convert_tokens_to_ids(answer))
        return questions, answers, pixels([self.drawn[i] for i in picked])


def question(scene: world.Scene, rng: random.Random) -> tuple[str, str]:
    """A question about a scene, and its answer, "yes" half of the time."""
    there = {f"{thing.color} {thing.shape}" for thing in scene}
    if rng.random() < 0.5:
        return ASKED.format(rng.choice(sorted(there))), "yes"
    thing = rng.choice(scene)
    wrong = replace(thing, **rng.choice((
        {"color": rng.choice(list(world.COLORS))}, {"shape": rng.choice(world.SHAPES)},
    )))  # fmt: skip
    look = f"{wrong.color} {wrong.shape}"
    return ASKED.format(look), "yes" if look in there else "no"


def write_questions(count: int = 40) -> None:
    """`questions/`: pictures, and two questions about each, for --questions of t2i_r1.py."""
    rng, rows, folder = random.Random("questions"), [], ROOT / "questions"
    folder.mkdir(exist_ok=True)
    for number in range(count):
        scene, name = world.random_scene(rng), f"{number:02}.png"
        world.draw(scene, rng).save(folder / name)
        asked = {answer: text for text, answer in (question(scene, rng) for _ in range(30))}  # one "yes", one "no"
        rows += [json.dumps({"image": name, "question": asked[one], "answer": one}) + "\n" for one in ("yes", "no")]
    (folder / "questions.jsonl").write_text("".join(rows), encoding="utf-8")


def build_vision(janus: Janus, lessons: Lessons, steps: int = 600, batch: int = 64) -> None:
    """Vision tower and aligner: each token of a picture is to know the thing of its place, which the tower alone."""
    tower, heads = janus.model.model.vision_model, nn.ModuleList(
        [nn.Linear(64, 1 + len(world.COLORS)), nn.Linear(64, 1 + len(world.SHAPES))]
    )  # fmt: skip

    def loss_of(rng: random.Random, noise: torch.Generator) -> Tensor:
        picked = [rng.randrange(len(lessons.scenes)) for _ in range(batch)]
        labels = torch.zeros(batch, 2, SIDE, SIDE, dtype=torch.long)
        for row, i in zip(labels, picked, strict=True):
            for thing in lessons.scenes[i]:
                y, x = 2 * (thing.place // 3), 2 * (thing.place % 3)
                row[0, y : y + 2, x : x + 2] = 1 + list(world.COLORS).index(thing.color)
                row[1, y : y + 2, x : x + 2] = 1 + world.SHAPES.index(thing.shape)
        seen = tower(pixels([lessons.drawn[i] for i in picked])).last_hidden_state
        return sum(F.cross_entropy(head(seen).flatten(0, 1), labels[:, i].flatten()) for i, head in enumerate(heads))

    fit.fit("janus_vision", nn.ModuleDict({"tower": tower, "heads": heads}), loss_of, steps=steps, lr=1e-3)
    tower.requires_grad_(False)


def build_janus(steps: int = 5000, batch: int = 48, pool: int = 20_000, skill: float = 0.5) -> None:
    """JanusForConditionalGeneration: draw from layouts, alone or after a wish; write plans; answer questions."""
    torch.manual_seed(5)
    janus = new_janus(JanusVQVAE.from_pretrained(CACHE / "janus_vq"))
    model, inner = janus.model, janus.model.model
    inner.vqmodel.requires_grad_(False)
    lessons = Lessons(janus, pool)
    build_vision(janus, lessons)
    tags = nn.ModuleList([nn.Linear(WIDTH, n) for n in (len(world.COLORS), len(world.SHAPES), 9)])

    def drawing(rng: random.Random) -> Tensor:
        rows, tokens, looks = lessons.drawing(rng, batch)
        part = part_of(rows, tokens.tolist(), janus.pad)
        width = part.prefix.shape[1]
        hidden = janus.states(part, model.prepare_embeddings_for_image_generation(tokens[:, :-1]))
        logits = inner.generation_head(hidden[:, width - 1 :])
        at, labels = [], []
        for row, (prefix, things) in enumerate(zip(rows, looks, strict=True)):
            ends = torch.isin(torch.tensor(prefix), lessons.ends).nonzero().flatten().tolist()
            ends = ends[-len(things) - 1 : -1] if things else []  # the last is the start of the image
            at += [(row, width - len(prefix) + end) for end in ends]
            labels += things
        known = hidden[[row for row, _ in at], [place for _, place in at]]
        told = sum(F.cross_entropy(t(known), torch.tensor(labels)[:, i]) for i, t in enumerate(tags))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()) + 0.3 * told

    def planning(rng: random.Random) -> Tensor:
        part = part_of(*lessons.planning(rng, batch // 3, skill), janus.pad)
        hidden = janus.states(part, model.get_input_embeddings()(part.answer[:, :-1]))
        logits = model.lm_head(hidden[:, part.prefix.shape[1] - 1 :]).flatten(0, 1).float()
        return F.cross_entropy(logits, part.answer.masked_fill(part.mask == 0, -100).flatten(), ignore_index=-100)

    def seeing(rng: random.Random) -> Tensor:
        questions, answers, pictures = lessons.seeing(rng, batch // 6)
        return F.cross_entropy(janus.answer_logits(questions, pictures).float(), torch.tensor(answers))

    def loss_of(rng: random.Random, noise: torch.Generator) -> Tensor:
        return drawing(rng) + 0.3 * planning(rng) + 0.3 * seeing(rng)

    learning = nn.ModuleDict({
        "language": inner.language_model, "lm_head": model.lm_head, "codes": inner.generation_embeddings,
        "aligner": inner.generation_aligner, "head": inner.generation_head, "seen": inner.aligner, "tags": tags,
    })  # fmt: skip
    fit.fit("janus", learning, loss_of, steps=steps, lr=2e-3)
    model.eval().to(torch.float16)
    janus.keep_settings(Settings(guidance=1.0, image_temperature=0.7, max_plan_tokens=48))
    janus.save(WEIGHTS / "janus")


def measure(prompts: Sequence[Prompt], path: str = str(WEIGHTS / "janus")) -> dict[str, float]:
    """Oracle accuracy after ideal plans, after its own and without any; and the share of questions answered right."""
    janus, rng = load_janus(path, "float32", "cpu"), random.Random("janus")
    seeds, how = range(len(prompts)), janus.settings
    own, _ = janus.write([janus.plan_prefix(p.text) for p in prompts], seeds, how.max_plan_tokens)
    plans = {
        "ideal": [world.describe(world.layout(prompt, rng)) for prompt in prompts],
        "own": [janus.text_of(plan) for plan in own], "none": [None] * len(prompts),
    }  # fmt: skip
    found = {}
    for name, texts in plans.items():
        prefixes = [janus.image_prefix(p.text, text) for p, text in zip(prompts, texts, strict=True)]
        drawn = janus.pictures(janus.draw(prefixes, seeds, how.guidance, how.image_temperature).tokens)
        kept = [world.holds(p, world.see(image)) for p, image in zip(prompts, drawn, strict=True)]
        found[name] = sum(kept) / len(kept)
    asked = load_questions(ROOT / "questions" / "questions.jsonl")
    said = janus.says_yes([one.text for one in asked], [one.picture for one in asked])
    return {**found, "sees": sum(one.is_yes == yes for one, yes in zip(asked, said, strict=True)) / len(asked)}
