"""`xlarank plan` reads sizes of requests, from a list or a page of /metrics, and chooses row counts."""

import json

import numpy as np
import pytest
import shop
from flax import nnx
from measured import write_bundle
from prometheus_client import CollectorRegistry

import xlarank
from xlarank.cli import main
from xlarank.cli.sizes import read_sizes
from xlarank.errors import ConfigError
from xlarank.runtime import Engine, Metrics


@pytest.fixture
def bundle_path(tmp_path):
    """1 ms and as many as rows; more where a bucket holds several requests."""
    return write_bundle(
        tmp_path / "models", lambda bucket: {"cpu": (1 + bucket.rows) * (1 + (bucket.requests > 1)) / 1000}
    )


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a command line in a folder of its own; gives its status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = main.main(main.parse(["xlarank", "plan", *map(str, words)]))
        return status, *capsys.readouterr()

    return run


def planned(run, *words):
    """The JSON object, the last and only line of standard output."""
    status, out, err = run(*words, "--json")
    assert status == 0, err
    return json.loads(out)


def sizes_file(tmp_path, text, name="sizes.txt"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def page_of(*series, head="# TYPE xlarank_request_candidates histogram\n"):
    """A page of the histogram: for each (model, version), cumulative counts by edge."""
    lines = [
        f'xlarank_request_candidates_bucket{{le="{edge}",model="{model}",version="{version}"}} {count}\n'
        for model, version, counts in series
        for edge, count in counts.items()
    ]
    return head + "".join(lines)


# Sizes -------------------------------------------------------------------------------------------


def test_a_list_of_sizes_may_have_blank_lines_and_comments(tmp_path):
    text = "# of Monday\n500\n\n  20  \n500 # again\r\n007\n"
    assert read_sizes(sizes_file(tmp_path, text)).counts == {7: 1, 20: 1, 500: 2}


def test_a_page_of_the_server_s_own_metrics_is_read_back_at_upper_edges(tmp_path):
    metrics = Metrics()
    for version, sizes in ((3, (1, 3, 500)), (4, (500, 9, 4096))):
        model = metrics.model("feed", version)
        for size in sizes:
            model.record_accepted(size)
    metrics.model("ads", 1).record_accepted(77)
    (tmp_path / "page.txt").write_bytes(metrics.text())
    read = read_sizes(tmp_path / "page.txt", model="feed")
    assert read.counts == {1: 1, 4: 1, 16: 1, 512: 2, 4096: 1}  # of both versions
    assert read_sizes(tmp_path / "page.txt", model="ads").counts == {96: 1}


def test_a_name_that_has_to_be_quoted_in_a_page_is_read_as_it_is(tmp_path):
    metrics = Metrics(CollectorRegistry())
    metrics.model('odd "name"\n\\', 1).record_accepted(8)
    (tmp_path / "page.txt").write_bytes(metrics.text())
    assert read_sizes(tmp_path / "page.txt", model='odd "name"\n\\').counts == {8: 1}


def test_pages_of_several_servers_one_after_the_other_are_added_up(tmp_path):
    page = page_of(("feed", 1, {8: 1, 16: 4, "+Inf": 4}))
    assert read_sizes(sizes_file(tmp_path, page + page)).counts == {8: 2, 16: 6}


def test_the_series_alone_without_a_page_s_comments_will_do(tmp_path):
    page = page_of(("feed", 1, {"8.0": "1e1", "16.0": 12.0, "+Inf": 12}), head="")
    assert read_sizes(sizes_file(tmp_path, page)).counts == {8: 10, 16: 2}


def test_requests_above_the_last_edge_are_refused_until_told_what_to_count_them_as(tmp_path):
    page = sizes_file(tmp_path, page_of(("feed", 1, {8: 1, 16: 4, "+Inf": 6})))
    with pytest.raises(
        ConfigError,
        match=r"sizes\.txt: model 'feed' version '1': 2 of 6 requests have more than 16 candidates, and a "
        r"page doesn't say how many; count them as N with --largest N, or list",
    ):
        read_sizes(page)
    assert read_sizes(page, largest=40).counts == {8: 1, 16: 3, 40: 2}
    with pytest.raises(ConfigError, match="expected --largest of more than 16, the last edge; got 16"):
        read_sizes(page, largest=16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            r"sizes\.txt: expected one candidate count a line, or a page of /metrics, got no line of either",
        ),
        ("# none\n", r"sizes\.txt: expected one candidate count a line, or a page"),
        (
            "5\n\n0\n",
            r"sizes\.txt:3: expected one candidate count, a whole number in \[1, 2\*\*31\), got '0'",
        ),
        ("5\n-5\n", r"sizes\.txt:2: expected one candidate count, .*, got '-5'"),
        ("5.0\n", r"sizes\.txt:1: .* got '5\.0'"),
        ("5 6\n", r"sizes\.txt:1: .* got '5 6'"),
        ("1_0\n", r"sizes\.txt:1: .* got '1_0'"),
        ("٥\n", r"sizes\.txt:1: .* got '٥'"),
        ("2147483648\n", r"sizes\.txt:1: .* got '2147483648'"),
        ("9" * 5000, r"sizes\.txt:1: .* got '9{80}'$"),
        ("size\n5\n", r"sizes\.txt:1: .* got 'size'"),
    ],
)
def test_a_line_that_is_no_candidate_count_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_sizes(sizes_file(tmp_path, text))


LINE = r"sizes\.txt:2: expected xlarank_request_candidates_bucket\{le=.* COUNT, got "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "# TYPE nv_inference_count counter\nnv_inference_count 5\n",
            r"sizes\.txt: a page of metrics without xlarank_request_candidates_bucket; expected the /metrics",
        ),
        (
            page_of(("feed", 1, {8: 0, "+Inf": 0})),
            r"sizes\.txt: model 'feed' has had no requests; expected a",
        ),
        (
            page_of(("feed", 1, {8: 1, "+Inf": 1}), ("ads", 2, {8: 1, "+Inf": 1})),
            r"sizes\.txt: has requests of the models \['ads', 'feed'\]; expected --model to choose one",
        ),
        (
            page_of(("feed", 1, {8: 4, 16: 3, "+Inf": 4})),
            r"model 'feed' version '1': expected counts that don't fall with the edge le, got \[4, 3, 4\]",
        ),
        (
            page_of(("feed", 1, {8: 4, 16: 4})),
            r"expected edges that end with le=\"\+Inf\", got \['8', '16'\]; is the page whole",
        ),
        (page_of(("feed", 1, {"+Inf": 4})), r"expected edges that end with le=\"\+Inf\", got \['inf'\]"),
        (
            page_of(("feed", 1, {8.5: 4})),
            r":2: expected an edge le of \+Inf or a whole number .*, got '8\.5'",
        ),
        (page_of(("feed", 1, {0: 4})), r":2: expected an edge le of .*, got '0'"),
        (page_of(("feed", 1, {"NaN": 4})), r":2: expected an edge le of .*, got 'NaN'"),
        (page_of(("feed", 1, {8: 4.5})), r":2: expected a whole count >= 0, got 4\.5"),
        (page_of(("feed", 1, {8: -4})), r":2: expected a whole count >= 0, got -4"),
        (page_of(("feed", 1, {8: "NaN"})), r":2: expected a whole count >= 0, got nan"),
        (page_of(("feed", 1, {8: "many"})), LINE),
        (page_of(("feed", 1, {8: ""})), LINE),
        (page_of(("feed", 1, {"x": 4})), LINE),
        ('# TYPE a counter\nxlarank_request_candidates_bucket{le="8"} 4', LINE),
        ("# TYPE a counter\nxlarank_request_candidates_bucket{le=", LINE),
        ("# TYPE a counter\nxlarank_request_candidates_bucket 4", LINE),
    ],
)
def test_a_page_that_can_t_be_read_is_refused_with_the_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_sizes(sizes_file(tmp_path, text))


def test_another_model_s_page_is_refused(tmp_path):
    page = sizes_file(tmp_path, page_of(("feed", 1, {8: 1, "+Inf": 1})))
    with pytest.raises(ConfigError, match=r"expected requests of model 'ads', got those of \['feed'\]"):
        read_sizes(page, model="ads")


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.txt: can't be read: No such file or directory"):
        read_sizes(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"12\xff")
    with pytest.raises(ConfigError, match="binary: expected a text file, got other bytes at 2"):
        read_sizes(tmp_path / "binary")


# The command -------------------------------------------------------------------------------------


def test_the_json_holds_the_plan_and_what_it_buys(run, bundle_path, tmp_path):
    sizes_file(tmp_path, "10\n" * 6 + "30\n" * 3 + "100\n")
    facts = planned(run, bundle_path, "--sizes", "sizes.txt", "--num-buckets", 2)
    # By hand in tests/spec/test_ladder.py: 1 + rows milliseconds.
    assert facts["planned"]["rows"] == [32, 104]
    assert facts["planned"]["seconds_per_request"] == pytest.approx(40.2e-3, rel=1e-12)
    assert facts["planned"]["padding_share"] == 142 / 392
    assert [bucket["share_of_requests"] for bucket in facts["planned"]["buckets"]] == [0.9, 0.1]
    assert [bucket["seconds"] for bucket in facts["planned"]["buckets"]] == pytest.approx([33e-3, 105e-3])
    assert facts["powers_of_two"]["rows"] == [8, 16, 32, 64, 128]
    assert facts["powers_of_two"]["seconds_per_request"] == pytest.approx(33e-3, rel=1e-12)
    assert facts["powers_of_two"]["padding_share"] == 70 / 320
    assert facts["bundle"]["rows"] == [8, 128]
    assert facts["bundle"]["seconds_per_request"] == pytest.approx(129e-3, rel=1e-12)
    assert facts["compile_option"] == "--buckets 32,104"
    assert (facts["model"], facts["version"], facts["device_kind"]) == ("feed", 7, "cpu")
    assert (facts["measured_rows"], facts["max_rows"]) == ([8, 128], 1024)
    assert facts["sizes"] == {"file": "sizes.txt", "requests": 10, "mean": 25.0, "largest": 100}


def test_the_tables_show_it_to_a_person(run, bundle_path, tmp_path):
    sizes_file(tmp_path, "10\n" * 6 + "30\n" * 3 + "100\n")
    # 250 candidates run in 392, 320 and 10 x 128 rows.
    status, out, err = run(bundle_path.parent, "--sizes", "sizes.txt", "--num-buckets", 2)
    assert (status, err) == (0, "")
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0] == "feed version 7 on cpu: 10 requests of 25.0 candidates on average, 100 at most"
    cells = [line.replace("│", " ").split() for line in lines]
    assert ["32", "90.0%", "33.000", "47.9%"] in cells  # 138 of 288 rows
    assert ["104", "10.0%", "105.000", "3.8%"] in cells
    assert lines[-4:] == [
        "planned          40.200 ms a request   36.2% padding  32,104",
        "powers of two    33.000 ms a request   21.9% padding  8,16,32,64,128",
        "this bundle     129.000 ms a request   80.5% padding  8,128",
        "To use it: xlarank compile ... --buckets 32,104",
    ]


def test_splitting_and_times_beyond_the_measured_ones_are_told(run, bundle_path, tmp_path):
    sizes_file(tmp_path, "200\n5000\n")
    _, out, _ = run(bundle_path, "--sizes", "sizes.txt")
    assert "Requests of more than 1024 candidates are split.\n" in out
    assert "Times of more than 128 rows, the most that were measured, are extrapolated.\n" in out
    facts = planned(run, bundle_path, "--sizes", "sizes.txt", "--max-rows", 64, "--num-buckets", 1)
    assert (facts["max_rows"], facts["planned"]["rows"]) == (64, [64])
    # 200 are 3 x 64 and 8, 5000 are 78 x 64 and 8: 4 and 79 runs of 65 ms.
    assert facts["planned"]["seconds_per_request"] == pytest.approx(83 * 65e-3 / 2, rel=1e-12)


def test_a_page_is_read_for_the_bundle_s_own_model_unless_another_is_named(run, bundle_path, tmp_path):
    page = page_of(("feed", 1, {8: 1, 64: 1, "+Inf": 1}), ("ads", 2, {8: 0, 64: 1, "+Inf": 2}))
    sizes_file(tmp_path, page)
    assert planned(run, bundle_path, "--sizes", "sizes.txt")["planned"]["rows"] == [8]
    words = ("--sizes", "sizes.txt", "--model", "ads", "--largest", 90)
    assert planned(run, bundle_path, *words)["planned"]["rows"] == [64, 96]


def test_one_of_several_device_kinds_is_chosen(run, tmp_path):
    # On the GPU every size takes the same, so one bucket is enough.
    path = write_bundle(tmp_path / "models", lambda bucket: {"cpu": bucket.rows / 1000, "gpu": 1e-4})
    sizes_file(tmp_path, "8\n100\n")
    status, out, err = run(path, "--sizes", "sizes.txt")
    assert (status, out) == (1, "")
    assert err == (
        f"xlarank plan: {path}: has times of the device kinds ['cpu', 'gpu']; choose one with --device-kind\n"
    )
    for kind, rows in {"cpu": [8, 104], "gpu": [104]}.items():
        facts = planned(run, path, "--sizes", "sizes.txt", "--device-kind", kind)
        assert (facts["device_kind"], facts["planned"]["rows"]) == (kind, rows)
    _, _, err = run(path, "--sizes", "sizes.txt", "--device-kind", "tpu")
    assert err == f"xlarank plan: {path}: expected --device-kind of ['cpu', 'gpu'], got 'tpu'\n"


@pytest.mark.parametrize(
    ("words", "told"),
    {
        "none --sizes sizes.txt": "none: expected the folder of a bundle or of a model, found nothing",
        "models/feed --sizes none.txt": "none.txt: can't be read: No such file or directory",
        "models/feed --sizes bad.txt": "bad.txt:2: expected one candidate count, a whole number in "
        "[1, 2**31), got 'x'",
        "models/feed --sizes ads.txt": "ads.txt: expected requests of model 'feed', got those of ['ads']",
        "models/feed --sizes sizes.txt --num-buckets 0": "ladder plan: num_buckets must be an integer in "
        "[1, 2**31); was 0",
        "models/feed --sizes sizes.txt --max-rows -8": "ladder plan: max_rows must be an integer in "
        "[1, 2**31); was -8",
    }.items(),
)
def test_a_mistake_ends_with_1_and_one_line(run, bundle_path, tmp_path, words, told):
    sizes_file(tmp_path, "8\n")
    sizes_file(tmp_path, "8\nx\n", "bad.txt")
    sizes_file(tmp_path, page_of(("ads", 1, {8: 1, "+Inf": 1})), "ads.txt")
    assert run(*words.split()) == (1, "", f"xlarank plan: {told}\n")


def test_help_has_an_example_that_parses(capsys):
    with pytest.raises(SystemExit) as ended:
        main.parse(["xlarank", "plan", "--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    (example,) = [line.split() for line in lines if line.startswith("  xlarank plan ")]
    args = main.parse(example)
    assert (args.command, args.num_buckets, str(args.sizes)) == ("plan", 4, "page.txt")


@pytest.mark.once
def test_from_traffic_to_a_plan_for_the_bundle_that_served_it(run, tmp_path):
    tables = shop.make_tables()
    path = xlarank.build_bundle(
        shop.Shop(rngs=nnx.Rngs(0)), shop.SPEC, tables, out=tmp_path, buckets=[8], tune_seconds=0
    )
    metrics = Metrics()
    with Engine.load(path, metrics=metrics) as engine:
        for size in (1, 20, 20, 64, 100, 0):  # 0 is answered and runs nowhere
            items = np.zeros(size, np.int64)
            features = {
                "age": 1.0,
                "item": items,
                "tags": [[]] * size,
                "price": np.ones((size, 2), np.float32),
            }
            engine.score(engine.request(features))
    (tmp_path / "page.txt").write_bytes(metrics.text())
    facts = planned(run, path, "--sizes", "page.txt", "--num-buckets", 3)
    mean = (1 + 24 + 24 + 64 + 128) / 5  # by upper edges
    assert facts["sizes"] == {"file": "page.txt", "requests": 5, "mean": mean, "largest": 128}
    assert facts["planned"]["rows"][-1] == 128


def test_sizes_below_the_fewest_measured_rows_are_warned_of(run, tmp_path):
    path = write_bundle(tmp_path / "large", lambda bucket: {"cpu": 0.001}, rows=(32, 128))
    some, none = sizes_file(tmp_path, "3\n31\n32\n100\n"), sizes_file(tmp_path, "32\n100\n", "none.txt")
    _, out, _ = run(path, "--sizes", some)
    assert (
        "Warning: 50.0% of the requests have fewer than 32 candidates, the fewest rows that were measured"
        in out
    )
    assert "Compile with --buckets 8,32,128 first, or with --buckets auto." in out
    assert planned(run, path, "--sizes", some)["share_below_measured"] == 0.5
    assert "Warning" not in run(path, "--sizes", none)[1]


def test_a_bundle_measured_at_8_rows_is_planned_by_without_a_warning(run, bundle_path, tmp_path):
    assert "Warning" not in run(bundle_path, "--sizes", sizes_file(tmp_path, "1\n3\n"))[1]
