"""What `xlarank compile --explain` says of a bucket."""

import dataclasses
import inspect
import io
import json
import types

import jax
import jax.numpy as jnp
from foreign import random_params, two_tasks
from pass_cases import case_from, hoisted_of, plain_of
from rich.console import Console

from xlarank.cli.compile_output import explain
from xlarank.compiler.result import PassNotes


def _recurrent(params, features):
    item = jnp.concatenate([features["item"], features["price"]], axis=1) @ params["in"]

    def step(state, _):
        return jnp.tanh(state @ params["loop"]), None  # in a scan

    state, _ = jax.lax.scan(step, item, None, length=3)
    return two_tasks(jnp.tanh(state) @ params["out"] + features["user"][:, :2])  # the last layer


def line(text):
    lines, first = inspect.getsourcelines(_recurrent)
    (number,) = [first + i for i, found in enumerate(lines) if text in found]
    return f"test_explain.py:{number} "


def explained(case, *, rows=8, requests=2):
    plain = plain_of(case, rows, requests)
    notes = PassNotes.of(hoisted_of(case, rows, requests), plain, plain)
    assert PassNotes.from_dict(_as_json(notes)) == notes
    found = types.SimpleNamespace(bucket=plain.bucket)
    out = io.StringIO()
    result = types.SimpleNamespace(by_bucket=[(found, None, notes)])
    explain(result, Console(file=out, width=300))
    return out.getvalue()


def _as_json(notes):
    return json.loads(json.dumps(dataclasses.asdict(notes)))


def test_why_matmuls_are_neither_merged_nor_lowered():
    case = case_from(_recurrent, random_params(0, **{"in": (6, 4), "loop": (4, 4), "out": (4, 2)}))
    text = explained(case)
    inside = [row for row in text.splitlines() if row.startswith("inside a scan, while or cond")]
    assert len(inside) == 1
    assert line("# in a scan") in inside[0]
    kept = [row for row in text.splitlines() if row.startswith("lower_precision leaves in float32")]
    assert any(line("# the last layer") in row for row in kept)
    assert "fuse_experts does not apply" in text


def test_each_repeated_context_value_is_told_with_its_shape_bytes_reason_and_line():
    text = explained(case_from(_recurrent, random_params(0, **{"in": (6, 4), "loop": (4, 4), "out": (4, 2)})))
    assert (
        "hoist_context does not apply: nothing is computed from context features alone before add at " in text
    )
    (row,) = [row for row in text.splitlines() if row.startswith("│ ")]
    operation, shape, num_bytes, why, at = (cell.strip() for cell in row.strip("│").split("│"))
    assert (operation, shape, num_bytes) == ("add", "[8, 2]", f"{8 * 2 * 4}")
    assert why == "add reads the context and the candidate together"
    assert line("# the last layer") in at


def test_a_model_of_one_layer_has_nothing_to_lower():
    def one_layer(params, features):
        return two_tasks(features["item"] @ params["w"])

    text = explained(case_from(one_layer, random_params(0, w=(4, 2))))
    assert "lower_precision does not apply: no matmul with weights but those that the scores feel" in text
