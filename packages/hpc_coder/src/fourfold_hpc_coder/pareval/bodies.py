"""The body of a function in a code model's reply: ParEval's outputs are bodies, a chat's replies are not."""

import re

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_TYPE = r"(?:^|[\n;}])\s*(?!return\b|else\b)[\w:<>,&*\[\]\s]*[\s&*>]"
"""The text before the name of a function that is defined, and not called."""


def body_of(text: str, prompt: str) -> str:
    """The function's body in what a model wrote: up to the brace that closes it.

    Understands a bare continuation, a fenced block, and a whole function written again; braces in strings,
    characters and comments do not count. Helpers written before the function are left out, since a body has
    no place for them.

    Args:
        text: the model's words.
        prompt: ends by opening the function.
    """
    fenced = _FENCE.findall(text)
    function = re.search(r"(\w+)\s*\([^()]*\)\s*\{?\s*$", prompt)
    name = function.group(1) if function else ""
    code = next(
        (block for block in fenced if name and name in block), fenced[0] if fenced else text
    )
    again = re.search(rf"{_TYPE}{re.escape(name)}\s*\([^;{{]*\)\s*\{{", code) if name else None
    if again:
        code = code[again.end() :]
    return code[: _closing(code)]


def _closing(code: str) -> int:
    """Index after the brace that closes a body whose opening brace was in the prompt; all of it if none."""
    plain = _blanked(code)
    depth = 1
    for index, sign in enumerate(plain):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return index + 1
    return len(code)


_LITERAL = re.compile(
    r'//[^\n]*|/\*.*?(?:\*/|\Z)|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL
)


def _blanked(code: str) -> str:
    """Code of the same length with comments and literals blanked."""
    return _LITERAL.sub(lambda match: " " * len(match.group()), code)
