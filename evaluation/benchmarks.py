"""The one dict from a benchmark's name to its constructor, and the options that a user may choose about judges.

Each imports its own module, so a judge's packages are loaded only when it is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clients.chat import VLMClient
from evaluation.benchmark import Benchmark
from models.hub import contents_of
from rewards import RewardOptions, judge_client
from run.options import option


@dataclass
class BenchmarkOptions:
    """What a user may choose about a benchmark's judge; the judge's API is that of the rewards (`--judge_url`)."""

    detector_path: str | None = option(
        None, "Mask2Former (geneval) or OWLv2 (compbench); unset: published.", changes="run"
    )
    clip_path: str | None = option(None, "CLIP of geneval or compbench; unset: the published one.", changes="run")
    blip_path: str | None = option(None, "BLIP-VQA of compbench; unset: the published one.", changes="run")
    depth_path: str | None = option(None, "DPT of compbench; unset: the published one.", changes="run")
    vlm_path: str | None = option(None, "geneval2: a Qwen-VL here in place of the judge's API.", changes="run")
    parses: str | None = option(None, "compbench: frozen parses (.json), spacy, or grammar.", changes="run")
    categories: list[str] = option([], "compbench: which files of the folder are judged; unset: all.", changes="run")
    wise_version: str = option("verified", "wise: which protocol.", changes="run", choices=["verified", "legacy"])
    judge_revision: str = option("", "Revision of judge and server, for the record.", changes="run")
    judge_batch_size: int = option(8, "Pictures per forward pass of a judge on this machine.", changes="run", least=1)


def _geneval(options: BenchmarkOptions, reward: RewardOptions, device: str) -> Benchmark:
    from evaluation import clip_colours, mask2former
    from evaluation.geneval import GenEval

    detector = options.detector_path or mask2former.PUBLISHED.repo
    clip = options.clip_path or clip_colours.PUBLISHED.repo
    detect = mask2former.Mask2Former(detector, device=device, batch_size=options.judge_batch_size)
    colours = clip_colours.ClipColours(clip, device=device)
    contents = contents_of({"detector_path": str(detect.folder), "clip_path": str(colours.folder)})
    settings = {"colours": colours.settings, "contents": contents}
    return GenEval(detect, colours, title="GenEval-HF", settings=settings)


def _compbench(options: BenchmarkOptions, reward: RewardOptions, device: str) -> Benchmark:
    from evaluation import blip_vqa, boxes, clip_score, depth
    from evaluation.compbench import ROWS, CompBench, judges_of
    from evaluation.parses import parser

    categories = options.categories or list(ROWS)
    needed, computing = judges_of(categories), {"device": device, "batch_size": options.judge_batch_size}
    judges: dict[str, Any] = {}
    if "blip" in needed:
        judges["blip"] = blip_vqa.BlipVQA(options.blip_path or blip_vqa.PUBLISHED.repo, **computing)
    if "clip" in needed:
        judges["clip"] = clip_score.ClipScore(options.clip_path or clip_score.PUBLISHED.repo, **computing)
    if "detector" in needed:
        judges["detector"] = boxes.Owlv2(options.detector_path or boxes.PUBLISHED.repo, device=device)
    if "depth" in needed:
        judges["depth"] = depth.Depth(options.depth_path or depth.PUBLISHED.repo, **computing)
    return CompBench(parser(options.parses) if options.parses else None, categories, judges)


def _judge(reward: RewardOptions) -> VLMClient:
    """The judge's client, once the judge has answered."""
    client = judge_client(reward)
    client.check()
    return client


def _unigenbench(options: BenchmarkOptions, reward: RewardOptions, device: str) -> Benchmark:
    from evaluation.unigenbench import UniGenBench

    return UniGenBench(_judge(reward))


def _wise(options: BenchmarkOptions, reward: RewardOptions, device: str) -> Benchmark:
    from evaluation.wise import WISE

    return WISE(_judge(reward), version=options.wise_version)


def _dpg(options: BenchmarkOptions, reward: RewardOptions, device: str) -> Benchmark:
    from evaluation.dpg import DPG

    return DPG(_judge(reward))


def _geneval2(options: BenchmarkOptions, reward: RewardOptions, device: str) -> Benchmark:
    from evaluation.geneval2 import GenEval2, LocalVLM, ServedVLM

    if options.vlm_path:
        return GenEval2(LocalVLM(options.vlm_path, device=device, batch_size=options.judge_batch_size))
    return GenEval2(ServedVLM(_judge(reward)))


Constructor = Callable[[BenchmarkOptions, RewardOptions, str], Benchmark]
BENCHMARKS: dict[str, Constructor] = {
    "geneval": _geneval,
    "compbench": _compbench,
    "unigenbench": _unigenbench,
    "wise": _wise,
    "geneval2": _geneval2,
    "dpg": _dpg,
}
