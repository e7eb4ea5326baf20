"""Whatever a template does with strings, the text is what Python gives and every user character stays marked.

User text is made of Greek letters, template text of x, y and z, both of spaces and signs: so the letters of a result
tell where they came from.
"""

from __future__ import annotations

import inspect
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from penstock.frontend.template_environment import TemplateEnvironment
from penstock.frontend.traced_text import TracedText, join_text, plain, spans_of, traced, user_text

USER_LETTERS = set("αβγΑΒΓ")

# Each yields text from u (a user's), t (the template's), m (mixed), d (a dict of them) and l (a list of them).
FILTERS = {
    "abs": "{{ (-3)|abs }}{{ u }}",
    "attr": "{{ d|attr('items') is callable }}",
    "batch": "{{ m|batch(2)|map('join', '-')|join('/') }}",
    "capitalize": "{{ m|capitalize }}",
    "center": "{{ m|center(30) }}",
    "count": "{{ m|count }}",
    "d": "{{ nothing|d(u) }}{{ m|d(t) }}",
    "default": "{{ nothing|default(m) }}{{ ''|default(u, true) }}",
    "dictsort": "{% for k, v in d|dictsort %}{{ k ~ v }}{% endfor %}",
    "e": "{{ m|e }}",
    "escape": "{{ m|escape ~ u }}{{ (t|escape) + t }}{{ t|e ~ m }}",
    "filesizeformat": "{{ 10000|filesizeformat }}",
    "first": "{{ (m ~ '-')|first }}{{ l|first }}",
    "float": "{{ m|float }}",
    "forceescape": "{{ m|forceescape }}",
    "format": "{{ '%s-%s'|format(m, t) }}{{ m|replace('%', '')|format }}",
    "groupby": "{% for g, items in rows|groupby('k') %}{{ g }}{{ items|map(attribute='v')|join }}{% endfor %}",
    "indent": "{{ (m ~ '\n' ~ u)|indent(2) }}{{ m|indent(t, true) }}",
    "int": "{{ m|int }}",
    "items": "{% for k, v in d|items %}{{ k }}{{ v }}{% endfor %}",
    "join": "{{ l|join(u) }}{{ m|join('.') }}{{ rows|join(t, attribute='v') }}{{ l|join(d='-') }}",
    "last": "{{ (m ~ '-')|last }}{{ l|last }}",
    "length": "{{ m|length }}",
    "list": "{{ m|list }}{{ m|list|join }}",
    "lower": "{{ m|upper|lower }}",
    "map": "{{ l|map('upper')|join }}{{ l|map('replace', 'x', u)|list }}",
    "max": "{{ l|max }}",
    "min": "{{ l|min }}{{ (m ~ '-')|min }}",
    "pprint": "{{ d|pprint }}",
    "random": "{{ [m]|random }}",
    "reject": "{{ l|reject('eq', t)|join }}",
    "rejectattr": "{{ rows|rejectattr('k')|map(attribute='v')|join }}",
    "replace": "{{ m|replace('x', u) }}{{ t|replace('x', u) }}{{ m|replace(u, t) }}{{ m|replace('', '.') }}",
    "reverse": "{{ m|reverse }}{{ l|reverse|join }}",
    "round": "{{ 1.5|round }}",
    "safe": "{{ m|safe }}{{ (m|safe) ~ u }}",
    "select": "{{ l|select|join }}",
    "selectattr": "{{ rows|selectattr('k')|map(attribute='v')|join }}",
    "slice": "{{ m|slice(2)|map('join')|join('/') }}",
    "sort": "{{ l|sort|join }}{{ m|sort|join }}",
    "string": "{{ m|string }}{{ d|string }}",
    "striptags": "{{ m|striptags }}",
    "sum": "{{ [1, 2]|sum }}",
    "title": "{{ m|title }}",
    "tojson": "{{ d|tojson(indent=1) }}{{ m|tojson }}",
    "trim": "{{ m|trim }}{{ m|trim('xα ') }}",
    "truncate": "{{ m|truncate(5, true, t) }}{{ t|truncate(4, true, u) }}",
    "unique": "{{ m|unique|join }}",
    "upper": "{{ m|upper }}",
    "urlencode": "{{ m|urlencode }}",
    "urlize": "{{ m|urlize }}",
    "wordcount": "{{ m|wordcount }}",
    "wordwrap": "{{ m|wordwrap(3) }}",
    "xmlattr": "{{ {'x': m}|xmlattr }}",
}
METHODS = {
    "capitalize": "{{ m.capitalize() }}",
    "casefold": "{{ m.casefold() }}",
    "center": "{{ m.center(30, 'x') }}{{ t.center(40, 'x') }}",
    "expandtabs": "{{ m.expandtabs(2) }}",
    "format": "{{ '{}{x}{0}'.format(m, x=u) if false }}{{ '{} {x!r:>9} {{'.format(m, x=t) }}{{ 'x{0[k]}'.format(d) }}",
    "format_map": "{{ 'x{k}'.format_map(d) }}",
    "join": "{{ t.join(l) }}{{ u.join([t, t]) }}{{ m.join([]) }}",
    "ljust": "{{ m.ljust(30, 'x') }}",
    "lower": "{{ m.lower() }}",
    "lstrip": "{{ m.lstrip('αx ') }}",
    "partition": "{{ m.partition(' ')|join('|') }}{{ m.partition('x')[2] }}",
    "removeprefix": "{{ m.removeprefix('x') }}{{ m.removeprefix(u) }}",
    "removesuffix": "{{ m.removesuffix(u) }}",
    "replace": "{{ m.replace('x', u, 1) }}{{ t.replace('x', u) }}{{ m.replace('', u) }}",
    "rjust": "{{ m.rjust(30) }}",
    "rpartition": "{{ m.rpartition(' ')|join('|') }}",
    "rsplit": "{{ m.rsplit(none, 1)|join('|') }}{{ m.rsplit('x', 1)[0] }}",
    "rstrip": "{{ m.rstrip() }}",
    "split": "{{ m.split()|join('|') }}{{ m.split('x')[-1] }}{{ m.split(' ', 1)[0] }}{{ t.split(' ')[0] ~ m }}",
    "splitlines": "{{ (m ~ '\n' ~ u ~ '\r\n').splitlines()|join('|') }}{{ m.splitlines(true)|join }}",
    "strip": "{{ m.strip() }}{{ m.strip('xyz ') }}",
    "swapcase": "{{ m.swapcase() }}",
    "title": "{{ m.title() }}",
    "translate": "{{ m.translate({945: 'z', 120: u}) }}{{ t.translate({120: u}) }}",
    "upper": "{{ m.upper() }}",
    "zfill": "{{ m.zfill(30) }}",
}
OPERATIONS = [
    "{{ m[1:4] }}{{ m[::-1] }}{{ m[:-2:3] }}{{ m[-3:] }}{{ (m ~ '-')[0] }}",
    "{{ m + u + t }}{{ t + m }}{{ m * 2 }}{{ 2 * m }}",
    "{{ m ~ 1 ~ none ~ l ~ d ~ u }}",
    "{{ 'x%sy' % m }}{{ '%s%%%5s' % (m, t) }}{{ '%(k)s!' % d }}{{ 'x' ~ ('%r' % u) }}{{ '%*s' % (9, m) }}",
    "{% for c in m %}{{ c }}.{% endfor %}{{ l }}{{ d }}{{ d.items() }}{{ (m, t) }}",
    "{% set x %}x{{ m }}y{% endset %}{{ x }}{{ x[1:] }}{% filter upper %}x{{ x }}{% endfilter %}",
    "{% macro f(a, b=u) %}x{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ f(m) }}{% call f(t) %}{{ u }}"
    "{% endcall %}",
    "{% set ns = namespace(v=m) %}{% for i in l %}{% set ns.v = ns.v ~ i %}{% endfor %}{{ ns.v }}{{ ns }}",
    "{% set j = joiner(u) %}{{ j() }}x{{ j() }}{% set c = cycler(u, t) %}{{ c.next() }}{{ c.next() }}{{ c.current }}",
    "{% for i in l recursive %}{{ i }}{{ loop.cycle(u, t) }}{{ loop([]) }}{{ loop.previtem }}{% endfor %}",
    "{{ dict(a=u, b=t) }}{{ d.get('k') }}{{ d.get('none', u) }}{{ d['k'] }}{{ d.k }}{{ l[0] }}{{ l.index(t) }}",
    "{{ m if u in m else t }}{{ u == u }}{{ m.startswith(t) }}{{ m.find(u) }}{{ m is string }}{{ d is mapping }}",
    "{{ strftime_now(m) }}",
    "{% block b %}x{{ m }}{% endblock %}{{ self.b() }}",
    "{{ ('<x>'|e) + m }}{{ ('x'|safe) * 2 }}{{ ('x%s'|safe) % m }}{{ ('x'|safe).join(l) }}",
]  # fmt: skip

letters = st.text(alphabet="αβγ <\n", max_size=6)
others = st.text(alphabet="xyz <\n", max_size=6)


@pytest.fixture(scope="module")
def environments() -> tuple[TemplateEnvironment, ImmutableSandboxedEnvironment]:
    ours = TemplateEnvironment()
    reference = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    # These are set, not traced, by transformers too.
    reference.filters["tojson"] = inspect.unwrap(ours.filters["tojson"])
    reference.globals["strftime_now"] = ours.globals["strftime_now"]
    return ours, reference


def values(user: str, template: str, *, is_traced: bool) -> dict[str, object]:
    mark = user_text if is_traced else plain
    u, t = mark(user), template
    m = join_text(("x", u, t, u)) if is_traced else "x" + user + template + user
    rows = [{"k": u, "v": m}, {"k": t, "v": t}]
    return {"u": u, "t": t, "m": m, "l": [u, t, m], "d": {"k": u, u + "x" + t: m, "q": [u]}, "rows": rows}


def check(source: str, user: str, template: str, environments: tuple) -> None:
    ours, reference = environments
    ours.begin()
    try:
        expected = reference.from_string(source).render(values(user, template, is_traced=False))
    except Exception as error:
        with pytest.raises(type(error)):
            ours.from_string(source).render(values(user, template, is_traced=True))
        return
    result = ours.from_string(source).render(values(user, template, is_traced=True))
    if "escape" not in source and "safe" not in source and "|e" not in source and "<Namespace" not in expected:
        assert plain(result) == expected
    marked = {index for start, end in spans_of(result) for index in range(start, end)}
    forgotten = [index for index, letter in enumerate(plain(result)) if letter in USER_LETTERS and index not in marked]
    assert not forgotten, (source, result, spans_of(result))


@pytest.mark.parametrize("source", [*FILTERS.values(), *METHODS.values(), *OPERATIONS])
@settings(max_examples=25, deadline=None)
@given(user=letters, template=others)
def test_operations_keep_text_and_origin(source: str, user: str, template: str, environments: tuple) -> None:
    check(source, user, template, environments)


def test_every_filter_of_jinja_is_covered(environments: tuple) -> None:
    assert set(FILTERS) == set(environments[0].filters)


def test_every_method_that_gives_strings_is_covered() -> None:
    gives_none = {
        "count", "encode", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit",
        "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "maketrans", "rfind",
        "rindex", "startswith",
    }  # fmt: skip
    methods = {name for name in dir(str) if not name.startswith("_")}
    assert methods - gives_none == set(METHODS)
    assert all(name in vars(TracedText) for name in METHODS), "an inherited method would lose the ranges"


@given(
    pieces=st.lists(st.tuples(st.booleans(), letters), max_size=6),
    cut=st.tuples(st.integers(-9, 9), st.integers(-9, 9)),
)
def test_ranges_are_exact_for_joins_and_slices(pieces: list[tuple[bool, str]], cut: tuple[int, int]) -> None:
    joined = join_text(user_text(text) if mine else text for mine, text in pieces)
    origin = [mine for mine, text in pieces for _ in text]
    part = joined[cut[0] : cut[1]]
    assert plain(part) == plain(joined)[cut[0] : cut[1]]
    marked = {index for start, end in spans_of(part) for index in range(start, end)}
    assert [index in marked for index in range(len(part))] == origin[cut[0] : cut[1]]
    spans = spans_of(part)
    assert all(start < end for start, end in spans)
    assert all(first[1] < second[0] for first, second in itertools.pairwise(spans)), "merged and in order"


def test_traced_text_is_a_string_everywhere_else() -> None:
    text = traced("abc", ((0, 1),))
    assert text == "abc"
    assert {text: 1}["abc"] == 1
    assert type(plain(text)) is str
    assert str(text) is text
