"""ONNX Runtime GenAI's generator, on the checkpoint that its own builder converted once. Batches are static."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import worker_loop

_MAX_BATCH = 32


def converted(model: str, work: str) -> Path:
    """The int4 directory of `model`, made by the builder on first use; accuracy level 4 multiplies in int8."""
    source = Path(model).resolve()
    target = Path(work) / "onnxruntime" / f"{source.parent.name}-{source.name}-int4"
    if not target.exists():
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(part)]
        cache = ["-c", str(part / "cache")]
        subprocess.run(
            [*builder, *cache, "-p", "int4", "-e", "cpu", "--extra_options", "int4_accuracy_level=4"], check=True
        )
        part.rename(target)
    return target


class OnnxRuntime:
    version = ""

    def load(self, options: dict[str, Any]) -> None:
        import numpy as np
        import onnxruntime_genai

        self.version = onnxruntime_genai.__version__
        self._np, self._genai = np, onnxruntime_genai
        config = onnxruntime_genai.Config(str(converted(options["model"], options["work"])))
        sessions = {"intra_op_num_threads": options["threads"], "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": sessions}}}))
        self._model = onnxruntime_genai.Model(config)

    def generate(self, prompts: list[list[int]], output_len: int) -> int:
        """One batch after another, of as many sequences as the library takes."""
        batches = [prompts[start : start + _MAX_BATCH] for start in range(0, len(prompts), _MAX_BATCH)]
        return sum(self._generate(batch, output_len) for batch in batches)

    def _generate(self, prompts: list[list[int]], output_len: int) -> int:
        length = len(prompts[0]) + output_len
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(
            do_sample=False, batch_size=len(prompts), min_length=length, max_length=length,
            past_present_share_buffer=True,
        )  # fmt: skip
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(self._np.array(prompts, dtype=self._np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return sum(len(generator.get_sequence(row)) for row in range(len(prompts))) - len(prompts) * len(prompts[0])


if __name__ == "__main__":
    worker_loop.run(OnnxRuntime())
