"""vLLM, through its offline API. Its allocator, OpenMP and thread binding come from the environment (engines.py)."""

from __future__ import annotations

from typing import Any

import worker_loop


class Vllm:
    version = ""

    def load(self, options: dict[str, Any]) -> None:
        import vllm

        self.version = vllm.__version__
        self._sampling = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=options["model"],
            dtype=options["dtype"],
            max_model_len=options["max_model_len"],
            max_num_seqs=options["max_num_seqs"],
            enable_prefix_caching=False,
            seed=0,
        )

    def generate(self, prompts: list[list[int]], output_len: int) -> int:
        sampling = self._sampling(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(requests, sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)


# vLLM starts its engine process by spawning, which imports this file again.
if __name__ == "__main__":
    worker_loop.run(Vllm())
