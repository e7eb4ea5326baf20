"""OpenVINO GenAI's ContinuousBatchingPipeline, on the checkpoint that its own exporter converted once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import worker_loop


def converted(model: str, work: str, weight_format: str) -> Path:
    """The exported directory of `model`, made by optimum-cli on first use. weight_format: "fp16", "int8" or "int4"."""
    source = Path(model).resolve()
    suffix = "" if weight_format == "fp16" else f"-{weight_format}"
    target = Path(work) / "openvino" / f"{source.parent.name}-{source.name}{suffix}"
    if not (target / "openvino_model.xml").exists():
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        exporter = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", str(source)]
        task = ["--task", "text-generation-with-past", "--weight-format", weight_format]
        groups = ["--group-size", "128", "--ratio", "1.0", "--sym"] if weight_format == "int4" else []
        subprocess.run([*exporter, *task, *groups, str(part)], check=True)
        part.rename(target)
    return target


class OpenVino:
    version = ""

    def load(self, options: dict[str, Any]) -> None:
        import numpy as np
        import openvino
        import openvino_genai

        self.version = openvino_genai.__version__
        self._np, self._openvino, self._genai = np, openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = options["max_num_seqs"]
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 2
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(converted(options["model"], options["work"], options.get("weight_format", "fp16"))),
            scheduler,
            "CPU",
            {"INFERENCE_NUM_THREADS": options["threads"]},
        )

    def generate(self, prompts: list[list[int]], output_len: int) -> int:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = output_len
        config.do_sample = False
        config.ignore_eos = True
        inputs = [self._openvino.Tensor(self._np.array([prompt], dtype=self._np.int64)) for prompt in prompts]
        results = self._pipeline.generate(inputs, [config] * len(prompts))
        return sum(len(result.m_generation_ids[0]) for result in results)


if __name__ == "__main__":
    worker_loop.run(OpenVino())
