import json
import re

import numpy as np
import xarray as xr
from helpers.refusals import refused
from show_samples import HOSTILE, N_EXPERTS, emptied_trace, make_trace
from unpacking import unpack

from mixlens import view
from mixlens.errors import BadInput
from mixlens.live import payload
from mixlens.live.payload import pack
from mixlens.trace.trace import Trace


def test_packed_arrays_come_back():
    arrays = {
        "a": np.arange(7, dtype=np.uint8),
        "b": np.array([[1.5, np.nan]], np.float32),
        "c": np.array([], np.int32),
    }
    header, back = unpack(pack({"text": "שלום 🙂 \udc80"}, arrays))
    assert header["text"].startswith("שלום 🙂")
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


def test_view_carries_what_the_trace_says(trace):
    header, arrays = unpack(view.tokens(trace, [3, 0], layer=2).packed)
    in_view = np.isin(trace.read("sequence"), [0, 3])
    ids = trace.read("expert_id")[in_view]
    np.testing.assert_array_equal(arrays["pair"], (ids[..., 0] * 8 + ids[..., 1]).T)
    shown = np.vectorize("{:.2f}".format)  # as tables of the same numbers have them
    weight, second = trace.read("weight")[in_view], arrays["weight"][0] / 100
    np.testing.assert_array_equal(shown(second), shown(weight[..., 1].T))
    np.testing.assert_array_equal(shown(1 - second), shown(weight[..., 0].T))
    logprob = np.where(arrays["surprise"] == 65535, np.nan, arrays["surprise"] / -100)
    np.testing.assert_array_equal(shown(logprob), shown(trace.read("logprob")[in_view]))
    np.testing.assert_array_equal(arrays["step"].cumsum(), trace.read("position")[in_view])
    assert header["starts"] == [0, 60, 120]
    assert header["layer"] == 2
    texts = [header["pieces"][i] for i in arrays["piece"]]
    assert texts == trace.pieces(trace.read("token_id")[in_view])
    logits = trace.read("router_logits")[in_view].astype(float)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    bits = -(p * np.log2(p)).sum(-1)
    np.testing.assert_allclose(arrays["entropy"] / 31 * np.log2(N_EXPERTS), bits.T, atol=0.5 * 3 / 31 + 1e-3)


def test_one_output_with_a_picture_first(trace):
    html = view.tokens(trace, 1)._repr_html_()
    before_script = html.split("<script>")[0]
    assert re.search(
        r'<img alt="Text of sequence 1, arxiv \(document arxiv-1\) at layer 2 of sample, n = 60 tokens', html
    )
    assert "data:image/png;base64," in before_script
    assert "<figcaption>" in before_script
    assert "<table" in before_script
    assert html.count("<script>") == html.count("</script>") == 1


def test_static_form_has_only_what_a_sanitiser_keeps(trace):
    static = view.tokens(trace, 1).static
    assert not re.search(r"<(style|svg|script|link|iframe)", static)
    assert not re.search(r"\s(on\w+|class|role|aria-\w+)=", static)


def test_hostile_text_is_never_markup(trace):
    page = view.tokens(trace, 0).to_html()
    assert HOSTILE[0].strip("▁") not in page
    assert HOSTILE[2] not in page
    assert page.count("<script>") == page.count("</script>") == 2
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "10,000 characters" in page


def test_page_of_its_own_has_no_address_to_load(trace, tmp_path):
    page = view.tokens(trace, 0).save(tmp_path / "view.html").read_text("utf-8")
    assert not re.findall(r"(?:src|href|action)\s*=\s*[\"']?(?!data:)[a-z]+:", page)
    assert "default-src 'none'" in page


def test_a_trace_with_ids_alone_can_be_seen():
    bare = Trace.from_arrays(np.tile([0, 1], (5, 2, 1)), n_experts=4)
    header, arrays = unpack(view.tokens(bare).packed)
    assert set(arrays) == {"pair", "step", "phase"}
    assert "pieces" not in header


def test_weights_that_do_not_sum_to_one_are_all_kept():
    ids = np.tile([0, 1], (3, 1, 1))
    odd = Trace.from_arrays(ids, n_experts=4, weight=np.full((3, 1, 2), 0.25))
    assert unpack(view.tokens(odd).packed)[1]["weight"].shape == (2, 1, 3)


def test_unknown_sequences_and_layers_are_named(trace):
    with refused(BadInput, "sequence", 77):
        view.tokens(trace, 77)
    with refused(BadInput, "layer", 8):
        view.tokens(trace, 0, layer=8)


def test_ten_thousand_tokens_with_entropy_save_in_one_megabyte():
    long = make_trace(domains=("arxiv",), documents=1, tokens=10_000, layers=32)
    saved = json.dumps({"text/html": view.tokens(long)._repr_html_(), "text/plain": repr(view.tokens(long))})
    assert unpack(view.tokens(long).packed)[1].keys() >= {"pair", "weight", "entropy", "surprise", "token_id"}
    assert len(saved.encode()) < 1_000_000


def test_more_than_two_choices_keep_a_plane_each():
    ids = np.array([[[3, 1, 2]], [[0, 2, 3]]])
    arrays = unpack(view.tokens(Trace.from_arrays(ids, n_experts=4)).packed)[1]
    np.testing.assert_array_equal(arrays["expert"], ids.transpose(2, 1, 0))


def test_a_view_that_would_be_too_large_leaves_weights_out_and_says_so(trace, monkeypatch):
    monkeypatch.setattr(payload, "_MOST_WEIGHTS", 60 * trace.n_layers * 2)
    whole = unpack(view.tokens(trace, [0]).packed)
    header, arrays = unpack(view.tokens(trace, [0, 1]).packed)
    assert "weight" in whole[1]
    assert "left_out" not in whole[0]
    assert arrays.keys() == whole[1].keys() - {"weight"}
    assert header["left_out"] in header["title"]


def contributions_of(trace) -> xr.Dataset:
    rng = np.random.default_rng(1)
    ids = trace.read("expert_id")
    logit = rng.normal(size=ids.shape)
    logit[trace.read("position") == 59] = np.nan
    data = {"logit": logit, "norm": rng.exponential(size=ids.shape), "expert_id": ids}
    coords = {name: ("token", trace.read(name)) for name in ("sequence", "position")}
    dims = ("token", "layer", "slot")
    return xr.Dataset({k: (dims, v) for k, v in data.items()}, {**coords, "layer": trace.layers})


def test_contributions_ride_along_whatever_their_order(trace):
    data = contributions_of(trace)
    shuffled = data.isel(token=np.random.default_rng(2).permutation(data.sizes["token"]))
    header, arrays = unpack(view.tokens(trace, 5, contributions=shuffled).packed)
    mine = trace.read("sequence") == 5
    for name in ("logit", "norm"):
        step = header["steps"][name]
        values = data[name].to_numpy()[mine].transpose(2, 1, 0).clip(-127 * step, 127 * step)
        shown = np.where(arrays[name] == -128, np.nan, arrays[name] * step)
        np.testing.assert_allclose(shown, values, atol=0.501 * step)


def test_contributions_of_other_tokens_are_refused(trace):
    data = contributions_of(trace)
    with refused(BadInput, "contributions", (60, 60)):
        view.tokens(trace, 5, contributions=data.isel(token=slice(0, 120)))
    with refused(BadInput, "contributions", "expert_id"):
        view.tokens(trace, 5, contributions=data.assign(expert_id=(data.expert_id + 1) % 8))


def test_its_plain_form_is_one_short_line(trace):
    assert repr(view.tokens(trace, 0)) == "View: Routing of sequence 0, arxiv (document arxiv-0)"


def test_the_first_sequence_of_a_selection_is_shown_by_default(trace):
    selected = trace.select(where={"domain": "github"}, layers=[1, 3])
    made = view.tokens(selected)
    header, arrays = unpack(made.packed)
    assert made.title == "Routing of sequence 6, github (document github-6)"
    assert header["layers"] == [1, 3]
    np.testing.assert_array_equal(arrays["pair"][1], trace.read("expert_id")[trace.read("sequence") == 6, 3] @ [8, 1])


def test_a_sequence_that_a_selection_left_without_tokens_keeps_its_place():
    """Routing stands under its own document: label i belongs to the tokens from starts[i] to starts[i + 1]."""
    part = emptied_trace()
    header, arrays = unpack(view.tokens(part, [2, 1, 0]).packed)
    assert [name[:10] for name in header["labels"]] == ["sequence 0", "sequence 1", "sequence 2"]
    assert header["starts"] == [0, 3, 3, 6]
    assert arrays["pair"][1].tolist() == [1, 1, 1, 11, 11, 11]
    assert [header["pieces"][i] for i in arrays["piece"]] == ["alpha"] * 3 + ["gamma"] * 3
    assert unpack(view.diff(part, part, [0, 1, 2]).packed)[0]["starts"] == [0, 3, 3, 6]
    nothing = part.select(positions=(50, 60))
    assert unpack(view.tokens(nothing, [0, 1, 2]).packed)[0]["starts"] == [0, 0, 0, 0]
