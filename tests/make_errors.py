"""docs/errors.md from the source: every message that a user can meet, what to do about it, and the exit code.

Reads syntax trees, imports nothing of the package. Values become `<names>`, a condition both of its texts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "pissa_cli"
AREAS = {
    "Any command": "errors cli.edge",
    "Recipe and flags": "schema cli",
    "Base model": "base",
    "Data": "data",
    "Run folder": "run files paths initialize base.integrity base.peft_files training.checkpoint training.optim "
    "outputs.trained outputs.result",
    "Training": "train training process demo",
    "Evaluation": "evals",
    "Merge, quantize, export": "merge quantize export outputs",
    "Upload": "outputs.hub",
}
"""By the modules that say them."""
IN_MESSAGE = ("schema.recipe", "schema.adapter_options", "schema.data_options")
"""Their ValueErrors are messages on a recipe's keys, with the remedy in them; those of IN_ROWS are on a row of data."""
IN_ROWS = tuple(f"data.{name}" for name in ("tokenize", "rows", "chat", "messages", "turns", "classification"))
RETURNED = {
    "schema.recipe_errors": ("messages", "_unknown_key"),
    "data.classification": ("encode_classified",),
    "data.rows": ("_file_rows", "_json_lines", "_json_list"),
}
NOTED = {
    "cli.evaluate": ("_notes",),
    "data.examples": ("notes",),
    "training.guards": ("schedule_change",),
    "base.heads": ("head_note",),
    "run.report": ("_not_used", "_left_without_adapter", "_left_dense", "left_by_peft"),
    "data.classification": ("class_counts",),
    "evals.gsm8k": ("other_form",),
}
"""Functions that give messages, or notes, back."""
NAMES = {
    "section.name": "<model.name>",
    "rules.name": "<server>",
    "self.files[name]": "<file>",
    "weights.files[tensor]": "<file>",
    "run.folder": "<run folder>",
    "run.init": "<run folder>/init",
    "run.adapter": "<run folder>/adapter",
    "run.merged": "<run folder>/merged",
    "weights.folder": "<folder>",
    "key_node.value": "<key>",
    "mark.line": "<line>",
    "_kind(root)": "[a list / a single value]",
    "names[near[0]]": "<nearest>",
    "near[0]": "<nearest>",
    "near[:8]": "<nearest>",
    "error.start": "<position>",
    "wanted.get(key)": "<other value>",
    "protection().text()": "<protection>",
    "num_base": "<base>",
    "intact": "[<folder> is complete; ]",
    "owners[0]": "<section>",
    **dict.fromkeys(
        [f"resume_hint({folder})" for folder in ("recipe.output", "trainer.recipe.output", "str(run.folder)")],
        "go on with: pissa train <run folder> --resume",
    ),
}
"""Values that are better called otherwise than by their expression."""
SAME = {"str", "repr", "sorted", "min", "max", "list", "map", "next", "iter", "set", "tuple", "_first"}
"""Functions whose value is called as their argument is."""
KEPT = {"strip", "rstrip", "splitlines", "removeprefix", "values", "items"}
"""Methods whose value is called as their object is."""
LONG = 6
"""So many texts in the place of one are not listed."""
INTRO = """# Messages

Made by `tests/make_errors.py` from the source. `<name>` stands for a value, `[this / that]` for one of several texts.
On the terminal a message follows `error:` and the remedy `next:`; with `--json` they are `error` and `hint`, beside
`exit_code`. Exit codes: 1 failed while running, 2 wrong input, 130 interrupted. Words that the command line itself does
not understand (an unknown flag, a number that is none) end with 2 as well.
"""
SECTION_NOTES = {
    "Recipe and flags": (
        "Messages on keys begin with file and line, or the flag, and the key's whole path; what to do is in them.\n"
        "Types are checked by pydantic: `train.lr: input should be a valid number (found 'fast')`."
    ),
}


@dataclass(frozen=True)
class Message:
    """One row. code: the exit code; None for a note, and for a reason why a row of data is not used."""

    module: str
    text: str
    hint: str
    code: int | None


def page() -> str:
    """The whole of docs/errors.md."""
    lines, found = [INTRO], messages()
    for area in AREAS:
        own = [message for message in found if message.code is not None and area_of(message.module) == area]
        lines += [f"## {area}\n"]
        if area in SECTION_NOTES:
            lines += [SECTION_NOTES[area] + "\n"]
        lines += ["| message | what to do | exit |", "|---|---|---|"]
        lines += [f"| {_cell(one.text)} | {_cell(one.hint)} | {one.code} |" for one in dict.fromkeys(own)]
        lines += [""]
        reasons = [one for one in found if one.hint == "row" and area_of(one.module) == area]
        if reasons:
            lines += ["Rows that cannot be used are counted and named, and the rest is used; why:\n"]
            lines += [f"- {_cell(one.text)}" for one in dict.fromkeys(reasons)] + [""]
    notes = [one for one in found if one.code is None and one.hint == "note"]
    lines += ["## Notes\n", "Said on the way, beside progress; nothing has to be done.\n"]
    lines += [f"- {_cell(one.text)}" for one in dict.fromkeys(notes)]
    return "\n".join(lines) + "\n"


def area_of(module: str) -> str:
    """The area of a module: that of the longest name in AREAS that it is or lies in."""
    owners = {name: area for area, modules in AREAS.items() for name in modules.split()}
    fitting = [name for name in owners if module == name or module.startswith(f"{name}.")]
    assert fitting, f"{module} has messages: give it an area in tests/make_errors.py"
    return owners[max(fitting, key=len)]


def messages() -> list[Message]:
    """Of every module, in the order of the source."""
    trees = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    codes, own = _exit_codes(trees["errors"]), {module: _constants(tree) for module, tree in trees.items()}
    found = []
    for module, tree in trees.items():
        constants = dict(own[module])
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pissa_cli."):
                known = own.get((node.module or "").removeprefix("pissa_cli."), {})
                constants |= {alias.name: known[alias.name] for alias in node.names if alias.name in known}
        for node, function in _nodes(tree):
            found += _of_node(module, node, Words(function, constants), codes)
    return [message for message in found if any(character.isalpha() for character in _plain(message.text))]


def _of_node(module: str, node: ast.AST, words: Words, codes: dict[str, int]) -> Iterator[Message]:
    """The messages that one node makes."""
    function = getattr(words.function, "name", "")
    if function in RETURNED.get(module, ()):
        for value in _given(node):
            yield Message(
                module, words.text(value), "row" if module in IN_ROWS else "", None if module in IN_ROWS else 2
            )
    if function in NOTED.get(module, ()):
        for value in _given(node):
            yield Message(module, words.text(value), "note", None)
    if not isinstance(node, ast.Call):
        return
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    arguments = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
    if name in codes and arguments:
        yield Message(module, words.text(arguments[0]), words.text(arguments[1]), codes[name])
    elif name == "ValueError" and module in IN_MESSAGE:
        yield Message(module, words.text(arguments[0]), "", 2)
    elif name == "ValueError" and module in IN_ROWS:
        yield Message(module, words.text(arguments[0]), "row", None)
    elif name == "refuse":
        yield Message(module, words.text(arguments[1]), "row", None)
    elif name == "say" and arguments and module != "demo.__main__":
        yield Message(module, words.text(arguments[0]), "note", None)


def _given(node: ast.AST) -> Iterator[ast.expr]:
    """The texts that a statement returns, yields, appends to a list, or sets beside another value."""
    values: list[ast.expr] = []
    if isinstance(node, ast.Return | ast.Yield) and node.value is not None:
        values = node.value.elts if isinstance(node.value, ast.Tuple | ast.List) else [node.value]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".append"):
        values = node.args
    elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple):
        values = node.value.elts
    for value in values:
        value = value.orelse if isinstance(value, ast.IfExp) else value
        if isinstance(value, ast.JoinedStr) or (isinstance(value, ast.Constant) and isinstance(value.value, str)):
            yield value


@dataclass(frozen=True)
class Words:
    """Expressions in words: `function` is where they stand, `constants` are the package's."""

    function: ast.FunctionDef | None
    constants: dict[str, ast.expr]

    def text(self, node: ast.expr) -> str:
        """A string expression: what is fixed as it is, the rest by placeholders."""
        if isinstance(node, ast.Constant):
            return "" if node.value is None else str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(self.text(part) for part in node.values)
        if isinstance(node, ast.FormattedValue):
            word = self.value(node.value)
            return f"'{word}'" if node.conversion == ord("r") else word
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.text(node.left) + self.text(node.right)
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(".join")
            and isinstance(node.args[0], ast.List)
        ):
            return " ".join(self.text(part) for part in node.args[0].elts)
        return self.value(node)

    def value(self, node: ast.expr) -> str:
        """The value of an expression: a placeholder, or the texts that it may be."""
        name = NAMES.get(ast.unparse(node))
        if name is not None:
            return name
        match node:
            case ast.IfExp():
                return _either([self.text(node.body), self.text(node.orelse)])
            case ast.Constant() | ast.JoinedStr():
                return self.text(node)
            case ast.Name(id=name):
                return self._name(name)
            case ast.BoolOp(op=ast.Or()):
                return self.value(node.values[0])
            case ast.Starred():
                return self.value(node.value)
            case ast.BinOp(op=ast.Div()):
                return f"{self.value(node.left)}/{self.value(node.right)}"
            case ast.BinOp():
                return self.value(node.left)
            case ast.Subscript(slice=ast.Constant(value=str(key))):
                return f"<{key}>"
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(place))) if isinstance(
                constant := self.constants.get(name), ast.Tuple
            ):
                return self.text(constant.elts[place])
            case ast.Subscript():
                return self.value(node.value)
            case ast.GeneratorExp() | ast.ListComp() | ast.SetComp():
                return self.value(node.generators[0].iter)
            case ast.Attribute():
                return self._attribute(node)
            case ast.Call():
                return self._call(node)
        return "<value>"

    def _name(self, name: str) -> str:
        if name == "error":
            return "<reason>"
        if name in self.constants:
            constant = self.constants[name]
            if isinstance(constant, ast.Dict) and all(map(_is_text, constant.values)) and len(constant.values) < LONG:
                return _either([self.text(value) for value in constant.values])
            return self.text(constant) if isinstance(constant, ast.Constant) else f"<{name.lower()}>"
        texts = self._texts(name)
        return _either([self.text(text) for text in texts]) if texts else f"<{name.strip('_').replace('_', ' ')}>"

    def _texts(self, name: str) -> list[ast.expr]:
        """What a local variable is set to, if to texts alone."""
        found = []
        for node in ast.walk(self.function) if self.function is not None else ():
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                found.append(node.value)
        return found if all(_is_text(value) for value in found) else []

    def _attribute(self, node: ast.Attribute) -> str:
        path = ast.unparse(node)
        root, _, rest = path.partition(".")
        if root == "error":
            return "<reason>"
        if root == "recipe":
            return f"<{rest}>"
        if node.attr in ("name", "__name__"):
            return self.value(node.value) if node.attr == "name" else "<kind>"
        return f"<{node.attr.strip('_').replace('_', ' ')}>"

    def _call(self, node: ast.Call) -> str:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "value")
        if name in KEPT and isinstance(node.func, ast.Attribute):
            return self.value(node.func.value)
        if name == "join" and ast.unparse(node.func) == "'.'.join":
            return "<key>"
        if name == "join":
            inner = self.value(node.args[0])
            return f"{inner}, ..." if inner.startswith("<") else inner
        if name == "len":
            return "<number>"
        if name == "get" and isinstance(node.args[0], ast.Constant):
            return f"<{node.args[0].value}>"
        if name in ("first_line", "in_one_line", "getattr") and "error" in ast.unparse(node):
            return "<reason>"
        if name in SAME and node.args:
            return self.value(node.args[-1] if name == "map" else node.args[0])
        return f"<{name.strip('_').replace('_', ' ')}>"


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) and _is_text(node.orelse)
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str))
    )


def _either(texts: list[str]) -> str:
    some = list(dict.fromkeys(text for text in texts if text))
    return some[0] if len(some) == 1 and "" not in texts else f"[{' / '.join(some)}]" if some else ""


def _plain(text: str) -> str:
    """What is left without placeholders."""
    return "".join(part.partition(">")[2] if number else part for number, part in enumerate(text.split("<")))


def _cell(text: str) -> str:
    words = " ".join(text.split()).replace("|", "\\|")
    fence = "``" if "`" in words else "`"
    space = " " if "`" in words else ""
    return f"{fence}{space}{words}{space}{fence}" if words else ""


def _exit_codes(tree: ast.Module) -> dict[str, int]:
    """Exit code by exception: its own, else that of the class it is made from."""
    codes: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            own = [s.value for s in node.body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "exit_code"]
            code = ast.literal_eval(own[0]) if own else codes[ast.unparse(node.bases[0])]
            codes[node.name] = code
    return codes


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    """A module's CONSTANTS by name."""
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                found |= {ast.unparse(t): value for t, value in zip(target.elts, node.value.elts, strict=True)}
            elif isinstance(target, ast.Name) and target.id.lstrip("_").isupper() and node.value is not None:
                found[target.id] = node.value
    return found


def _nodes(tree: ast.AST, function: ast.FunctionDef | None = None) -> Iterator[tuple[ast.AST, ast.FunctionDef | None]]:
    """(node, the function it stands in), in the order of the source."""
    for node in ast.iter_child_nodes(tree):
        yield node, function
        yield from _nodes(node, node if isinstance(node, ast.FunctionDef) else function)
