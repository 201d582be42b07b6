"""HTML for report.html and comparison.html: elements, their style, and what a page may load."""

import html
from collections.abc import Iterable


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2433; --faint: #5b6475; --rule: #d5d9e1; --soft: #f1f3f6;
  --accent: #1b6b8f; --on-accent: #fff; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171d; --ink: #e4e7ed; --faint: #a0a8b8; --rule: #343a46;
  --soft: #1f242d; --accent: #6cc0e5; --on-accent: #10141a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 88rem; padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; }
h2 { margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--rule); font-size: 1.2rem; }
p, ul, ol { max-width: 48rem; margin: .5rem 0; }
.faint, figcaption { color: var(--faint); font-size: .9rem; }
.state { display: inline-block; padding: 0 .6rem; border-radius: 1rem; background: var(--accent);
  color: var(--on-accent); font-weight: 600; }
figure { margin: .75rem 0; overflow-x: auto; }
figure img { display: block; height: auto; max-width: max(100%, 40rem); border-radius: .3rem; background: #fff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
.numbers td, .numbers th { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
code, .settings td:first-child { font: .875rem/1.5 ui-monospace, monospace; }
.settings td:first-child { white-space: nowrap; }
.settings td:last-child { white-space: pre-wrap; }
@media (max-width: 40rem) { .settings td { display: block; padding: 0; } .settings td:first-child { border: 0; } }
code { white-space: nowrap; }
pre { overflow-x: auto; padding: 1rem; border-radius: .3rem; background: var(--soft); }
pre code { white-space: pre; }
summary { cursor: pointer; margin: .75rem 0; color: var(--accent); }
.tabs { display: flex; flex-wrap: wrap; gap: .4rem; margin-top: .75rem; }
.tabs > input { position: absolute; opacity: 0; pointer-events: none; }
.tabs > label { padding: .15rem .7rem; border-radius: .3rem; background: var(--soft); cursor: pointer; }
.tabs > input:checked + label { background: var(--accent); color: var(--on-accent); }
.tabs > input:focus-visible + label { outline: 3px solid var(--ink); }
.tabs > figure { display: none; order: 1; flex: 0 0 100%; }
.tabs > input:checked + label + figure { display: block; }
@media print { .tabs > figure { display: block; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Markup(str):
    """Text that is HTML. Any other text is escaped by `element`."""


def element(name: str, /, *content: str | None, **attributes: str) -> Markup:
    """An element without the parts that are None. An attribute's trailing underscore is dropped, as in `class_`."""
    opening = "".join(f' {key.removesuffix("_")}="{html.escape(value)}"' for key, value in attributes.items())
    end = "" if name in ("meta", "link", "img", "input") else f"</{name}>"
    parts = (part if isinstance(part, Markup) else html.escape(part) for part in content if part is not None)
    return Markup(f"<{name}{opening}>{''.join(parts)}{end}")


def from_user(name: str, text: str, /, **attributes: str) -> Markup:
    """An element with a user's text, which may be written from right to left."""
    return element(name, text, dir="auto", **attributes)


def table(rows: Iterable[Iterable[str]], headings: Iterable[str] = (), **attributes: str) -> Markup:
    header = element("tr", *(element("th", text, scope="col") for text in headings)) if headings else None
    body = [element("tr", *(from_user("td", text) for text in row)) for row in rows]
    return element("div", element("table", header, *body, **attributes), class_="wide")


def section(title: str, *content: str | None) -> Markup:
    return element("section", element("h2", title), *content)


def folded(summary: str, *content: str) -> Markup:
    return element("details", element("summary", summary), *content)


def prompt_list(prompts: Iterable[str]) -> Markup:
    return folded("The prompts", element("ol", *(from_user("li", prompt) for prompt in prompts)))


def document(title: str, *parts: str | None, style: str = "") -> str:
    """A whole page, which loads and runs nothing, as its Content-Security-Policy says.

    Args:
        parts: of its body.
        style: rules after those of `STYLE`.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", **{"http-equiv": "Content-Security-Policy"}, content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(STYLE + style)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, element('body', *parts), lang='en')}\n"
