"""Mutated recipes: real ones with keys, values and bytes that nobody should write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hypothesis import strategies as st

from pissa_cli.schema.other_tools import SYNONYMS
from pissa_cli.schema.recipe_errors import ADAPTER_OPTIONS, SECTIONS
from pissa_cli.schema.recipe_file import shipped

Pairs = list[tuple[str, Any]]
"""A mapping as YAML text would have it: keys and values are text to write as it is, values may be Pairs again."""

VALUES = [
    *("", "~", "null", "true", "yes", "off", "0", "-1", "1", "2", "3", "4", "16", "32", "3.7", "1e308", "1e400"),
    *("-1e-400", ".nan", ".inf", "-.inf", "0x10", "0o17", "017", "1_000", "1:30", "2024-01-01", "2024-99-99", "+1"),
    *("2024-01-01T00:00:00Z", str(2**70), str(2**63), str(2**31), "9" * 5000, f"'{'9' * 400}'", "1e5", "0.5", "1e-9"),
    *("''", "' '", '"\\0"', '"\\ud800"', '"\\x1b[31m"', '"\\u202e"', '"a\\nb"', "😀", "ä", "'[red]x[/red]'", "[/red]"),
    *("'../../x'", "/etc/passwd", "/dev/null", "/dev/zero", "/dev/null/x", "/", ".", "..", "~/x", "out/../../y", "//x"),
    *("x" * 300, "x/" * 3000, f"'{'x' * 5000}'", f"'{'y ' * 400_000}'", "a:b:c:d", "a:b", ":", "a/b/c", "a//b", "-a"),
    *("[]", "[[]]", "{}", "{a: b}", "[1, a, null]", "[a, a]", "[1.5]", "[true]", "['']", "[null]", "{1: 2}", "{a: 1}"),
    *("[" * 60 + "]" * 60, "[" * 5000, "{a: " * 40 + "1" + "}" * 40, "{a: " * 3000 + "1" + "}" * 3000),
    f"[{', '.join(['q_proj'] * 20000)}]",
    "{'x{99999999999999}': 2}",
    "{'" + "(" * 900 + ")" * 900 + "': 2}",
    "0x" + "f" * 5000,
    "{" + ", ".join(f"k{i}: {i}" for i in range(3000)) + "}",
    *("&a b", "*a", "&a [*a]", "!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system"),
    *("!!binary aGVsbG8=", "!!binary '@@'", "!!set {a, b}", "!!omap [a: b]", "!!pairs [a: b]", "!!timestamp x"),
    *("!!int abc", "!!float x", "!!bool x", "!!null x", "!!str 3", "!!map [1]", "!!seq {a: b}", "!foo bar", "! 3"),
    *("!!int ''", "!!int '0b'", "!!float '.'", "!!float '1:2:x'", "!!int '-'", "=", "<<", "!!merge x", "!!value x"),
    *(
        "|\n  a\n  b",
        ">-\n  a\n  b",
        "|9\n  x",
        "? a",
        "- a",
        "'",
        '"',
        "'{instruction}'",
        "'%s%n'",
        "(",
        "a\tb",
        "\ta",
    ),
    *(
        "q_proj",
        "[q_proj]",
        "[lm_head]",
        "[embed_tokens]",
        "[nope]",
        "[norm]",
        "all-linear",
        "auto",
        "fast",
        "1%",
        "exact",
    ),
    *("100%", "0%", "1e5%", "lora", "vera", "svfit", "loftq", "full", "pissa", "A", "B", "gsm8k", "[gsm8k]", "[loss]"),
    *("[gsm8k, nope]", "[lm_eval:x]", "{loss: x.jsonl}", "{q_proj: 2}", "{'(': 2}"),
    *("{'(?i)q_proj': 2}", "{'(a+)+$': 2}", "{q_proj: -1}"),
    *("{q_proj: 1.5}", "{'.*': 4}", "alpaca", "chat", "text", "glue/cola", "classification", "sequence-classification"),
    *(
        "causal-lm",
        "[no, yes]",
        "[x]",
        "{instruction: a}",
        "{imput: a}",
        "'{instruction}{output}'",
        "vllm",
        "bf16",
        "fp32",
    ),
    *(
        "cosine",
        "paged-adamw-8bit",
        "mistral-7b",
        "demo",
        "'%'",
        "*",
        "&",
        "@",
        "`",
        "#",
        "# x",
        "%YAML 9.9",
        "---",
        "...",
    ),
]
KEYS = [
    *(
        "",
        "''",
        "~",
        "1",
        "1.5",
        "true",
        "? a",
        "[a]",
        "{a: b}",
        "<<",
        "=",
        "&k key",
        "*k",
        "!!str x",
        "- a",
        "a.b",
        ".",
    ),
    *('"\\0"', '"\\ud800"', "x" * 2000, "é", "__class__", "__init__", "model_config", "self", "method", "use", "name"),
    *("'[red]'", "'a b'", "2024-01-01", ".nan", "TRAIN", "Model", "lr ", "'lr\n'", "!!binary aGVsbG8="),
    *list(SYNONYMS)[:12],
]
TEXTS = [
    *(
        "&a ",
        "*a\n",
        "<<: *a\n",
        "<<: {a: b}\n",
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "%TAG ! x\n",
        "\t",
        "\0",
        "\x85",
        "\u2028",
    ),
    *(
        "\ufeff",
        "\x1b[2J",
        "# \n",
        "? \n",
        ": \n",
        "- \n",
        "'",
        '"',
        "{",
        "}",
        "[",
        "]",
        "|\n",
        ">\n",
        ",",
        "!",
        "!!",
        "\\",
    ),
    "x: &x [1]\ny: *x\n",
    "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c,*c,*c]\n",
    "--- !!python/object:os.system\n",
    "\n" * 2000,
    " " * 2000,
    "# comment\n" * 500,
    "model: {name: other}\n",
    "train: {lr: 1}\n",
    "".join(f"k{i}: {i}\n" for i in range(2000)),
]
ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7"]


class Recipe(NamedTuple):
    """The bytes of a recipe file, and texts for --set."""

    content: bytes
    sets: list[str]


def write(pairs: Pairs, indent: int = 0) -> str:
    """YAML in block form."""
    lines = []
    for key, value in pairs:
        if isinstance(value, list):
            lines.append(
                f"{' ' * indent}{key}:\n{write(value, indent + 2)}" if value else f"{' ' * indent}{key}: {{}}\n"
            )
        else:
            lines.append(f"{' ' * indent}{key}: {value}\n")
    return "".join(lines)


def read(path: Path) -> Pairs:
    def pairs(mapping: dict[str, Any]) -> Pairs:
        return [(k, pairs(v) if isinstance(v, dict) and v else json.dumps(v)) for k, v in mapping.items()]

    return pairs(yaml.safe_load(path.read_text()))


SHIPPED = {str(path): read(path) for path in sorted(shipped("recipes").rglob("*.yaml"))}
FIELDS = {name: list(ADAPTER_OPTIONS["pissa"].model_fields) for name in SECTIONS}


STARTS = [(m, b) for m in ADAPTER_OPTIONS for b in ("32", "16", "4") if (m, b != "4") != ("loftq", True)]
STARTS = [(method, bits) for method, bits in STARTS if method != "full" or bits == "32"]


def small(model: Path, rows: Path, method: str = "lora", bits: str = "32") -> Pairs:
    """A recipe that runs in a moment."""
    return [
        ("model", [("name", json.dumps(str(model))), ("bits", bits)]),
        ("adapter", [("method", method), *([("rank", "2")] if method != "full" else [])]),
        ("data", [("train", json.dumps(str(rows))), ("limit", "4"), ("max_length", "128")]),
        ("train", [("lr", "1e-3"), ("steps", "1"), ("batch_size", "2"), ("micro_batch_size", "2")]),
        ("eval", [("max_new_tokens", "2")]),
        ("seed", "1"),
        ("output", "out"),
    ]


def _places(pairs: Pairs, prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    found = []
    for number, (_, value) in enumerate(pairs):
        found.append((*prefix, number))
        if isinstance(value, list):
            found += _places(value, (*prefix, number))
    return found


def _copy(pairs: Pairs) -> Pairs:
    return [(key, _copy(value) if isinstance(value, list) else value) for key, value in pairs]


def _keys() -> dict[str, list[str]]:
    from pissa_cli.schema.recipe import Recipe as Schema

    found: dict[str, list[str]] = {"": ["use", *Schema.model_fields]}
    for name in SECTIONS:
        field = Schema.model_fields[name].annotation
        fields = getattr(field, "model_fields", None)
        found[name] = list(fields) if fields else sorted({k for o in ADAPTER_OPTIONS.values() for k in o.model_fields})
    return found


KNOWN = _keys()
_COUNTS = ("1", "2", "3", "64", "65", str(2**31), str(2**62))
_RATES = ("1e-3", "0.5", "1", "1e-9", "100", "1e6", "1e-300", "1e300", "1.7e308", "5e-324")
PLAUSIBLE = {
    **dict.fromkeys(["rank", "steps", "batch_size", "micro_batch_size", "limit", "keep", "eval_every"], _COUNTS),
    **dict.fromkeys(["save_every", "max_new_tokens", "samples", "max_parameters", "passes", "max_length"], _COUNTS),
    **dict.fromkeys(["lr", "head_lr", "epochs", "warmup", "weight_decay", "max_grad_norm", "temperature"], _RATES),
    **dict.fromkeys(["alpha", "lr_ratio", "d_initial", "max_error", "dropout"], _RATES),
    "bits": ["4", "16", "32"],
    "method": list(ADAPTER_OPTIONS),
    "targets": ["[q_proj]", "[self_attn.q_proj, gate_proj]", "[model.layers.0.mlp.up_proj]", "[embed_tokens]", "[q]"],
    "modules_to_save": ["[embed_tokens]", "[lm_head]", "[norm]", "[q_proj]", "[model]", "['']", "[layers.0]", "['0']"],
    "rank_pattern": ["{q_proj: 2}", "{'.*': 4}", "{'q|k': 1}", "{'layers.0.*': 3, q_proj: 100}", "{'': 1}", "{'$': 1}"],
    "alpha_pattern": ["{q_proj: 2}", "{'.*': 1e300}", "{'.*': 5e-324}", "{x: 1.0}"],
    "schedule": ["linear", "constant"],
    "optimizer": ["paged-adamw-8bit"],
    "precision": ["bf16", "fp32", "~"],
    **dict.fromkeys(["rslora", "gradient_checkpointing", "double_quant", "refit", "private"], ("true", "false")),
    **dict.fromkeys(["trust_remote_code", "save_projection"], ("true", "false")),
    **dict.fromkeys(["train", "eval"], ("rows.jsonl", "./rows.jsonl", "nothing.jsonl", "some/data", "a:b:c")),
    "init": ["A", "B"],
    "distribution": ["gaussian"],
    "absmax": ["largest"],
    "packing": ["true", "false", "auto"],
    "format": ["prompt", "chat", "text", "classification", "glue/mrpc", "glue/stsb"],
    "columns": [
        "{instruction: a}",
        "{output: output, instruction: output, input: output}",
        "{text: x}",
        "{prompt: ''}",
    ],
    "template": ["'{instruction}{output}'", "'{output}{instruction}'", "'{instruction}{output}{output}'"],
    "svd": ["fast", "exact", "1%", "0.0001%", "99.99%", f"0.{'0' * 400}1%"],
    "task": ["sequence-classification"],
    "labels": ["[a, b]", "[a]", "['1', '2']", "['', ' ']", "[nan, inf]"],
    "bench": ["[loss]", "[gsm8k, loss, gsm8k]", "['']", "[glue/cola]", "[mt_bench]"],
    "data": ["{loss: rows.jsonl}", "{gsm8k: ''}", "{'': x}"],
    "stop": ["[a]", "['\n']", "['1e5']", f"['{'x' * 5000}']"],
    "engine": ["vllm"],
    "revision": ["'1e5'", "main", "'../x'", "'\u00e9'", "''"],
    "repo": ["a/b", "'../x'", "''", "a/b/c"],
    "name": ["mistral-7b", "demo", "demo/base", "a/b", "/", ".", "..", "''"],
    "output": [".", "..", "../x", "/", "/dev/null", "out/../out", "recipe.yaml", "''", "a/b/c", "~"],
    "seed": ["0", str(2**63 - 1), str(2**63)],
}


@st.composite
def mutated(draw: st.DrawFn, seeds: list[Pairs]) -> Recipe:
    """A recipe that starts as one of `seeds`; half of them have a wrong value or two and are whole otherwise."""
    pairs = _copy(draw(st.sampled_from(seeds)))
    gentle = draw(st.booleans())
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        _value(draw, pairs, gentle) if gentle else _mutate(draw, pairs)
    if gentle:
        return Recipe(write(pairs).encode(errors="surrogatepass"), [])
    text = write(pairs)
    if draw(st.integers(0, 3)) == 0:
        for _ in range(draw(st.integers(1, 2))):
            place = draw(st.integers(0, len(text)))
            text = text[:place] + draw(st.sampled_from(TEXTS)) + text[place:]
    content = text.encode(errors="surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        content = _bytes(draw, text, content)
    return Recipe(content, draw(st.lists(_set(), max_size=draw(st.sampled_from([0, 0, 1, 2])))))


@st.composite
def plausible(draw: st.DrawFn, seeds: list[Pairs]) -> Recipe:
    """A recipe whose every value could be meant."""
    pairs = _copy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        _value(draw, pairs, True)
    return Recipe(write(pairs).encode(), [])


def _value(draw: st.DrawFn, pairs: Pairs, gentle: bool) -> None:
    """Set a key that there is, or could be."""
    section = draw(st.sampled_from([*SECTIONS, "train", "adapter", "data", "model", ""]))
    known = KNOWN[section]
    if gentle and section == "adapter":
        method = next(
            (v for n, pair in pairs if n == section and isinstance(pair, list) for k, v in pair if k == "method"), ""
        )
        known = list(ADAPTER_OPTIONS.get(method, ADAPTER_OPTIONS["lora"]).model_fields)
    key = draw(st.sampled_from(known))
    values = PLAUSIBLE.get(key, ["~"]) if gentle and draw(st.integers(0, 9)) else VALUES
    inside = pairs
    if section:
        inside = next((value for name, value in pairs if name == section and isinstance(value, list)), [])
        if not inside:
            pairs.append((section, inside))
    pair = (key, draw(st.sampled_from(values)))
    others = [number for number, (name, _) in enumerate(inside) if name == key]
    if others:
        inside[others[0]] = pair
    else:
        inside.append(pair)


def _mutate(draw: st.DrawFn, pairs: Pairs) -> None:
    places = _places(pairs)
    if not places:
        return
    place = draw(st.sampled_from(places))
    inside = pairs
    for number in place[:-1]:
        inside = inside[number][1]
    key, value = inside[place[-1]]
    kind = draw(st.integers(0, 9))
    if kind <= 2:
        inside[place[-1]] = (key, draw(st.sampled_from(VALUES)))
    elif kind <= 5:
        _value(draw, pairs, False)
    elif kind == 6:
        inside[place[-1]] = (draw(st.sampled_from(KEYS)), value)
    elif kind == 7:
        del inside[place[-1]]
    elif kind == 8:
        inside.insert(place[-1], (draw(st.sampled_from([key, key.upper(), key.title(), f"{key}s"])), value))
    else:
        pairs.append((key, value))


def _set() -> st.SearchStrategy[str]:
    paths = [f"{section}.{key}".strip(".") for section, keys in KNOWN.items() for key in keys]
    odd = [
        "",
        ".",
        "a..b",
        "model",
        "train.lr.x",
        "use.model",
        "use",
        "x",
        "adapter.rank_pattern.a.b.c",
        "model.name.x",
    ]
    values = [value for value in VALUES if "\0" not in value]
    return st.builds(
        lambda path, sign, value: f"{path}{sign}{value}",
        st.sampled_from(paths) | st.sampled_from(odd),
        st.sampled_from(["=", "=", "=", "=", "", ":", "=="]),
        st.sampled_from(values) | st.sampled_from(["\udcff", "{q_proj:8}", "{a", "[a", "'a", "a: b: c", "\x1b[0m"]),
    )


def _bytes(draw: st.DrawFn, text: str, content: bytes) -> bytes:
    kind = draw(st.integers(0, 6))
    if kind == 0:
        return text.encode(draw(st.sampled_from(ENCODINGS)), errors="replace")
    if kind == 1:
        return content[: draw(st.integers(0, len(content)))]
    if kind == 2:
        return content.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\n\n", b"\x0b", b"\xc2\x85", b""])))
    if kind == 3:
        return content.replace(b"  ", b"\t")
    if kind == 4:
        return b"\xef\xbb\xbf" + content
    if kind == 5:
        return draw(st.binary(max_size=60))
    place = draw(st.integers(0, len(content)))
    junk = [b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x80" * 9, b"\x1f\x8b\x08"]
    return content[:place] + draw(st.sampled_from(junk)) + content[place:]
