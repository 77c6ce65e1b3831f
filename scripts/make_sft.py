"""Think/answer examples for the cold start: user prompts -> what a teacher would think and write (read by sft.py).

    python scripts/make_sft.py --data prompts.jsonl --out examples.jsonl --teacher miniature
    TEACHER_API_KEY=... python scripts/make_sft.py --data prompts.jsonl --out examples.jsonl \\
        --teacher_url https://api.example.com/v1 --teacher_model NAME [--price_in 0.5 --price_out 1.5]
    ... --best_of 8 --sdmodel_name PATH --rewards hps git     draw and score 8 answers a prompt, keep the best

An answer that is refused, cut off, malformed, or that lost something of the prompt (`data.intent`) is dropped and
asked for again, `--attempts` times. Of several answers the one with the highest sum of weight x reward is kept, the
sum that GRPO is trained on; rewards have different units, so `--reward_weights` matter as they do there. The first
wins a tie.

    FILE             one example a line, in the order of the prompts; written when all are done
    FILE.journal     every answer and score as it comes: run the same command again after Ctrl-C, a kill or a dead
                     server, and only what is missing is asked for
    FILE.dropped     prompts without an example, and why

Exit code: 0 done; 1 something is missing that the same command may still get, or nothing was kept; 2 bad input or a
teacher that cannot be asked; 130 interrupted. Left out: several teachers at once, editing of answers.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm
from transformers import HfArgumentParser

from data.intent import lost
from data.prompts import load_prompts
from errors import UserError, one_line
from interfaces import Prompt
from prompting import SYSTEM_PROMPT, completion
from rendering import AUTO, RenderOptions
from rewards import REWARDS, RewardContext, RewardOptions, build, check, option
from run.files import atomic_write
from scripts.journal import Journal
from scripts.teacher import (
    FOR_A_TEACHER,
    FOREIGN,
    MALFORMED,
    REFUSED,
    TRUNCATED,
    CallFailed,
    ChatTeacher,
    Draft,
    MiniatureTeacher,
)

INTENT = "intent lost"
DROPS = (REFUSED, TRUNCATED, MALFORMED, INTENT, FOREIGN)
THINGS = ("object", "attribute", "number", "relation", "absence", "colour")  # the first words of what `lost` returns
KEPT_ALL = {"on": "", "off": "; kept all the same, --intent off"}
AGAIN = ("API failure", "unscored")  # why a prompt has no example yet
TOLD = ("drop", "lost", "text", "rewrite")  # of an answer, in the list of dropped prompts
NOT_RESULTS = {  # options that a run may go on with other values of; --data and --limit count by the prompts they give
    "data", "limit", "out", "teacher_url", "concurrency", "timeout", "price_in", "price_out",
    "render_device", "render_batch_size", "render_offload_text", "render_timeout", "render_batch_timeout",
    "render_concurrency",
    "reward_device", "reward_offload", "reward_batch_size",
    "judge_url", "judge_concurrency", "judge_timeout", "judge_batch_timeout", "judge_cache",
}  # fmt: skip
COUNTS = (  # options that are 1 or more
    "limit", "attempts", "max_tokens", "concurrency", "best_of", "images_per_rewrite", "render_steps", "resolution",
    "max_sequence_length", "render_batch_size",
)  # fmt: skip
PATIENCE = 3  # batches in a row without any score before scoring stops


@dataclass
class Options:
    """The command line, but for what the rewards have of their own."""

    data: Path = option(MISSING, "User prompts: .txt, one a line, or .jsonl (data/README.md).")
    out: Path = option(MISSING, "Examples, .jsonl: a new file, or this run's own to go on with.")
    limit: int | None = option(None, "Take only the first so many prompts.")
    seed: int = option(0, "Of sampling and of the noise that pictures start from.")
    attempts: int = option(3, "At one answer, before it is given up.")
    intent: str = option("on", "Drop answers that lost something of the prompt.", choices=["on", "off"])
    teacher: str = option("chat", "Who writes: a chat API, or the miniature world.", choices=["chat", "miniature"])
    teacher_url: str | None = option(None, "OpenAI-compatible API, ends in /v1; key: environment TEACHER_API_KEY.")
    teacher_model: str | None = option(None, "Its name there.")
    temperature: float = option(0.8, "Of the teacher's sampling.")
    max_tokens: int = option(2048, "Of one answer; a longer one is dropped.")
    concurrency: int = option(16, "Requests in flight.")
    timeout: float = option(120.0, "Seconds for one request.")
    price_in: float | None = option(None, "Of a million tokens read; without it tokens are shown, but no cost.")
    price_out: float | None = option(None, "Of a million tokens written.")
    skill: float = option(0.35, "Share, 0 to 1, of what the miniature's writer means to write with care.")
    best_of: int = option(1, "Answers a prompt, of which the best is kept; needs rewards.")
    min_score: float | None = option(None, "A prompt whose best answer scores less is dropped.")
    rewards: list[str] = field(default_factory=list, metadata={"help": f"Of: {', '.join(REWARDS)}."})
    reward_weights: list[float] | None = option(None, "One for each reward; unset: 1 each.")
    images_per_rewrite: int = option(1, "Pictures per answer, averaged.")


# --- asking ---------------------------------------------------------------------------------------


def open_slots(args: Options, prompts: Sequence[Prompt], journal: Journal) -> list[tuple[Prompt, int]]:
    """(prompt, slot) of every answer that is neither there nor given up."""
    slots = []
    for prompt in prompts:
        for slot in range(args.best_of):
            rows = journal.answers.get(prompt.id, {}).get(slot, [])
            if len(rows) < args.attempts and not (rows and not rows[-1]["drop"]):
                slots.append((prompt, slot))
    return slots


def sampling_seed(seed: int, prompt: Prompt, slot: int, attempt: int) -> int:
    """Of one attempt at one answer, in [0, 2**31): no two attempts at a prompt share theirs but by chance."""
    return int(hashlib.sha256(f"{seed}/{prompt.id}/{slot}/{attempt}".encode()).hexdigest()[:8], 16) >> 1


async def ask_all(
    args: Options,
    teacher: ChatTeacher | MiniatureTeacher,
    slots: Sequence[tuple[Prompt, int]],
    journal: Journal,
) -> Counter[str]:
    """Fill the open slots, `--concurrency` at a time; returns how often each API failure left one open.

    Raises:
        UserError: nobody can be asked; what was answered is in the journal.
    """
    failures: Counter[str] = Counter()
    waiting = iter(slots)
    with tqdm(total=len(slots), desc="asking", unit="answer", disable=not slots) as bar:

        async def work() -> None:
            for prompt, slot in waiting:
                try:
                    await _fill(args, teacher, prompt, slot, journal)
                except CallFailed as error:
                    failures[str(error)] += 1
                failed = f", {failures.total():,} calls failed" if failures else ""
                bar.set_postfix_str(spent(args, journal) + failed, refresh=False)
                bar.update()

        async with teacher:
            await asyncio.gather(*(work() for _ in range(args.concurrency)))
    return failures


async def _fill(
    args: Options, teacher: ChatTeacher | MiniatureTeacher, prompt: Prompt, slot: int, journal: Journal
) -> None:
    """Ask until an answer can be kept or all attempts are spent."""
    for attempt in range(len(journal.answers.get(prompt.id, {}).get(slot, [])), args.attempts):
        draft = await teacher(prompt, sampling_seed(args.seed, prompt, slot, attempt))
        row = _row(prompt, draft, args.intent)
        journal.add({"id": prompt.id, "slot": slot, "attempt": attempt, **row})
        if not row["drop"]:
            return


def _row(prompt: Prompt, draft: Draft, intent: str) -> dict:
    if draft.answer is None:
        return {"drop": draft.drop, "text": draft.text, "tokens": draft.tokens}
    gone = lost(prompt, draft.answer.rewrite)
    return {
        "drop": INTENT if gone and intent == "on" else "",
        "lost": gone,
        "reasoning": draft.answer.reasoning,
        "rewrite": draft.answer.rewrite,
        "tokens": draft.tokens,
    }


# --- scoring --------------------------------------------------------------------------------------


def load_scorer(args: Options, render: RenderOptions, reward: RewardOptions, prompts: Sequence[Prompt]):
    """The renderer and rewards that the arguments name, as the trainer has them."""
    from models.policy import pick_device  # torch: seconds that asking alone need not cost
    from scoring.drawing import Drawer
    from scoring.rollouts import Scorer

    try:
        device = pick_device(render.render_device or "auto")
        renderer = render.load(device)
        context = RewardContext(reward.reward_device or device, renderer, prompts, args.seed)
        rewards = build(args.rewards, reward, context)
    except (UserError, ValueError) as error:
        raise UserError(f"renderer: {error}") from error
    # Groups differ in size here, and no answer is unreadable: what the size of a group is for does not occur. Pictures
    # of one prompt start from the same noise all the same, which depends on seed, prompt and image index alone.
    drawer = Drawer(renderer, group=1, images_per_rewrite=args.images_per_rewrite, run_seed=args.seed)
    return Scorer(drawer, rewards, {prompt.id: prompt for prompt in prompts})


def unscored(args: Options, prompts: Sequence[Prompt], journal: Journal) -> list[Prompt]:
    """Prompts with answers and all slots closed, but without scores."""
    if not args.rewards:
        return []
    waiting = {prompt.id for prompt, _ in open_slots(args, prompts, journal)} | journal.scores.keys()
    return [prompt for prompt in prompts if prompt.id not in waiting and journal.kept(prompt)]


def score_all(args: Options, scorer, prompts: Sequence[Prompt], journal: Journal, pictures: int) -> None:
    """Score the answers to `prompts`, `pictures` or so at once; a prompt with no score at all is left as it is.

    Raises:
        UserError: PATIENCE batches in a row without a single score.
    """
    size = max(1, pictures // (args.best_of * args.images_per_rewrite))
    bad = 0
    with tqdm(total=len(prompts), desc="scoring", unit="prompt", disable=not prompts) as bar:
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            bad = 0 if _score(args, scorer, batch, journal) else bad + 1
            if bad == PATIENCE:
                raise UserError(
                    f"no score at all in {bad * size} prompts: pictures fail or a reward returns nothing, see the log "
                    "above; repair the cause and run the same command again"
                )
            bar.update(len(batch))


def _score(args: Options, scorer, batch: Sequence[Prompt], journal: Journal) -> int:
    """Score one batch; returns how many of its prompts got a score."""
    answers = [(prompt, row) for prompt in batch for row in journal.kept(prompt)]
    texts = [completion(row["reasoning"], row["rewrite"]) for _, row in answers]
    scored = scorer.score(texts, [prompt.id for prompt, _ in answers], step=0)
    rows: dict[str, list[dict]] = {}
    for (prompt, _), one in zip(answers, scored, strict=True):
        rows.setdefault(prompt.id, []).append(one.parts)
    there = 0
    for id, parts in rows.items():
        totals = [_total(args.reward_weights, each) for each in parts]
        if any(total is not None for total in totals):
            there += 1
            journal.add({"id": id, "totals": totals, "parts": parts})
    return there


def _total(weights: Sequence[float], parts: dict[str, float | None]) -> float | None:
    """Sum of weight x reward; None if any part is absent, which is not zero."""
    if None in parts.values():
        return None
    return sum(weight * part for weight, part in zip(weights, parts.values(), strict=True))


# --- what comes of it -----------------------------------------------------------------------------


def examples(args: Options, prompts: Sequence[Prompt], journal: Journal) -> list[tuple[dict | None, str]]:
    """For each prompt its example, or None and why there is none."""
    waiting = {prompt.id for prompt, _ in open_slots(args, prompts, journal)}
    return [(None, "API failure") if prompt.id in waiting else _choose(args, prompt, journal) for prompt in prompts]


def _choose(args: Options, prompt: Prompt, journal: Journal) -> tuple[dict | None, str]:
    kept, scores = journal.kept(prompt), journal.scores.get(prompt.id)
    if not kept:
        return None, "given up"
    if not args.rewards:
        return _example(args, prompt, kept, 0), ""
    if scores is None:
        return None, "unscored"
    totals = scores["totals"]
    best = max((i for i, total in enumerate(totals) if total is not None), key=lambda i: totals[i])
    if args.min_score is not None and totals[best] < args.min_score:
        return None, "below --min_score"
    scored = {"score": totals[best], "rewards": scores["parts"][best]}
    return {**_example(args, prompt, kept, best), **scored}, ""


def _example(args: Options, prompt: Prompt, kept: list[dict], best: int) -> dict:
    """What sft.py reads, prompt, reasoning and rewrite, and where it comes from."""
    row = kept[best]
    return {
        "prompt": prompt.text,
        "reasoning": row["reasoning"],
        "rewrite": row["rewrite"],
        "id": prompt.id,
        "task": prompt.task,
        "teacher": args.teacher_model if args.teacher == "chat" else args.teacher,
        "candidate": row["slot"],
        "attempt": row["attempt"],
        "candidates": len(kept),
        **({"lost": row["lost"]} if row["lost"] else {}),
    }


def write(path: Path, rows: Sequence[dict]) -> None:
    """All rows or nothing."""
    try:
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({one_line(error)}): repair that, then run again") from error


def spent(args: Options, journal: Journal) -> str:
    """ "120 kept, 4 dropped, 81,000 + 40,200 tokens, cost 0.10": what the answers so far are and cost."""
    kept = journal.counts["kept"]
    parts = [f"{kept:,} kept", f"{sum(journal.counts[reason] for reason in DROPS):,} dropped"]
    if any(journal.tokens):
        parts.append(f"{journal.tokens[0]:,} + {journal.tokens[1]:,} tokens")
        if args.price_in is not None:
            cost = (journal.tokens[0] * args.price_in + journal.tokens[1] * args.price_out) / 1e6
            parts.append(f"cost {cost:,.2f}")
    return ", ".join(parts)


def report(args: Options, outcomes: Sequence[tuple[dict | None, str]], journal: Journal) -> str:
    """What was kept, dropped and why, and what it cost, in a few lines."""
    missing, counts = Counter(why for example, why in outcomes if example is None), journal.counts
    lines = [f"{len(outcomes) - missing.total():,} of {len(outcomes):,} prompts have an example: {args.out}"]
    if missing:
        lines.append(f"  without: {_listed(missing)} (see {_dropped(args.out).name})")
    reasons = Counter({reason: counts[reason] for reason in DROPS if counts[reason]})
    lines.append(f"  {spent(args, journal)}" + (f": {_listed(reasons)}" if reasons else ""))
    things = Counter({thing: counts[thing] for thing in THINGS if counts[thing]})
    if things:
        lines.append(f"  answers that lost something of the prompt: {_listed(things)}" + KEPT_ALL[args.intent])
    if journal.uncounted and any(journal.tokens):
        lines.append(f"  {journal.uncounted:,} answers came without token counts")
    if journal.scores:
        every = [total for row in journal.scores.values() for total in row["totals"] if total is not None]
        best = [example["score"] for example, _ in outcomes if example is not None]
        lines.append(
            f"  mean score: {_mean(every)} of {len(every):,} answers, {_mean(best)} of the {len(best):,} kept"
        )
    return "\n".join(lines)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else "none"


def _dropped(out: Path) -> Path:
    return out.with_name(out.name + ".dropped")


# --- the command ----------------------------------------------------------------------------------


def run(args: Options, render: RenderOptions, reward: RewardOptions) -> int:
    """The whole job; returns the exit code.

    Raises:
        UserError: one line each.
    """
    check(args.rewards, reward)
    prompts = load_prompts(args.data)[: args.limit]
    teacher = load_teacher(args)
    with Journal(args.out, _settings(args, render, reward, prompts)) as journal:
        slots = open_slots(args, prompts, journal)
        scorer = None
        if args.rewards and (slots or unscored(args, prompts, journal)):
            # before the first question, so that a missing checkpoint is missed at once
            scorer = load_scorer(args, render, reward, prompts)
        failures = asyncio.run(ask_all(args, teacher, slots, journal))
        if scorer is not None:
            score_all(args, scorer, unscored(args, prompts, journal), journal, 4 * render.render_batch_size)
        outcomes = examples(args, prompts, journal)
        write(args.out, [example for example, _ in outcomes if example])
        write(_dropped(args.out), list(_given_up(prompts, outcomes, journal)))
    print(report(args, outcomes, journal))
    for failure, count in failures.most_common(3):
        print(f"API failure, {count} times: {failure}", file=sys.stderr)
    again, kept = sum(why in AGAIN for _, why in outcomes), any(example for example, _ in outcomes)
    if again:
        print(f"{again} prompts are not done: run the same command again", file=sys.stderr)
    elif not kept:
        print(f"error: no example was kept, {_dropped(args.out)} says why", file=sys.stderr)
    return 1 if again or not kept else 0


def _given_up(
    prompts: Sequence[Prompt], outcomes: Sequence[tuple[dict | None, str]], journal: Journal
) -> Iterator[dict]:
    for prompt, (example, why) in zip(prompts, outcomes, strict=True):
        if example is None:
            slots = journal.answers.get(prompt.id, {})
            tries = [{k: row[k] for k in TOLD if row.get(k)} for slot in sorted(slots) for row in slots[slot]]
            yield {"prompt": prompt.text, "id": prompt.id, "task": prompt.task, "why": why, "answers": tries}


def load_teacher(args: Options) -> ChatTeacher | MiniatureTeacher:
    if args.teacher == "miniature":
        return MiniatureTeacher(args.skill)
    sampling = {"timeout": args.timeout, "temperature": args.temperature, "max_tokens": args.max_tokens}
    return ChatTeacher(args.teacher_url, args.teacher_model, **sampling)


def _settings(args: Options, render: RenderOptions, reward: RewardOptions, prompts: Sequence[Prompt]) -> dict:
    """All that an example depends on."""
    settings = {**vars(args), **({**vars(render), **vars(reward)} if args.rewards else {})}
    settings = {name: value for name, value in settings.items() if name not in NOT_RESULTS}
    ids = hashlib.sha256("".join(prompt.id for prompt in prompts).encode()).hexdigest()[:16]
    told = hashlib.sha256((SYSTEM_PROMPT + FOR_A_TEACHER).encode()).hexdigest()[:16]
    return {**settings, "prompts": f"{len(prompts)}: {ids}", "instructions": told if args.teacher == "chat" else None}


class _Parser(HfArgumentParser):
    """The dataclasses' parser, with every complaint as an `UserError` of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_args(argv: Sequence[str] | None = None) -> tuple[Options, RenderOptions, RewardOptions]:
    """The command line.

    Raises:
        UserError: an unknown flag (with the nearest one), a missing or bad value.
    """
    parser = _Parser((Options, RenderOptions, RewardOptions), description=__doc__.splitlines()[0], allow_abbrev=False)
    try:
        args, render, reward, unknown = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    except ValueError as error:  # of a dataclass
        raise UserError(str(error)) from error
    if unknown:
        flags = [f"--{name}" for name in (*vars(args), *vars(render), *vars(reward))]
        nearest = difflib.get_close_matches(unknown[0], flags, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown argument {unknown[0]!r}, did you mean {nearest!r}?")
    if complaint := _complaint(args, render):
        raise UserError(complaint)
    args.reward_weights = args.reward_weights or [1.0] * len(args.rewards)
    return args, render, reward


def _complaint(args: Options, render: RenderOptions) -> str:
    """What is wrong with the options, "" if nothing is."""
    if args.teacher == "chat" and not (args.teacher_url and args.teacher_model):
        return "give --teacher_url and --teacher_model, or --teacher miniature"
    if not args.rewards and (args.best_of > 1 or args.min_score is not None):
        return "nothing to choose by: give --rewards, or neither --best_of nor --min_score"
    if not args.rewards and render.sdmodel_name != RenderOptions.sdmodel_name:
        return f"--sdmodel_name {render.sdmodel_name} without --rewards would draw nothing: name what scores pictures"
    if args.reward_weights and len(args.reward_weights) != len(args.rewards):
        return f"--reward_weights {args.reward_weights} for --rewards {args.rewards}: give one for each"
    if (args.price_in is None) != (args.price_out is None):
        return "--price_in and --price_out go together"
    numbers = {**vars(args), **vars(render)}
    limits = {"temperature": (0, 10), "timeout": (1e-3, 86400), "skill": (0, 1), **dict.fromkeys(COUNTS, (1, 10**9))}
    for name, (low, high) in limits.items():
        if numbers[name] == AUTO:
            return f"--{name} {AUTO} is settled by r1_prompter.py alone: give a number"
        if numbers[name] is not None and not low <= numbers[name] <= high:  # NaN too
            return f"--{name} is {numbers[name]}: give {low:g} to {high:g}"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: see the head of this file."""
    try:
        return run(*parse_args(argv))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is done is kept, run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
