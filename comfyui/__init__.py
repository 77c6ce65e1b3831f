"""R1-Prompter in ComfyUI: a node that rewrites a request with a trained policy.

    ln -s /path/to/R1-Prompter/comfyui ComfyUI/custom_nodes/r1_prompter
    pip install -e /path/to/R1-Prompter             # into ComfyUI's environment; --no-deps if only a URL is used

Without a URL the node loads the policy and keeps it until another one is named. workflow.json is an example.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

MOST_SEED = 2**31 - 1


class R1Reprompt:
    """Text in; rewrite and reasoning out. An answer that cannot be read gives the text itself."""

    CATEGORY = "conditioning/R1-Prompter"
    FUNCTION = "rewrite"
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("rewrite", "reasoning")
    DESCRIPTION = "Think about a request, then write the prompt that an image model draws it from."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[str, dict[str, Any]]]]:
        return {
            "required": {
                "text": ("STRING", {"multiline": True, "default": "a photo of three circles"}),
                "policy": (
                    "STRING",
                    {"default": "", "tooltip": "Folder or hub name, or its name at the URL."},
                ),
                "temperature": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 2.0, "step": 0.1, "tooltip": "0: greedy"},
                ),
                "seed": ("INT", {"default": 0, "min": 0, "max": MOST_SEED, "control_after_generate": True}),
            },
            "optional": {
                "url": ("STRING", {"default": "", "tooltip": "OpenAI-compatible API that serves it (ends in /v1)."}),
                "max_new_tokens": ("INT", {"default": 512, "min": 16, "max": 8192}),
                "reasoning": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Was it trained to think first?"},
                ),
            },
        }

    def rewrite(
        self, text: str, policy: str, temperature: float, seed: int, url: str = "", max_new_tokens: int = 512,
        reasoning: bool = True,
    ) -> tuple[str, str]:  # fmt: skip
        """ValueError, which ComfyUI shows, if no policy is named; UserError if it cannot be used."""
        if not policy.strip():
            raise ValueError("R1-Prompter: name a policy, a folder or hub name, or the model's name at the URL")
        reprompter = _reprompter(policy.strip(), url.strip() or None, max_new_tokens, reasoning)
        reprompter.temperature, reprompter.seed = temperature, seed
        (found,) = reprompter([text])
        return found.rewrite, found.reasoning


@lru_cache(maxsize=1)
def _reprompter(policy: str, url: str | None, max_new_tokens: int, reasoning: bool) -> Any:
    from inference import Reprompter  # ComfyUI starts without torch being imported twice

    return Reprompter(policy, max_new_tokens=max_new_tokens, reasoning=reasoning, url=url)


NODE_CLASS_MAPPINGS = {"R1Reprompt": R1Reprompt}
NODE_DISPLAY_NAME_MAPPINGS = {"R1Reprompt": "R1-Prompter: rewrite"}
