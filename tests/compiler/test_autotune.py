"""The search over forms: a fake bench with times of its own and a fake clock."""

import itertools

import pytest

from xlarank.compiler.autotune import Choice, choose, tune, worthwhile
from xlarank.compiler.forms import PLAIN, Form
from xlarank.compiler.passes import Fusion
from xlarank.spec import Bucket, BucketLadder, Precision

HOISTED = Form(hoisted=True)
WIDE = Form(fusion=Fusion.WIDE)
HOISTED_WIDE = Form(hoisted=True, fusion=Fusion.WIDE)
HALF = (Precision.BFLOAT16, Precision.INT8)
LADDER = BucketLadder.of_rows((8, 64, 512)).buckets
ALL_FORMS = [Form(h, f, p) for h, f, p in itertools.product((False, True), Fusion, Precision)]


class FakeBench:
    """Forms take the milliseconds that `time_of` says; a compile takes `compile_seconds` of the fake
    clock."""

    def __init__(self, time_of, *, forms=ALL_FORMS, compile_seconds=0.0, refused=(), new_bytes=None):
        self.time_of = time_of
        self.forms = set(forms)
        self.compile_seconds = compile_seconds
        self.refused = set(refused)
        self.sizes = new_bytes or {}
        self.now = 0.0
        self.compiled = []
        self.released = []
        self.decided = {}

    def clock(self):
        return self.now

    def has(self, bucket, form):
        if form not in self.forms:
            return False
        if (bucket, form) not in self.compiled:
            self.compiled.append((bucket, form))
            self.now += self.compile_seconds
        return True

    def times(self, bucket, forms):
        return {form: [self.time_of(bucket, form)] * 5 for form in forms}

    def new_bytes(self, bucket, form):
        return self.sizes.get(form, 0)

    def refusal(self, bucket, form):
        return "its scores are off" if form in self.refused else ""

    def release(self, bucket, kept):
        self.released.append((bucket, kept))

    def decide(self, bucket, form):
        self.decided[bucket] = form


def run(bench, *, buckets=LADDER, precisions=(), named=False, seconds=1e9, **options):
    return tune(
        buckets,
        bench,
        precisions=precisions,
        is_precision_named=named,
        seconds=seconds,
        clock=bench.clock,
        **options,
    )


def forms_of(choices):
    return [choice.form for choice in choices]


def test_the_fastest_form_of_every_bucket_is_found_and_told():
    best = dict(
        zip(LADDER, itertools.cycle([HOISTED_WIDE, PLAIN, Form(True, Fusion.EXPERT_MAJOR)]), strict=False)
    )
    bench = FakeBench(lambda bucket, form: 1.0 if form == best[bucket] else 2.0 + form.complexity[1] / 10)
    choices = run(bench)
    assert [choice.bucket for choice in choices] == list(LADDER)
    assert forms_of(choices) == list(best.values())
    assert bench.decided == best
    assert all(choice.reason == "fastest" for choice in choices)


def test_what_is_tried_and_how_many_buckets_are_done_is_told_as_it_goes():
    told = []
    run(FakeBench(lambda *_: 1.0), precisions=HALF, on_progress=lambda *said: told.append(said))
    texts = [text for text, _, _ in told]
    for stage in ("structure", "merging", "precision", "choice"):
        steps = [(text, done, total) for text, done, total in told if text.startswith(f"{stage} of ")]
        assert {text for text, _, _ in steps} == {f"{stage} of {bucket}" for bucket in LADDER}
        assert [(done, total) for _, done, total in steps] == [(n, len(LADDER)) for n in range(len(LADDER))]
    assert texts.index("structure of 8x1") < texts.index("merging of 8x1") < texts.index("choice of 8x1")


def test_with_time_to_spare_every_combination_in_float32_is_tried():
    bench = FakeBench(lambda bucket, form: 1.0)
    (choice,) = run(bench, buckets=[Bucket(64, 1)])
    assert {trial.form for trial in choice.trials} == {Form(h, f) for h in (False, True) for f in Fusion}


@pytest.mark.parametrize("slower", [1.0, 1.015])
def test_a_tie_goes_to_the_simpler_form(slower):
    times = {PLAIN: slower, HOISTED: 1.0, WIDE: 1.0, HOISTED_WIDE: 1.0}
    (choice,) = run(FakeBench(lambda _, form: times.get(form, 9.0)), buckets=[Bucket(64, 1)])
    assert choice.form == PLAIN
    assert choice.reason == (
        "fastest" if slower == 1.0 else "as fast as the fastest, and simpler or prepared already"
    )


def test_a_tie_goes_to_arrays_already_prepared_before_it_goes_to_the_simpler_form():
    samples = {PLAIN: [1.0] * 5, HOISTED: [1.0] * 5, WIDE: [1.5] * 5}
    assert choose(samples, {PLAIN: 64, HOISTED: 0, WIDE: 0}) == [HOISTED, PLAIN, WIDE]
    assert choose(samples, {PLAIN: 64, HOISTED: 64, WIDE: 0}) == [PLAIN, HOISTED, WIDE]


def test_the_spread_decides_what_a_tie_is():
    calm = {HOISTED: [1.0] * 5, PLAIN: [1.04] * 5}
    noisy = {HOISTED: [1.0] * 5, PLAIN: [0.9, 1.2, 1.04, 0.8, 1.3]}
    slow = {HOISTED: [1.0] * 5, PLAIN: [0.9, 1.3, 1.1, 0.8, 1.4]}
    none = {HOISTED: 0, PLAIN: 0}
    assert choose(calm, none)[0] == HOISTED
    assert choose(noisy, none)[0] == PLAIN
    assert choose(slow, none)[0] == HOISTED, "no noise makes a tenth a tie"


def test_neighbours_in_time_are_compared_so_that_a_slow_spell_decides_nothing():
    spell = [1, 1, 5, 5, 5]  # the machine was busy for three rounds
    samples = {PLAIN: [1.2 * s for s in spell], HOISTED: [1.0 * s for s in spell]}
    assert choose(samples, {PLAIN: 0, HOISTED: 0}) == [HOISTED, PLAIN]


def test_the_same_timings_give_the_same_choices():
    def time_of(bucket, form):
        return 1.0 + (hash((str(bucket), str(form), form.precision.value)) % 97) / 100

    first, second = (run(FakeBench(time_of), precisions=HALF) for _ in range(2))
    assert first == second


def test_a_faster_form_whose_scores_may_not_be_served_is_passed_over_with_its_reason():
    lowered = Form(hoisted=True, precision=Precision.INT8)
    bench = FakeBench(
        lambda _, form: {lowered: 1.0, HOISTED: 3.0}.get(form, 4.0),
        refused=[Form(h, f, Precision.INT8) for h in (False, True) for f in Fusion],
    )
    (choice,) = run(bench, buckets=[Bucket(64, 1)], precisions=HALF)
    assert choice.form == HOISTED
    assert choice.reason == "fastest whose scores may be served"
    assert [trial.refusal for trial in choice.trials if trial.form == lowered] == ["its scores are off"]


def test_a_hoisted_form_whose_sums_are_off_is_tried_with_whole_reductions():
    whole = Form(hoisted=True, whole_reductions=True)
    bench = FakeBench(
        lambda _, form: 1.0 if form.hoisted else 2.0, forms=[PLAIN, HOISTED, whole], refused=[HOISTED]
    )
    (choice,) = run(bench, buckets=[Bucket(64, 1)])
    assert choice.form == whole


def test_nothing_lower_is_tried_unless_it_is_allowed():
    bench = FakeBench(lambda _, form: 1.0)
    run(bench)
    assert {form.precision for _, form in bench.compiled} == {Precision.FLOAT32}


def test_a_precision_asked_for_is_taken_even_where_it_is_slower_or_off():
    refused = [form for form in ALL_FORMS if form.precision is Precision.INT8]
    bench = FakeBench(lambda _, form: 9.0 if form.precision is Precision.INT8 else 1.0, refused=refused)
    choices = run(bench, precisions=[Precision.INT8], named=True)
    assert {form.precision for form in forms_of(choices)} == {Precision.INT8}


def test_a_precision_asked_for_that_applies_nowhere_leaves_float32():
    bench = FakeBench(lambda _, form: 1.0, forms=[PLAIN, HOISTED])
    choices = run(bench, precisions=[Precision.INT8], named=True, buckets=[Bucket(8, 1)])
    assert forms_of(choices) == [PLAIN]


def test_when_the_time_is_up_the_rest_take_the_form_of_the_nearest_bucket_of_their_sort():
    def time_of(bucket, form):
        if bucket.requests == 1:
            return {HOISTED: 1.5, HOISTED_WIDE: 1.0}.get(form, 2.0)
        return 1.0 if form == PLAIN else 2.0

    bench = FakeBench(time_of, compile_seconds=1.0)
    choices = {choice.bucket: choice for choice in run(bench, seconds=7.0)}
    tuned = {bucket for bucket, choice in choices.items() if choice.trials}
    # The largest and the smallest of a sort come before what lies between.
    assert {Bucket(512, 1), Bucket(512, 512), Bucket(8, 1)} <= tuned < set(LADDER)
    for bucket, choice in choices.items():
        assert choice.form == (HOISTED if bucket.requests == 1 else PLAIN)
        if bucket not in tuned:
            assert choice.reason.startswith("as bucket ")
    assert bench.now <= 7.0 + 1.0 + len(set(LADDER) - tuned)  # then one compile a bucket that is left


def test_every_bucket_gets_its_structure_before_any_gets_more():
    bench = FakeBench(lambda *_: 1.0, compile_seconds=1.0)
    run(bench, seconds=2.0 * len(LADDER))
    assert set(bench.compiled) == {(bucket, form) for bucket in LADDER for form in (PLAIN, HOISTED)}
    assert {bucket for bucket, _ in bench.released} == set(LADDER), "losers hold no memory"


def test_of_a_precision_asked_for_a_form_that_holds_goes_before_a_faster_one_that_does_not():
    fast, held = (Form(h, precision=Precision.INT8) for h in (True, False))
    bench = FakeBench(
        lambda _, form: {fast: 1.0, held: 2.0}.get(form, 1.5),
        forms=[PLAIN, HOISTED, fast, held],
        refused=[fast],
    )
    (choice,) = run(bench, precisions=[Precision.INT8], named=True, buckets=[Bucket(64, 1)])
    assert choice.form == held


def test_no_time_at_all_takes_the_hoisted_form_where_it_applies_untried():
    bench = FakeBench(lambda *_: 1.0, forms=[PLAIN, HOISTED])
    choices = run(bench, seconds=0.0)
    assert forms_of(choices) == [HOISTED] * len(LADDER)
    assert all(choice.trials == () and choice.reason == "not tuned" for choice in choices)
    bench = FakeBench(lambda *_: 1.0, forms=[PLAIN, HOISTED], refused=[HOISTED])
    assert forms_of(run(bench, seconds=0.0)) == [PLAIN] * len(LADDER)


def test_a_choice_reads_back_equal_from_json_values():
    bench = FakeBench(lambda _, form: 1.0 + form.complexity[0], refused=[HOISTED])
    for choice in run(bench, precisions=HALF):
        assert Choice.from_dict(choice.to_dict()) == choice


def test_a_bucket_is_dropped_where_the_next_one_of_its_rows_is_as_fast():
    b1, b2, b64, small = Bucket(64, 1), Bucket(64, 2), Bucket(64, 64), Bucket(8, 8)
    everything = [small, b1, b2, b64]
    assert worthwhile({small: 1.0, b1: 1.0, b2: 2.0, b64: 3.0}, 0, 1.0) == everything
    assert worthwhile({small: 1.0, b1: 3.0, b2: 2.0, b64: 3.0}, 0, 1.0) == [small, b2, b64]
    assert worthwhile({small: 1.0, b1: 3.0, b2: 3.0, b64: 3.0}, 0, 1.0) == [small, b64]
    assert worthwhile({small: 1.0, b1: 2.0, b2: 9.0, b64: 3.0}, 0, 1.0) == [small, b1, b64]


def test_contexts_that_pad_a_batch_cost_the_host_time():
    times = {Bucket(64, 1): 1.0, Bucket(64, 64): 1.0}
    assert worthwhile(times, 0, 1.0) == [Bucket(64, 64)]
    assert worthwhile(times, bytes_a_context=10, host_bandwidth=63.0) == list(times)  # 63 contexts: 10 s
