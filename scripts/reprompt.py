"""Rewrite a file of prompts with a policy and, if a renderer is named, draw the rewrites.

    python scripts/reprompt.py --prompts file.txt --gpt_path PATH --out DIR [--sdmodel_name PATH --images 4 --baseline]

Writes DIR/rewrites.jsonl (one row per distinct prompt, in the order of the file), DIR/settings.json and DIR/*.png. Run
it again to continue where it stopped. What it leaves out: scores (see evaluation/).

No batch is padded: prompts of one exact token length are batched together. Greedy rewrites then do not depend on the
batch size but for the rounding of matrix products. In float32 that is too small to matter (the tests compare sizes
1, 3 and 8); in bfloat16 it can turn a near-tie, and --batch_size 1 is the way to be exact. A sampled rewrite is a
function of the seed and of the prompts in its batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.prompts import DataError, load_prompts
from interfaces import Prompt, Renderer
from prompting import messages, parse, well_formed
from rendering import CheckpointError, RenderOptions
from models.policy import DTYPES, PolicyError, load_policy, load_tokenizer, pick_device, pick_dtype
from run.folder import differences, save_png, whole_lines, write_whole
from run.seeds import render_seed

NOT_RESULTS = ("prompts", "out", "device")  # arguments that may differ when a run is continued
PICTURE_SETTINGS = (
    "sdmodel_name", "images", "baseline", "steps", "guidance", "resolution", "max_sequence_length", "chunk_size",
)  # fmt: skip


class RepromptError(RuntimeError):
    """The run cannot start or continue; the message is one line and says what to do."""


@dataclass(frozen=True)
class Rewrite:
    """One prompt, rewritten.

    Attributes:
        prompt: the user's own text.
        reasoning: the think block; "" if there is none or the answer could not be read.
        rewrite: what the image model is given; the user's own text if the answer could not be read.
        readable: whether the answer could be read.
        completion: the policy's whole text.
        prompt_tokens, completion_tokens, rewrite_tokens: lengths in the policy's tokens: of all that it read (system
            prompt and template too), of all that it wrote (end token too), of `rewrite`.
    """

    prompt: str
    reasoning: str
    rewrite: str
    readable: bool
    completion: str
    prompt_tokens: int
    completion_tokens: int
    rewrite_tokens: int


class Reprompter:
    """A policy that rewrites prompts: `Reprompter(path)(["a cat"])[0].rewrite`.

    Args:
        path: policy folder, PEFT adapter folder or hub name.
        reasoning: whether the policy was trained to think first.
        temperature: 0 is greedy; above, plain sampling (no top-k, no top-p, no repetition penalty, as in training).
        dtype, device: see `models.policy.load_policy`.

    Raises:
        PolicyError: the policy or its tokenizer cannot be loaded.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 16,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        dtype: str = "auto",
        device: str = "auto",
        reasoning: bool = True,
    ) -> None:
        self.reasoning = reasoning
        self.tokenizer = load_tokenizer(path)
        self.policy = load_policy(path, dtype, device)
        self.batch_size = batch_size
        self.seed = seed
        self.end_tokens = _end_tokens(self.policy, self.tokenizer)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        self.policy.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            repetition_penalty=1.0,
            eos_token_id=self.end_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )

    def __call__(self, texts: Sequence[str]) -> list[Rewrite]:
        """Rewrite `texts`; one Rewrite each, in their order. A text that comes twice is rewritten once."""
        done = {rewrite.prompt: rewrite for batch in self.stream(list(dict.fromkeys(texts))) for rewrite in batch}
        return [done[text] for text in texts]

    def stream(
        self, texts: Sequence[str], skip: Iterable[str] = (), share: tuple[int, int] = (0, 1)
    ) -> Iterator[list[Rewrite]]:
        """Rewrite distinct `texts` batch by batch, shortest first; a batch wholly in `skip` is left out.

        The batches are those of a run that skips nothing and has no other process, so that a continued or a shared run
        samples what it would have sampled.

        Args:
            share: (i, n): only every n-th batch, from the i-th on.
        """
        skip = set(skip)
        inputs = [self._encode(messages(text, self.reasoning)) for text in texts]
        for batch in _batches([len(ids) for ids in inputs], self.batch_size)[share[0] :: share[1]]:
            if not all(texts[i] in skip for i in batch):
                yield self._rewrite([texts[i] for i in batch], [inputs[i] for i in batch])

    def sample(self, text: str, conversation: list[dict[str, str]], count: int, temperature: float) -> list[Rewrite]:
        """`count` sampled answers to one conversation about `text`: a function of seed, conversation and count."""
        key = "/".join(turn["content"] for turn in conversation)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        return self._rewrite([text] * count, [self._encode(conversation)] * count, key, **sampling)

    def _encode(self, conversation: list[dict[str, str]]) -> list[int]:
        return self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)

    def _rewrite(self, texts: list[str], inputs: list[list[int]], key: str = "", **sampling) -> list[Rewrite]:
        ids = torch.tensor(inputs, device=self.policy.device)  # (batch, tokens), no padding
        gpus = [ids.device] if ids.is_cuda else []
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(_batch_seed(self.seed, [key] if key else texts))
            out = self.policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **sampling)
        written = out[:, ids.shape[1] :].tolist()
        return [self._read(text, ids.shape[1], row) for text, row in zip(texts, written, strict=True)]

    def _read(self, text: str, prompt_tokens: int, row: list[int]) -> Rewrite:
        length = next((i + 1 for i, token in enumerate(row) if token in self.end_tokens), len(row))
        completion = self.tokenizer.decode(row[:length], skip_special_tokens=True)
        answer = parse(completion, self.reasoning)
        rewrite = answer.rewrite if answer else well_formed(text)
        return Rewrite(
            prompt=text,
            reasoning=(answer.reasoning or "") if answer else "",
            rewrite=rewrite,
            readable=answer is not None,
            completion=completion,
            prompt_tokens=prompt_tokens,
            completion_tokens=length,
            rewrite_tokens=len(self.tokenizer.encode(rewrite, add_special_tokens=False)),
        )


def _end_tokens(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    of_model = policy.generation_config.eos_token_id
    ends = of_model if isinstance(of_model, list) else [of_model]
    return sorted({token for token in (*ends, tokenizer.eos_token_id) if token is not None})


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions in batches of one length each, shortest first."""
    groups: dict[int, list[int]] = {}
    for position, length in enumerate(lengths):
        groups.setdefault(length, []).append(position)
    return [group[i : i + batch_size] for _, group in sorted(groups.items()) for i in range(0, len(group), batch_size)]


def _batch_seed(seed: int, texts: Sequence[str]) -> int:
    key = "/".join((str(seed), *(Prompt(text).id for text in texts)))
    return int(hashlib.sha256(key.encode()).hexdigest()[:15], 16)


# --- the run folder -------------------------------------------------------------------------------


def _settings(args: argparse.Namespace, prompts: Sequence[Prompt], pictures: bool) -> dict:
    """All that a row or picture depends on. Greedy rows do not depend on the batch size, so it may change then."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_RESULTS}
    settings["batch_size"] = args.batch_size if args.temperature > 0 else None
    settings["prompt_ids"] = hashlib.sha256("".join(prompt.id for prompt in prompts).encode()).hexdigest()[:16]
    return settings if pictures else {**settings, **dict.fromkeys(PICTURE_SETTINGS)}


def _check_settings(path: Path, new: dict) -> None:
    """RepromptError if the folder was made with other settings; pictures may be added to rewrites without any."""
    if not path.is_file():
        if path.with_name("rewrites.jsonl").exists():
            raise RepromptError(f"{path.parent} holds rewrites but no settings.json; name another --out")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RepromptError(f"{path} is not JSON ({error}); name another --out") from error
    added = PICTURE_SETTINGS if old.get("sdmodel_name") is None else ()
    changed = differences({k: old.get(k) for k in new}, {**new, **{k: old.get(k) for k in added}})
    if changed:
        raise RepromptError(f"{path.parent} was made with other settings ({changed}); name another --out")


def _read_rows(path: Path) -> dict[str, dict]:
    """Rows by prompt id; a last line torn by a kill is cut off the file."""
    if not path.exists():
        return {}
    try:
        rows = [json.loads(line) for line in whole_lines(path, cut=True)]
    except ValueError as error:
        raise RepromptError(f"{path} has a line that is not JSON ({error}); name another --out") from error
    return {row["id"]: row for row in rows}


# --- rewriting and drawing ------------------------------------------------------------------------


def rewrite_all(args: argparse.Namespace, prompts: Sequence[Prompt], rows: dict[str, dict]) -> tuple[int, float]:
    """Add the missing rows to `rows` and to rewrites.jsonl as they come; returns (tokens written, seconds)."""
    reprompter = Reprompter(
        args.gpt_path,
        args.batch_size,
        args.max_new_tokens,
        args.temperature,
        args.seed,
        args.dtype,
        args.device,
        reasoning=not args.no_reasoning,
    )
    if not (args.out / "settings.json").exists():
        write_whole(
            args.out / "settings.json", json.dumps(_settings(args, prompts, pictures=False), indent=1).encode()
        )
    where = {prompt.text: (index, prompt.id) for index, prompt in enumerate(prompts)}
    done = [prompt.text for prompt in prompts if prompt.id in rows]
    tokens, start = 0, time.perf_counter()
    with (
        open(args.out / "rewrites.jsonl", "a", encoding="utf-8") as file,
        tqdm(total=len(prompts), initial=len(done), desc="rewriting", unit="prompt") as bar,
    ):
        for batch in reprompter.stream([prompt.text for prompt in prompts], skip=done):
            for rewrite in batch:
                index, prompt_id = where[rewrite.prompt]
                tokens += rewrite.completion_tokens
                if prompt_id not in rows:
                    rows[prompt_id] = {"index": index, "id": prompt_id, **asdict(rewrite)}
                    file.write(json.dumps(rows[prompt_id]) + "\n")
                    bar.update()
            file.flush()
    return tokens, time.perf_counter() - start


def load_renderer(args: argparse.Namespace) -> Renderer:
    """The renderer that the arguments name; options not given are its own defaults."""
    device = pick_device(args.device)
    options = RenderOptions(
        args.sdmodel_name,
        render_steps=args.steps,
        guidance=args.guidance,
        resolution=args.resolution,
        max_sequence_length=args.max_sequence_length,
        render_dtype=pick_dtype(args.dtype, device),
        render_batch_size=args.chunk_size,
    )
    try:
        return options.load(device)
    except (CheckpointError, ValueError) as error:
        raise RepromptError(f"renderer: {error}") from error


def draw_all(args: argparse.Namespace, renderer: Renderer, rows: Iterable[dict]) -> tuple[int, int]:
    """Draw what is not in the folder yet and put file names (or None) in the rows; returns (drawn, not drawn)."""
    jobs = {}  # file name -> (text, seed)
    for row in rows:
        for key, suffix, text in _versions(row, args.baseline):
            names = [f"{row['index']:06d}_{row['id'][:8]}_{image}{suffix}.png" for image in range(args.images)]
            row[key] = names
            jobs |= {name: (text, render_seed(args.seed, row["id"], 0, image)) for image, name in enumerate(names)}
    missing = [name for name in jobs if not (args.out / name).exists()]
    failed = set()
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="drawing", unit="picture") as bar:
        for start in range(0, len(missing), args.chunk_size):
            names = missing[start : start + args.chunk_size]
            pictures = renderer(*zip(*(jobs[name] for name in names), strict=True))
            for name, picture in zip(names, pictures, strict=True):
                if picture is None:
                    failed.add(name)
                else:
                    save_png(picture, args.out / name)
                bar.update()
    for row in rows:
        for key, _, _ in _versions(row, args.baseline):
            row[key] = [None if name in failed else name for name in row[key]]
    return len(missing) - len(failed), len(failed)


def _versions(row: dict, baseline: bool) -> list[tuple[str, str, str]]:
    rewritten, raw = ("images", "", row["rewrite"]), ("baseline_images", "_raw", well_formed(row["prompt"]))
    return [rewritten, raw] if baseline else [rewritten]


# --- the command ----------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> str:
    """The whole job; returns the summary. Raises PolicyError, DataError, RepromptError."""
    prompts = load_prompts(args.prompts)
    _check_settings(args.out / "settings.json", _settings(args, prompts, pictures=args.sdmodel_name is not None))
    args.out.mkdir(parents=True, exist_ok=True)
    rows = _read_rows(args.out / "rewrites.jsonl")
    there = len(rows)
    tokens, seconds = rewrite_all(args, prompts, rows) if there < len(prompts) else (0, 1.0)
    ordered = [rows[prompt.id] for prompt in prompts]
    pictures = ""
    if args.sdmodel_name is not None:
        renderer = load_renderer(args)
        write_whole(args.out / "settings.json", json.dumps(_settings(args, prompts, pictures=True), indent=1).encode())
        drawn, failed = draw_all(args, renderer, ordered)
        pictures = f"; {drawn} pictures drawn, {failed} could not be drawn"
    write_whole(args.out / "rewrites.jsonl", "".join(json.dumps(row) + "\n" for row in ordered).encode())
    fallbacks = sum(not row["readable"] for row in ordered)
    return (
        f"{len(ordered) - there} prompts rewritten, {there} were there; {fallbacks} of {len(ordered)} fell back to "
        f"the user's prompt; {tokens / seconds:.0f} tokens/s{pictures}; {args.out / 'rewrites.jsonl'}"
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with code 2 on a bad one."""
    parser = argparse.ArgumentParser(description="Rewrite prompts with a policy and, if asked, draw the rewrites.")
    parser.add_argument("--prompts", type=Path, required=True, help=".txt (one a line) or .jsonl")
    parser.add_argument("--gpt_path", required=True, help="policy: folder, PEFT adapter folder or hub name")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, or to continue in")
    parser.add_argument("--batch_size", type=_positive, default=16)
    parser.add_argument("--max_new_tokens", type=_positive, default=512)
    parser.add_argument("--no_reasoning", action="store_true", help="for a policy trained with --reasoning false")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--device", default="auto")
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument("--sdmodel_name", help="renderer: folder or hub name; none: rewrite only")
    pictures.add_argument("--images", type=_positive, default=1, help="seeds per prompt")
    pictures.add_argument("--baseline", action="store_true", help="draw the user's own prompts too, same seeds")
    pictures.add_argument("--steps", type=_positive)
    pictures.add_argument("--guidance", type=float)
    pictures.add_argument("--resolution", type=_positive, help="height and width in pixels")
    pictures.add_argument("--max_sequence_length", type=_positive, help="tokens that the renderer reads")
    pictures.add_argument("--chunk_size", type=_positive, default=4, help="pictures drawn at once")
    args = parser.parse_args(argv)
    if not 0 <= args.temperature < float("inf"):
        parser.error(f"--temperature is {args.temperature}; give 0 (greedy) or a positive number")
    if args.baseline and args.sdmodel_name is None:
        parser.error("--baseline draws pictures; name a renderer with --sdmodel_name")
    return args


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 cannot start or continue (one line on stderr)."""
    try:
        print(run(parse_args(argv)))
    except (PolicyError, DataError, RepromptError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
