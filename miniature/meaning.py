"""What the miniature's rewards mean: of two pictures, do they prefer the one that keeps the prompt?

    python -m miniature.meaning [--pairs 300]     # the table of RESULTS.md, about two minutes on one core

Every pair is one prompt with a right scene and a wrong one, drawn; a tie is a miss. Models of taste (HPS, PickScore,
ImageReward) are asked about what they learnt, the world's taste; the others about what holds: things (GIT, with their
colours; GroundingDINO, without), numbers and places (GroundingDINO), all six tasks (the ORM, and the judges that are a
server around it).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence

from data.grammar import TASKS
from interfaces import Prompt, Reward, Sample
from miniature import world
from miniature.fit import WEIGHTS

Pair = tuple[Sample, Sample]  # right, wrong: of one prompt
Wrong = Callable[[Prompt, world.Scene, world.Scene], bool]
THINGS, COLORED = ("single_object", "two_object"), ("single_object", "two_object", "colors", "color_attr")


def disliked(prompt: Prompt, right: world.Scene, scene: world.Scene) -> bool:
    """Is `scene` clearly less to the world's taste?"""
    return world.taste(prompt, scene) < 0.9 * world.taste(prompt, right)


def broken(prompt: Prompt, right: world.Scene, scene: world.Scene) -> bool:
    """Does the prompt not hold in `scene`?"""
    return not world.keeps(prompt, scene)


def pairs(count: int, tasks: Sequence[str] = TASKS, wrong: Wrong = broken) -> list[Pair]:
    """`count` pairs of pictures of fresh prompts, each task as often as the others; near misses."""
    rng = random.Random(f"meaning/{tasks}")
    made = []
    for i in range(count):
        prompt = world.request(tasks[i % len(tasks)], rng)
        right = scene = world.layout(prompt, rng)
        while not wrong(prompt, right, scene):
            scene = world.spoil(right if rng.random() < 0.7 else scene, rng)
        made.append(tuple(Sample(prompt, "", "", (world.draw(one, rng),)) for one in (right, scene)))
    return made


def right_share(reward: Reward, pairs: Sequence[Pair]) -> float:
    """Share of the pairs in which the right picture scores higher; an absent score is an error, not a miss."""
    scores = reward([sample for pair in pairs for sample in pair])
    if None in scores:
        raise ValueError(f"{reward.name} has no score for {scores.count(None)} of {len(scores)} pictures")
    return sum(right > wrong for right, wrong in zip(scores[::2], scores[1::2], strict=True)) / len(pairs)


def exact_counts(gdino: Reward, pairs: Sequence[Pair]) -> float:
    """Share of the pictures of counting prompts of which GroundingDINO says rightly whether the number is kept."""
    scores = gdino([sample for pair in pairs for sample in pair])
    return sum(score == (i % 2 == 0) for i, score in enumerate(scores)) / len(scores)


def measure(count: int = 300) -> dict[str, float]:
    """Every figure by its name."""
    from clients.chat import VLMClient
    from miniature.judge_server import MODEL, JudgeServer
    from rewards.gdino import GroundingDino
    from rewards.git import GIT
    from rewards.hps import HPS
    from rewards.imagereward import ImageReward
    from rewards.judge import Judge
    from rewards.orm import ORM
    from rewards.pickscore import PickScore
    from rewards.preference import Preference

    liked, held = pairs(count, wrong=disliked), pairs(count)
    found = {
        f"{kind.name}, taste": right_share(kind(WEIGHTS / kind.name, device="cpu"), liked)
        for kind in (HPS, PickScore, ImageReward)
    }
    found["git, things and colours"] = right_share(GIT(WEIGHTS / "git", device="cpu"), pairs(count, COLORED))
    gdino = GroundingDino(WEIGHTS / "gdino", device="cpu")
    found["gdino, existence"] = right_share(gdino, pairs(count, THINGS))
    found["gdino, exact counts"] = exact_counts(gdino, pairs(count, ("counting",)))
    found["gdino, relations"] = right_share(gdino, pairs(count, ("position",)))
    orm = ORM(WEIGHTS / "orm", device="cpu")
    found["orm, all tasks"] = right_share(orm, held)
    for task in TASKS:
        found[f"orm, {task}"] = right_share(orm, pairs(count // 2, (task,)))
    with JudgeServer(orm) as url:
        found["judge, all tasks"] = right_share(Judge(VLMClient(url, MODEL)), held)
        found["preference, all tasks"] = right_share(_Duel(Preference(VLMClient(url, MODEL))), held)
    return found


class _Duel(Reward):
    """A preference whose groups are single pairs, also where two pairs have one prompt."""

    name, range = "preference", (0.0, 1.0)

    def __init__(self, preference: Reward):
        self.preference = preference

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        return [score for i in range(0, len(samples), 2) for score in self.preference(samples[i : i + 2])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Do the miniature's rewards prefer the right picture?")
    parser.add_argument("--pairs", type=int, default=300, help="of pictures, for each figure")
    for name, share in measure(parser.parse_args().pairs).items():
        print(f"{name:28s} {share:6.1%}")


if __name__ == "__main__":
    main()
