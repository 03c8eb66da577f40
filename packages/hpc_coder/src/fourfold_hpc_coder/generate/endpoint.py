"""A served model that completes prompts: any OpenAI-compatible server."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FUNCTION_ONLY = (
    "Complete this C++ function. Reply with one code block that holds the whole function.\n"
)
"""Put before a prompt for models that chat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Any OpenAI-compatible server: vLLM, llama.cpp, TGI, or a company's."""

    url: str
    """Up to and including `/v1`."""
    model_name: str
    key_file: str = ""
    """Holds the key that the server wants; empty for none."""
    temperature: float = 0.2
    max_new_tokens: int = 512
    top_p: float = 1.0
    timeout_s: float = 120.0

    def complete_many(self, prompts: Sequence[str], *, first: int = 0) -> list[str]:  # noqa: ARG002
        """Completions of functions, one chat of one message each.

        Raises:
            ValueError: as of `ask`.
        """
        return [self.ask(prompt)[0] for prompt in prompts]

    def ask(self, prompt: str) -> tuple[str, int]:
        """The model's words for a prompt that opens a function, and how many tokens the exchange took.

        Raises:
            ValueError: where the server cannot be reached, or answers with something else than a completion.
        """
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url={self.url!r} is no http address; give one that ends in /v1")
        body: dict[str, Any] = {
            "model": self.model_name,
            "messages": [{"role": "user", "content": FUNCTION_ONLY + prompt}],
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
        }
        if self.temperature and self.top_p < 1:
            body["top_p"] = self.top_p
        key = Path(self.key_file).read_text(encoding="utf-8").strip() if self.key_file else ""
        request = urllib.request.Request(  # noqa: S310 - checked above
            f"{self.url.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:  # noqa: S310
                whole = reply.read()
        except urllib.error.HTTPError as error:
            raise ValueError(
                f"{self.url} refused ({error}): {_explanation(error)}; mend what it names, and the same "
                "command goes on from here"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"{self.url} gave no answer ({error}); when it does, the same command goes on from here"
            ) from None
        try:
            answer = json.loads(whole)
            # Where a model declined, or ran out of tokens before its answer, there is no text.
            text = _text_of(answer["choices"][0]["message"]["content"])
            return text, int((answer.get("usage") or {}).get("total_tokens") or 0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(
                f"{self.url} answered {whole[:200].decode(errors='replace')}, which is no completion"
            ) from None


MOST_QUOTED = 500
"""Characters of a server's words in an error of ours."""


def _explanation(error: urllib.error.HTTPError) -> str:
    """The server's own words on its refusal, of which each server has another form."""
    try:
        text = error.read(1 << 16).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        said = json.loads(text)
        while isinstance(said, dict):
            said = next(said[key] for key in ("error", "message", "detail") if said.get(key))
        text = str(said)
    except (ValueError, StopIteration):
        pass  # a page, or an object of another form, is quoted as it is
    return " ".join(text.split())[:MOST_QUOTED] or "it says no more"


def _text_of(content: Any) -> str:
    """The text of a message, which may come in parts."""
    if isinstance(content, list):
        return "".join(str(part["text"]) for part in content if part.get("type") == "text")
    return str(content or "")
