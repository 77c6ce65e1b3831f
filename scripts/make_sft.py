"""Think/answer examples for the cold start: user prompts -> what a teacher would think and write (read by sft.py).

    python scripts/make_sft.py --data prompts.jsonl --out examples.jsonl --teacher miniature
    TEACHER_API_KEY=... python scripts/make_sft.py --data prompts.jsonl --out examples.jsonl \\
        --teacher_url https://api.example.com/v1 --teacher_model NAME [--price_in 0.5 --price_out 1.5]
    ... --best_of 8 --sdmodel_name PATH --rewards hps git     draw and score 8 answers a prompt, keep the best

An answer that is refused, cut off, malformed, or that lost something of the prompt (`data.intent`) is dropped and
asked for again, `--attempts` times; where a prompt has no word to look for, its row says "unchecked". Of several
answers the one with the highest sum of weight x reward is kept; the first wins a tie.

    FILE             one example a line, added when its prompt is done; in the end in the order of the prompts
    FILE.dropped     prompts without an example, and why
    FILE.settings    what the two depend on

After Ctrl-C, a kill or a dead server run the same command again: prompts that are done are not asked again. The exit
code is 1 if something is missing that the same command may still get, or nothing was kept, and 130 after Ctrl-C.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from openai.types.chat import ChatCompletion
from tqdm import tqdm

from clients.chat import ChatClient
from clients.http import CallFailed
from data.intent import can_check, lost
from data.prompts import load_prompts
from data.text import fold
from errors import Stopped, UserError, one_line
from interfaces import Prompt
from models.devices import pick_device
from prompting import SYSTEM_PROMPT, completion, messages
from prompting import parse as parse_answer
from rendering import RenderOptions, load_renderer, renderer_contents
from rewards import REWARDS, RewardContext, RewardOptions, build, check, reward_contents
from rewards.offload import describe
from run.files import append_line, atomic_write, complete_lines, differences
from run.options import SEED, may_differ, option, parse, run_main
from scoring.drawing import Drawer
from scoring.rollouts import Scorer, weighted_total

# Added to what the policy itself is told.
FOR_A_TEACHER = (
    " Your answer is an example from which a small model will learn. Think in two to six short lines. In the final "
    "prompt name every thing of the request with its own words, its number, its attributes beside it and its place in "
    "the picture; where the request says how things stand to each other, say so again. Repeat text that is to be "
    "written in the picture letter for letter, between quotation marks. "
    "Begin with <think> and end with </answer>."
)
REFUSED, TRUNCATED, MALFORMED = "refused", "truncated", "malformed"
INTENT, FOREIGN = "intent lost", "not of the miniature world"
_REFUSAL = re.compile(
    r"\W*(?:(?:i'?m |i am )?(?:(?:very|so|really|truly) )?sorry|i apologi[sz]e|my apologies|unfortunately,? i"
    r"|as an ai|i (?:cannot|can't|(?:can|could|will|do|am) not|(?:could|do)n't|won't)"
    r"|(?:i'm|i am) (?:not|unable))\b",
)
ATTEMPTS = 6  # at one call of the teacher's API
SKILL = 0.35  # share of what the miniature's writer writes with care
PATIENCE = 20  # prompts in a row without any score before the run stops

Teacher = Callable[[Prompt, int], Awaitable[dict]]  # prompt, sampling seed -> an answer as `read` returns it


@dataclass
class Options:
    """What is asked of whom; the renderer's and the rewards' own options have the trainer's names."""

    data: str = option(help="User prompts: .txt, one a line, or .jsonl (data/README.md).", changes="nothing")
    out: str = option(help="Examples, .jsonl: a new file, or this run's own to continue.", changes="nothing")
    limit: int | None = option(None, "Take only the first so many prompts.", changes="nothing", least=1)
    seed: int = option(0, "Of sampling and of the noise that pictures start from.", changes="run", **SEED)
    attempts: int = option(3, "At one answer, before it is given up.", changes="run", least=1)
    intent: bool = option(True, "Drop answers that lost something of the prompt.", changes="run")
    teacher: str = option(
        "chat", "Who writes: a chat API, or the miniature world.", changes="run", choices=["chat", "miniature"]
    )
    teacher_url: str = option("", "OpenAI-compatible API; its key: environment TEACHER_API_KEY.", changes="nothing")
    teacher_model: str = option("", "The teacher's name there.", changes="run")
    teacher_concurrency: int = option(16, "Calls in flight at once.", changes="nothing", least=1)
    teacher_timeout: float = option(300.0, "Seconds for one call, repeats included.", changes="nothing", above=0)
    temperature: float = option(0.8, "Of the teacher's sampling.", changes="run", least=0)
    max_new_tokens: int = option(2048, "Of one answer; a longer one is dropped.", changes="run", least=1)
    price_in: float = option(0.0, "Of a million tokens read.", changes="nothing", least=0)
    price_out: float = option(0.0, "Of a million tokens written.", changes="nothing", least=0)
    best_of: int = option(1, "Answers a prompt, of which the best is kept; needs rewards.", changes="run", least=1)
    rewards: list[str] = option([], f"Of: {', '.join(REWARDS)}.", changes="run")
    reward_weights: list[float] = option([], "One for each reward; unset: 1 each.", changes="run")
    images_per_rewrite: int = option(1, "Pictures per answer, averaged.", changes="run", least=1)


@asynccontextmanager
async def chat_teacher(client: ChatClient, **sampling: float) -> AsyncIterator[Teacher]:
    """The teacher behind a chat API. A call may raise CallFailed, and ends the run where the API is of no use."""
    async with client.connect() as complete:

        async def draft(prompt: Prompt, seed: int) -> dict:
            system, user = messages(prompt.text)
            asked = [{**system, "content": system["content"] + FOR_A_TEACHER}, user]
            try:
                return read(await complete(asked, seed=seed, **sampling))
            except CallFailed as error:
                if error.code == "content_filter":
                    return {"drop": REFUSED, "tokens": None}
                if error.status in (401, 403, 404):
                    raise client.unusable(error) from error
                if client.circuit.is_open:
                    raise Stopped(f"{client.url} does not answer ({error}): run it again later") from error
                raise

        yield draft


def read(reply: ChatCompletion) -> dict:
    """The answer in a chat completion, or why it is of no use ("drop"), with its beginning ("text").

    "tokens" are (read, written) as the API counts them, None if it does not say.
    """
    choice, usage = reply.choices[0], reply.usage
    tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else None
    refusal, text = choice.message.refusal, choice.message.content or ""
    thoughts = choice.message.model_extra or {}
    thought = thoughts.get("reasoning_content") or thoughts.get("reasoning") or ""
    # A model that always thinks may think before the block that it was asked for, or in its place: in a block that the
    # chat template opened, or in a field of its own.
    tried = (text, text.partition("</think>")[2], f"<think>{text}", f"<think>{thought}</think>{text}")
    answer = next(filter(None, map(parse_answer, tried)), None)
    if refusal or choice.finish_reason == "content_filter" or _REFUSAL.match(fold(answer.rewrite if answer else text)):
        drop = REFUSED
    elif choice.finish_reason == "length":
        drop = TRUNCATED
    elif answer is None:
        drop = MALFORMED
    else:
        return {"drop": "", **vars(answer), "tokens": tokens}
    return {"drop": drop, "text": (refusal or text)[:200], "tokens": tokens}


@asynccontextmanager
async def miniature_teacher() -> AsyncIterator[Teacher]:
    """The miniature's own writer, right in content SKILL of the time; an answer is a function of prompt and seed."""
    from miniature import world

    def can_be_drawn(prompt: Prompt) -> bool:
        words = {word for name in (*prompt.nouns, *prompt.attr_nouns) for word in name.split()}
        related = prompt.spatial is None or prompt.spatial[1] in world.RELATIONS
        number = sum(number for _, number in prompt.counts) or len(prompt.nouns)
        return words <= {*world.SHAPES, *world.COLORS} and related and 0 < number <= world.MAX_THINGS

    async def draft(prompt: Prompt, seed: int) -> dict:
        await asyncio.sleep(0)  # so that Ctrl-C is heard
        if not can_be_drawn(prompt):
            return {"drop": FOREIGN, "tokens": None}
        reasoning, rewrite = world.lesson(prompt, random.Random(seed), SKILL)
        return {"drop": "", "reasoning": reasoning, "rewrite": rewrite, "tokens": None}

    yield draft


def open_teacher(options: Options) -> AbstractAsyncContextManager[Teacher]:
    """The teacher that the options name; a URL that cannot work is a UserError at once."""
    if options.teacher == "miniature":
        return miniature_teacher()
    limits = {"concurrency": options.teacher_concurrency, "call_timeout": options.teacher_timeout}
    client = ChatClient("teacher", options.teacher_url, options.teacher_model, attempts=ATTEMPTS, **limits)
    return chat_teacher(client, temperature=options.temperature, max_tokens=options.max_new_tokens)


async def ask(options: Options, teacher: Teacher, prompt: Prompt) -> list[dict]:
    """All answers to a prompt: for each of `--best_of` slots, attempts until one can be kept or all are spent."""

    async def fill(slot: int) -> list[dict]:
        answers: list[dict] = []
        unchecked = {} if can_check(prompt) else {"unchecked": True}
        while len(answers) < options.attempts and (not answers or answers[-1]["drop"]):
            attempt = len(answers)
            digest = hashlib.sha256(f"{options.seed}/{prompt.id}/{slot}/{attempt}".encode()).hexdigest()
            answer = await teacher(prompt, int(digest[:8], 16) >> 1)
            if not answer["drop"] and (gone := lost(prompt, answer["rewrite"])):
                answer |= {"drop": INTENT if options.intent else "", "lost": gone}
            answers.append({"slot": slot, "attempt": attempt, **unchecked, **answer})
        return answers

    slots = await asyncio.gather(*map(fill, range(options.best_of)))
    return [answer for answers in slots for answer in answers]


def load_scorer(options: Options, render: RenderOptions, reward: RewardOptions, prompts: Sequence[Prompt]) -> Scorer:
    """The renderer and rewards that the options name, as the trainer has them."""
    device = pick_device(render.render_device or "auto")
    renderer = load_renderer(render, device)
    context = RewardContext(reward.reward_device or device, renderer, prompts, options.seed)
    # groups of 1: the noise of a picture depends on seed, prompt and image index alone
    drawer = Drawer(renderer, group=1, images_per_rewrite=options.images_per_rewrite, run_seed=options.seed)
    rewards = build(options.rewards, reward, context)
    print(*(describe(one, prompts) for one in rewards), sep="\n", flush=True)
    return Scorer(drawer, rewards, {prompt.id: prompt for prompt in prompts})


def row_of(options: Options, prompt: Prompt, answers: list[dict], parts: Sequence[dict]) -> dict | None:
    """The row of a prompt: its example, or why it has none ("why"). None where no answer got a score.

    `parts` has the scores of the answers that were not dropped; it is empty without rewards.
    """
    kept = [answer for answer in answers if not answer["drop"]]
    tokens = [answer["tokens"] for answer in answers if answer["tokens"]]
    row = {"prompt": prompt.text, "id": prompt.id, "task": prompt.task, "candidates": len(kept)}
    row |= {"drops": [answer["drop"] for answer in answers if answer["drop"]]}
    row |= {"tokens": [sum(column) for column in zip(*tokens, strict=True)]}
    if not kept:
        return {**row, "why": "given up", "answers": answers}
    best, scores = 0, {}
    if options.rewards:
        totals = [weighted_total(each, options.reward_weights) for each in parts]
        there = [i for i, total in enumerate(totals) if total is not None]
        if not there:
            return None
        best = max(there, key=totals.__getitem__)
        scores = {"score": totals[best], "rewards": parts[best], "scores": totals}
    names = ("reasoning", "rewrite", "slot", "attempt", "lost", "unchecked")
    example = {name: kept[best][name] for name in names if name in kept[best]}
    return {**row, **example, "teacher": options.teacher_model or options.teacher, **scores}


class Output:
    """FILE and FILE.dropped, with a row for each prompt that is done; one process at a time holds them.

    `rows` are by the id of their prompts; one with "why" belongs to FILE.dropped. Files that are in use, or belong to
    other settings or another program, are a UserError. Until `record` is closed no other process gets them.
    """

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.out, self.dropped = out, out.with_name(out.name + ".dropped")
        record = out.with_name(out.name + ".settings")
        if out.exists() and not record.exists():
            raise UserError(f"--out {out} was not made by this program: name another")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.record = open(record, "a+", encoding="utf-8")
            fcntl.flock(self.record, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError if another run has it
            self.record.seek(0)
            lines = [line for path in (out, self.dropped) if path.exists() for line in complete_lines(path, cut=True)]
            self.rows = {row["id"]: row for row in map(json.loads, lines)}
            changed = differences(json.loads(self.record.read()), settings) if self.rows else ""
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--out {out} cannot be continued ({one_line(error)}): name another file") from error
        if changed:
            raise UserError(f"--out {out} was begun with other settings ({changed}): use those, or name another")
        if not self.rows:
            self.record.truncate(0)
            self.record.write(json.dumps(settings))
            self.record.flush()

    def add(self, row: dict) -> None:
        """Append a row; raises Stopped where there is no room for it."""
        try:
            append_line(self.dropped if "why" in row else self.out, json.dumps(row))
        except OSError as error:
            raise Stopped(f"{self.out} cannot be written ({one_line(error)}): make room and run again") from error
        self.rows[row["id"]] = row

    def sort(self, prompts: Sequence[Prompt]) -> None:
        """Put the rows of both files into the order of the prompts."""
        rows = [self.rows[prompt.id] for prompt in prompts if prompt.id in self.rows]
        for path in (self.out, self.dropped):
            text = "".join(json.dumps(row) + "\n" for row in rows if ("why" in row) == (path == self.dropped))
            atomic_write(path, text.encode())


def report(options: Options, count: int, rows: Sequence[dict]) -> str:
    """What was kept, dropped and why, and what it cost, in a few lines."""
    kept, dropped = [row for row in rows if "why" not in row], Counter(row["why"] for row in rows if "why" in row)
    lines = [f"{len(kept):,} of {count:,} prompts have an example: {options.out}"]
    drops = Counter(reason for row in rows for reason in row["drops"])
    for what, counts in (("without", dropped + Counter({"not done": count - len(rows)})), ("answers dropped", drops)):
        if counts:
            lines.append(f"  {what}: " + ", ".join(f"{name} {n:,}" for name, n in counts.most_common()))
    if unchecked := sum("unchecked" in row for row in kept):
        lines.append(f"  not checked for intent: {unchecked:,}, no word of their prompts can be looked for")
    if tokens := [row["tokens"] for row in rows if row["tokens"]]:
        read, written = map(sum, zip(*tokens, strict=True))
        cost = (read * options.price_in + written * options.price_out) / 1e6
        lines.append(f"  {read:,} + {written:,} tokens" + (f", cost {cost:,.2f}" if cost else ""))
    every = [total for row in kept for total in row.get("scores", ()) if total is not None]
    if every:
        best = fmean(row["score"] for row in kept)
        lines.append(f"  mean score: {fmean(every):.3f} of all answers, {best:.3f} of those kept")
    return "\n".join(lines)


async def make(
    options: Options, teacher: AbstractAsyncContextManager[Teacher], scorer: Scorer | None,
    prompts: Sequence[Prompt], output: Output,
) -> Counter[str]:  # fmt: skip
    """Add the row of each prompt to `output`; returns how often each failure of the API left a prompt undone.

    A prompt is scored in another thread while others are asked; at most `--teacher_concurrency` are under way.

    Raises:
        Stopped: PATIENCE prompts in a row had answers and no score.
    """
    failures: Counter[str] = Counter()
    room, scoring, unscored = asyncio.Semaphore(options.teacher_concurrency), asyncio.Lock(), 0

    async def work(draft: Teacher, prompt: Prompt) -> None:
        nonlocal unscored
        async with room:
            try:
                answers = await ask(options, draft, prompt)
            except CallFailed as error:
                failures[str(error)] += 1
                return
            async with scoring:
                texts = [completion(one["reasoning"], one["rewrite"]) for one in answers if not one["drop"]]
                ids = [prompt.id] * len(texts)
                scored = await asyncio.to_thread(scorer.score, texts, ids, 0) if scorer and texts else []
        row = row_of(options, prompt, answers, [one.parts for one in scored])
        unscored = unscored + 1 if row is None else 0
        if row is not None:
            output.add(row)
        elif unscored == PATIENCE:
            raise Stopped("no score at all: pictures fail or a reward returns nothing, see the log above")
        bar.update()

    with tqdm(total=len(prompts), unit="prompt", disable=not prompts) as bar:
        async with teacher as draft:
            await asyncio.gather(*(work(draft, prompt) for prompt in prompts))
    return failures


def run(options: Options, render: RenderOptions, reward: RewardOptions) -> int:
    """The exit code; see the head of this file."""
    if options.teacher == "chat" and not (options.teacher_url and options.teacher_model):
        raise UserError("give --teacher_url and --teacher_model, or --teacher miniature")
    if not options.rewards and options.best_of > 1:
        raise UserError("--best_of chooses by a score: name --rewards")
    options.reward_weights = options.reward_weights or [1.0] * len(options.rewards)
    if len(options.reward_weights) != len(options.rewards):
        raise UserError(f"--reward_weights {options.reward_weights}: give one for each of --rewards {options.rewards}")
    check(options.rewards, reward)
    render.settle("auto")
    reward.settle(render.render_device or "auto")
    prompts = load_prompts(options.data)[: options.limit]
    teacher = open_teacher(options)
    output = Output(Path(options.out), _settings(options, render, reward, prompts))
    with output.record:
        todo = [prompt for prompt in prompts if prompt.id not in output.rows]
        scorer = load_scorer(options, render, reward, prompts) if options.rewards and todo else None
        failures = asyncio.run(make(options, teacher, scorer, todo, output))
        output.sort(prompts)
    print(report(options, len(prompts), list(output.rows.values())))
    for failure, count in failures.most_common(3):
        print(f"API failure, {count} times: {failure}", file=sys.stderr)
    if left := len(prompts) - len(output.rows):
        raise Stopped(f"{left} prompts are not done: run the same command again")
    if all("why" in row for row in output.rows.values()):
        raise Stopped(f"no example was kept, {output.dropped} says why")
    return 0


def _settings(options: Options, render: RenderOptions, reward: RewardOptions, prompts: Sequence[Prompt]) -> dict:
    """All that a row depends on."""
    kinds = (options, render, reward) if options.rewards else (options,)
    given = {name: value for kind in kinds for name, value in vars(kind).items()}
    settings = {name: value for name, value in given.items() if name not in may_differ(*kinds)}
    ids = hashlib.sha256("".join(prompt.id for prompt in prompts).encode()).hexdigest()[:16]
    told = hashlib.sha256((SYSTEM_PROMPT + FOR_A_TEACHER).encode()).hexdigest()[:16]
    contents = {**renderer_contents(render), **reward_contents(options.rewards, reward)} if options.rewards else {}
    return {**settings, "contents": contents, "prompts": f"{len(prompts)}: {ids}", "instructions": told}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: see the head of this file."""
    try:
        words = sys.argv[1:] if argv is None else argv
        return run_main("make_sft", lambda: run(*parse((Options, RenderOptions, RewardOptions), None, words)))
    except KeyboardInterrupt:
        print("interrupted: what is done is kept, run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
