"""The body of a function in a code model's reply: ParEval's outputs are bodies, a chat's replies are not.

Every scan is linear in what the model wrote, however often it repeats itself.
"""

import re
from collections.abc import Iterator

from fourfold_hpc_coder.judge.failures import FENCE

_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_TYPE = re.compile(r"[\w:<>,&*\[\]\s]")
"""Signs of the text before the name of a function that is defined, and not called."""
_STATEMENTS = frozenset(("return", "else", "throw", "case", "goto", "new", "delete"))


def body_of(text: str, prompt: str) -> str:
    """The function's body in what a model wrote: up to the brace that closes it.

    Understands a bare continuation, one that closes a fence of the prompt's, a fenced block, and a whole
    function written again; braces in strings, characters and comments do not count. Helpers written before
    the function are left out, since a body has no place for them.

    Args:
        text: the model's words.
        prompt: ends by opening the function.
    """
    function = re.search(r"(\w+)\s*\([^()]*\)\s*\{?\s*$", prompt)
    name = function.group(1) if function else ""
    code = _code(text, name, is_fenced=prompt.count(FENCE) % 2 == 1)
    return _continued(code[_opened(code, name) :])


def _code(text: str, name: str, *, is_fenced: bool) -> str:
    """The part of a reply that is code."""
    before, fence, _ = text.partition(FENCE)
    # Code before the first fence closes a fence of the prompt's; what follows is about it.
    if not fence or is_fenced or _opened(before, name) or _closing(before) is not None:
        return before
    blocks = _BLOCK.findall(text)
    return next((block for block in blocks if name and name in block), [*blocks, text][0])


def _continued(code: str) -> str:
    """Code up to the brace that closes a body whose opening brace was in the prompt; all of it if none."""
    return code[: _closing(code)]


def _closing(code: str) -> int | None:
    """Index after the brace that closes a body whose opening brace was in the prompt."""
    depth = 1
    for brace in re.finditer(r"[{}]", _blanked(code)):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return brace.end()
    return None


def _opened(code: str, name: str) -> int:
    """Index after the brace that opens a function's definition; 0 where it is not defined."""
    if not name:
        return 0
    plain = _blanked(code)
    ends = _ends(plain)
    place, sign, before = next(ends)
    for mention in re.finditer(rf"\b{re.escape(name)}\s*\(", plain):
        while place < mention.end():
            place, sign, before = next(ends)
        if sign == "{" and before == ")" and _has_type(plain, mention.start()):
            return place + 1
    return 0


def _ends(plain: str) -> Iterator[tuple[int, str, str]]:
    """Every sign that may end a function's head: its place, and the sign before it that is no blank."""
    before = ""
    for sign in re.finditer(r"\S", plain):
        if sign.group() in ";{":
            yield sign.start(), sign.group(), before
        before = sign.group()
    yield len(plain), "", ""


def _has_type(plain: str, place: int) -> bool:
    """Whether the text before a function's name is a type, which begins a line or a statement."""
    first = place
    while first and _TYPE.match(plain, first - 1):
        first -= 1
    head = plain[first:place]
    if first and plain[first - 1] not in ";}":
        head = head.partition("\n")[2] if "\n" in head else ""
    is_apart = head[-1:].isspace() or head[-1:] in ("*", "&", ">")
    return bool(head) and is_apart and _STATEMENTS.isdisjoint(re.findall(r"\w+", head))


_LITERAL = re.compile(
    r'//[^\n]*|/\*.*?(?:\*/|\Z)|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL
)


def _blanked(code: str) -> str:
    """Code of the same length with comments and literals blanked."""
    return _LITERAL.sub(lambda match: " " * len(match.group()), code)
