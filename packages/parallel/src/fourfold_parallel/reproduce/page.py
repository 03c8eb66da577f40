"""Self-contained HTML pages: a template over the base of every page, drawings inside."""

from pathlib import Path

import jinja2
from markupsafe import Markup

_HALF_PT = 580
"""A drawing up to this width stands beside another on a page."""
_TEMPLATES = Path(__file__).resolve().parent / "templates"


def render(template: Path, **values: object) -> str:
    """A page from a template that extends `base.html.jinja`; values are escaped.

    Raises:
        jinja2.UndefinedError: The template names a value that is not given.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)


def inline(svg: str, *, prefix: str) -> Markup:
    """A drawing of ours as part of a page: no XML prolog, ids that no other drawing has, its width known.

    Args:
        svg: what matplotlib wrote; nothing of a stranger's.
        prefix: unique on the page.
    """
    text = svg[svg.index("<svg") :]
    width = text.partition(' width="')[2].partition('"')[0]
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, mark + prefix)
    kind = "drawing wide" if float(width.removesuffix("pt")) > _HALF_PT else "drawing"
    return Markup(f'<div class="{kind}" style="--native: {width}">{text}</div>')  # noqa: S704
