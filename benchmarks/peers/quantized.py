#!/usr/bin/env python3
"""Quantised weights beside other engines: the same model in 8 and 4 bits, one run, engines in turn.

    quantized.py --model DIR [--bits 8,4] [--engines penstock,llamacpp,vllm] [--threads 2] [--rounds 2]

Each engine reads the format that it is made for; the files are written once, by `penstock quantize` (GGUF and
compressed-tensors) and by the exporters of OpenVINO and ONNX Runtime, below $BENCH_WORK. All engines of one width are
loaded together and take turns case by case; who is not on the clock is stopped. The machine's limits are measured
before and after each figure, whose bound is made of them. Writes quantized-<model>.json and .md to benchmarks/results/.
With `--prepare` only the files are written.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cases import Case, Sample, figures
from engines import WORK, Engine, chosen
from machine import Limits, LimitsMeter
from machine_limits import read_shapes
from offline import note, token_limit
from process_tree import end_on_sigterm, wait_for_quiet
from report import OURS, Table, machine_facts, number, write_results
from worker import Worker, WorkerError

# Prompts of the batches are short: they are on the clock twice, and are not what is compared.
QUANTIZED_CASES = (
    Case("one stream", 1, 64, 48),
    Case("8", 8, 32, 24),
    Case("32", 32, 16, 16),
    Case("64", 64, 16, 12),
    Case("prefill 512", 1, 512, 1, is_decode=False),
)
# A stream that is alone takes a second or two, and feels the memory's speed most.
ONE_STREAM_TURNS = 3


@dataclass(frozen=True)
class BoundedSample(Sample):
    """limits: of the machine, the mean of before and after."""

    limits: Limits


@dataclass(frozen=True)
class Entry:
    """One line of the comparison. target: what `penstock quantize --to` writes for it; "" if it needs no file.

    options: further fields of the worker's load request. bf16: which products have 16 bits: "", "head" or "all".
    """

    bits: int
    engine: str
    label: str
    target: str = ""
    options: dict[str, str] = field(default_factory=dict)
    bf16: str = ""


# What these files leave in bfloat16, and their peers' of the same width do not.
INT8_HEAD = {"quantization": "int8"}
ENTRIES = (
    Entry(8, OURS, "Q8_0", "q8_0"),
    Entry(8, OURS, "--quantization int8", options={"quantization": "int8"}),
    Entry(8, OURS, "W8A8", "w8a8", bf16="head"),
    Entry(8, OURS, "W8A8, int8 head", "w8a8", options=INT8_HEAD),
    Entry(8, "llamacpp", "Q8_0", "q8_0"),
    Entry(8, "vllm", "W8A8", "w8a8", bf16="head"),
    Entry(8, "openvino", "int8", options={"weight_format": "int8"}),
    Entry(4, OURS, "Q4_0", "q4_0"),
    Entry(4, OURS, "Q4_K_M", "q4_k_m"),
    Entry(4, OURS, "W4A16", "w4a16", bf16="all"),
    Entry(4, OURS, "W4A16, int8 inputs and head", "w4a16", options={"activations": "int8", **INT8_HEAD}),
    Entry(4, "llamacpp", "Q4_0", "q4_0"),
    Entry(4, "llamacpp", "Q4_K_M", "q4_k_m"),
    Entry(4, "vllm", "W4A16", "w4a16", bf16="all"),
    Entry(4, "openvino", "int4", options={"weight_format": "int4"}),
    Entry(4, "onnxruntime", "int4"),
)


@dataclass
class Record:
    """What one entry showed; failure is empty when all went well. Bytes: of the file or checkpoint, 0 without one."""

    entry: Entry
    version: str = ""
    load_s: float = 0.0
    memory_total: int = 0
    memory_private: int = 0
    weight_bytes: int = 0
    failure: str = ""
    samples: dict[str, list[BoundedSample]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.entry.engine} {self.entry.label}"


def written(model: Path, target: str) -> Path:
    """The quantised file or directory of `model`, made on first use."""
    is_gguf = target.startswith("q")
    output = WORK / "quantized" / (f"{model.name}-{target}" + (".gguf" if is_gguf else ""))
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        note(f"writing {output}")
        program = Path(sys.executable).with_name("penstock")
        subprocess.run([str(program), "quantize", str(model), str(output), "--to", target], check=True)
    return output


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))


class Comparison:
    def __init__(self, options: argparse.Namespace, engines: list[Engine]) -> None:
        self.options = options
        self.engines = {engine.name: engine for engine in engines}
        wanted = options.cases.split(",") if options.cases else [case.name for case in QUANTIZED_CASES]
        self.cases = tuple(case for case in QUANTIZED_CASES if case.name in wanted)
        self.records: list[Record] = []
        self.meter = LimitsMeter(options.threads)
        self.limits: list[Limits] = []  # before the first figure, and after each
        self.busy: list[float] = []
        self.seed = int(time.time())
        # A token of a mixture reads only the experts that it meets: its bound is not told.
        self.is_mixture = "experts" in (Path(options.model) / "config.json").read_text()
        self.shapes = read_shapes(options.model)

    def run_width(self, bits: int) -> None:
        """Loads all entries of a width, warms them up, runs the rounds, and ends them."""
        records = [Record(entry) for entry in ENTRIES if entry.bits == bits and entry.engine in self.engines]
        self.records += records
        workers: dict[str, Worker] = {}
        try:
            for record in records:
                self._load(record, workers)
            for round_index in range(self.options.rounds):
                self.busy.append(wait_for_quiet(0.15, self.options.patience))
                self.limits.append(self.meter.measure())
                for case in self.cases:
                    for turn in range(ONE_STREAM_TURNS if case.is_decode and case.batch == 1 else 1):
                        first = (round_index + turn) % len(records)
                        for record in records[first:] + records[:first]:
                            self._sample(record, case, workers)
        finally:
            for record in records:
                if record.name in workers:
                    workers[record.name].end()
                    record.memory_total = workers[record.name].memory.peak.total
                    record.memory_private = workers[record.name].memory.peak.private

    def _load(self, record: Record, workers: dict[str, Worker]) -> None:
        """Loads an entry and warms it up with a small batch of each kind. What fails is left out."""
        note(f"loading {record.name}")
        entry = record.entry
        model = written(self.options.model, entry.target) if entry.target else self.options.model
        record.weight_bytes = size_of(model) if entry.target else 0
        if entry.target and "quantization" in entry.options:
            record.weight_bytes -= self.shapes.head[0] * self.shapes.head[1]  # of two bytes, one is left
        log = WORK / "logs" / f"quantized-{record.name.replace(' ', '-')}.log"
        worker = workers[record.name] = Worker(self.engines[entry.engine], log)
        request = {
            "model": str(model),
            "threads": self.options.threads,
            "dtype": "bfloat16",
            "max_model_len": 1024,
            "max_num_seqs": 64,
            "token_limit": token_limit(self.options.model),
            "work": str(WORK),
            **entry.options,
        }
        try:
            answer = worker.load(request)
            record.version, record.load_s = answer["version"], answer["seconds"]
            with worker.memory.watch():
                for batch in (1, 8, 64):
                    worker.generate(batch, 8, 2, self._next_seed())
                worker.generate(1, 512, 1, self._next_seed())
        except WorkerError as error:
            self._fail(record, error, workers)

    def _sample(self, record: Record, case: Case, workers: dict[str, Worker]) -> None:
        if record.name not in workers:
            return
        worker, first_s = workers[record.name], 0.0
        try:
            worker.generate(1, 8, 2, self._next_seed())  # the system takes pages back of those who were stopped long
            if case.is_decode:
                first_s = worker.generate(case.batch, case.prompt_len, 1, self._next_seed())
            whole_s = worker.generate(case.batch, case.prompt_len, case.output_len, self._next_seed())
        except WorkerError as error:
            self._fail(record, error, workers)
            return
        self.limits.append(self.meter.measure())
        sample = BoundedSample(whole_s, first_s, Limits.median(self.limits[-2:]))
        record.samples.setdefault(case.name, []).append(sample)
        share = f", {self._share(record, case):.2f} of the bound" if self._has_bound(record) else ""
        note(f"{case.name:12} {record.name:30} {rate(record, case):9.1f} tokens/s{share}")

    @staticmethod
    def _fail(record: Record, error: WorkerError, workers: dict[str, Worker]) -> None:
        record.failure = str(error)
        note(record.failure)
        workers.pop(record.name).end()

    def _next_seed(self) -> int:
        self.seed += 1
        return self.seed

    def result(self) -> dict[str, Any]:
        return {
            "kind": "quantized",
            **machine_facts(self.options.model, self.options.threads),
            "rounds": self.options.rounds,
            "cases": [asdict(case) for case in self.cases],
            "busy_share_before_rounds": self.busy,
            "limits": [asdict(limits) for limits in self.limits],
            "entries": [asdict(record) for record in self.records],
        }

    def tables(self) -> list[Table]:
        widths = sorted({record.entry.bits for record in self.records}, reverse=True)
        return [self._table(bits) for bits in widths]

    def _has_bound(self, record: Record) -> bool:
        """Known for files that we know. A token of a mixture reads only the experts that it meets."""
        return not self.is_mixture and (record.entry.engine == OURS or record.weight_bytes > 0)

    def _bound(self, record: Record, case: Case, limits: Limits) -> float:
        """Tokens/s that the machine allows: a step reads the weights once, multiplies each with each row, and no more.

        Attention, activations and the sums of a format's groups come on top, so no engine gets there.
        """
        entry, head = record.entry, self.shapes.head[0] * self.shapes.head[1]
        num_bytes = record.weight_bytes or self.shapes.weights * entry.bits / 8
        tokens, sampled = (case.batch, case.batch) if case.is_decode else (case.prompt_len, 1)
        block_rate = limits.bf16_gops if entry.bf16 == "all" else limits.peak_gops
        head_rate = limits.bf16_gops if entry.bf16 else limits.peak_gops
        products_s = 2e-9 * (tokens * self.shapes.block_weights / block_rate + sampled * head / head_rate)
        return tokens / max(num_bytes / limits.read_gb_s / 1e9, products_s)

    def _share(self, record: Record, case: Case) -> float:
        """Of the bound at the moment of each sample, the median."""
        samples = record.samples.get(case.name)
        if not samples:
            return float("nan")
        return statistics.median(
            rate_of(case, [sample]) / self._bound(record, case, sample.limits) for sample in samples
        )

    def _table(self, bits: int) -> Table:
        """Figures of every entry; below, ours over the best peer and the machine's bound, and bound over best peer."""
        records = [record for record in self.records if record.entry.bits == bits]
        limits = Limits.median(self.limits)
        slowest, fastest = (choose(each.read_gb_s for each in self.limits) for choose in (min, max))
        table = Table(
            f"{bits} bits, tokens/s after the first token (prefill: prompt tokens)",
            ("engine and format", *(case.name for case in self.cases), "peak memory GB (private)", "load s"),
            note=f"DRAM read {limits.read_gb_s:.1f} GB/s ({slowest:.1f} to {fastest:.1f}); torch._int_mm 512x2048x8192 "
            f"{limits.int_mm_gops:.0f} GOP/s, this instruction set's own peak {limits.peak_gops:.0f} in 8 bits, "
            f"{limits.bf16_gops:.0f} in bf16. Decode: batch x (output - 1) / (t(output) - t(1)). Bound: reading the "
            "weights, or their products with every row at the peak, whichever takes longer, at the limits measured "
            "before and after each figure. W4A16 is multiplied in bf16, and so are the heads of W8A8 and W4A16, unless "
            "the row says otherwise; Penstock's other products are of 8 bits.",
        )
        for record in records:
            cells = ["failed" if record.failure else number(rate(record, case)) for case in self.cases]
            memory = f"{record.memory_total / 1e9:.2f} ({record.memory_private / 1e9:.2f})"
            table.rows.append((f"{record.name} ({record.version})", *cells, memory, f"{record.load_s:.1f}"))
        peers = [record for record in records if record.entry.engine != OURS and not record.failure]
        for record in records:
            if record.entry.engine != OURS or record.failure:
                continue
            best = [max((rate(peer, case) for peer in peers), default=0.0) for case in self.cases]
            ours = [rate(record, case) for case in self.cases]
            table.rows.append((f"**{record.name} / best peer**", *_ratios(ours, best), "", ""))
            if self._has_bound(record):
                bounds = [self._bound(record, case, limits) for case in self.cases]
                table.rows.append((f"{record.name}: bound / best peer", *_ratios(bounds, best), "", ""))
        for record in records:
            if self._has_bound(record) and not record.failure:
                shares = [f"{self._share(record, case):.2f}x" for case in self.cases]
                table.rows.append((f"{record.name}: of the bound", *shares, "", ""))
        return table


def _ratios(values: list[float], others: list[float]) -> list[str]:
    return [f"{value / other:.2f}x" if other else "" for value, other in zip(values, others, strict=True)]


def rate(record: Record, case: Case) -> float:
    """Median tokens/s of an entry; NaN when it has none."""
    samples = record.samples.get(case.name)
    return rate_of(case, samples) if samples else float("nan")


def rate_of(case: Case, samples: Sequence[Sample]) -> float:
    shown = figures(case, samples)
    return shown.end_to_end if shown.decode is None else shown.decode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory, in bf16")
    parser.add_argument("--engines", default="penstock,llamacpp,vllm,openvino,onnxruntime")
    parser.add_argument("--bits", default="8,4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", default="", help="comma-separated names: one stream,8,32,64,prefill 512")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to wait for a quiet machine each round")
    parser.add_argument("--prepare", action="store_true", help="only write the files")
    options = parser.parse_args()
    end_on_sigterm()
    options.model = options.model.resolve()
    widths = [int(bits) for bits in options.bits.split(",")]
    for entry in ENTRIES:
        if entry.bits in widths and entry.target:
            written(options.model, entry.target)
    if options.prepare:
        return 0
    comparison = Comparison(options, chosen(options.engines, options.threads))
    for bits in widths:
        comparison.run_width(bits)
        write_results(f"quantized-{options.model.name}", comparison.result(), comparison.tables())
    for table in comparison.tables():
        print(table.markdown())
    return 1 if any(record.failure for record in comparison.records) else 0


if __name__ == "__main__":
    sys.exit(main())
