"""Penstock, through its offline API."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import worker_loop


class Penstock:
    version = ""

    def load(self, options: dict[str, Any]) -> None:
        import penstock

        self.version = importlib.metadata.version("penstock")
        self._sampling = penstock.SamplingParams
        self._llm = penstock.LLM(
            model=options["model"],
            num_threads=options["threads"],
            max_model_len=options["max_model_len"],
            max_num_seqs=options["max_num_seqs"],
            quantization=options.get("quantization"),
            activations=options.get("activations", "auto"),
            enable_prefix_caching=False,
        )

    def generate(self, prompts: list[list[int]], output_len: int) -> int:
        sampling = self._sampling(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        outputs = self._llm.generate(prompts=prompts, sampling_params=sampling)
        return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)


if __name__ == "__main__":
    worker_loop.run(Penstock())
