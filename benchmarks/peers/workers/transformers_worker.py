"""transformers' generate() with a static batch."""

from __future__ import annotations

from typing import Any

import worker_loop


class Transformers:
    version = ""

    def load(self, options: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(options["threads"])
        self.version = transformers.__version__
        self._torch = torch
        dtype = getattr(torch, options["dtype"])
        model = transformers.AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype)
        # Random weights do draw the end-of-sequence token; every engine here is told to ignore it.
        model.generation_config.eos_token_id = None
        self._model = model.eval()

    def generate(self, prompts: list[list[int]], output_len: int) -> int:
        ids = self._torch.tensor(prompts)
        with self._torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=output_len,
                do_sample=False,
                pad_token_id=0,
            )
        return int(out.shape[0] * (out.shape[1] - ids.shape[1]))


if __name__ == "__main__":
    worker_loop.run(Transformers())
