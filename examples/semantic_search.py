"""The documents nearest to a question, by a sentence encoder: `python examples/semantic_search.py PATH_OR_HUB_ID`."""

from __future__ import annotations

import sys

from penstock import LLM

DOCUMENTS = [
    "A penstock carries water from the reservoir to the turbine.",
    "The bakery opens at seven.",
    "Turbines turn the energy of falling water into electricity.",
]


def main() -> None:
    with LLM(sys.argv[1]) as llm:
        for ranked in llm.rerank("How does a dam make power?", DOCUMENTS):
            print(f"{ranked.score:.3f}  {ranked.document}")


if __name__ == "__main__":
    main()
