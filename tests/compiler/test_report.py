"""report.html: says what was built, to a person, from one file that loads nothing."""

import collections
import copy
import dataclasses
import functools
import io
import re
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shop
from flax import nnx
from rich.console import Console

from xlarank import device
from xlarank.cli.compile_output import show
from xlarank.compiler import random_requests, reference_scores
from xlarank.compiler.autotune import Trial
from xlarank.compiler.build import BuildOptions, build
from xlarank.compiler.forms import PLAIN, Form
from xlarank.compiler.passes import Fusion
from xlarank.compiler.report import render_report
from xlarank.compiler.report_facts import Facts
from xlarank.compiler.report_plots import plot_forms
from xlarank.device import ScoreError
from xlarank.spec import Bucket, FeatureSpec, ModelSpec, Precision, TaskSpec

pytestmark = pytest.mark.once

GOLDEN = random_requests(shop.SPEC, 6, num_candidates=20, seed=1)
TRIED = [
    (Form(fusion=Fusion.WIDE), 0.01, ""),
    (Form(hoisted=True, fusion=Fusion.EXPERT_MAJOR, precision=Precision.INT8), 0.02, "too far off"),
]
BLOCKS = {"dd", "dt", "h1", "h2", "h3", "li", "p", "small", "td", "th"}
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Text by section, tables as rows of cells, attributes; checks that tags nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.tags = [], [], collections.Counter()
        self.sections = collections.defaultdict(str)
        self.tables = collections.defaultdict(list)
        self.feed(text)
        self.close()
        assert self.open == []

    @property
    def section(self):
        return next((name for _, name in reversed(self.open) if name), "")

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag in BLOCKS:
            self.sections[self.section] += " "
        if tag in VOID:
            return
        named = dict(attrs).get("id") if tag in ("section", "header") else None
        self.open.append((tag, named))
        if tag == "table":
            self.tables[self.section].append([])
        elif tag == "tr":
            self.tables[self.section][-1].append([])
        elif tag in ("td", "th"):
            self.tables[self.section][-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag
        if tag in BLOCKS:
            self.sections[self.section] += " "

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "style":
            return
        self.sections[self.section] += data
        if any(tag in ("td", "th") for tag, _ in self.open):
            self.tables[self.section][-1][-1][-1] += data

    def words(self, section):
        return " ".join(self.sections[section].split())


class Dense(nnx.Module):
    """A model without embedding tables."""

    def __init__(self, *, rngs):
        self.out = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, features):
        return {"click": self.out(jnp.concatenate([features["user"], features["item"]], axis=1))[:, 0]}


DENSE = ModelSpec(
    name="dense",
    features=(
        FeatureSpec(name="user", kind="dense", scope="context", width=2),
        FeatureSpec(name="item", kind="dense", scope="candidate"),
        FeatureSpec(name="ignored", kind="dense", scope="candidate"),
    ),
    tasks=(TaskSpec(name="click"),),
)


@functools.cache
def labels():
    scores = np.concatenate(
        reference_scores(shop.Shop(rngs=nnx.Rngs(0)), shop.SPEC, shop.make_tables(), GOLDEN)["click"]
    )
    return {"click": (np.random.default_rng(0).random(len(scores)) < scores).astype(np.float32)}


def build_shop(out, seed):
    return build(
        shop.Shop(rngs=nnx.Rngs(seed)),
        shop.SPEC,
        shop.make_tables(),
        out=out,
        options=BuildOptions(bucket_rows=(4, 64), num_devices=1, tune_seconds=0),
        golden=GOLDEN,
        labels=labels(),
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return tmp_path_factory.mktemp("repository")


@pytest.fixture(scope="module")
def built(repository):
    """With buckets 4x1, 4x4, 64x1, 64x2 and 64x64, and labels of click; not tuned."""
    return build_shop(repository, 0)


@pytest.fixture(scope="module")
def tuned(built):
    """The same with made-up times of tuning: no test depends on how fast a form really is."""
    for found in built.results:
        seconds = found.seconds
        trials = [(found.form, seconds, ""), *TRIED]
        if found.form != PLAIN:
            trials.append((PLAIN, 2.5 * seconds, ""))
        built = with_trials(built, found.bucket, trials, reason="fastest of all")
    return built


@pytest.fixture(scope="module")
def reused(repository, built):
    """Other weights of the same architecture."""
    result = build_shop(repository, 1)
    assert result.reused == built.manifest.version
    return result


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Without tables, labels and tuning."""
    requests = random_requests(DENSE, 3, num_candidates=30, seed=2)
    options = BuildOptions(bucket_rows=(8, 16), num_devices=1, tune_seconds=0)
    out = tmp_path_factory.mktemp("dense")
    return build(Dense(rngs=nnx.Rngs(0)), DENSE, {}, out=out, options=options, golden=requests), requests


@pytest.fixture(scope="module")
def page(tuned):
    return Page(render_report(tuned, GOLDEN))


def with_trials(result, bucket, trials, *, reason="", **fields):
    """The result with made-up trials of a bucket (form, seconds, refusal), the first one chosen."""
    tried = tuple(Trial(form, seconds, 0.0, refusal) for form, seconds, refusal in trials)
    choices = tuple(
        dataclasses.replace(choice, form=tried[0].form, trials=tried, reason=reason)
        if choice.bucket == bucket
        else choice
        for choice in result.tuning.choices
    )
    results = tuple(
        dataclasses.replace(found, form=tried[0].form, **fields) if found.bucket == bucket else found
        for found in result.results
    )
    tuning = dataclasses.replace(result.tuning, choices=choices)
    return dataclasses.replace(result, tuning=tuning, results=results)


def test_a_build_leaves_the_report_of_its_result_in_the_bundle(built):
    written = Page((built.path / "report.html").read_text())
    assert written.words("lead") == Page(render_report(built, GOLDEN)).words("lead")


def test_the_lead_says_what_was_built_and_what_it_bought(page, tuned):
    lead = page.words("lead")
    width = 1 + 8 + 8 + 5 + 2
    for text in (
        f"dense parameters {(width * 32 + 32) + 4 * 32 + (32 * 2 + 2)}",
        f"embedding tables {4 * (50 * 8 + 20 * 5) / 1e3:.1f} kB",
        "tasks click, spend",
        "features 5",
        f"buckets {len(tuned.results)}",
        "MFLOP a candidate",
        "At the knee, bucket",
        f"device kind {device.device_kind(jax.devices()[0])}",
        "Every bucket computes in float32.",
        "1.0e-05 is allowed",
    ):
        assert text in lead


def test_the_speed_at_the_knee_is_told_from_plain_to_chosen(tuned):
    knee = Facts.of(tuned, GOLDEN).knee.bucket
    fast = Form(fusion=Fusion.WIDE)
    told = {
        "takes 2.00 ms instead of 5.00 ms: 2.50 times as fast": [(fast, 2e-3, ""), (PLAIN, 5e-3, "")],
        "nothing beat the plain form, which takes 5.00 ms": [(PLAIN, 5e-3, ""), (fast, 6e-3, "")],
        "the plain form was not timed there": [(fast, 2e-3, "")],
    }
    for text, trials in told.items():
        found = Page(render_report(with_trials(tuned, knee, trials), GOLDEN))
        assert text in found.words("lead")


def test_every_bucket_shows_its_form_times_limit_and_bytes(page, tuned):
    header, *rows = page.tables["buckets"][0]
    assert header[1:6] == ["form", "plain ms", "chosen ms", "gain", "published ms"]
    assert len(rows) == len(tuned.results)
    for row, (found, choice, _) in zip(rows, tuned.by_bucket, strict=True):
        assert row[0].startswith(f"{found.bucket.rows} × {found.bucket.requests}")
        assert str(found.form) in row[1]
        assert choice.reason in row[1]
        assert float(row[2]) == pytest.approx(1e3 * choice.plain_seconds, rel=0.01, abs=6e-4)
        assert re.fullmatch(r"\d+\.\d\d×", row[4])
        assert row[6] == f"{round(found.bucket.rows / found.seconds):,}"
        assert row[7].split()[0] in ("arithmetic", "memory", "launch")


def test_dropped_buckets_are_named(tuned):
    for dropped in [(), (Bucket(4, 2), Bucket(64, 3))]:
        tuning = dataclasses.replace(tuned.tuning, dropped=dropped)
        words = Page(render_report(dataclasses.replace(tuned, tuning=tuning), GOLDEN)).words("buckets")
        assert ("Dropped: 4x2, 64x3." in words) == bool(dropped)


def marks_in(plot):
    return collections.Counter(
        (float(x), float(y)) for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', plot)
    )


def test_each_trial_has_one_mark_at_its_time(tuned):
    facts = Facts.of(tuned, GOLDEN).buckets[0]
    chosen = next(trial for trial in facts.trials if trial.form == facts.form)
    moved, slowest = [trial for trial in facts.trials if trial.form != facts.form and not trial.refusal][:2]

    def marks(milliseconds):
        seconds = zip((chosen, moved, slowest), (1, milliseconds, 8), strict=True)
        trials = tuple(dataclasses.replace(trial, seconds=ms / 1e3) for trial, ms in seconds)
        return marks_in(plot_forms([dataclasses.replace(facts, trials=trials, seconds=1e-3)]))

    places = []
    for at, other in ((2, 4), (8**0.5, 2), (4, 2)):
        (place,) = (marks(at) - marks(other)).elements()  # all others stay where they are
        places.append(place)
    (x0, y0), (x1, y1), (x2, y2) = places
    assert y0 == y1 == y2
    assert x0 < x2
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)  # the scale is logarithmic


def test_the_plots_are_drawn_in_the_page_in_its_own_colours(tuned):
    html = render_report(tuned, GOLDEN)
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(plots) == 2
    for plot in plots:
        assert 'role="img" aria-label="' in plot
        assert "var(--ink)" in plot
        assert not re.search(r"#[0-9a-f]{6}", plot), "every colour is the page's"
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)


def test_every_form_that_was_tried_is_in_the_table_by_bucket(page, tuned):
    header, *rows = page.tables["forms"][0]
    assert header[1:] == [str(choice.bucket) for choice in tuned.tuning.choices if choice.trials]
    tried = {trial.form for choice in tuned.tuning.choices for trial in choice.trials}
    assert len(rows) == len(tried)
    assert sum(cell != "–" for row in rows for cell in row[1:]) == sum(
        len(choice.trials) for choice in tuned.tuning.choices
    )


def test_errors_stand_beside_what_was_allowed(page, tuned):
    assert "may be 1.0e-05 on probabilities" in page.words("errors")
    _, _, *rows = page.tables["errors"][0]
    assert len(rows) == len(tuned.results)
    for row, found in zip(rows, tuned.results, strict=True):
        click, spend = (found.judgement.errors[task] for task in ("click", "spend"))
        assert [float(cell) for cell in row[2:4]] == [float(f"{e:.1e}") for e in (click.p99, click.max)]
        assert [float(cell) for cell in row[5:7]] == [float(f"{e:.1e}") for e in (spend.p99, spend.max)]
    assert ["click", "binary", f"{tuned.reference_auc['click']:.4f}"] in page.tables["errors"][1]
    assert ["spend", "regression", "–"] in page.tables["errors"][1]


def test_a_lower_precision_is_held_by_its_99th_percentile_and_told_in_the_lead(tuned):
    bucket = tuned.results[0].bucket
    judgement = dataclasses.replace(
        tuned.results[0].judgement,
        errors={"click": ScoreError(1.0e-3, 0.25), "spend": ScoreError(1e-4, 1e-3)},
        budget_errors={"click": ScoreError(1.5e-3, 0.25), "spend": ScoreError(1e-4, 1e-3)},
        auc_loss={"click": 3e-4},
    )
    lowered = [(Form(precision=Precision.INT8), 1e-3, ""), (PLAIN, 2e-3, "")]
    result = with_trials(tuned, bucket, lowered, judgement=judgement)
    found = Page(render_report(result, GOLDEN))
    lead = found.words("lead")
    assert f"A lower precision (int8) serves 1 of {len(tuned.results)} buckets." in lead
    assert f"1.5e-03 (99th percentile, task click, bucket {bucket}); 2.0e-03 is allowed" in lead
    assert f"loses is 3.0e-04 (task click, bucket {bucket}); a lower precision may lose 5.0e-04" in lead
    assert found.tables["errors"][0][2][:5] == [str(bucket), "int8", "1.5e-03", "2.5e-01", "+0.000300"]


def test_the_network_shows_the_context_s_share_before_and_after(tuned):
    mixed = Bucket(64, 2)
    result = with_trials(tuned, mixed, [(Form(hoisted=True), 1e-3, ""), (PLAIN, 2e-3, "")])
    network = next(n for n in Facts.of(result, GOLDEN).networks if n.bucket == mixed)
    flops_before = 2 * 64 * (24 * 32 + 32 * 2)
    assert network.total[0] == flops_before
    notes = next(notes for found, _, notes in tuned.by_bucket if found.bucket == mixed)
    assert network.context_only[-1][0] in {source for _, source in notes.hoisted}
    html = render_report(result, GOLDEN)
    words = Page(html).words("network")
    for text in ("once a request", "every row", "[64, 24] @ [24, 32]", "shop.py:", "reduce_sum"):
        assert text in words
    assert re.search(r'<code title="/[^"]*/shop.py:\d+ \(Shop.hidden_of\)">shop.py:\d+ ', html)


def test_what_the_passes_say_is_told(tuned):
    bucket = tuned.results[-1].bucket
    trials = [(PLAIN, 2e-3, ""), (Form(precision=Precision.INT8), 1e-3, "task 'click': too far off")]
    result = with_trials(tuned, bucket, trials)
    notes = dataclasses.replace(tuned.tuning.notes[-1], siblings=((3, "/a/m.py:7 (M.f)"),))
    tuning = dataclasses.replace(result.tuning, notes=(*tuned.tuning.notes[:-1], notes))
    words = Page(render_report(dataclasses.replace(result, tuning=tuning), GOLDEN)).words("passes")
    for text in (
        "Every row has a context of its own",
        "the context's share of dot_general joins the candidate's",
        "shop.py:",
        f"3 at m.py:7 M.f ({bucket})",
        f"{bucket}, plain int8 (1.00 ms) task 'click': too far off",
    ):
        assert text in words


def test_bytes_of_weights_and_prepared_arrays_are_told(page, tuned):
    num_bytes = sum(layer.num_bytes for layer in tuned.analysis.layers)
    assert f"as trained are {num_bytes / 1e3:.1f} kB" in page.words("bytes")
    assert len(page.tables["bytes"][0]) == 1 + len(tuned.results)


def test_padding_is_what_the_golden_requests_would_waste(tuned):
    requests = random_requests(shop.SPEC, 2, num_candidates=48, seed=3)
    found = Page(render_report(tuned, requests))
    assert "2 golden requests with candidates, of 48, would" in found.words("padding")
    _, ours, best, powers = found.tables["padding"][0]
    assert (ours[:3], powers[:3]) == (
        ["this bundle", "4, 64", f"{16 / 64:.0%}"],
        ["powers of two", "8, 16, 32, 64", f"{16 / 64:.0%}"],
    )
    assert best[1:3] == ["48", "0%"]


def test_layers_tables_provenance_and_fingerprint_are_listed(page, tuned):
    for text in ("hidden", "norm", "items", "tags", "Every feature reaches a score"):
        assert text in page.words("model")
    for values in (tuned.manifest.provenance, tuned.manifest.fingerprint):
        for key, value in values.items():
            assert key in page.words("provenance")
            assert value in page.words("provenance")
    assert tuned.manifest.architecture in page.words("provenance")


def test_a_reused_build_says_so(reused):
    lead = Page(render_report(reused, GOLDEN)).words("lead")
    assert f"Programs, forms and times are those of version {reused.reused}" in lead


def test_a_note_and_a_refusal_stand_at_the_top(tuned):
    manifest = dataclasses.replace(tuned.manifest, refusal="task 'click' is off")
    result = dataclasses.replace(tuned, manifest=manifest, note="version 3 was not reused")
    lead = Page(render_report(result, GOLDEN)).words("lead")
    assert "Refused. task 'click' is off" in lead
    assert "Version 3 was not reused." in lead


def test_a_busy_machine_is_told(tuned):
    seconds = tuned.results[0].seconds
    for factor in (1.2, 3.0):
        trials = [(PLAIN, factor * seconds, "")]
        steady = dataclasses.replace(
            tuned,
            results=tuned.results[:1],
            tuning=dataclasses.replace(
                tuned.tuning, choices=tuned.tuning.choices[:1], notes=tuned.tuning.notes[:1]
            ),
        )
        result = with_trials(steady, tuned.results[0].bucket, trials)
        lead = Page(render_report(result, GOLDEN)).words("lead")
        assert ("changed by a factor of 3.0" in lead) == (factor == 3.0)
        console = Console(file=io.StringIO(), width=200)
        show(result, console)
        printed = console.file.getvalue()
        assert ("changed by a factor of 3.0 (bucket" in printed) == (factor == 3.0)
        # Throughput and the time beside it are the published program's, as in the report.
        (row,) = [
            line for line in printed.splitlines() if str(tuned.results[0].bucket) in line and "│" in line
        ]
        cells = [cell.strip() for cell in row.split("│")]
        assert cells[3:8] == [
            f"{factor * seconds * 1e3:.3f}",
            f"{factor * seconds * 1e3:.3f}",
            "1.00x",
            f"{seconds * 1e3:.3f}",
            f"{tuned.results[0].bucket.rows / seconds:,.0f}",
        ]


def test_a_model_without_tables_labels_and_tuning_has_a_report(dense):
    result, requests = dense
    found = Page(render_report(result, requests))
    assert "the plain form was not timed there" in found.words("lead")
    assert "AUC was not checked" in found.words("lead")
    assert "No form was tried: tuning was turned off" in found.words("forms")
    assert found.tags["svg"] == 1
    assert "The model has none." in found.words("model")
    assert "No score depends on ignored" in found.words("model")
    assert all(row[2:5] == ["not timed", "–", "–"] for row in found.tables["buckets"][0][1:])


def test_compile_prints_which_features_are_not_looked_up(dense):
    result, _ = dense
    console = Console(file=io.StringIO(), width=200)
    show(result, console)
    assert "no score depends on ignored: not looked up\n" in console.file.getvalue()


def test_what_is_missing_is_a_dash(tuned, reused, dense):
    for result, requests in [(tuned, GOLDEN), (reused, GOLDEN), dense]:
        html = render_report(result, requests)
        for word in ("None", "nan", "inf", "Undefined"):
            assert not re.search(rf"\b{word}\b", html)


def test_a_page_loads_and_runs_nothing(tuned):
    html = render_report(tuned, GOLDEN)
    found = Page(html)
    assert "://" not in html
    assert "@import" not in html
    assert not {"script", "link", "img", "iframe", "object", "base", "image"} & found.tags.keys()
    references = [v for _, name, v in found.attributes if name in ("href", "src", "xlink:href", "action")]
    assert references
    assert all(value.startswith("#") for value in references)
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_what_an_author_wrote_can_t_become_markup(tuned):
    evil = "<script>alert('x')</script>\"'><img src=x onerror=y>&lt;"
    spec = copy.copy(tuned.manifest.spec)  # names are checked, so they are changed behind its back
    object.__setattr__(spec, "name", evil)
    manifest = dataclasses.replace(
        tuned.manifest, refusal=evil, provenance={evil: evil, "created": evil}, fingerprint={"jax": evil}
    )
    object.__setattr__(manifest, "spec", spec)
    object.__setattr__(manifest, "unused_features", (evil,))
    analysis = dataclasses.replace(
        tuned.analysis,
        layers=(dataclasses.replace(tuned.analysis.layers[0], name=evil),),
        tables=(dataclasses.replace(tuned.analysis.tables[0], name=evil),),
    )
    source = f"/home/{evil}/m.py:3 (f)"
    notes = tuned.tuning.notes[-1]
    notes = dataclasses.replace(
        notes,
        hoist_reason=evil,
        hoisted=((evil, source),),
        siblings=((2, source), (2, evil)),
        before=tuple(dataclasses.replace(m, source=source, shapes=evil) for m in notes.before),
        expansions=tuple(
            dataclasses.replace(e, source=source, reason=evil, operation=evil)
            for n in tuned.tuning.notes
            for e in n.expansions
        ),
    )
    choices = tuple(
        dataclasses.replace(
            choice,
            reason=evil,
            trials=tuple(dataclasses.replace(trial, refusal=evil) for trial in choice.trials),
        )
        for choice in tuned.tuning.choices
    )
    tuning = dataclasses.replace(
        tuned.tuning,
        choices=choices,
        notes=(notes,) * len(choices),
        precision_note=evil,
    )
    result = dataclasses.replace(
        tuned, manifest=manifest, analysis=analysis, tuning=tuning, note=evil, reused=None
    )
    found = Page(render_report(result, GOLDEN))
    assert not {"script", "img"} & found.tags.keys()
    assert evil in found.words("lead")
    assert (("code", "title", source)) in found.attributes
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]


def test_equal_facts_give_equal_pages_in_any_thread(tuned):
    with ThreadPoolExecutor(4) as pool:
        pages = list(pool.map(lambda _: render_report(tuned, GOLDEN), range(4)))
    assert len(set(pages)) == 1
