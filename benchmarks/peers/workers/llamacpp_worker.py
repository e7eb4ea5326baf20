"""llama.cpp, through the C API that llama-cpp-python exposes: one batch of sequences decoded together, greedy.

The Python class Llama and its server decode one sequence at a time, which would not be fair to llama.cpp.
"""

from __future__ import annotations

from typing import Any

import llama_gguf
import numpy as np
import numpy.typing as npt
import worker_loop

BATCH_TOKENS = 2048
SEQUENCE_TOKENS = 1024


class LlamaCpp:
    version = ""

    def load(self, options: dict[str, Any]) -> None:
        import llama_cpp

        self.version = llama_cpp.__version__
        self._api = api = llama_cpp.llama_cpp
        # By default every decode writes its graph to the log.
        self._quiet = api.llama_log_callback(lambda _level, _text, _data: None)
        api.llama_log_set(self._quiet, None)
        api.llama_backend_init()
        path = options["model"]
        if not path.endswith(".gguf"):
            path = str(llama_gguf.converted(path, options["work"]))
        self._model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        parameters = api.llama_context_default_params()
        parameters.n_ctx = SEQUENCE_TOKENS * options["max_num_seqs"]
        parameters.n_seq_max = options["max_num_seqs"]
        parameters.n_batch = BATCH_TOKENS
        parameters.n_threads = parameters.n_threads_batch = options["threads"]
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError("llama_init_from_model failed")
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(BATCH_TOKENS, 0, 1)

    def generate(self, prompts: list[list[int]], output_len: int) -> int:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        last = self._prefill(prompts)
        made = len(prompts)
        for step in range(output_len - 1):
            rows = [(int(token), len(prompts[index]) + step, index, True) for index, token in enumerate(last)]
            last = self._decode(rows)
            made += len(last)
        return made

    def _prefill(self, prompts: list[list[int]]) -> npt.NDArray[np.int64]:
        """Prompts in batches of at most BATCH_TOKENS; returns the first token of each sequence, in order."""
        firsts = []
        rows: list[tuple[int, int, int, bool]] = []
        for index, prompt in enumerate(prompts):
            if len(rows) + len(prompt) > BATCH_TOKENS:
                firsts.append(self._decode(rows))
                rows = []
            end = len(prompt) - 1
            rows += [(token, position, index, position == end) for position, token in enumerate(prompt)]
        firsts.append(self._decode(rows))
        return np.concatenate(firsts)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> npt.NDArray[np.int64]:
        """Runs (token, position, sequence, wants logits) rows; the greedy choice of each row that wants logits."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for slot, (token, position, sequence, wants_logits) in enumerate(rows):
            batch.token[slot] = token
            batch.pos[slot] = position
            batch.n_seq_id[slot] = 1
            batch.seq_id[slot][0] = sequence
            batch.logits[slot] = wants_logits
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        wanted = sum(row[3] for row in rows)
        logits = np.ctypeslib.as_array(self._api.llama_get_logits(self._context), shape=(wanted, self._vocab_size))
        return logits.argmax(axis=1)


if __name__ == "__main__":
    worker_loop.run(LlamaCpp())
