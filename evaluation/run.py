"""Rewrite, draw and judge the prompts of a benchmark; print raw prompts against rewrites, with paired intervals.

    python scripts/evaluate.py --benchmark geneval --metadata evaluation_metadata.jsonl --gpt_path runs/mine \\
        --sdmodel_name black-forest-labs/FLUX.1-dev --resolution 512 --render_steps 50 --guidance 3.5 --out geneval

    ... --n 4 --select hps          best of four rewrites, by a reward, beside them
    ... --revise 2 --select gdino   draw, look, tell the policy what is missing, twice at most
    ... --rewrites file.jsonl       somebody else's rewrites: rows of prompt and rewrite
    ... --tuned runs/flow           the user's own words, drawn with what pref_grpo.py or t2i_r1.py trained
    ... --render_plan true          ... and drawn after a plan that the untrained Janus writes
    ... --images old new            pictures that are there already, each folder in the benchmark's own layout
    accelerate launch --num_processes 8 scripts/evaluate.py ...                    the same, shared; the same table

Run it again to continue where it stopped, and to judge what could not be judged. OUT/results.json has every number
with all that it depends on, results.txt the table, examples.png a prompt of each category, rows_R.jsonl a row per
picture. An error is one line on stderr: a user's has exit code 2, a system of which nothing could be judged 1.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from data.prompts import load_prompts
from data.text import json_rows
from errors import Stopped, UserError
from evaluation import leak
from evaluation.benchmark import Benchmark, Item
from evaluation.benchmarks import BENCHMARKS, BenchmarkOptions, Constructor
from evaluation.layouts import There
from evaluation.pipeline import Evaluation, finished
from evaluation.sheet import draw_examples
from evaluation.statistics import OVERALL, measure
from evaluation.systems import BestOf, Chooser, Fixed, Revise, System
from evaluation.table import absences, cost, cost_table, text_table
from inference import Reprompter, Rewrite
from interfaces import Renderer
from models.devices import DTYPES
from models.hub import contents_of, is_janus
from models.policy import policy_contents
from prompting import well_formed
from rendering import RenderOptions, load_renderer, renderer_contents
from rewards import REWARDS, RewardContext, RewardOptions, build, reward_contents
from rewards.offload import describe
from run.files import atomic_write, complete_lines, file_hash, git_commit, installed_versions
from run.options import SEED, may_differ, option, parse, run_main, template_option

ROOT = Path(__file__).resolve().parent.parent
LORA = "pytorch_lora_weights.safetensors"  # diffusers' own name, which `pref_grpo` keeps


@dataclass
class EvaluateOptions:
    """What is evaluated, and how; the renderer's and the rewards' own options have the trainer's names."""

    benchmark: str = option(help=f"One of: {', '.join(BENCHMARKS)}.", changes="run")
    metadata: str = option(help="The benchmark's prompts: its own file or folder.", changes="run")
    out: str = option(help="Folder to write to, or to continue in.", changes="nothing")
    gpt_path: str | None = option(None, "Policy: folder, adapter folder or hub name.", changes="run")
    rewrites: str | None = option(None, "A .jsonl with `prompt` and `rewrite`, to be drawn.", changes="run")
    tuned: str | None = option(
        None, "Run of pref_grpo.py or t2i_r1.py, or its best/, to draw raw prompts with.", changes="run"
    )
    images: list[str] = option([], "Folders of pictures to judge, in the benchmark's layout.", changes="run")
    samples: int | None = option(None, "Pictures a prompt; unset: the protocol's.", changes="run", least=1)
    seed: int = option(42, "Of noise and sampling.", changes="run", **SEED)
    limit: int | None = option(None, "Only the first so many prompts of each category.", changes="run", least=1)
    unit: int = option(8, "Prompts that are drawn and judged together.", changes="run", least=1)
    n: int = option(1, "Rewrites to choose the best picture from; above 1 needs --select.", changes="run", least=1)
    revise: int = option(0, "Times that the policy may try again; needs --select.", changes="run", least=0)
    select: str | None = option(
        None, f"Reward that chooses; not the benchmark's own judge. Of: {', '.join(REWARDS)}.", changes="run"
    )
    training_prompts: list[str] = option(
        [], "For the leak check; unset: what run.json of policy and --tuned name.", changes="nothing"
    )
    temperature: float = option(1.0, "Of the rewrites to choose from; the other is greedy.", changes="run", above=0)
    max_new_tokens: int = option(512, "Of one answer of the policy.", changes="run", least=1)
    rewrite_batch_size: int = option(16, "Prompts rewritten at once.", changes="run", least=1)
    dtype: str = option("auto", "Of the policy.", changes="run", choices=list(DTYPES))
    reasoning: bool = option(True, "false for a policy trained with --reasoning false.", changes="run")
    chat_template_kwargs: dict | str | None = template_option()


@dataclass(frozen=True)
class Options:
    """All options of one evaluation."""

    evaluate: EvaluateOptions
    render: RenderOptions
    reward: RewardOptions
    benchmark: BenchmarkOptions


Constructors = Mapping[str, Constructor]


def parse_options(argv: Sequence[str], known: Constructors) -> Options:
    """Options of one evaluation; UserError if they do not go together."""
    options = Options(*parse((EvaluateOptions, RenderOptions, RewardOptions, BenchmarkOptions), None, argv))
    args = options.evaluate
    if args.benchmark not in known:
        raise UserError(f"unknown benchmark {args.benchmark!r}: one of {', '.join(known)}")
    if (args.n > 1 or args.revise) and not (args.select and args.gpt_path):
        raise UserError(f"--n {args.n} and --revise {args.revise} choose among a policy's pictures: name --select "
                         "and --gpt_path")  # fmt: skip
    if args.images and (args.gpt_path or args.rewrites or args.tuned):
        raise UserError("--images are judged as they are: leave --gpt_path, --rewrites and --tuned out")
    if args.tuned:
        with_tuned(options.render, args.tuned)  # refused before anything is loaded or written
    return options


def with_tuned(render: RenderOptions, run: str) -> RenderOptions:
    """How to draw, otherwise alike, with what `pref_grpo` left in `run`; UserError if nothing, or they exclude it."""
    if render.render_lora or render.remote:
        raise UserError(f"--tuned {run} is a LoRA or a pipeline in this process: give no --render_lora and no servers")
    if Path(run, LORA).is_file():
        return replace(render, render_lora=run)
    if Path(run, "model_index.json").is_file():
        return replace(render, sdmodel_name=run)
    if is_janus(run):
        return replace(render, sdmodel_name=run, render_plan=True)
    raise UserError(f"--tuned {run} has neither {LORA} nor model_index.json, and is no Janus: give the folder of a "
                    "finished run of pref_grpo.py or t2i_r1.py, or its best/")  # fmt: skip


# What is drawn -----------------------------------------------------------------------------------------------------


def systems(options: Options, items: Sequence[Item], samples: int) -> dict[str, System]:
    """Name -> system, the baseline first. Rewriting is done here, drawing when a system is called."""
    args = options.evaluate
    if args.images:
        places = {Path(folder).resolve().name: Path(folder) for folder in args.images}
        if len(places) < len(args.images):
            raise UserError(f"--images {' '.join(args.images)}: the table goes by their last names: rename one")
        return {name: There(place, args.benchmark, items, samples) for name, place in places.items()}
    device = str(PartialState().device)
    renderer = load_renderer(replace(options.render, render_plan=False), device)
    raw = {item.id: (well_formed(item.prompt.text), True) for item in items}
    made: dict[str, System] = {"raw": Fixed(renderer, raw, {})}
    if options.render.render_plan:
        made["planned"] = Fixed(load_renderer(options.render, device), raw, {})
    if args.tuned:
        made["tuned"] = Fixed(load_renderer(with_tuned(options.render, args.tuned), device), raw, {})
    if args.rewrites:
        made["given"] = Fixed(renderer, _given(Path(args.rewrites), items), {})
    if not args.gpt_path:
        return made
    policy = Reprompter(
        args.gpt_path, args.rewrite_batch_size, args.max_new_tokens, 0.0, args.seed, args.dtype, device,
        args.reasoning, args.chat_template_kwargs,
    )  # fmt: skip
    greedy, seconds = rewritten(policy, Path(args.out), items)
    made["rewrite"] = Fixed(renderer, {id: (one.rewrite, one.readable) for id, one in greedy.items()}, seconds)
    if args.select:
        choose = _chooser(options, device, renderer, items)
        if args.n > 1:
            made[f"best_of_{args.n}"] = BestOf(renderer, policy, choose, args.n, args.temperature)
        if args.revise:
            made[f"revise_{args.revise}"] = Revise(renderer, policy, choose, args.revise, greedy, args.temperature)
    return made


def rewritten(policy: Reprompter, out: Path, items: Sequence[Item]) -> tuple[dict[str, Rewrite], dict[str, float]]:
    """Item id -> greedy rewrite, and the seconds that it took; those of all processes, kept in `rewrites_R.jsonl`."""
    state = PartialState()
    texts = list(dict.fromkeys(item.prompt.text for item in items))
    done = _read_rewrites(out, mine=state.process_index)
    started = time.perf_counter()
    with open(out / f"rewrites_{state.process_index}.jsonl", "a", encoding="utf-8") as file:
        for batch in policy.stream(texts, skip=done, share=(state.process_index, state.num_processes)):
            each = (time.perf_counter() - started) / len(batch)
            rows = [{"seconds": round(each, 4), **asdict(one)} for one in batch]
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            started = time.perf_counter()
    state.wait_for_everyone()
    known = _read_rewrites(out)
    rows, names = {item.id: known[item.prompt.text] for item in items}, [one.name for one in fields(Rewrite)]
    made = {id: Rewrite(**{name: row[name] for name in names}) for id, row in rows.items()}
    return made, {id: row["seconds"] for id, row in rows.items()}


def _read_rewrites(out: Path, mine: int | None = None) -> dict[str, dict[str, Any]]:
    """Prompt -> row, of all processes; a line that a kill tore is cut off the file of process `mine`."""
    paths = sorted(out.glob("rewrites_*.jsonl"))
    lines = [line for path in paths for line in complete_lines(path, cut=path.name == f"rewrites_{mine}.jsonl")]
    return {row["prompt"]: row for row in map(json.loads, lines)}


def _given(path: Path, items: Sequence[Item]) -> dict[str, tuple[str, bool]]:
    """Rewrites of a file, by prompt; every prompt must have one."""
    known = {row["prompt"].strip(): row["rewrite"] for _, row in json_rows(path, "prompt", "rewrite")}
    missing = [item.prompt.text for item in items if not known.get(item.prompt.text)]
    if missing:
        raise UserError(f"--rewrites {path} has none of {len(missing)} prompts, the first {missing[0][:80]!r}")
    return {item.id: (known[item.prompt.text], True) for item in items}


def _chooser(options: Options, device: str, renderer: Renderer, items: Sequence[Item]) -> Chooser:
    name, prompts = options.evaluate.select, [item.prompt for item in items]
    context = RewardContext(options.reward.reward_device or device, renderer, prompts, options.evaluate.seed)
    (reward,) = build([name], options.reward, context)
    if not reward.needs_images:
        raise UserError(f"--select {name} does not look at pictures: choose one that does")
    if PartialState().is_main_process:
        print(describe(reward, prompts), flush=True)
    return Chooser(reward)


# The evaluation ----------------------------------------------------------------------------------------------------


def evaluate(options: Options, known: Constructors) -> None:
    """One evaluation, from options to table."""
    args = options.evaluate
    state = PartialState(not torch.cuda.is_available(), timeout=timedelta(days=1))  # processes finish hours apart
    options.render.settle(str(state.device))
    options.reward.settle(str(state.device))
    benchmark = known[args.benchmark](options.benchmark, options.reward, str(state.device))
    items = _limited(benchmark.load(Path(args.metadata)), args.limit)
    samples = args.samples or benchmark.images_per_prompt
    settings = _settings(options, benchmark, items, samples)
    share = (state.process_index, state.num_processes)
    run = Evaluation(Path(args.out), settings, items, samples, args.seed, args.unit, share)
    files = args.training_prompts or leak.training_files(args.gpt_path, args.tuned)
    found = leak.leaks(items, [prompt for path in files for prompt in load_prompts(path)]) if files else None
    state.wait_for_everyone()  # all have looked at the folder
    if state.is_main_process:
        run.open()
        print(leak.summary(found), flush=True)
    state.wait_for_everyone()
    made = systems(options, items, samples)
    for name, system in made.items():
        run.run(name, system, benchmark)
    state.wait_for_everyone()
    if state.is_main_process:
        _report(run, list(made), benchmark, found)


def _limited(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` items of each category, in their order."""
    number = defaultdict(itertools.count)
    return [item for item in items if next(number[item.category]) < (limit or len(items))]


def _settings(options: Options, benchmark: Benchmark, items: Sequence[Item], samples: int) -> dict[str, Any]:
    """All that a row depends on."""
    parts = (options.evaluate, options.render, options.reward, options.benchmark)
    ours = {name: value for part in parts for name, value in asdict(part).items()}
    texts = json.dumps([[item.id, item.prompt.text, item.category, item.meta] for item in items], default=str)
    args, of_benchmark = options.evaluate, dict(benchmark.settings)
    pictures = [path for folder in args.images for path in sorted(Path(folder).rglob("*.png"))]
    contents = {
        **of_benchmark.pop("contents", {}),
        **(policy_contents(args.gpt_path) if args.gpt_path else {}),
        **({} if args.images else renderer_contents(options.render)),
        **reward_contents([args.select], options.reward),
        **contents_of({name: path for name in ("rewrites", "tuned") if (path := ours[name])}),
    }
    return {
        **{name: value for name, value in ours.items() if name not in may_differ(*parts)},
        "contents": contents,
        "images_hash": hashlib.sha256("".join(map(file_hash, pictures)).encode()).hexdigest()[:16],
        "samples": samples,
        "prompts": len(items),
        "prompts_hash": hashlib.sha256(texts.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        "benchmark_settings": of_benchmark,
    }


def _report(run: Evaluation, names: Sequence[str], benchmark: Benchmark, found: leak.Leak | None) -> None:
    table = measure(run.items, {n: run.verdicts(n) for n in names}, benchmark.categories, benchmark.overall)
    rows = {name: run.rows(name) for name in names}
    absent = [text for name, of in rows.items() if (text := absences(name, of))]
    if not all(OVERALL in scores for scores in table.scores.values()):
        raise Stopped(f"no table, because of one system nothing could be judged: {'; '.join(absent)}")
    costs = {name: cost(of) for name, of in rows.items()}
    tables = [text_table(benchmark.title, table), cost_table(costs)]
    text = "\n\n".join([*tables, *(f"WARNING: {one}" for one in absent)])
    results = {
        "title": benchmark.title,
        "settings": run.settings,
        "commit": git_commit(ROOT),
        "versions": installed_versions(),
        "leak": None if found is None else asdict(found),
        **asdict(table),
        "cost": costs,
        "not_judged": {name: [row for row in of if not finished(row)] for name, of in rows.items()},
    }
    atomic_write(run.out / "results.json", json.dumps(results, indent=1).encode())
    atomic_write(run.out / "results.txt", f"{text}\n".encode())
    sheet = draw_examples(rows, run.out)
    print(f"\n{text}\n\nexamples: {sheet}\nrows, pictures and results.json: {run.out}", flush=True)


def main(argv: Sequence[str] | None = None, known: Constructors = BENCHMARKS) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_main("evaluate", lambda: evaluate(parse_options(words, known), known))
