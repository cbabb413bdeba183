"""What holds of every page that is made from the kit's templates."""

import subprocess
import sys

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from codeparrot_ds.report import page_kit
from codeparrot_ds.report.page_kit import TEMPLATES, Cell, Table, render

HOSTILE = "<img src=x> & [a](b) | *c* `d`\nsecond <b> line\nthird"


def shown(form, template):
    """What a piece of a template makes of texts."""
    table = Table(["head", HOSTILE], [["x", HOSTILE], [Cell("y", "label"), Cell("a_b,c on 2", "name")]], ["", "number"])
    environment = page_kit._environment(form)
    source = f'{{% import "parts.{form}.j2" as parts %}}{template}'
    return environment.from_string(source).render(table=table, text=HOSTILE)


def test_every_text_is_escaped_in_html():
    page = shown(
        "html", "{{ text }}{{ parts.table(table) }}{{ parts.items(text, [text]) }}{{ parts.source(text, text) }}"
    )
    assert "<img" not in page and "<b>" not in page and page.count("&lt;img src=x&gt; &amp; [a](b)") == 7
    assert '<th scope="col" class="number">' in page and '<th scope="row">y</th>' in page
    assert "<small>second &lt;b&gt; line\nthird</small></td>" in page and "a_<wbr>b,<wbr>c on\xa02" in page


def test_every_text_is_escaped_in_markdown():
    page = shown("md", "{{ text }}\n\n{{ parts.table(table) }}\n{{ parts.items([text]) }}")
    safe = r"\<img src=x\> \& \[a\](b) \| \*c\* \`d\` (second \<b\> line third)"
    assert page == f"{safe}\n\n| head | {safe} |\n| --- | --- |\n| x | {safe} |\n| y | a\\_b,c on 2 |\n\n- {safe}\n"


def test_source_cannot_close_its_fence():
    page = shown("md", '{{ fenced("a ``` b", "python") }}')
    assert page == "``````python\na ``` b\n``````"


def test_a_template_that_is_given_too_little_is_an_error():
    with pytest.raises(UndefinedError, match="subtitle"):
        render("run.md.j2", title="a")


@pytest.mark.parametrize("path", sorted(TEMPLATES.iterdir()), ids=lambda path: path.name)
def test_templates_are_whole_and_ask_for_nothing_from_elsewhere(path):
    text = path.read_text()
    page_kit._environment(path.name.split(".")[1]).get_template(path.name)
    assert not any(word in text for word in ("http:", "https:", "url(", "@import", "<script", "<link"))


def test_jinja_is_loaded_when_a_page_is_made_and_torch_never():
    script = (
        "import sys; from codeparrot_ds.report import run_report, plan_chart; assert 'jinja2' not in sys.modules;"
        "from codeparrot_ds.report.page_kit import _environment; _environment('md'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_marked_text_is_not_escaped_again():
    assert page_kit._markdown(Markup("*a*")) == "*a*" and page_kit._markdown("*a*") == r"\*a\*"
