"""Instructions with answers: the prompt, and generated questions for tests and toy scale.

Records have the format of Commonsense170K (Hu et al., LLM-Adapters, EMNLP 2023): {"instruction", "input", "output",
"answer"}. The output is the expected text ("the correct answer is answer2"), the answer its last word.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

PROMPT_RECIPE = 1
"""Increase when `prompt_of` returns another text."""
DRAWN_RECIPE = 1
"""Increase when `drawn` yields other records."""
DRAWN_RECORDS = 4_000
DRAWN_SEED = 1


class Example(str):
    """A prompt and its answer as one string that knows where the answer begins."""

    start: int

    def __new__(cls, prompt: str, answer: str) -> Example:
        self = super().__new__(cls, prompt + answer)
        self.start = len(prompt)
        return self

    @property
    def parts(self) -> tuple[str, str]:
        return self[: self.start], self[self.start :]

    def __reduce__(self) -> tuple[type[Example], tuple[str, str]]:
        return Example, self.parts


def prompt_of(instruction: str, given: str = "") -> str:
    """Return the prompt of Stanford Alpaca (Taori et al., 2023), with LLM-Adapters' line break before the answer."""
    context = ", paired with an input that provides further context" if given else ""
    section = f"### Input:\n{given}\n\n" if given else ""
    return (
        f"Below is an instruction that describes a task{context}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{section}### Response:\n"
    )


# --- drawn questions --------------------------------------------------------------------------------------------------

ALIVE = ["bear", "cat", "deer", "fox", "goat", "hen", "lion", "owl"]
LIFELESS = ["bell", "cup", "door", "fork", "hat", "key", "lamp", "nail"]


def drawn(seed: int = DRAWN_SEED, count: int = DRAWN_RECORDS) -> Iterator[dict[str, str]]:
    """Yield questions about what is alive: half of them true or false, half with one right answer of four.

    The question does not reveal which names are alive; a model has to learn it. Guessing is right in 3/8 of the cases.
    """
    generator = random.Random(seed)

    def draw(words: list[str]) -> str:
        # random() is the only method with the same results in every version of Python.
        return words[int(generator.random() * len(words))]

    for _ in range(count):
        if generator.random() < 0.5:
            choices = ["true", "false"]
            answer = draw(choices)
            thing = draw(ALIVE if answer == "true" else LIFELESS)
            question = f"Please answer with true or false: is the {thing} alive?"
        else:
            choices = ["answer1", "answer2", "answer3", "answer4"]
            answer = draw(choices)
            things = [f"{choice.title()}: {draw(ALIVE if choice == answer else LIFELESS)}" for choice in choices]
            question = f"Please choose what is alive.\n\n{' '.join(things)}"
        yield {
            "instruction": f"{question}\n\nAnswer format: {'/'.join(choices)}",
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }
