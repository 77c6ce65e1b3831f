"""A web page to try what was trained: words in; reasoning, rewrite and pictures out. `make app` shows the miniature.

    python scripts/app.py --gpt_path RUN --sdmodel_name black-forest-labs/FLUX.1-dev   # a rewriter before a renderer
    python scripts/app.py --gpt_path BEFORE AFTER --sdmodel_name ...                   # two of them, side by side
    python scripts/app.py --sdmodel_name black-forest-labs/FLUX.1-dev --tuned RUN      # a tuned image model or Janus
    ... --rewards hps git          score bars; the best of several rewrites can be chosen by one of them

Left are the user's own words as the untouched model draws them, right what the trained one makes of them, from the
same noise. One request is served at a time and sixteen wait. The page is on this machine only, and takes no files.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

from PIL import Image

from data.grammar import read
from errors import Stopped, UserError
from evaluation.run import with_tuned
from group_training import NEEDS_REWRITE
from inference import Reprompter, Rewrite
from interfaces import Prompt, Renderer, Reward, Sample
from models.devices import DTYPES, pick_device
from prompting import MAX_PROMPT_CHARS, messages, well_formed
from rendering import RenderOptions, load_renderer
from rendering.janus import JanusRenderer
from rewards import RewardContext, RewardOptions, build
from run.options import device, option, parse, run_main, template_option
from run.seeds import render_seed

try:
    import gradio as gr
except ImportError as missing:
    sys.exit(f"app: error: {missing}: pip install -e '.[app]', or `make app`")

UNREADABLE = "**The answer could not be read, so your own words are drawn.**"
WAITING, MOST_PICTURES, MOST_REWRITES, MOST_SEED = 16, 8, 8, 2**31 - 1
KEPT = (3600, 3600)  # seconds between looks, and that a picture is kept in Gradio's folder
EXAMPLES = [
    "a photo of three circles", "a poster of a red square left of a blue triangle", "a sketch of a green cross",
]  # fmt: skip
CSS = """
textarea { unicode-bidi: plaintext; }
.gallery-container, .grid-wrap { min-height: 0 !important; height: auto !important; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 4px 10px; align-items: center; }
.bars i { display: block; height: 10px; border-radius: 5px; background: #4a7dd6; min-width: 2px; }
.bars em { grid-column: 1 / -1; }
.bars i.before { background: #b5bcc9; }
"""


@dataclass
class AppOptions:
    """What the page shows, and where it is."""

    gpt_path: list[str] = option([], "Policies: folders, PEFT adapter folders or hub names.", changes="run")
    policy_url: str | None = option(None, "Or an OpenAI-compatible API that serves one.", changes="run")
    policy_model: str | None = option(None, "Its name there.", changes="run")
    tuned: str | None = option(None, "Run folder of pref_grpo.py or t2i_r1.py: draws on the right.", changes="run")
    rewards: list[str] = option([], "That judge the pictures.", changes="run")
    max_new_tokens: int = option(512, "Of one answer of the policy.", changes="run", least=1)
    reasoning: bool = option(True, "false for a policy trained with --reasoning false.", changes="run")
    chat_template_kwargs: dict | str | None = template_option()
    dtype: str = option("auto", "Of the policies.", changes="run", choices=list(DTYPES))
    device: str = option("auto", "Of everything.", changes="nothing", reads=device)
    about: str = option("", "A sentence under the title of the page.", changes="nothing")
    port: int = option(7860, "Of this machine.", changes="nothing", least=1, most=65535)
    share: bool = option(False, "Let Gradio open a tunnel from the internet to the page.", changes="nothing")


@dataclass(frozen=True)
class Asked:
    """What a user asks for.

    Attributes:
        chosen_by: the reward that chooses among `rewrites` sampled ones.
    """

    text: str
    seed: int
    pictures: int
    temperature: float
    rewrites: int
    chosen_by: str | None


class Studio:
    """All models of the page; no word of Gradio.

    Attributes:
        policies: name -> rewriter.
        before, after: draw the user's own words, and what became of them.
    """

    def __init__(self, options: AppOptions, render: RenderOptions, reward: RewardOptions):
        if bool(options.policy_url) != bool(options.policy_model):
            raise UserError("--policy_url and --policy_model go together")
        if not (options.gpt_path or options.policy_url or options.tuned or render.render_plan):
            raise UserError("nothing trained is named: give --gpt_path, --policy_url, --tuned, or --render_plan true")
        if odd := [name for name in options.rewards if name in NEEDS_REWRITE]:
            raise UserError(f"reward {odd[0]!r} judges an answer, and pictures are judged here: leave it out")
        where, self.about = pick_device(options.device), options.about
        render.settle(where)
        reward.settle(where)
        how = (options.dtype, options.device, options.reasoning, options.chat_template_kwargs)
        self.policies = {path: Reprompter(path, 16, options.max_new_tokens, 0.0, 0, *how) for path in options.gpt_path}
        if options.policy_url:
            served = Reprompter(
                options.policy_model, 4, options.max_new_tokens, reasoning=options.reasoning, url=options.policy_url
            )
            self.policies[options.policy_model] = served
        untouched = replace(render, render_plan=False)
        tuned = with_tuned(render, options.tuned) if options.tuned else render
        self.before: Renderer = load_renderer(untouched, where)
        self.after: Renderer = self.before if tuned == untouched else load_renderer(tuned, where)
        self.rewards: dict[str, Reward] = {
            one.name: one for one in build(options.rewards, reward, RewardContext(where, self.before))
        }

    def check(self, asked: Asked) -> None:
        """UserError for what cannot be drawn, in words; the API sends whatever it likes."""
        whole = {"seed": (0, MOST_SEED), "pictures": (1, MOST_PICTURES), "rewrites": (1, MOST_REWRITES)}
        for name, (low, high) in whole.items():
            value = vars(asked)[name]
            if not isinstance(value, int) or not low <= value <= high:
                raise UserError(f"{name} {value!r}: give a whole number from {low} to {high}")
        if not isinstance(asked.temperature, int | float) or not 0 <= asked.temperature <= 2:
            raise UserError(f"temperature {asked.temperature!r}: give a number from 0 to 2")
        if not isinstance(asked.text, str) or not asked.text.strip():
            raise UserError("Write what the picture is to show.")
        if len(asked.text) > MAX_PROMPT_CHARS:
            raise UserError(f"{len(asked.text):,} characters: at most {MAX_PROMPT_CHARS:,} are read. Shorten it.")
        if asked.rewrites > 1 and asked.chosen_by not in self.rewards:
            raise UserError("Choose the reward that is to pick the best of several rewrites.")

    def rewrite(self, policy: str, asked: Asked) -> Iterator[Rewrite]:
        """What there is of the answer while it is written; of several, the best by a reward."""
        reprompter = self.policies[policy]
        reprompter.temperature, reprompter.seed = asked.temperature, asked.seed
        if asked.rewrites == 1:
            yield from reprompter.typed(asked.text)
            return
        conversation = messages(asked.text, reprompter.reasoning)
        found = reprompter.sample(asked.text, conversation, asked.rewrites, asked.temperature or 1.0)
        prompt, seeds = read(asked.text), [self.seeds(asked)[0]] * asked.rewrites
        pictures = self.after([one.rewrite for one in found], seeds)
        scores = self.scores(asked.chosen_by, prompt, pictures)
        best = max(range(len(found)), key=lambda i: float("-inf") if scores[i] is None else scores[i])
        yield found[best]

    def scores(self, name: str, prompt: Prompt, pictures: Sequence[Image.Image | None]) -> list[float | None]:
        """Of each picture; None where there is none."""
        there = [(i, Sample(prompt, "", prompt.text, (one,))) for i, one in enumerate(pictures) if one is not None]
        found = dict(zip([i for i, _ in there], self.rewards[name]([sample for _, sample in there]), strict=True))
        return [found.get(i) for i in range(len(pictures))]

    def seeds(self, asked: Asked) -> list[int]:
        """One for each picture, the same on both sides."""
        return [render_seed(asked.seed, Prompt(asked.text).id, 0, k) for k in range(asked.pictures)]

    def draw(self, renderer: Renderer, text: str, asked: Asked) -> tuple[list[Image.Image | None], str]:
        """Pictures of a text, and the plan of the first if a Janus wrote one."""
        text = well_formed(text)
        if isinstance(renderer, JanusRenderer) and renderer.plans:
            drawn = renderer.sample([text] * asked.pictures, self.seeds(asked))
            return [one and one.image for one in drawn], (drawn[0].text or "") if drawn[0] else ""
        return renderer([text] * asked.pictures, self.seeds(asked)), ""

    def bars(self, text: str, before: Sequence[Image.Image | None], after: Sequence[Image.Image | None]) -> str:
        """The mean scores of both sides as HTML bars over each reward's range, and what a reward does not see."""
        rows, prompt = [], read(text)
        for name, reward in self.rewards.items():
            low, high = reward.range
            if blind := [limit for limit in reward.limits([prompt]) if "cuts 0 " not in limit]:
                rows.append(f"<em>{html.escape(name)}: {html.escape('; '.join(blind))}</em>")
                continue
            for side, pictures in (("before", before), ("after", after)):
                known = [one for one in self.scores(name, prompt, pictures) if one is not None]
                mean = sum(known) / len(known) if known else None
                width = 0 if mean is None else 100 * min(max((mean - low) / (high - low), 0), 1)
                label = f"{html.escape(name)}, {'your words' if side == 'before' else 'trained'}"
                value = "not scored" if mean is None else f"{mean:.3f}"
                rows.append(f'<span>{label}</span><i class="{side}" style="width:{width:.1f}%"></i><b>{value}</b>')
        return f'<div class="bars">{"".join(rows)}</div>' if rows else ""


def told(step: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Bad input and lost servers become a message on the page."""

    @wraps(step)
    def careful(*given: Any) -> Iterator[Any]:
        try:
            yield from step(*given)
        except (UserError, Stopped) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return careful


def page(studio: Studio) -> gr.Blocks:
    """The page: one tab to try, one to compare two policies."""
    names = list(studio.policies)
    after = "Its rewrite" if names else "What the trained model draws"
    with gr.Blocks(title="R1-Prompter", analytics_enabled=False, delete_cache=KEPT) as blocks:
        gr.Markdown(f"# R1-Prompter\nA model that thinks before it draws. {studio.about}")
        with gr.Tab("Try"):
            inputs, start = _inputs(studio)
            with gr.Row():
                label = "Reasoning" if names else "Plan"
                reasoning = gr.Textbox(label=label, lines=5, min_width=320, elem_id="reasoning")
                rewrite = gr.Textbox(
                    label="Rewrite", lines=5, buttons=["copy"], min_width=320, elem_id="rewrite", visible=bool(names)
                )
            said = gr.Markdown(elem_id="said")
            with gr.Row():
                left, right = (_gallery(label, name) for label, name in (("Your words", "before"), (after, "after")))
            bars = gr.HTML(elem_id="bars")
            with gr.Accordion("History", open=False):
                history = gr.Dataframe(headers=["prompt", "rewrite", "seed"], interactive=False, elem_id="history")
            seen = gr.State([])
            outputs = [reasoning, rewrite, said, left, right, bars, history, seen]
            ask = partial(try_it, studio, names[0] if names else None)
            start.click(told(ask), [*inputs, seen], outputs, concurrency_id="one", concurrency_limit=1, api_name="try")
        if len(names) > 1:
            with gr.Tab("Compare"):
                fields, start = _inputs(studio)
                chosen, columns = [], []
                with gr.Row():
                    for name in names[:2]:
                        with gr.Column():
                            chosen.append(gr.Dropdown(names, value=name, label="Policy"))
                            texts = [gr.Textbox(label=label, lines=4) for label in ("Reasoning", "Rewrite")]
                            columns += [*texts, _gallery("Pictures", f"pictures_{len(chosen)}")]
                compare = told(partial(compare_them, studio))
                start.click(compare, [*fields, *chosen], columns, concurrency_id="one", api_name="compare")
    return blocks.queue(max_size=WAITING, default_concurrency_limit=1)


def _gallery(label: str, name: str) -> gr.Gallery:
    with gr.Column(min_width=320):
        gr.Markdown(f"**{label}**")
        return gr.Gallery(columns=2, format="png", height="auto", show_label=False, elem_id=name)


def _inputs(studio: Studio) -> tuple[list[Any], gr.Button]:
    """The fields of `Asked`, and the button."""
    text = gr.Textbox(label="What is the picture to show?", lines=3, elem_id="prompt")
    gr.Examples([[one] for one in EXAMPLES], [text], label="Examples")
    with gr.Accordion("Settings", open=False):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED)
        pictures = gr.Slider(1, MOST_PICTURES, 2, step=1, label="Pictures")
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: the likeliest rewrite)")
        names = list(studio.rewards)
        can_choose = bool(names and studio.policies)
        rewrites = gr.Slider(1, MOST_REWRITES, 1, step=1, label="Best of so many rewrites", visible=can_choose)
        chosen = gr.Dropdown(names, value=names[0] if names else None, label="Chosen by", visible=can_choose)
    return [text, seed, pictures, temperature, rewrites, chosen], gr.Button("Draw", variant="primary", elem_id="draw")


def try_it(studio: Studio, policy: str | None, *given: Any) -> Iterator[tuple]:
    """Rewrite while the page looks on, then draw both sides and judge them."""
    *fields, seen = given
    asked, started = Asked(*fields), gr.skip()
    studio.check(asked)
    text, reasoning, said = asked.text, "", ""
    if policy is not None:
        for found in studio.rewrite(policy, asked):
            reasoning, text = thought_so_far(found), found.rewrite if found.readable else ""
            yield reasoning, text, "writing ...", [], [], "", started, seen
        text = found.rewrite
        said = (
            f"{found.completion_tokens} tokens"
            if found.readable
            else "**The answer could not be read; your words are drawn.**"
        )
    yield reasoning, text, f"{said}; drawing ...", [], [], "", started, seen
    before, _ = studio.draw(studio.before, asked.text, asked)
    yield reasoning, text, f"{said}; drawing ...", _there(before), [], "", started, seen
    after, plan = studio.draw(studio.after, text, asked)
    lost = sum(one is None for one in (*before, *after))
    said = "; ".join(part for part in (said, f"{lost} pictures could not be drawn" if lost else "") if part)
    seen = [[asked.text, text, asked.seed], *seen][:50]
    yield (
        plan or reasoning,
        text,
        said,
        _there(before),
        _there(after),
        studio.bars(asked.text, before, after),
        seen,
        seen,
    )


def compare_them(studio: Studio, *given: Any) -> Iterator[tuple]:
    """Rewrites and pictures of two policies, from the same noise."""
    *fields, one, other = given
    asked, columns = Asked(*fields), []
    studio.check(asked)
    for policy in (one, other):
        *_, found = studio.rewrite(policy, asked)
        rewrite = found.rewrite if found.readable else f"{found.rewrite}\n({UNREADABLE.strip('*')})"
        columns += [thought_so_far(found), rewrite, _there(studio.draw(studio.after, found.rewrite, asked)[0])]
        yield (*columns, *[gr.skip()] * (6 - len(columns)))


def thought_so_far(found: Rewrite) -> str:
    """The reasoning, or what has been written so far of an answer."""
    return found.reasoning or found.completion.removeprefix("<think>").partition("</think>")[0].strip()


def _there(pictures: Sequence[Image.Image | None]) -> list[Image.Image]:
    return [one.resize((256, 256), Image.Resampling.NEAREST) if one.width < 256 else one for one in pictures if one]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_main("app", lambda: serve(*parse((AppOptions, RenderOptions, RewardOptions), None, words)))


def serve(options: AppOptions, render: RenderOptions, reward: RewardOptions) -> None:
    """Load everything, then answer until Ctrl-C."""
    blocks = page(Studio(options, render, reward))
    try:
        blocks.launch(
            server_name="127.0.0.1", server_port=options.port, share=options.share, css=CSS, max_file_size=1,
            quiet=True, show_error=True, prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port {options.port} cannot be had ({error}): name another") from error
    print(f"open http://127.0.0.1:{options.port}; stop with Ctrl-C", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    sys.exit(main())
