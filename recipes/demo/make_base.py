"""Make the demo's data, tokenizer and untrained model. After it: `pissa train recipes/demo/base.yaml`, then --finish.

    python recipes/demo/make_base.py            # build/demo/{corpus.jsonl, start/}, pissa_cli/demo/*.jsonl
    pissa train recipes/demo/base.yaml          # full training from scratch into build/demo/run
    python recipes/demo/make_base.py --finish   # pissa_cli/demo/base, in bf16

Everything is drawn from one seed. The base learns arithmetic, the words, and two-step stories told in one way; the
demo's fine-tuning data ask about them in another way.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "demo"
PACKAGED = ROOT / "pissa_cli" / "demo"
NUM_CORPUS, NUM_TRAIN, NUM_VALID, NUM_TEST = 120_000, 3_200, 100, 200

NAMES = ["Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry"]
NAMES += ["Ida", "Jonas", "Kim", "Leo", "Mona", "Noah", "Olga", "Paul"]
THINGS = ["apples", "books", "coins", "cards", "eggs", "flowers"]
THINGS += ["marbles", "pens", "rolls", "shells", "stamps", "stones"]
MORE = ["finds {n} {t}", "buys {n} {t}", "gets {n} {t}", "makes {n} {t}", "wins {n} {t}"]
LESS = ["loses {n} {t}", "sells {n} {t}", "gives away {n} {t}", "breaks {n} {t}", "hides {n} {t}"]


def story(source: random.Random, num_steps: int) -> tuple[str, str, list[str], list[str], int]:
    """(name, thing, clauses, worked equations, answer) of a story with `num_steps` changes, numbers within 0..99."""
    name, thing = source.choice(NAMES), source.choice(THINGS)
    total = source.randint(5, 60)
    clauses, work = [f"has {total} {thing}"], []
    for _ in range(num_steps):
        add = source.random() < 0.5 if 12 < total < 80 else total <= 12
        number = source.randint(2, min(30, 99 - total)) if add else source.randint(2, min(30, total - 1))
        clauses.append(source.choice(MORE if add else LESS).format(n=number, t=thing))
        after = total + number if add else total - number
        work.append(f"{total} {'+' if add else '-'} {number} = {after}")
        total = after
    return name, thing, clauses, work, total


def corpus_text(source: random.Random) -> str:
    """One text of the base's corpus: a story told as notes, bare sums, or single changes with their sum."""
    kind = source.random()
    if kind < 0.6:
        name, thing, clauses, work, total = story(source, source.randint(1, 2))
        told = ". ".join(f"{name} {clause}" for clause in clauses)
        return f"{told}. Count the {thing}: {'; '.join(work)}. The answer is: {total}"
    if kind < 0.8:
        return "; ".join(story(source, 1)[3][0] for _ in range(4))
    name, thing, clauses, work, total = story(source, 1)
    return f"How many {thing} are left, if {name} {clauses[0]} and then {clauses[1]}? {name}: {work[0]}."


def task_row(source: random.Random) -> dict[str, str]:
    """One row of the demo's task, in GSM8K's form."""
    name, thing, clauses, work, total = story(source, 2)
    question = f"{name} {clauses[0]}, {clauses[1]} and then {clauses[2]}. How many {thing} are left?"
    return {"question": question, "answer": f"{'. '.join(work)}. The answer is: {total}\n#### {total}"}


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make() -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    source = random.Random(0)
    texts = [corpus_text(source) for _ in range(NUM_CORPUS)]
    write_jsonl(BUILD / "corpus.jsonl", [{"text": text} for text in texts])
    unique = {row["question"]: row for row in (task_row(source) for _ in range(2 * NUM_TRAIN))}
    rows = list(unique.values())[: NUM_TRAIN + NUM_VALID + NUM_TEST]
    shown = [{**row, "answer": row["answer"].partition("\n")[0]} for row in rows]  # without "#### N"
    write_jsonl(PACKAGED / "train.jsonl", shown[:NUM_TRAIN])
    write_jsonl(PACKAGED / "valid.jsonl", shown[NUM_TRAIN : NUM_TRAIN + NUM_VALID])
    write_jsonl(PACKAGED / "test.jsonl", rows[NUM_TRAIN + NUM_VALID :])

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(texts[:20_000], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    shutil.rmtree(BUILD / "start", ignore_errors=True)
    model.save_pretrained(BUILD / "start")
    tokenizer.save_pretrained(BUILD / "start")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(texts):,} texts")


def finish() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BUILD / "run" / "merged", dtype=torch.bfloat16)
    model.save_pretrained(PACKAGED / "base")
    AutoTokenizer.from_pretrained(BUILD / "run" / "merged").save_pretrained(PACKAGED / "base")


if __name__ == "__main__":
    finish() if "--finish" in sys.argv[1:] else make()
