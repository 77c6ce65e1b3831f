"""Claims about the one reader of verdicts: nothing that judges write around a verdict hides it, and what is denied,
bound to a condition, said in two ways or off the scale is none."""

import json

import pytest

from evaluation import dpg, geneval2, unigenbench, wise
from rewards import judge, preference
from rewards.preference import FIRST, SECOND, TIE

AROUND = [  # what judges put around any verdict
    "{}", "{}.", " {}\n", "**{}**", "_{}_", "`{}`", "```\n{}\n```", "- {}", "• {}", "> {}", "### Verdict\n{}",
    "\\boxed{{{}}}", "<think>hm</think>{}", "hm</think> {}", "<thinking>hm</thinking>\n{}", "◁think▷hm◁/think▷{}",
    "{}<|im_end|>", "<|channel|>analysis<|message|>hm<|end|><|channel|>final<|message|>{}", "<answer>{}</answer>",
    "<Answer> {} </Answer>", "<|begin_of_box|>{}<|end_of_box|>", "\u200b{}\ufeff", "The picture shows a dog.\n\n{}",
    "<think>It may be {}</think>{}",
]  # fmt: skip
CUT = ["", ".", "<think>{}", "<think>a</think><think>{}", "<answer>{}", "＜answer＞x＜/answer＞", "maybe"]


def said(read, verdict, *answers: str) -> list[tuple]:
    return [(read, answer, verdict) for answer in answers]


def around(read, verdict, text: str) -> list[tuple]:
    cut = said(read, None, *(one.format(text) for one in CUT))
    return said(read, verdict, *(one.format(*[text] * one.count("{}")) for one in AROUND)) + cut


def scores(answer: str) -> list | None:
    read = unigenbench.parse(3, answer)
    return None if read is None else json.loads(read)[0]


yes_no, grade, audit, three = dpg.parse, judge.parse, wise.parse, wise.parse_grades
better, word = preference.parse, geneval2.HARD.parse
THREE = "Consistency{0} 2\nRealism{0} 0\nAesthetic Quality{0} 1"
CASES = [
    *around(yes_no, "yes", "YES"), *around(word, "two", "Two"), *around(audit, 1, "Score: 1"),
    *around(grade, 7, "Score: 7/10"), *around(better, SECOND, "Image 2 is better"), *around(three, "2 0 1",
        THREE.format(":")),
    *around(scores, [1, 0, 1], "<score>[1, 0, 1]</score>"),
    *said(yes_no, "yes", "Yes, there is.", "Yes there is", "ＹＥＳ！", "Answer：yes", "Answer: **Yes**.",
        "I’d say yes",
        '{"answer": "yes"}', 'So: ```json\n{"why": "no cat, no", "answer": "Yes."}\n```', "Is there a dog? Yes.",
        "Yes! No cat, no bird.", "Based on the image, yes.", "It's a yes", "“Yes”", "(yes)", "1. Yes",
        "So the answer is yes."),
    *said(yes_no, "no", "No — but a cat is.", "Final answer - no", "No it isn't",
        "Is it red? Yes. Here? No. Final answer: no"),
    *said(yes_no, None, "yes no", "no idea", "yes/no", "Yes or no", "Yes, or no", "Yes and no.", "not yes",
        "The answer is not yes", "Yes, if you squint", "Yes. No.", "Yes... no, wait", "It is false that yes",
        "I can't say yes", "No one is there", "No. 5 is on the shirt", "Yes?", "The sign says: yes",
        "Some would say yes", "答案：yes", "y" * 100_000, "\n" * 100_000),
    *said(word, "two", "2", "２", "There are two."), *said(word, "12", "12"), *said(word, None, "Two or three",
        "plastic"),
    *said(grade, 8.3, "<score>8.3</score> All 3 dogs are there.", "<SCORE>8.3</SCORE>",
        "<score>８.３</score> Score: 2",
        "<score>8.3</score> again <score>8.30</score>"),
    *said(grade, 7, "7 out of 10", "7/10 because", "I'd give this a 7/10.", "I'd give it a score of 7.",
        "Rating: **7**", "７", "7.", "7.0", "Score：７", "Grade = 7", "Score - 7", "The score is 7.", "| Score | 7 |",
        '{"score": "7/10"}', "Score: 7 (out of 10)"),
    *said(grade, 0, "<score>0</score>", "0/10"),
    *said(grade, 10, "<score>12</score>"),
    *said(grade, 0, "<score>-3</score>"),
    *said(grade, None, "<score>9</score> or <score>2</score>", "Score: 12", "Grade: -3",
        "<score>nan</score>", "<score>8", "Score: 11", "Score: 85/100", "Score: 4/5", "Score: 4 (out of 5)", "85%",
        "4 stars", "Score: 7-8", "Score: 7 or 8", "Score: 7,5", "Score: ½", "A score of 10 would be perfect.",
        "Score: 7\nScore: 8", "It is false that the score: 7", "Score: -1", "10/10/2024",
        "3/10 of the dogs are missing", "<score>1" + " " * 100_000, "score" * 20_000, "1" * 100_000),
    *said(audit, 1, "Score：1", "Score：１", "**Score:** 1", "It is there.\n 1 \n", "1", "score: 1.0",
        "Final score: 1",
        "Score: 1\nScore: 1"),
    *said(audit, 0, "score:0."),
    *said(audit, None, "It says 'Score: 1', but no. Score: 0", "Score: 10", "Score: 0.5", "Score: 2", "Score: -1",
        "Score: 1/2", "Score: 0/1", "Score: 0|1", "Underscore: 1", "1\n0", "1 apple", "It is false that Score: 1",
        "Score: 1 if you squint", "Score∶ 1"),
    *said(three, "2 0 1", THREE.format("："), THREE.format(""),
        "**aesthetic quality**: 1\n**Consistency:** 2\n- Realism: 0",
        '{"Consistency": 2, "Realism": 0, "Aesthetic Quality": 1}', THREE.format(" (0-2):"),
        THREE.format(":") + "\nRealism: 0/2"),
    *said(three, None, THREE.format(":") + "\nConsistency: 0", "Consistency: 2\nRealism: 0",
        THREE.format(":").replace("2", "3"), THREE.format(":").replace("2", "1.5"), THREE.format(":").replace("2",
        "1-2"), THREE.format(":").replace("2", "C"), "2 0 1"),
    *said(better, FIRST, "<answer>\n image 1 is better. </answer>", "Image 1 is better than Image 2", "Image A",
        "Answer: 1", "Image 1 wins", "Winner: the first image", "I think Image 1 is better, because the dog is red",
        "Image １ is better"),
    *said(better, SECOND, "<answer>Image 1 is better</answer> no: <answer>Image 2 is better</answer>"),
    *said(better, TIE, "<answer>tie</answer>", "It is a tie", "Both are equal", "Neither is better."),
    *said(better, None, "It is false that Image 1 is better", "<answer>It is false that Image 1 is better</answer>",
        "Image 1 is not better", "I don't think Image 1 is better.", "Image 1 is better if you like red",
        "Image 1 is better, if you like red", "Image 1 is better lit, Image 2 is better framed",
        "Is Image 1 better? No.", "Image 1, Image 2", "Image 12 is better",
        "<answer>Image 1 is better</answer> <answer>Image 2", "<answer></answer>"),
    *said(scores, [1, 0, 1], "```xml\n<score>\n[ 1, 0.0, 1, ]\n</score>\n```", "<score>［１，０，１］</score>",
        "<score>\n1\n0\n1\n</score>", '{"analysis": ["a", "b", "c"], "score": [1, 0, 1]}', "**Score:** [1, 0, 1]",
        "<score>[1,0,1]</score> <score>[1, 0, 1]</score>",
        "<analysis>['it's', 'unreadable']</analysis><score>[1,0,1]</score>",
        "<analysis>" + "[" * 50_000 + "</analysis><score>1,0,1</score>"),
    *said(scores, None, "it reads <score>[1,1,1]</score> on the wall <score>[0,0,0]</score>", "<score>[1,0]</score>",
        "<score>[1,2,0]</score>", "<score>[1,0.5,0]</score>", '<score>[1,"1",0]</score>', "<score>[[1,1,1]]</score>",
        "<score>[1, 0, 1]", "＜score＞[1,0,1]＜/score＞", '<analysis>["a", "b"]</analysis><score>[1,0,1]</score>',
        "<score>[" + "1," * 50_000),
]  # fmt: skip


@pytest.mark.parametrize("read, answer, verdict", CASES, ids=[str(number) for number in range(len(CASES))])
def test_an_answer_is_its_verdict_or_none(read, answer, verdict):
    assert read(answer) == verdict
